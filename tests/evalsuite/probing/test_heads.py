"""Heads trained on augmented images: against plain loops, many against one, killed runs, copies, choices, recipes."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import signal
import socket
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.data.classification import Arrays, ClassificationSet
from evalsuite.errors import BackboneError, DataError, ImageError, TrainingError, UsageError
from evalsuite.hooks import Registry
from evalsuite.metrics.ranking import top_k_hits
from evalsuite.preflight import TooLarge
from evalsuite.probes import hold_out
from evalsuite.probing import heads, published
from evalsuite.progress import Progress
from evalsuite.task import Setup
from evalsuite.training import launched

SIZE = 12
COLOURS = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)])


class Net(nn.Module):
    """Two convolutions with batch norm, of strides 2 and 4. Counts the images it saw."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(nn.Conv2d(8, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        fine = self.conv1(x)
        coarse = self.conv2(fine)
        return Features(coarse.mean((2, 3)), {2: fine, 4: coarse})


def make(seed=0):
    torch.manual_seed(seed)
    spec = BackboneSpec("test:net", 6, {2: 8, 4: 6}, frozenset({"pooled", "maps"}), image_size=(SIZE, SIZE))
    return Backbone(Net(), spec).eval()


def world(count=24, split="train", seed=0, size=SIZE, labels=None, pixels=None):
    """Images of three colours under noise."""
    rng = np.random.default_rng([seed, len(split)])
    labels = np.arange(count) % 3 if labels is None else labels
    if pixels is None:
        shown = labels if labels.ndim == 1 else labels.argmax(1)
        noise = rng.normal(0, 60, (count, size, size, 3))
        pixels = (COLOURS[shown][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    ids = np.array([f"{split}{i:03d}" for i in range(count)])
    return ClassificationSet(
        "world", split, ("red", "green", "blue"), ids, labels.astype(np.int64), Arrays(count, lambda: pixels, split),
        np.arange(count),
    )  # fmt: skip


def right(scores, labels, scale="logits"):
    assert scale == "logits"
    return float(top_k_hits(scores, labels).mean())


def recipe(**changes):
    values = dict(
        id="test", version=1, lrs=(0.5,), view="whole", flip=0.0, epochs=2, batch_size=8, rule="squash",
        weight_decay=0.01, milestones=(1,),
    )  # fmt: skip
    return heads.HeadProtocol(**{**values, **changes})


def setup(protocol, work, **changes):
    return Setup(protocol=protocol, work=work, registry=Registry(), progress=Progress(quiet=True), **changes)


def train(protocol, work, backbone=None, data=None, test=None, **changes):
    work.mkdir(parents=True, exist_ok=True)
    test = world(9, "test") if test is None else test
    hidden = dataclasses.replace(test, labels=np.full_like(test.labels, -1))
    return protocol.fit(backbone or make(), data or world(), hidden, right, setup(protocol, work, **changes))


def trainer_of(backbone, protocol, data, given):
    return heads._Trainer(backbone, protocol, data, given, launched(given.device))


def plain_loop(protocol, backbone, data, test, steps):
    """What a person would write around torch's SGD, for a linear head on frozen features."""

    def features(part):
        pixels = np.stack([part[i] for i in range(len(part))])
        with torch.no_grad():
            return backbone(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).pooled

    x, y = features(data), torch.from_numpy(data.labels)
    head = nn.Linear(x.shape[1], 3)
    torch.manual_seed(0)
    with torch.no_grad():
        head.weight.normal_(0, 0.01)
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), protocol.lrs[0], 0.9, weight_decay=protocol.weight_decay)
    order = np.concatenate([np.random.default_rng([0, epoch, 0]).permutation(len(data)) for epoch in range(9)])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = protocol.lrs[0] * (0.1 if step * 8 >= len(data) else 1)
        batch = order[8 * step : 8 * step + 8]
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x[batch]), y[batch]).backward()
        optimizer.step()
    return head(features(test)).detach().numpy()


def test_a_head_is_what_a_plain_loop_trains(tmp_path, monkeypatch):
    # torch's own first weights of Linear draw from the seed before ours do
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)
    protocol, backbone, data, test = recipe(), make(), world(20), world(9, "test")
    found = train(protocol, tmp_path, backbone, data, test)
    assert found.details["iterations"] == 5
    np.testing.assert_allclose(found.scores, plain_loop(protocol, backbone, data, test, 5), atol=1e-5)
    assert found.scale == "logits"
    assert found.choice == {"lr": 0.5, "validation_score": None}


