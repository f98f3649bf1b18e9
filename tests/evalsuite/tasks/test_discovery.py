"""The discovery task: masks and properties of encoders whose worth is known, and what it promises and refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features, build
from evalsuite.errors import BackboneError, UsageError
from evalsuite.hooks import load
from evalsuite.progress import Progress
from evalsuite.task import Outcome, Protocol, Setup, evaluate
from evalsuite.tasks.discovery import KINDS, ObjectDiscovery, _clusters, _connected, _costs, _matched
from evalsuite.testing import check_task
from evalsuite.worlds import World, rules

REGISTRY = load().registry
SMOKE = ObjectDiscovery().protocol("smoke")


class _Halves(nn.Module):
    """Two slots: the left and the right half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Features:
        masks = torch.zeros(len(x), 2, 4, 4)
        masks[:, 0, :, :2] = masks[:, 1, :, 2:] = 1
        return Features(tokens=torch.zeros(len(x), 2, self.width), masks=masks)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Features:
        return Features(pooled=x.mean(dim=(2, 3)))


def backbone(net: nn.Module, *gives: str) -> Backbone:
    return Backbone(net, BackboneSpec("test:net", 3, {}, frozenset(gives), image_size=(64, 64)))


def measure(encoder: Backbone, work: Path, protocol: Protocol = SMOKE, **named: object) -> Outcome:
    work.mkdir(exist_ok=True)
    setup = Setup(protocol=protocol, work=work, registry=REGISTRY, progress=Progress(quiet=True), **named)
    return evaluate(ObjectDiscovery(), encoder, setup)


def test_it_owes_what_every_task_owes():
    check_task(ObjectDiscovery, protocol="smoke")


def test_an_encoder_that_takes_images_apart_is_found_out(tmp_path: Path):
    protocol = dataclasses.replace(SMOKE, train_images=160, test_images=32, epochs=20, batch_size=32, lr=3e-3)
    seeing = measure(ObjectDiscovery().oracle(), tmp_path / "a", protocol)
    blind = measure(backbone(_Halves(8), "tokens", "masks"), tmp_path / "b", protocol)
    assert seeing.scores["fg_ari"] > 0.85
    assert seeing.scores["colour"] > 0.6
    assert blind.scores["fg_ari"] < 0.5
    assert blind.scores["properties"] < 0.2
    assert seeing.scores["fg_ari"] == pytest.approx(
        seeing.details["fg_ari_without_encoder"]["parts of one colour"], abs=0.05
    )
    assert 0.3 < seeing.details["fg_ari_without_encoder"]["k-means on colours"] < 0.8


def test_scores_have_samples_replicates_and_a_picture(tmp_path: Path):
    found = measure(backbone(_Halves(8), "tokens", "masks"), tmp_path, limit=20)
    assert set(found.scores) == {"fg_ari", "ari", "properties", "colour", "shape", "scale", "position"}
    assert set(found.samples) == set(found.scores) - {"position"}
    assert set(found.replicates) == set(found.scores)
    assert len(found.ids) == 20
    assert found.replicates["position"].shape == (1000,)
    assert abs(found.replicates["position"].mean() - found.scores["position"]) < 0.2
    with Image.open(found.figures["masks"]) as picture:
        assert picture.format == "PNG"
        assert picture.width > 4 * 300


def test_fg_ari_is_that_of_the_pixels_of_objects_alone(tmp_path: Path):
    found = measure(backbone(_Halves(8), "tokens", "masks"), tmp_path, limit=8)
    expected, world = [], World(rules("random-objects"))
    from evalsuite.training import mix_seed

    rng = np.random.default_rng(mix_seed(0, 1))
    halves = np.repeat([[0] * 32 + [1] * 32], 64, axis=0)
    for _ in range(8):
        world.reset(rng)
        truth = world.segments()
        expected.append(adjusted_rand_score(truth[truth >= 0], halves[truth >= 0]))
    assert found.samples["fg_ari"].tolist() == pytest.approx(expected)


