"""SLATE: its losses, its recipe, what it says of held-out images, and its files."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from evalsuite_objects.slate import SLATE, Explained, PixelSLATE
from evalsuite_objects.slate_method import SlateMethod
from evalsuite_objects.zoo import build
from PIL import Image

from evalsuite import BackboneError, UsageError, load_backbone
from evalsuite.backbone import build as build_by_name
from evalsuite.testing import check_backbone, check_checkpoint
from pretrain import Arrays, Centre, Corpus, Images, Recipe
from pretrain.blocks import Noise
from pretrain.testing import check_method, losses, small_backbone, small_options, tiny_corpus, tiny_train
from pretrain.train import Plan, prepare

SMALL: dict[str, Any] = dict(SlateMethod.small_arch or {})
NAMES = {"slate": SMALL, "slate-pixels": SMALL | {"channels": 4}}


def slate(**options):
    return SlateMethod(SlateMethod.Options(**{"size": 16, "warmup_steps": 1, "cooling_steps": 4} | options))


def encoder(name="slate", **options):
    torch.manual_seed(0)
    return build(name, **NAMES[name] | options)


def ready(tmp_path, name="slate", method=slate, **options):
    plan = Plan(out=tmp_path, epochs=1, batch_size=8, device="cpu", workers=0)
    return prepare(Recipe(method(**options)), encoder(name), tiny_corpus(), plan), plan


@pytest.mark.parametrize(("name", "options"), [("slate", {}), ("slate", {"hard": True}), ("slate-pixels", {})])
def test_what_every_method_owes(name, options):
    check_method(lambda: slate(**options), backbone=partial(encoder, name))


def test_it_brings_its_own_architecture_and_small_options(registry):
    assert SlateMethod.arch == "objects:slate"
    assert isinstance(small_backbone(SlateMethod, registry).net, SLATE)
    assert small_options(SlateMethod).size == SMALL["size"]


@pytest.mark.parametrize("name", NAMES)
def test_what_every_backbone_owes(name, registry):
    """Wide enough to tell two images apart."""
    wide = NAMES[name] | {"words": 64, "width": 32} | ({"channels": 16} if "channels" in NAMES[name] else {})
    check_backbone(lambda: build_by_name(f"objects:{name}", registry, **wide), registry=registry)


# Networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_masks_share_out_every_place(name):
    found = encoder(name).eval()(torch.rand(3, 3, 16, 16))
    side = {"slate": 4, "slate-pixels": 16}[name]
    assert found.masks.shape == (3, 2, side, side)
    torch.testing.assert_close(found.masks.sum(dim=1), torch.ones(3, side, side))
    torch.testing.assert_close(found.pooled, found.tokens.mean(dim=1))


def test_masks_lie_as_the_image_does():
    """A corner that changes, changes the masks there most."""
    for name in NAMES:
        net = encoder(name, words=64).eval()
        images = torch.full((1, 3, 16, 16), 0.5)
        other = images.clone()
        other[:, :, :4, 12:] = torch.rand(3, 4, 4)
        moved = (net(other).masks - net(images).masks).abs().sum(dim=1)[0]
        place = divmod(int(moved.argmax()), moved.shape[1])
        assert (place[0] / moved.shape[0], place[1] / moved.shape[1]) <= (0.25, 1.0)
        assert place[1] / moved.shape[1] >= 0.75


def test_the_slots_of_the_original_see_words_alone():
    net = encoder().eval().net
    words = torch.randint(8, (2, 16))
    with torch.no_grad():
        one, other = (net.attend(net.read(torch.rand(2, 3, 16, 16), net.embedded(words)))[0] for _ in range(2))
    assert torch.equal(one, other)


def test_the_slots_of_the_benchmark_see_pixels_alone():
    net = encoder("slate-pixels").eval().net
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        one, other = (net.attend(net.read(images, net.embedded(torch.randint(8, (2, 16)))))[0] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_word_is_told_from_those_before_it_and_the_slots(name):
    net = encoder(name).eval().net
    words, slots = torch.randint(8, (1, 16)), torch.randn(1, 2, 8)
    changed = words.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 8
    with torch.no_grad():
        one, other = (net.out(net.tf_dec(net.embedded(w)[:, :-1], net.slot_proj(slots))) for w in (words, changed))
    torch.testing.assert_close(one[:, :10], other[:, :10])
    assert not torch.allclose(one[:, 10:], other[:, 10:])


def test_what_is_generated_is_what_the_transformer_would_say_of_itself():
    net = encoder(words=32).eval().net
    with torch.no_grad():
        slots = torch.randn(2, 2, 8)
        words = torch.zeros(2, 0, dtype=torch.long)
        for place in range(16):
            padded = torch.cat([words, torch.zeros(2, 16 - place, dtype=torch.long)], dim=1)
            said = net.out(net.tf_dec(net.embedded(padded)[:, :-1], net.slot_proj(slots))).argmax(dim=-1)
            words = torch.cat([words, said[:, place : place + 1]], dim=1)
        torch.testing.assert_close(net.generate(slots), net.rebuild(words))


def test_sizes_that_do_not_go_together_are_refused(registry):
    with pytest.raises(BackboneError, match="objects:slate cannot be built") as refused:
        build_by_name("objects:slate", registry, size=18)
    assert "no 4x4 patches of 18 pixels" in refused.value.cause
    with pytest.raises(BackboneError, match="objects:slate cannot be built") as refused:
        build_by_name("objects:slate", registry, channels=8)
    assert "it has no option channels; there are slots, size, words" in refused.value.cause


def test_fresh_weights_of_every_part_are_kept(registry):
    """No gradient tells that features depend on the VAE, and all of it is to be trained."""
    for name in NAMES:
        loaded = load_backbone(f"random:objects:{name}", registry, options=NAMES[name])
        net = loaded.backbone.net
        assert loaded.report.parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)
        assert all(bool(p.any()) for n, p in net.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_backbone_is_read_again_whole(name, tmp_path, registry):
    trained = tiny_train(slate, backbone=partial(encoder, name), steps=2, out=tmp_path)
    again = load_backbone(trained.path, registry).backbone
    state = trained.backbone.net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.net.state_dict().items())
    assert again.spec.image_size == (16, 16)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.eval()(images).tokens, trained.backbone.eval()(images).tokens)


# Recipe --------------------------------------------------------------------------------------------------------------


def test_an_image_is_seen_whole():
    assert SlateMethod().views() == (Centre(64, share=1.0),)


def test_each_part_has_its_rate(tmp_path):
    for name, decoder in (("slate", 1e-4), ("slate-pixels", 3e-4)):
        state, _ = ready(tmp_path / name, name, lr_decoder=decoder)
        optimizer = state.recipe.optimizer(state.run, state.objective)
        names = {id(p): n for n, p in state.run.backbone.net.named_parameters()}
        groups = [sorted({names[id(p)].partition(".")[0] for p in g["params"]}) for g in optimizer.param_groups]
        begin = ["bos"] if name == "slate-pixels" else []
        cnn = ["cnn", "position"] if name == "slate-pixels" else []
        assert groups == [
            [*cnn, "slot_attn", "slot_proj"],
            [*begin, "dictionary", "out", "positional_encoder", "tf_dec"],
            ["dvae"],
        ]
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-4, decoder, 3e-4])
        assert [g["constant"] for g in optimizer.param_groups] == [False, False, True]
        assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0}
        trained = sum(len(g["params"]) for g in optimizer.param_groups)
        assert trained == sum(p.requires_grad for p in state.objective.parameters())


def rates(state, steps):
    found = []
    for step in steps:
        state.run.step = step
        found.append(state.recipe.rate(state.run))
    return found


def test_rates_rise_and_the_benchmarks_halve(tmp_path):
    state, _ = ready(tmp_path, warmup_steps=4)
    assert rates(state, (0, 1, 3, 100)) == [0.25, 0.5, 1.0, 1.0]
    state, _ = ready(tmp_path / "other", warmup_steps=4, halving_steps=10)
    assert rates(state, (0, 10, 20)) == pytest.approx([0.25, 0.5, 0.25])


def test_presets_are_the_published_recipes():
    official, benchmark = SlateMethod.preset("official"), SlateMethod.preset("benchmark")
    assert (official.epochs, official.batch_size, benchmark.epochs, benchmark.batch_size) == (20, 50, 10, 24)
    o, b = (SlateMethod.Options(**preset.options) for preset in (official, benchmark))
    assert (o.lr_vae, o.lr, o.lr_decoder, o.clip, o.clip_norm) == (3e-4, 1e-4, 1e-4, 1.0, "max")
    assert (b.lr_vae, b.lr, b.lr_decoder, b.clip, b.clip_norm) == (3e-4, 1e-4, 3e-4, 0.05, "max")
    assert (o.halving_steps, b.halving_steps, o.warmup_steps, b.warmup_steps) == (None, 250_000, 30_000, 30_000)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"coldest": 0.0}, "cannot cool from 1.0 to 0.0"),
        ({"temperature": 0.05}, "cannot cool from 0.05 to 0.1"),
        ({"warmup_steps": 0}, "are 1 at least"),
        ({"halving_steps": 0}, "are 1 at least"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        SlateMethod.Options(**options)


def test_the_draw_cools(tmp_path):
    state, plan = ready(tmp_path)
    method, seen = state.recipe.method, []
    net = state.run.backbone.net
    explain = net.explain
    net.explain = lambda images, temperature, *rest: seen.append(temperature) or explain(images, temperature, *rest)
    for draw, _ in zip(state.draws(plan), range(3), strict=False):
        state.objective(draw)
    assert seen == [method.temperature(step) for step in range(3)]
    assert seen[0] == 1.0 > seen[1] > seen[2]


def test_the_features_of_a_step_are_those_its_losses_are_of(tmp_path):
    state, plan = ready(tmp_path)
    draw = next(iter(state.draws(plan)))
    batch = draw.batch.to(state.run.device)
    state.run.rng.manual_seed(1)
    (found,) = state.recipe.features(state.run, batch)
    assert isinstance(found, Explained)
    assert state.recipe.losses(state.run, batch, [found], []) == found.losses
    assert found.losses["cross_entropy"].item() == pytest.approx(16 * math.log(8), rel=0.5)


def test_what_an_image_is_given_depends_on_no_other(tmp_path):
    """The first image of a batch has the same draws whatever images are beside it."""
    net = encoder(dropout=0.0).eval().net
    images = torch.rand(4, 3, 16, 16)
    for changed in (images.flip(0).roll(1, 0), torch.cat([images[:1], torch.rand(3, 3, 16, 16)])):
        changed[0] = images[0]
        with torch.no_grad():
            one, other = (
                net.explain(batch, 0.5, noise=Noise(torch.Generator().manual_seed(3), 4, torch.device("cpu")))
                for batch in (images, changed)
            )
        torch.testing.assert_close(one.tokens[0], other.tokens[0])
        torch.testing.assert_close(one.masks[0], other.masks[0])


def test_a_backbone_that_is_no_slate_is_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match="slate cannot train tiny") as refused:
        tiny_train(slate, out=tmp_path)
    assert "a transformer that explains them by slots" in refused.value.cause
    assert "--arch objects:slate or objects:slate-pixels" in refused.value.fix
    assert not (tmp_path / "run.json").exists()


def test_images_of_another_size_are_refused(tmp_path):
    with pytest.raises(UsageError, match="this objects:slate has no words for images of 32 pixels") as refused:
        tiny_train(lambda: slate(size=32), backbone=encoder, out=tmp_path)
    assert refused.value.fix == "--arch-option size=32, or --set slate.size=16"


# Held-out images -----------------------------------------------------------------------------------------------------


class Halves(Images):
    """Images whose left and right halves are two things, each dark or bright, and it is known which; the ground is a
    rim on top, black and white, without which a norm over the image takes dark and bright ones for the same."""

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        colours = rng.choice([30, 225], (count, 2, 1)).repeat(3, axis=2).astype(np.uint8)
        halves = torch.from_numpy(colours.repeat(8, axis=1)).permute(0, 2, 1)
        self.pixels = halves[:, :, None].repeat(1, 1, 16, 1)
        self.pixels[:, :, :4, :8], self.pixels[:, :, :4, 8:] = 0, 255
        self.labels, self.fingerprint = np.full(count, -1), f"halves {count} {seed}"
        self.segments = (torch.arange(16) // 8).expand(16, 16).clone()
        self.segments[:4] = -1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"image": self.pixels[row], "segments": self.segments}


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_to_write_images_down_and_the_log_tells_of_held_out_ones(name, tmp_path):
    corpus = Corpus(Halves(64, 0), (Halves(64, 0), Halves(40, 1)))
    fast = {"lr": 3e-3, "lr_vae": 3e-3, "lr_decoder": 3e-3, "coldest": 0.5, "cooling_steps": 32}
    run = partial(tiny_train, backbone=partial(encoder, name, words=16), corpus=corpus, epochs=8, knn_every=8)
    trained = run(lambda: slate(**fast), steps=64, out=tmp_path)
    idle = run(lambda: slate(lr=1e-9, lr_vae=1e-9, lr_decoder=1e-9), steps=8)
    (last,), (first,) = ([e for e in log if "reconstruction_error" in e] for log in (trained.log, idle.log))
    plain = float((torch.stack([row["image"] for row in (corpus.probe[1][i] for i in range(40))]) / 255).var())
    assert last["reconstruction_error"] < 0.5 * plain < first["reconstruction_error"]
    assert last["reconstruction_error"] < last["slots_error"] < 1  # what the VAE writes down slots alone draw worse
    assert -1 <= last["attention_fg_ari"] <= 1
    assert losses(trained)[-1]["cross_entropy"] < 0.7 * losses(trained)[0]["cross_entropy"]
    with Image.open(tmp_path / "slate.png") as picture:
        assert picture.width > 4 * 300
        assert picture.height > 6 * 300


def test_without_objects_told_there_is_no_index_of_them(tmp_path):
    images = Arrays(np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
    trained = tiny_train(slate, backbone=encoder, corpus=Corpus(images, (images, images)), steps=2, knn_every=1)
    (told,) = [e for e in trained.log if "reconstruction_error" in e]
    assert "attention_fg_ari" not in told


def test_measuring_changes_nothing():
    corpus = Corpus(Halves(32, 0), (Halves(32, 0), Halves(8, 1)))
    runs = [tiny_train(slate, backbone=encoder, corpus=corpus, steps=4, knn_every=every) for every in (0, 1)]
    assert runs[0].backbone.identity == runs[1].backbone.identity
    assert losses(runs[0]) == losses(runs[1])


def test_errors_are_means_over_pixels_and_channels(tmp_path):
    """Of the likeliest words; a batch is taken in parts."""
    corpus = Corpus(Halves(8, 0), (Halves(8, 0), Halves(70, 1)))
    trained = tiny_train(slate, backbone=encoder, corpus=corpus, steps=1, knn_every=1)
    net = trained.backbone.eval().net
    pixels = torch.stack([corpus.probe[1][i]["image"] for i in range(70)]) / 255
    with torch.no_grad():
        error = (net.rebuild(net.likeliest(pixels)) - pixels).square().mean()
        slots = (net.generate(net(pixels[:6]).tokens) - pixels[:6]).square().mean()
    (told,) = [e for e in trained.log if "reconstruction_error" in e]
    assert told["reconstruction_error"] == pytest.approx(float(error), rel=1e-5)
    assert told["slots_error"] == pytest.approx(float(slots), rel=1e-5)


# Files of others -----------------------------------------------------------------------------------------------------


def test_layouts_pass_over_what_is_not_theirs(registry):
    for name in ("slate", "ocrl"):
        check_checkpoint(registry.get("checkpoint", name), registry=registry)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_the_original_tells_its_sizes(prefix, tmp_path, registry):
    net = SLATE(slots=3, size=16, words=24, width=16, hidden=20, blocks=3, heads=2, slot_width=12)
    torch.save({prefix + k: v for k, v in net.state_dict().items()}, tmp_path / "best_model.pt")
    loaded = load_backbone(tmp_path / "best_model.pt", registry, options={"heads": 2})
    told = loaded.backbone.spec.options
    assert {k: told[k] for k in ("slots", "size", "words", "width", "hidden", "blocks", "slot_width")} == {
        "slots": 3, "size": 16, "words": 24, "width": 16, "hidden": 20, "blocks": 3, "slot_width": 12,
    }  # fmt: skip
    state = net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.backbone.net.state_dict().items())


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda s: {k: v for k, v in s.items() if not k.startswith("dvae.encoder.7")}, "missing, first dvae.encoder.7"),
        (lambda s: s | {"dvae.encoder.0.m.weight": torch.zeros(64, 1, 4, 4)}, "of another shape, first dvae.encoder.0"),
        (lambda s: s | {"tf_dec.extra.weight": torch.zeros(3)}, "that it does not know, first tf_dec.extra"),
    ],
)
def test_half_a_file_or_another_network_is_refused(broken, told, tmp_path, registry):
    state = SLATE(slots=3, size=16, words=64, width=16, heads=2).state_dict()
    torch.save(broken(state), tmp_path / "s.pt")
    with pytest.raises(BackboneError) as refused:
        load_backbone(tmp_path / "s.pt", registry, options={"heads": 2})
    assert told in refused.value.cause


def test_a_file_goes_on_learning(tmp_path, registry):
    """Its transformer and its VAE come with it."""
    torch.save({"ocr_module_state_dict": ocrl_names(PixelSLATE(channels=4, **SMALL))}, tmp_path / "o.pth")
    options = {"heads": 2, "slots": 2}
    loaded = partial(load_backbone, tmp_path / "o.pth", registry, options=options)
    trained = tiny_train(slate, backbone=lambda: loaded().backbone, steps=2)
    before, after = loaded().backbone.net.state_dict(), trained.backbone.net.state_dict()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n.partition(".")[0] for n, _ in loaded().backbone.net.named_children()}


def ocrl_names(net):
    """A state dict as OCRL writes it; what turns is the place of the four sides."""
    names = {
        "dvae.encoder": "_dvae._encoder", "dvae.decoder": "_dvae._decoder", "cnn": "_enc._encoder", "out": "_out",
        "position.dense": "_enc_pos.channels_map", "slot_attn": "_slotattn", "slot_proj": "_slotproj",
        "dictionary": "_dict", "bos.token": "_bos_token._bos_token", "positional_encoder": "_z_pos",
        "tf_dec": "_tfdec",
    }  # fmt: skip
    state = net.state_dict()
    state["position.dense.weight"] = state["position.dense.weight"][..., None, None]
    parts = {key: next(part for part in names if key.startswith(part)) for key in state}
    return {names[part] + key.removeprefix(part): state[key] for key, part in parts.items()}