def test_many_heads_learn_from_one_pass_what_each_learns_alone(tmp_path):
    many = recipe(lrs=(0.1, 0.5, 2.0), outputs=("pooled", "map2/max2"), norm="affine", view="resized", flip=0.5)
    backbone, data, points = make(), world(), world(9, "test")
    settings = many.settings(many.read(backbone))
    assert len(settings) == 6
    trainer = trainer_of(backbone, many, data, setup(many, tmp_path))
    backbone.net.seen = 0
    together = trainer.train(settings, data, "together")
    assert backbone.net.seen == 2 * len(data)  # two epochs, whatever the number of heads
    scores = together.scores(points, range(6))
    for place, setting in enumerate(settings):
        alone = trainer.train([setting], data, f"alone-{place}").scores(points, [0])
        np.testing.assert_array_equal(alone[0], scores[place])
    assert len({s.tobytes() for s in scores}) == 6


class Deadly(Arrays):
    """Kills the process, as the kernel would, at a reading of an image."""

    def __init__(self, data, after):
        super().__init__(len(data), lambda: data.pixels.pixels, "train")
        self.after = after

    def __getitem__(self, place):
        self.after -= 1
        if self.after < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(place)


@pytest.mark.parametrize(
    ("changes", "after", "states"),
    [
        ({"view": "resized", "flip": 0.5}, 30, {"train.pt"}),
        ({"tune": True, "backbone_norm": "train", "backbone_lr": 0.1, "view": "padded"}, 30, {"train.pt"}),
        ({"lrs": (0.1, 0.5)}, 30, {"choose-0.pt"}),
        ({"lrs": (0.1, 0.5)}, 48 + 24, {"choose-0.pt", "train.pt"}),
    ],
)
def test_a_run_that_was_killed_ends_in_the_same_bits(tmp_path, changes, after, states):
    protocol = recipe(**changes)
    data = world()
    doomed = dataclasses.replace(data, pixels=Deadly(data, after))
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(protocol, tmp_path / "cut", make(), doomed), kwargs={"save_every": 0.0}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "cut").glob("*.pt")} == states
    last = torch.load(tmp_path / "cut" / max(states), weights_only=True)
    assert 0 < last["step"] < 6
    resumed, whole = (train(protocol, tmp_path / name, make(), data) for name in ("cut", "whole"))
    np.testing.assert_array_equal(resumed.scores, whole.scores)
    assert resumed.table == whole.table
    assert resumed.details["log"] == whole.details["log"]


@pytest.mark.parametrize("changes", [{}, {"tune": True, "backbone_lr": 0.1}, {"lrs": (0.1, 0.5), "accumulate": 2}])
def test_a_run_of_years_is_refused_before_its_first_step(tmp_path, changes):
    with pytest.raises(TooLarge, match="training by test would take about"):
        train(recipe(epochs=10**9, **changes), tmp_path)


def test_workers_and_a_second_run_change_nothing_and_a_seed_does(tmp_path):
    protocol = recipe(view="resized", flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5)
    first = train(protocol, tmp_path / "a").scores
    np.testing.assert_array_equal(train(protocol, tmp_path / "b", workers=2).scores, first)
    assert (train(protocol, tmp_path / "c", seed=1).scores != first).any()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone_norm": "train"},
        {"tune": True, "backbone_lr": 0.5, "backbone_norm": "train"},
        {"tune": True, "backbone_lr": 0.5, "lrs": (0.1, 0.5)},
    ],
)
def test_the_backbone_comes_back_as_it_was(tmp_path, changes):
    backbone = make()
    backbone.net.conv2.train()
    before, modes = backbone.identity, [m.training for m in backbone.modules()]
    asked = [p.requires_grad for p in backbone.parameters()]
    train(recipe(**changes), tmp_path, backbone)
    assert backbone.identity == before
    assert [m.training for m in backbone.modules()] == modes
    assert [p.requires_grad for p in backbone.parameters()] == asked
    assert not any(m._forward_hooks for m in backbone.modules())


