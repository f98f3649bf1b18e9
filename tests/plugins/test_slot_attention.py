"""Slot Attention: what is drawn from slots and how it is learned; and sets of objects told by slots."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evalsuite_adainf.modifier import AdaInf
from evalsuite_objects.discovery import SlotDiscovery
from evalsuite_objects.setprediction import KINDS, SlotSet, hungarian_huber, precisions, targets
from evalsuite_objects.slots import BroadcastDecoder, Discovery, PositionEmbedding, Slots
from evalsuite_objects.zoo import build
from PIL import Image

from evalsuite import DataError, Features, UsageError, hooks
from evalsuite.testing import check_backbone
from evalsuite.worlds import SHAPES
from pretrain import Centre, Worlds
from pretrain.data import Corpus, parse
from pretrain.testing import (
    check_method,
    losses,
    small_backbone,
    small_corpus,
    small_options,
    tiny_backbone,
    tiny_train,
)


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Drawing them is half of so short a run."""
    monkeypatch.setattr("pretrain.train.plot", lambda *_: None)


REGISTRY = hooks.load(environ={"EVALSUITE_PLUGINS": ""}).registry
METHODS = (SlotDiscovery, SlotSet)


def small(kind, **options):
    return kind(kind.Options(**{"size": 16, "warmup": 0.0, **kind.small} | options))


def trained(kind, *modifiers, corpus=None, backbone=None, steps=4, options=None, **plan):
    make = partial(small, kind, **(options or {}))
    encoder = backbone or partial(small_backbone, kind, REGISTRY)
    return tiny_train(make, *modifiers, corpus=corpus or small_corpus(kind), backbone=encoder, steps=steps, **plan)


