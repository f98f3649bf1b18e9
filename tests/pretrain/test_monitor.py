"""The signs of collapse, neighbours, and the journal."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evalsuite import Backbone, BackboneSpec, DataError, Features
from evalsuite.progress import Progress
from pretrain import Arrays, Files
from pretrain.monitor import Journal, collapsed, health, knn_accuracy, last_collapse, plot
from pretrain.testing import tiny_backbone, tiny_corpus


def test_health_of_known_sets():
    apart = health(torch.eye(8).repeat(4, 1))
    assert apart["spread"] == pytest.approx(1, abs=1e-5)
    assert apart["effective_rank"] == pytest.approx(7, abs=1e-3)
    point = health(torch.ones(8, 5))
    assert point["spread"] == pytest.approx(0, abs=1e-3)
    assert health(torch.randn(32, 1) * torch.randn(1, 6))["effective_rank"] == pytest.approx(1, abs=1e-3)
    cloud = health(torch.randn(500, 10, generator=torch.Generator().manual_seed(0)))
    assert cloud["spread"] > 0.98
    assert 9.5 < cloud["effective_rank"] <= 10
    corner = health(torch.tensor([[1.0, 0, 0], [0.5, 0.75**0.5, 0], [0.5, 0, 0.75**0.5]]))
    assert corner["spread"] == pytest.approx(0.5**0.5, abs=1e-5)  # cosines of 1/2, 1/2 and 1/4


def test_a_few_far_rows_do_not_hide_a_point():
    """What batch normalisation makes of a head's collapse: mean 0 and deviation 1 in each channel none the less."""
    rows = torch.ones(64, 8) + 1e-3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    rows[:3] += 100 * torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    normed = torch.nn.functional.batch_norm(rows, None, None, training=True)
    assert normed.mean(0).abs().max() < 1e-5
    assert health(normed)["spread"] < 0.1


def test_health_does_not_depend_on_scale_or_order():
    rows = torch.randn(40, 6)
    assert health(rows) == pytest.approx(health(7 * rows.flip(0)), abs=1e-4)


def entry(spread: float, rank: float) -> dict[str, float]:
    return {"spread": spread, "effective_rank": rank}


def test_collapse_needs_three_signs_in_a_row():
    assert collapsed([entry(0.001, 5)] * 2) == ""
    assert collapsed([entry(0.001, 5)] * 3).startswith("all images look alike")
    assert collapsed([entry(0.001, 5)] * 3 + [entry(0.5, 5)]) == ""
    assert collapsed([entry(0.9, 1.1), {"knn": 0.1}, entry(0.9, 1.2), entry(0.9, 1.0)]).startswith(
        "images differ in one"
    )


def test_a_fall_is_measured_against_the_run_itself():
    rising = [entry(s, 20) for s in (0.24, 0.25, 0.27, 0.5, 0.7)]
    assert all(collapsed(rising[:end]) == "" for end in range(6))
    falling = [entry(s, 40) for s in (0.95, 0.6, 0.28, 0.25, 0.2)]
    assert collapsed(falling[:4]) == ""
    assert collapsed(falling) == "all images look alike (spread 0.2, once 0.95)"


def test_a_collapse_is_remembered_by_its_last_step():
    log = [entry(s, 5) | {"step": i} for i, s in enumerate([0.5, 0.01, 0.01, 0.01, 0.01, 0.3, 0.4, 0.6])]
    assert last_collapse(log[:7]).startswith("step 4: all images look alike")
    assert last_collapse(log) == "", "in the end they are farther apart than ever"
    assert last_collapse(log[:3]) == last_collapse([]) == ""


class Means(torch.nn.Module):
    def forward(self, pixels):
        self.saw_training = self.training
        return Features(pixels.mean((2, 3)) - 0.5)


def test_knn_of_colours_is_perfect_and_leaves_the_mode_alone():
    rng = np.random.default_rng(0)
    colours = np.array([[230, 20, 20], [20, 230, 20], [20, 20, 230]])
    labels = np.arange(60) % 3
    shown = (colours[labels][:, None, None] + rng.normal(0, 8, (60, 4, 4, 3))).clip(0, 255).astype(np.uint8)
    spec = BackboneSpec("means", 3, {}, frozenset({"pooled"}), mean=(0.0,) * 3, std=(1.0,) * 3)
    backbone = Backbone(Means(), spec).train()
    backbone.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    found = knn_accuracy(backbone, Arrays(shown[:30], labels[:30]), Arrays(shown[30:], labels[30:]), 4, k=5)
    assert found == 1.0
    assert backbone.training
    assert not backbone.net.saw_training
    wrong = knn_accuracy(backbone, Arrays(shown[:30], labels[:30]), Arrays(shown[30:], (labels[30:] + 1) % 3), 4, k=5)
    assert wrong == 0.0


def test_images_that_cannot_be_read_are_left_out_of_knn(tmp_path):
    bank, queries = tiny_corpus(16).probe
    names = [f"{row}.png" for row in range(len(queries))]
    for name, pixels in zip(names, queries.pixels, strict=True):
        Image.fromarray(pixels).save(tmp_path / name)
    held_out, whole = Files(tmp_path, names, queries.labels), knn_accuracy(tiny_backbone(), bank, queries, 16)
    (tmp_path / "3.png").write_bytes(b"no image")
    (tmp_path / "5.png").unlink()
    rest = [row for row in range(len(queries)) if row not in (3, 5)]
    kept = Arrays(queries.pixels[rest], queries.labels[rest])
    expected = knn_accuracy(tiny_backbone(), bank, kept, 16)
    assert knn_accuracy(tiny_backbone(), bank, held_out, 16) == expected != whole
    for name in names:
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(DataError, match="no held-out image can be read"):
        knn_accuracy(tiny_backbone(), bank, held_out, 16)


class Witness(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixels):
        self.seen = pixels
        return Features(pixels.mean((2, 3)))


def test_small_images_are_looked_at_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    spec = BackboneSpec("witness", 3, {}, frozenset({"pooled"}), mean=(0.0,) * 3, std=(1.0,) * 3)
    backbone, both = Backbone(Witness(), spec), Arrays(images, np.arange(12) % 2)
    knn_accuracy(backbone, both, both, 8, k=3)
    assert torch.equal(backbone.net.seen, torch.from_numpy(images).permute(0, 3, 1, 2) / 255)


def test_knn_of_an_untrained_network_is_no_more_than_a_guess_on_shuffled_labels():
    bank, queries = tiny_corpus(64).probe
    mixed = Arrays(queries.pixels, np.random.default_rng(0).permutation(queries.labels))
    assert knn_accuracy(tiny_backbone(), bank, mixed, 16) < 0.4


def test_the_journal_writes_a_line_at_once_and_can_be_set_back(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in range(4):
        journal.append({"step": step, "loss": step / 3})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step + 1
    journal[:] = list(journal)[:2]
    journal.rewrite(Progress(quiet=True))
    journal.append({"step": 2, "loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(journal)
    assert [line["step"] for line in lines] == [0, 1, 2]


def test_a_plot_of_an_empty_log_and_of_a_full_one(tmp_path):
    plot([], tmp_path / "a.png", "nothing yet")
    steps = [{"step": i, "a": 1 / (i + 1), "spread": 0.5, "effective_rank": 3.0} for i in range(5)]
    plot([*steps, {"step": 4, "knn": 0.3}], tmp_path / "b.png", "two terms")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))