def test_what_is_tuned_moves_as_fast_as_it_is_told(tmp_path):
    backbone, data = make(), world()
    moved = {}
    for lr in (0.0, 0.1):
        protocol = recipe(tune=True, backbone_lr=lr, weight_decay=0.0)
        run = trainer_of(backbone, protocol, data, setup(protocol, tmp_path)).train([{"lr": 0.5}], data, str(lr))
        moved[lr] = run.model.backbone
    assert moved[0.0].identity == backbone.identity
    for name, tensor in backbone.net.state_dict().items():
        same = torch.equal(tensor, moved[0.1].net.state_dict()[name])
        assert same == ("running" in name or "tracked" in name or name == "seen"), name


def test_batch_norm_in_training_mode_reads_the_batch_and_moves(tmp_path):
    backbone, data = make(), world(8)
    protocol = recipe(backbone_norm="train", lrs=(1e-9,), epochs=1)
    run = trainer_of(backbone, protocol, data, setup(protocol, tmp_path)).train([{"lr": 1e-9}], data, "x")
    reference = make().train()
    order = np.random.default_rng([0, 0, 0]).permutation(8)
    reference(torch.from_numpy(np.stack([data[i] for i in order])).permute(0, 3, 1, 2).float() / 255)
    expected, found = reference.net.state_dict(), run.model.backbone.net.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tune", [False, True])
def test_a_few_images_are_learnt_by_heart(tmp_path, tune):
    data = world(6, pixels=np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3)).astype(np.uint8))
    protocol = recipe(
        tune=tune, backbone_lr=0.1 * tune, backbone_norm="train" if tune else "eval", lrs=(0.5,), epochs=60,
        batch_size=6, weight_decay=0.0, milestones=(), outputs=("map2/avg4",), norm="plain",
    )  # fmt: skip
    found = train(protocol, tmp_path, data=data, test=data)
    assert right(found.scores, data.labels) == 1.0
    assert found.details["log"][-1]["lr=0.5"] < 0.2


def test_the_choice_is_made_on_held_out_training_images_and_told(tmp_path):
    protocol = recipe(lrs=(1e-6, 0.5, 1.0), epochs=4)
    found = train(protocol, tmp_path)
    table = {setting["lr"]: value for setting, value in found.table}
    assert set(table) == {1e-6, 0.5, 1.0}
    assert table[found.choice["lr"]] == found.choice["validation_score"] == max(table.values())
    part, held = hold_out(world().labels, 0.1, 0)
    alone = recipe(lrs=(found.choice["lr"],), epochs=4)
    data = world()
    reference = trainer_of(make(), alone, data, setup(alone, tmp_path)).train(
        [{"lr": found.choice["lr"]}], data.take(part), "part"
    )
    (scores,) = reference.scores(data.take(held), [0])
    assert right(scores, data.labels[held]) == found.choice["validation_score"]


def test_without_a_refit_the_chosen_head_has_not_seen_what_was_held_out(tmp_path):
    fit_on, _ = hold_out(world().labels, 0.1, 0)
    part = world().take(fit_on)
    for tune in (False, True):
        protocol = recipe(lrs=(0.1, 0.5), refit=False, tune=tune, backbone_lr=0.05 * tune)
        found = train(protocol, tmp_path / f"a{tune}")
        assert found.details["images"] == len(part)
        alone = dataclasses.replace(protocol, lrs=(found.choice["lr"],))
        np.testing.assert_array_equal(found.scores, train(alone, tmp_path / f"b{tune}", data=part).scores)


@pytest.mark.parametrize("tune", [False, True])
def test_of_equally_good_heads_the_middle_one_is_the_one_that_is_scored(tmp_path, tune):
    lrs = (1e-12, 1e-11, 1e-10)
    found = train(recipe(lrs=lrs, epochs=1, refit=False, tune=tune), tmp_path / "three")
    assert found.choice["lr"] == 1e-11
    assert found.choice["tied"] == 3
    part = world().take(hold_out(world().labels, 0.1, 0)[0])
    alone = train(recipe(lrs=(1e-11,), epochs=1, tune=tune), tmp_path / "one", data=part)
    np.testing.assert_array_equal(found.scores, alone.scores)


def test_small_images_are_trained_on_and_scored_without_a_margin(tmp_path):
    protocol = recipe(view="whole", flip=0.0, epochs=1, rule="auto")
    data = world(4, size=SIZE)
    shown = protocol.preprocess(make(), data)
    assert torch.equal(shown(data[0]), torch.from_numpy(data[0]).permute(2, 0, 1))
    assert torch.equal(heads._Views(data, protocol, shown)(0, 0)[0], shown(data[0]))
    assert train(protocol, tmp_path).details["preprocess"]["ratio"] == 1.0


