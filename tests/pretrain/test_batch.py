"""What flows through a step: stacking, joining, and pixels on a device."""

from __future__ import annotations

import pytest
import torch

from pretrain import Batch, Pairs, View
from pretrain.batch import collate, join, join_pairs


def sample(number: int) -> dict[str, object]:
    return {"image": torch.full((3, 2, 2), number, dtype=torch.uint8), "age": number, "note": "text"}


def views(number: int) -> list[View]:
    image = torch.full((3, 2, 2), number, dtype=torch.uint8)
    return [View(image, torch.full((4,), float(number))), View(torch.full((5,), number), kind="text")]


def test_views_are_stacked_and_numbers_of_samples_travel_along():
    batch = collate([views(0), views(255)], [sample(0), sample(255)], [7, 9])
    assert len(batch) == 2
    assert batch.index.tolist() == [7, 9]
    assert batch.views[0].data.shape == (2, 3, 2, 2)
    assert batch.views[0].box is not None
    assert batch.views[0].box.tolist() == [[0.0] * 4, [255.0] * 4]
    assert {name: value.tolist() for name, value in batch.extra.items()} == {"age": [0, 255]}


def test_on_a_device_eight_bit_images_are_in_0_1_and_other_kinds_as_they_were():
    batch = collate([views(0), views(255)], [sample(0), sample(255)], [7, 9]).to(torch.device("cpu"), torch.float64)
    assert batch.views[0].data.dtype == torch.float64
    assert batch.views[0].data.unique().tolist() == [0.0, 1.0]
    assert batch.views[1].data.dtype == torch.long


def test_boxes_are_given_for_all_samples_or_for_none():
    with pytest.raises(ValueError, match="a box for some"):
        collate([[View(torch.zeros(1), torch.zeros(4))], [View(torch.zeros(1))]], [{}, {}], [0, 1])


def test_joined_batches_and_pairs_are_those_of_one_batch():
    parts = [collate([views(i)], [sample(i)], [i]) for i in range(3)]
    whole = collate([views(i) for i in range(3)], [sample(i) for i in range(3)], [0, 1, 2])
    joined = join(parts)
    assert torch.equal(joined.views[0].data, whole.views[0].data)
    assert torch.equal(joined.index, whole.index)
    assert joined.views[1].box is None
    rows = torch.arange(6.0).view(3, 2)
    made = join_pairs([[Pairs(r[None], -r[None], torch.tensor([i]), r[None])] for i, r in enumerate(rows)])
    assert len(made) == 1
    assert torch.equal(made[0].query, rows)
    assert torch.equal(made[0].key, -rows)
    assert made[0].source.tolist() == [0, 1, 2]


def test_detached_pairs_carry_no_gradient():
    rows = torch.ones(2, 2, requires_grad=True) * 1
    found = Pairs(rows, rows, torch.arange(2), rows).detach()
    assert not any(t.requires_grad for t in (found.query, found.key, found.mate))


def test_a_batch_maps_every_tensor():
    batch = Batch((View(torch.ones(1), torch.ones(1, 4)),), torch.ones(1), {"age": torch.ones(1)})
    doubled = batch.map(lambda t: 2 * t)
    assert float(doubled.views[0].box.sum() + doubled.views[0].data + doubled.index + doubled.extra["age"]) == 14