def test_places_and_masks_are_as_exact_in_bfloat16_as_in_float32():
    torch.manual_seed(0)
    position = PositionEmbedding(4)
    maps = torch.zeros(1, 4, 96, 96)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = position(maps.bfloat16())
        masks = Slots(4, 3, 8, 8)(found.flatten(2).transpose(1, 2))[1]
    assert torch.equal(found, position(maps))
    assert len(found[0, 0, 0].unique()) > 90  # rounded to bfloat16, neighbours would coincide
    torch.testing.assert_close(masks.sum(2), torch.ones(1, 96 * 96), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", METHODS)
def test_what_every_method_owes(kind):
    make = partial(kind, small_options(kind))
    check_method(make, backbone=partial(small_backbone, kind, REGISTRY), corpus=partial(small_corpus, kind))


@pytest.mark.parametrize("name", ["slot-attention", "slot-set"])
def test_what_every_backbone_owes(name):
    check_backbone(partial(build, name, slots=3, width=16, hidden=16, channels=16), registry=REGISTRY)


@pytest.mark.parametrize(("name", "side"), [("slot-attention", 32), ("slot-set", 8)])
def test_masks_share_the_places_of_the_map_among_slots(name, side):
    backbone = build(name, slots=4, width=8, hidden=8, channels=4).eval()
    features = backbone(torch.rand(2, 3, 32, 32))
    assert features.tokens.shape == (2, 4, 8)
    assert features.masks.shape == (2, 4, side, side)
    torch.testing.assert_close(features.masks.sum(dim=1), torch.ones(2, side, side))
    assert torch.equal(features.pooled, features.tokens.mean(dim=1))


def test_convolutions_are_as_many_as_strides_and_begin_as_keras_begins():
    net = build("slot-attention", channels=8, strides=[1, 2]).net
    first, second = (layer for layer in net.cnn if isinstance(layer, torch.nn.Conv2d))
    assert (first.stride, second.stride) == ((1, 1), (2, 2))
    bound = math.sqrt(6 / (25 * (8 + 8)))  # of Glorot's uniform rule
    assert bound * 0.9 < second.weight.abs().max() <= bound
    assert second.bias.abs().max() == 0


# Discovery ---------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_squared_error_of_what_is_mixed_by_masks(bench_of):
    method, _, batch, features = bench_of(SlotDiscovery)
    (loss,) = method.losses(batch, features).values()
    _, colours, masks = method.decoder(features[0].tokens)
    mixed = sum(masks[:, slot, None] * colours[:, slot] for slot in range(masks.shape[1]))
    pixels = batch.views[0].data
    assert 0 <= pixels.min() <= pixels.max() <= 1
    torch.testing.assert_close(loss, (mixed - (pixels * 2 - 1)).square().mean())


def test_slots_begin_at_noise_in_training_and_at_what_is_fixed_in_evaluation(bench_of):
    method, run, batch, first = bench_of(SlotDiscovery)
    run.rng.manual_seed(3)
    (other,) = method.features(run, batch)
    assert not torch.equal(other.tokens, first[0].tokens)
    run.backbone.eval()
    (fixed,) = method.features(run, batch)
    torch.testing.assert_close(fixed.tokens, run.backbone(batch.views[0].data).tokens)


def test_the_decoder_has_the_official_layers():
    decoder = BroadcastDecoder(64, 128)
    layers = [layer for layer in decoder.net if isinstance(layer, torch.nn.ConvTranspose2d)]
    assert [layer.stride[0] for layer in layers] == [2, 2, 2, 2, 1, 1]
    assert [layer.kernel_size[0] for layer in layers] == [5, 5, 5, 5, 5, 3]
    assert [layer.out_channels for layer in layers] == [64, 64, 64, 64, 64, 4]
    assert isinstance(decoder.net[-1], torch.nn.ConvTranspose2d)
    with pytest.raises(ValueError, match="no 8 doubled"):
        BroadcastDecoder(64, 48)


@pytest.mark.parametrize("kind", METHODS)
def test_the_official_recipe(kind):
    options, preset = kind.Options(), kind.presets["official"]
    epoch_steps = 1_000_000 // preset.batch_size
    steps, warmup, half = {SlotDiscovery: (500_000, 10_000, 100_000), SlotSet: (150_000, 1_000, 50_000)}[kind]
    assert preset.epochs * epoch_steps == pytest.approx(steps, rel=0.005)
    assert options.warmup * epoch_steps == pytest.approx(warmup, rel=0.005)
    assert options.half_life * epoch_steps == pytest.approx(half, rel=0.005)
    assert (options.lr, options.optimizer, options.weight_decay, options.scaling) == (4e-4, "adamw", 0.0, "none")
    assert kind(kind.Options(**preset.options)).views


def test_the_rate_rises_and_halves_from_the_first_step_on(bench_of):
    from pretrain import Recipe

    method, run, _, _ = bench_of(SlotDiscovery, warmup=2.0, half_life=4.0)
    run.epoch_steps, run.steps, run.training = 10, 160, method.options
    recipe, found = Recipe(method), {}
    for run.step in (0, 10, 20, 40, 80):
        found[run.step] = recipe.rate(run)
    assert found == pytest.approx({0: 0.0, 10: 0.5 * 0.5**0.25, 20: 0.5**0.5, 40: 0.5, 80: 0.25})


def test_slots_are_watched_for_collapse_not_their_mean():
    from pretrain.train import _rows

    tokens = torch.rand(2, 3, 4)
    features = Features(pooled=tokens.mean(1), tokens=tokens)
    assert _rows(features) is features.pooled
    assert _rows(replace(features, masks=torch.ones(2, 3, 1, 1))).tolist() == tokens.view(6, 4).tolist()


def test_a_half_life_is_positive():
    with pytest.raises(ValueError, match="cannot halve"):
        SlotDiscovery.Options(half_life=0.0)


@pytest.mark.parametrize("kind", METHODS)
def test_an_encoder_without_slots_is_refused(kind):
    with pytest.raises(UsageError, match="slots cannot be learned in tiny") as refused:
        trained(kind, backbone=tiny_backbone)
    assert f"--arch {kind.arch}" in refused.value.fix


def test_a_size_that_cannot_be_drawn_is_refused():
    with pytest.raises(UsageError, match="cannot draw images of 24 pixels"):
        trained(SlotDiscovery, options={"size": 24})


def test_held_out_frames_are_measured_and_drawn(tmp_path):
    frames = parse("worlds:random-objects:16")
    held_out = Worlds("random-objects", count=8, seed=1)
    corpus = Corpus(frames.train, (frames.train, held_out))
    found = trained(SlotDiscovery, corpus=corpus, out=tmp_path, steps=2, epochs=1, knn_every=1)
    (entry,) = (entry for entry in found.log if "fg_ari" in entry)
    assert set(entry) == {"step", "epoch", "reconstruction_error", "fg_ari", "attention_fg_ari"}
    assert -1 <= entry["fg_ari"] <= 1
    with Image.open(tmp_path / "objects.png") as picture:
        assert picture.width > 4 * 300
        assert picture.height > 6 * 300
    assert all("fg_ari" not in terms for terms in losses(found))


def test_images_of_which_nothing_is_known_are_measured_by_their_reconstruction(tmp_path):
    from pretrain.testing import tiny_corpus

    data = tiny_corpus(16).train
    found = trained(SlotDiscovery, corpus=Corpus(data, (data, data)), out=tmp_path, steps=2, epochs=1, knn_every=1)
    (entry,) = (entry for entry in found.log if "reconstruction_error" in entry)
    assert "fg_ari" not in entry


@pytest.fixture
def bench_of(tmp_path):
    """A method, its run, a batch, and the features of the first step."""
    from pretrain import Recipe
    from pretrain.train import Plan, prepare

    def made(kind, **options):
        method = small(kind, **options)
        plan = Plan(out=tmp_path, epochs=1, batch_size=8, device="cpu", workers=0)
        state = prepare(Recipe(method), small_backbone(kind, REGISTRY).train(), small_corpus(kind), plan)
        batch = next(iter(state.draws(plan))).batch.to(torch.device("cpu"))
        state.run.rng.manual_seed(0)
        return method, state.run, batch, method.features(state.run, batch)

    return made


# Sets --------------------------------------------------------------------------------------------------------


def test_targets_are_of_what_is_seen_and_the_rest_is_zero():
    world = Worlds("random-objects", count=4)
    rows = [world[row] for row in range(4)]
    state, segments = (torch.stack([row[name] for row in rows]) for name in ("state", "segments"))
    wanted = targets(state, segments, 10)
    assert wanted.shape == (4, 10, 2 + sum(KINDS) + 1)
    for image in range(4):
        for row in range(10):
            seen = row < 6 and bool((segments[image] == row).any())
            assert wanted[image, row, -1] == seen
            if not seen:
                assert wanted[image, row].abs().sum() == 0
                continue
            colour, shape, scale, x, y = state[image, row].tolist()
            assert wanted[image, row, :2].tolist() == [x, y]
            hot = wanted[image, row, 2:-1].nonzero().squeeze(1).tolist()
            assert hot == [colour, KINDS[0] + shape, KINDS[0] + len(SHAPES) + scale]
    assert wanted[:, 5].abs().sum() == 0  # the agent, which these frames do not show
    assert targets(state, segments, 3).shape[1] == 6  # no object is left out for want of slots


def test_an_agent_that_is_shown_is_an_object():
    row = Worlds("object-goal", count=1)[0]
    wanted = targets(row["state"][None], row["segments"][None], 0)
    assert wanted[0, :, -1].tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(("slots", "rows"), [(4, 4), (3, 4), (5, 3)])
def test_the_loss_is_that_of_the_best_of_all_matchings(slots, rows):
    found, wanted = torch.rand(3, slots, 5) * 3, torch.rand(3, rows, 5)
    cost = F.huber_loss(found[:, None].expand(-1, rows, -1, -1), wanted[:, :, None].expand(-1, -1, slots, -1),
                        reduction="none").mean(3)  # fmt: skip
    if rows <= slots:
        ways = [list(zip(range(rows), way, strict=True)) for way in permutations(range(slots), rows)]
    else:
        ways = [list(zip(way, range(slots), strict=True)) for way in permutations(range(rows), slots)]
    best = [min(sum(float(cost[b, r, s]) for r, s in way) for way in ways) for b in range(3)]
    assert hungarian_huber(found, wanted).tolist() == pytest.approx(best, rel=1e-5)


def test_the_loss_of_the_official_code_by_hand():
    """Huber of 2 is 1.5 and of 0.5 is 0.125; each is averaged over its numbers, and matched pairs are added up."""
    found, wanted = torch.tensor([[[0.0, 0.0], [2.0, 0.5]]]), torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    assert hungarian_huber(found, wanted).item() == pytest.approx((1.5 + 0.125) / 2)


def test_a_perfect_set_has_full_precision_and_a_shifted_one_by_distance():
    world = Worlds("random-objects", count=6)
    rows = [world[row] for row in range(6)]
    state, segments = (torch.stack([row[name] for row in rows]) for name in ("state", "segments"))
    wanted = targets(state, segments, 7)
    assert precisions(wanted, wanted) == [1.0] * 5
    shifted = wanted.clone()
    shifted[:, :, 0] += 0.05  # 0.3 of CLEVR's units
    inf, one, half, quarter, eighth = precisions(shifted, wanted)
    assert (inf, one, half) == (1.0, 1.0, 1.0)
    assert quarter == eighth == 0.0
    wrong = wanted.clone()
    shapes = slice(2 + KINDS[0], 2 + KINDS[0] + KINDS[1])
    wrong[:, :, shapes] = wanted[:, :, shapes].roll(6, dims=2)  # to those that no object has
    assert precisions(wrong, wanted)[1:] == [0.0] * 4  # at any distance, what is no object is like some that are


def test_images_without_a_state_are_refused():
    from pretrain.testing import tiny_corpus

    with pytest.raises(DataError, match="cannot learn from images without segments and state"):
        trained(SlotSet, corpus=tiny_corpus())


def test_states_of_another_form_are_refused():
    class Other(Worlds):
        def __getitem__(self, row):
            sample = super().__getitem__(row)
            return {**sample, "state": torch.zeros(5, 17)}

    with pytest.raises(DataError, match="without rows of colour"):
        trained(SlotSet, corpus=Corpus(Other("random-objects", count=8)))


def test_added_images_without_a_state_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.zeros((8, 64, 64, 3), np.uint8))
    with pytest.raises(DataError, match="without segments and state") as refused:
        trained(SlotSet, lambda: AdaInf(AdaInf.Options(tmp_path / "a.npz", copies=1)))
    assert "no modifier that adds images" in refused.value.fix


def test_sets_are_learned_and_measured(tmp_path):
    """Few frames by heart: the loss falls, and the log has a precision by each distance."""
    data = Worlds("random-objects", count=8)
    found = trained(SlotSet, corpus=Corpus(data, (data, data)), steps=30, epochs=30, knn_every=30, out=tmp_path,
                    options={"lr": 2e-2, "half_life": None}, log_every=1)  # fmt: skip
    terms = losses(found)
    assert terms[-1]["huber"] < 0.5 * terms[0]["huber"]
    (entry,) = (entry for entry in found.log if "ap_inf" in entry)
    assert set(entry) == {"step", "epoch", "ap_inf", "ap_1", "ap_0.5", "ap_0.25", "ap_0.125"}


def test_frames_are_seen_whole():
    assert SlotDiscovery().views(run=type("Run", (), {"training": SlotDiscovery.Options()})()) == (
        Centre(64, share=1.0),
    )
    assert isinstance(build("slot-set").net, Discovery)