class TwoEyes(nn.Module):
    """One output sees the upper half of an image, the other the lower."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return Features(x[:, :, : SIZE // 2].mean((2, 3)) * self.scale, {4: x[:, :, SIZE // 2 :] * self.scale})


def halves(count, split, upper, lower):
    """The class's colour in each half, on a share of the images; on the others that of the next class."""
    rng = np.random.default_rng(len(split))
    labels = np.arange(count) % 3
    pixels = np.zeros((count, SIZE, SIZE, 3), dtype=np.uint8)
    for rows, share in ((slice(0, SIZE // 2), upper), (slice(SIZE // 2, SIZE), lower)):
        shown = np.where(rng.random(count) < share, labels, (labels + 1) % 3)
        pixels[:, rows] = COLOURS[shown][:, None, None]
    return world(count, split, labels=labels, pixels=pixels)


def test_an_oracle_that_only_the_test_images_hold_is_not_chosen(tmp_path):
    data, test = halves(90, "train", upper=0.7, lower=0.9), halves(30, "test", upper=1.0, lower=0.9)
    spec = BackboneSpec("test:eyes", 3, {4: 3}, frozenset({"pooled", "maps"}), image_size=(SIZE, SIZE))
    protocol = recipe(outputs=("pooled", "map4"), lrs=(0.5,), epochs=15, milestones=(12,), weight_decay=0.0)
    backbone = Backbone(TwoEyes(), spec)
    found = train(protocol, tmp_path / "both", backbone, data, test)
    assert found.choice["features"] == "map4"
    oracle = train(dataclasses.replace(protocol, outputs=("pooled",)), tmp_path / "one", backbone, data, test)
    assert right(oracle.scores, test.labels) == 1.0 > right(found.scores, test.labels)


def test_the_labels_of_the_test_images_are_never_read(tmp_path):
    class Sealed(ClassificationSet):
        def __getattribute__(self, name):
            if name in ("labels", "known", "digest"):
                raise AssertionError("the labels of the test images were asked for")
            return super().__getattribute__(name)

    test = world(9, "test")
    fields = {f.name: getattr(test, f.name) for f in dataclasses.fields(test)}
    for tune in (False, True):
        protocol = recipe(lrs=(0.1, 0.5), tune=tune)
        sealed = protocol.fit(make(), world(), Sealed(**fields), right, setup(protocol, tmp_path))
        np.testing.assert_array_equal(sealed.scores, train(protocol, tmp_path, test=test).scores)


def test_a_head_that_diverges_loses_and_does_not_end_the_others(tmp_path):
    found = train(recipe(lrs=(0.5, 1e38), weight_decay=0.5, epochs=4), tmp_path / "two")
    assert found.choice["lr"] == 0.5
    assert {s["lr"]: v for s, v in found.table}[1e38] == -math.inf
    assert any("could not be scored" in line for line in found.warnings)
    with pytest.raises(TrainingError, match="not finite"):
        train(recipe(lrs=(1e38,), weight_decay=0.5, epochs=4), tmp_path / "one")
    with pytest.raises(DataError, match="no setting"):
        train(recipe(lrs=(1e38, 2e38), weight_decay=0.5, epochs=4), tmp_path / "none")


def test_several_labels_an_image_and_the_unknown_ones_left_out(tmp_path):
    labels = np.eye(3, dtype=np.int64)[np.arange(24) % 3]
    labels[::5, 1] = -1
    data = world(labels=labels)
    logits = torch.randn(24, 3)
    known = labels >= 0
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    terms = -np.where(labels == 1, np.log(p), np.log(1 - p))
    expected = terms[known].mean()
    assert float(heads._loss(logits, torch.from_numpy(labels), True)) == pytest.approx(expected, rel=1e-5)
    protocol = recipe(epochs=30, milestones=())
    found = protocol.fit(make(), data, world(9, "test"), right, setup(protocol, tmp_path))
    assert found.scores.shape == (9, 3)
    assert right(found.scores, np.arange(9) % 3) > 0.6


def test_a_step_in_parts_is_the_mean_over_them(tmp_path):
    whole, parts = (train(recipe(accumulate=n), tmp_path / str(n)) for n in (1, 4))
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-5)


def test_fewer_images_than_a_batch_are_all_in_each_step_and_it_is_told(tmp_path):
    found = train(recipe(batch_size=100, epochs=3), tmp_path)
    assert found.details["batch_size"] == found.details["images"] == 24
    assert found.details["iterations"] == 3
    assert "fewer than a batch of 100" in found.warnings[0]


def test_resizing_on_the_device_gives_the_same_scores_for_images_of_any_size(tmp_path):
    test = world(9, "test", size=20)
    here, there = (train(recipe(resize=where), tmp_path / where, test=test) for where in ("workers", "device"))
    np.testing.assert_allclose(here.scores, there.scores, atol=0.02)


# --- recipes ----------------------------------------------------------------------------------------------------


def named(kind, name):
    return next(p for p in published.recipes(kind) if p.id == name)


@pytest.mark.parametrize(
    ("kind", "name", "rates"),
    [
        ("imagenet", "linear-moco", {0: 30, 59.99: 30, 60: 3, 80: 0.3, 99.9: 0.3}),
        ("imagenet", "linear-swav", {0: 0.3, 0.9: 0.3, 50.5: 0.15, 99.5: 0.3 * (1 + math.cos(math.pi * 0.99)) / 2}),
        ("imagenet", "linear-simsiam", {0: 1.6, 30: 1.2, 45: 0.8, 60: 0.4}),
        ("imagenet", "linear-simclr", {0: 1.6, 22.5: 0.8 * (1 + math.sqrt(0.5)), 90: 0.0}),
        ("imagenet", "linear-pixpro", {0: 0.3, 2.5: 15.15, 5: 30, 52.5: 15.0000005, 100: 1e-6}),
        ("imagenet", "rotnet-linear", {4.9: 0.01, 5: 0.002, 15: 4e-4, 25: 8e-5, 34: 8e-5}),
        ("imagenet", "rotnet-nonlinear", {9: 0.01, 10: 0.002, 20: 4e-4, 30: 8e-5}),
        ("imagenet", "finetune-10", {0: 0.2, 12: 0.04, 16: 0.008}),
        ("imagenet", "finetune-1", {0: 5.0, 12: 1.0, 16: 0.2}),
        ("imagenet", "finetune-1-simclr", {0: 0.005 * math.sqrt(1024), 30: 0.08, 60: 0}),
        ("small", "linear-moco", {0: 10, 60: 1, 80: 0.1}),
        ("small", "linear-simclr", {0: 0.2, 50: 0.1, 100: 0}),
        ("small", "rotnet-conv", {34: 0.1, 35: 0.02, 70: 0.004, 85: 0.0008}),
        ("small", "rotnet-nonlinear", {19: 0.1, 20: 0.02, 40: 0.004, 45: 0.0008, 99: 0.0008}),
        ("small", "online", {0: 3e-5, 1: 0.1, 50.5: 0.05, 100: 0}),
    ],
)
def test_the_rates_of_a_recipe_are_the_published_ones(kind, name, rates):
    protocol = named(kind, name)
    for epoch, rate in rates.items():
        assert protocol.lrs[0] * protocol.rate(epoch) == pytest.approx(rate, rel=1e-6, abs=1e-9), epoch


def test_recipes_have_names_of_their_own_and_say_what_they_need():
    for kind in ("imagenet", "small"):
        found = published.recipes(kind)
        assert len({p.id for p in found}) == len(found)
        assert all(p.rule == ("auto" if kind == "imagenet" else "squash") for p in found)
        assert {p.id for p in found if p.needs == {"maps"}} == {p.id for p in found if p.id.startswith("rotnet")}
        assert {p.fraction for p in found if p.tune} == {0.01, 0.1, 1.0}


class AlexNet(nn.Module):
    """The maps of AlexNet at 224 pixels under the paper's names, and nothing else of it."""

    def __init__(self):
        super().__init__()
        widths = (3, 64, 192, 384, 256, 256)
        for i, (before, width) in enumerate(pairwise(widths), 1):
            setattr(self, f"conv{i}", nn.Conv2d(before, width, 1))

    def forward(self, x):
        for i, size in enumerate((55, 27, 13, 13, 13), 1):
            x = getattr(self, f"conv{i}")(nn.functional.adaptive_avg_pool2d(x, size))
        return Features(x.mean((2, 3)), {16: x})


def test_rotnets_heads_on_alexnet_have_the_shapes_of_the_paper(tmp_path):
    spec = BackboneSpec("test:alexnet", 256, {16: 256}, frozenset({"pooled", "maps"}))
    backbone, data = Backbone(AlexNet(), spec), world(9, size=32)
    data = dataclasses.replace(data, classes=tuple(map(str, range(1000))))
    protocol = named("imagenet", "rotnet-linear")
    trainer = trainer_of(backbone, protocol, data, setup(protocol, tmp_path))
    built = [trainer.head(output) for output in trainer.outputs]
    assert [o.name.partition("/")[0] for o in trainer.outputs] == [f"layer:conv{i}" for i in range(1, 6)]
    assert [head[-1].in_features for head in built] == [9216, 9408, 9600, 9216, 9216]
    assert [head[1].num_features for head in built] == [64, 192, 384, 256, 256]
    assert not any(head[1].affine for head in built)
    assert float(built[0][-1].weight.detach().std()) == pytest.approx(math.sqrt(2 / 1000), rel=0.01)
    protocol = named("imagenet", "rotnet-nonlinear")
    trainer = trainer_of(backbone, protocol, data, setup(protocol, tmp_path))
    assert [o.name for o in trainer.outputs] == ["layer:conv4", "layer:conv5"]
    with torch.device("meta"):
        built = [trainer.head(output) for output in trainer.outputs]
    shapes = [[tuple(p.shape) for p in head.parameters() if p.ndim > 1] for head in built]
    full = [(4096, 9216), (4096, 4096), (1000, 4096)]
    assert shapes == [[(256, 256, 3, 3), *full], full]
    maps = torch.randn(2, 256, 13, 13)
    pool = next(m for m in built[1] if isinstance(m, nn.AdaptiveMaxPool2d))
    assert torch.equal(pool(maps), nn.functional.max_pool2d(maps, 3, 2))


def test_rotnets_heads_on_cifar_have_the_shapes_of_the_paper():
    classifier = heads._conv(192, 10)
    shapes = [tuple(p.shape) for p in classifier.parameters() if p.ndim > 1]
    assert shapes == [(192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1), (10, 192)]
    heads._start(classifier, "fan-out")
    assert float(classifier[0].weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 192)), rel=0.02)
    assert classifier(torch.randn(2, 192, 8, 8)).shape == (2, 10)
    hidden = [*heads._hidden(192 * 8 * 8, 200), nn.Linear(200, 10)]
    assert [tuple(p.shape) for m in hidden for p in m.parameters() if p.ndim > 1] == [
        (200, 12288), (200, 200), (10, 200),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["rotnet-conv", "rotnet-nonlinear"])