def test_without_masks_it_is_refused_with_the_protocol_that_needs_none(tmp_path: Path):
    with pytest.raises(BackboneError, match="needs masks") as refused:
        measure(backbone(_Mean(), "pooled"), tmp_path, ObjectDiscovery().protocol())
    assert "--protocol properties" in refused.value.fix
    protocol = dataclasses.replace(ObjectDiscovery().protocol("properties"), train_images=96, test_images=32, epochs=2)
    found = measure(backbone(_Mean(), "pooled"), tmp_path, protocol)
    assert set(found.scores) == {"properties", "colour", "shape", "scale", "position"}
    assert ObjectDiscovery().leading(protocol) == "properties"
    assert found.details["vectors"] == [1, 3]
    assert not found.figures


def test_the_ground_truth_is_the_ceiling_of_properties(tmp_path: Path):
    protocol = dataclasses.replace(
        ObjectDiscovery().protocol("properties"), train_images=160, test_images=32, epochs=25, batch_size=32, lr=3e-3
    )
    truth = measure(build("objects:state", REGISTRY), tmp_path / "a", protocol)
    mean = measure(backbone(_Mean(), "pooled"), tmp_path / "b", protocol)
    assert truth.scores["properties"] > 0.7
    assert truth.scores["position"] > 0.7
    assert mean.scores["properties"] < 0.35


@pytest.mark.parametrize("reads", ["tokens", "pooled"])
def test_what_is_to_be_read_is_required(reads: str):
    protocol = dataclasses.replace(SMOKE, reads=reads)
    assert ObjectDiscovery().requires(protocol) == {reads, "masks"}


def test_all_seeds_are_tested_on_the_same_frames_and_variants_are_other_data(tmp_path: Path):
    encoder = backbone(_Halves(8), "tokens", "masks")
    one, two = (measure(encoder, tmp_path / str(seed), limit=8, seed=seed) for seed in (0, 1))
    assert one.samples["fg_ari"].tolist() == two.samples["fg_ari"].tolist()
    other = measure(encoder, tmp_path / "v", dataclasses.replace(SMOKE, variant="objects-1-9"), limit=8)
    assert other.data["fingerprint"] != one.data["fingerprint"]
    with pytest.raises(UsageError, match="has no variant"):
        measure(encoder, tmp_path / "w", dataclasses.replace(SMOKE, variant="nothing"))


# Pieces ------------------------------------------------------------------------------------------------------


def test_a_cost_is_plain_cross_entropies_and_the_mean_squared_error():
    told = torch.randn(2, 3, sum(KINDS) + 2)
    kinds = torch.stack([torch.randint(count, (2, 4)) for count in KINDS], dim=2)
    places = torch.rand(2, 4, 2)
    costs = _costs(told, kinds, places)
    assert costs.shape == (2, 4, 3)
    colour, shape, scale, found = told.split((*KINDS, 2), dim=2)
    for image, row, place in ((0, 0, 0), (1, 3, 2), (0, 2, 1)):
        logits = [part[image, place][None] for part in (colour, shape, scale)]
        expected = sum(F.cross_entropy(part, kinds[image, row, n][None]) for n, part in enumerate(logits))
        expected = expected + F.mse_loss(found[image, place], places[image, row])
        torch.testing.assert_close(costs[image, row, place], expected)


def test_only_objects_that_are_there_are_matched_and_as_many_as_there_are_vectors():
    costs = torch.tensor([[[0.0, 5.0], [9.0, 0.0], [1.0, 1.0]]])
    ((rows, sets),) = _matched(costs, torch.tensor([[True, True, False]]))
    assert (rows.tolist(), sets.tolist()) == ([0, 1], [0, 1])
    ((rows, sets),) = _matched(costs, torch.tensor([[False, True, True]]))
    assert sorted(zip(rows.tolist(), sets.tolist(), strict=True)) == [(1, 1), (2, 0)]
    ((rows, sets),) = _matched(costs[:, :, :1], torch.tensor([[True, True, True]]))
    assert (rows.tolist(), sets.tolist()) == ([0], [0])


def picture() -> np.ndarray:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:2, :2] = image[6:, 6:] = (0, 0, 255)
    image[:2, 6:] = (255, 255, 0)
    return image


def test_clusters_of_colours_do_not_tell_two_things_of_one_colour_apart():
    labels = _clusters(picture(), 5)  # more than there are colours
    assert len(np.unique(labels)) == 3
    assert labels[0, 0] == labels[7, 7] != labels[0, 7]


def test_parts_that_hang_together_do():
    labels = _connected(picture(), ("blue", "yellow"))
    assert labels[4, 4] == 0
    assert len({0, labels[0, 0], labels[7, 7], labels[0, 7]}) == 4