def test_rotnets_heads_take_named_layers_or_else_every_map(tmp_path, name):
    protocol = dataclasses.replace(named("small", name), epochs=1)
    found = train(protocol, tmp_path)
    assert found.details["outputs"] == (["map2", "map4"] if name == "rotnet-conv" else ["map2/avg6", "map4/avg3"])
    layers = ("layer:conv1", "layer:conv2") if name == "rotnet-conv" else ("layer:conv1/avg4", "layer:conv2/avg3")
    (tmp_path / "layers").mkdir()
    assert train(dataclasses.replace(protocol, layers=layers), tmp_path / "layers").details["outputs"] == list(layers)


def test_what_lars_leaves_alone(tmp_path):
    def groups(protocol):
        run = trainer_of(make(), protocol, world(), setup(protocol, tmp_path)).train([{"lr": 0.1}], world(), "x")
        groups = run.run.optimizer.param_groups
        return {(g["adapt"], g["weight_decay"]): sorted(p.ndim for p in g["params"]) for g in groups}

    short = {"epochs": 1, "batch_size": 8, "fraction": 1.0}
    simsiam = dataclasses.replace(named("imagenet", "linear-simsiam"), weight_decay=0.5, **short)
    assert groups(simsiam) == {(True, 0.5): [1, 2]}
    online = dataclasses.replace(named("small", "online"), warmup_epochs=0, weight_decay=0.5, **short)
    assert groups(online) == {(True, 0.5): [2], (False, 0.0): [1]}
    simclr = dataclasses.replace(named("imagenet", "finetune-1-simclr"), weight_decay=0.5, **short)
    found = groups(simclr)
    assert found[True, 0.5] == [4, 4]
    assert found[False, 0.0] == [1] * 6  # the group of the head came before, and has the same key


def test_a_view_is_torchvisions_from_a_seed():
    data = world(3, size=20)
    protocol = recipe(view="resized", flip=0.5, interpolation="bicubic")
    sizing = protocol.preprocess(make(), data)
    views = heads._Views(data, protocol, sizing)
    transform = v2.Compose([
        v2.RandomResizedCrop([SIZE, SIZE], (0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    before = torch.get_rng_state()
    for seed in range(5):
        view, label = views(1, seed)
        torch.manual_seed(seed)
        assert torch.equal(view, transform(torch.from_numpy(data[1]).permute(2, 0, 1)))
        assert label == data.labels[1]
        torch.set_rng_state(before)
        views(2, seed)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [(9, 30), (30, 9), (12, 12)])
@pytest.mark.parametrize("view", ["resized", "cut", "padded", "whole"])
def test_a_view_of_any_image_has_the_size_of_the_input(view, size):
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3)).astype(np.uint8)
    data = world(1, labels=np.zeros(1, dtype=np.int64), pixels=pixels)
    protocol = recipe(view=view, ratio=0.5, rule="crop")
    views = heads._Views(data, protocol, protocol.preprocess(make(), data))
    drawn = [views(0, seed)[0] for seed in range(8)]
    assert {tuple(v.shape) for v in drawn} == {(3, SIZE, SIZE)}
    assert (len({v.numpy().tobytes() for v in drawn}) > 1) == (view != "whole")
    if view == "padded":
        assert any((v[:, 0] == 0).all() or (v[:, :, 0] == 0).all() or (v[:, -1] == 0).all() for v in drawn)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lrs": ()}, "no learning rate"),
        ({"epochs": 0.0}, "0.0 epochs"),
        ({"optimizer": "lars", "nesterov": True}, "Nesterov momentum with LARS"),
        ({"momentum": 0.0, "nesterov": True}, "Nesterov momentum of 0"),
        ({"backbone_lr": 0.1}, "a learning rate for a frozen backbone"),
        ({"jitter": (0.4,)}, "1 strengths of jitter"),
        ({"head": "conv", "outputs": ("map4/max2",)}, "a pool before conv heads"),
        ({"accumulate": 3}, "3 parts of 8 images"),
        ({"accumulate": 0}, "0 parts of 8 images"),
        ({"warmup_epochs": 2.0}, "2.0 of 2 epochs to warm up"),
        ({"fraction": 0.0}, "0.0 of the training labels"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, problem):
    with pytest.raises(UsageError, match=problem):
        recipe(**changes)


def test_outputs_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(BackboneError, match="no output 'map8'"):
        train(recipe(outputs=("map8",)), tmp_path)
    with pytest.raises(BackboneError, match="'pooled' is no map for a conv head"):
        train(recipe(head="conv"), tmp_path)


def test_settings_are_read_from_the_command_line():
    changed = named("imagenet", "linear-moco").override({"lrs": "1,3", "size": "96", "outputs": "maps/max"})
    assert (changed.lrs, changed.size, changed.outputs) == ((1, 3), 96, ("maps/max",))
    assert changed.modified == ("lrs", "outputs", "size")
    assert changed.override({"size": "null"}).size is None


class Torn(Arrays):
    """One of the images does not decode."""

    def __getitem__(self, place):
        if place == 5:
            raise ImageError("image 5 cannot be decoded", cause="it is cut off", fix="restore it")
        return super().__getitem__(place)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["train", "test"])
def test_an_image_that_does_not_decode_is_told_by_name(tmp_path, workers, where):
    parts = {"data": world(), "test": world(9, "test")}
    name = "data" if where == "train" else "test"
    part = parts[name]
    parts[name] = dataclasses.replace(part, pixels=Torn(len(part), lambda: part.pixels.pixels, where))
    with pytest.raises(ImageError, match="image 5 cannot be decoded"):
        train(recipe(), tmp_path, workers=workers, **parts)


# --- several processes ------------------------------------------------------------------------------------------

KINDS = {"frozen": {"lrs": (0.1, 0.5)}, "tuned": {"tune": True, "backbone_lr": 0.1}}


def in_process(rank, port, name, out):
    """As torchrun would call it."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    found = train(recipe(**KINDS[name]), out, devices=2, test=world(11, "test"))
    np.save(out / f"{rank}.npy", found.scores)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_train_what_one_does(tmp_path, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=in_process, args=(rank, port, name, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    one = train(recipe(**KINDS[name]), tmp_path / "one", test=world(11, "test"))
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), one.scores, atol=1e-4)
