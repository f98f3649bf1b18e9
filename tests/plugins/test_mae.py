"""Masked autoencoding: what the encoder sees, what the decoder draws, and what begins how."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from evalsuite_objects.mae import MAE, Decoder, begin, patches, visible

from evalsuite import UsageError, load_backbone
from evalsuite.backbone import build
from pretrain import Augment, Centre, Recipe
from pretrain.blocks import Noise
from pretrain.testing import check_method, small_backbone, small_options, tiny_backbone, tiny_corpus, tiny_train
from pretrain.train import Plan, prepare

SMALL = dict(MAE.small_arch)


def method(**options) -> MAE:
    return MAE(MAE.Options(**{"size": 16, "warmup": 0.0} | dict(MAE.small) | options))


@pytest.fixture
def vit(registry):
    def made(**options):
        torch.manual_seed(0)
        return build("timm:vit_base_patch16_224", registry, **{**SMALL, **options})

    return made


def ready(out, backbone, made=None):
    plan = Plan(out=out, epochs=1, batch_size=8, device="cpu", workers=0)
    return prepare(Recipe(made or method()), backbone, tiny_corpus(), plan), plan


def looked(state, plan, seed=0):
    """A batch, and what is said of it."""
    (draw, *_) = state.draws(plan)
    batch = draw.batch.to(state.run.device)
    state.run.rng.manual_seed(seed)
    return batch, state.recipe.features(state.run, batch)[0]


def test_what_every_method_owes(registry):
    check_method(lambda: MAE(small_options(MAE)), backbone=lambda: small_backbone(MAE, registry))


def test_patches_lie_row_by_row():
    images = torch.rand(2, 3, 8, 12)
    found = patches(images, 4)
    assert found.shape == (2, 6, 48)
    assert torch.equal(found[1, 4].view(3, 4, 4), images[1, :, 4:8, 4:8])


# What the encoder sees ---------------------------------------------------------------------------------------


def test_with_every_patch_in_place_it_is_the_plain_network(vit):
    net, images = vit(depth=2).net.eval(), torch.rand(2, 3, 16, 16)
    whole = visible(net, images, torch.arange(16).expand(2, -1))
    torch.testing.assert_close(whole, net.forward_features(images))
    assert not net.patch_drop._forward_hooks


def test_hidden_patches_do_not_matter_and_visible_ones_do(vit):
    net, images = vit(depth=2).net.eval(), torch.rand(1, 3, 16, 16)
    places = torch.tensor([[5, 2, 10]])
    before = visible(net, images, places)
    assert before.shape == (1, 1 + 3, 16)
    changed = images.clone()
    changed[:, :, 4:8, 8:12] = 0  # place 6
    assert torch.equal(visible(net, changed, places), before)
    changed[:, :, 4:8, 4:8] = 0  # place 5
    assert not torch.equal(visible(net, changed, places), before)


def test_every_image_hides_three_quarters_of_its_own(vit, tmp_path):
    state, plan = ready(tmp_path, vit())
    _, found = looked(state, plan)
    assert found.every.shape == (8, 1 + 4, 16)
    assert torch.equal(found.order.sort(dim=1).values, torch.arange(16).expand(8, -1))
    assert len({tuple(row[:4].sort().values.tolist()) for row in found.order}) > 4
    assert not torch.equal(looked(state, plan, seed=1)[1].order, found.order)
    assert torch.equal(found.pooled, found.every[:, 0])


def test_places_are_hidden_equally_often(vit, tmp_path):
    state, _ = ready(tmp_path, vit())
    noise = Noise(torch.Generator().manual_seed(0), 2000, state.run.device)
    with torch.no_grad():
        order = state.recipe.method.masked(state.run, torch.zeros(2000, 3, 16, 16), noise).order
    shown = torch.bincount(order[:, :4].flatten(), minlength=16)
    assert (shown - 500).abs().max() < 5 * math.sqrt(2000 * 3 / 16)


# What is drawn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_the_mean_squared_error_of_hidden_pixels(vit, tmp_path, normalise):
    state, plan = ready(tmp_path, vit(), method(normalise=normalise))
    batch, found = looked(state, plan)
    (loss,) = state.recipe.losses(state.run, batch, [found], []).values()
    drawn, pixels = state.recipe.method.decoder(found.every, found.order), state.run.backbone.normalise
    total = 0.0
    for image, order, guess in zip(pixels(batch.views[0].data), found.order, drawn, strict=True):
        for place, patch in zip(order[4:].tolist(), guess, strict=True):
            top, left = 4 * (place // 4), 4 * (place % 4)
            target = image[:, top : top + 4, left : left + 4].flatten()
            if normalise:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            total += (patch - target).square().mean().item()
    assert loss.item() == pytest.approx(total / (8 * 12), rel=1e-5)


def test_the_decoder_is_told_where_patches_lie():
    torch.manual_seed(0)
    decoder = Decoder(8, (4, 4), 1, 12, 16, 1, 2)
    every, order = torch.rand(1, 1 + 4, 8), torch.randperm(16)[None]
    drawn = decoder(every, order)
    assert drawn.shape == (1, 12, 12)
    turned = torch.cat([order[:, :4], order[:, 4:].flip(1)], dim=1)
    torch.testing.assert_close(decoder(every, turned), drawn.flip(1))  # by their places, whatever their order
    swapped = torch.cat([every[:, :1], every[:, 1:].flip(1)], dim=1)
    assert not torch.allclose(decoder(swapped, order), drawn)
    decoder.positions.zero_()
    torch.testing.assert_close(decoder(every, order), decoder(every, order)[:, :1].expand(-1, 12, -1))


def test_positions_are_sines_across_and_then_down():
    decoder = Decoder(8, (2, 3), 0, 12, 16, 1, 2)
    for place, row in enumerate(decoder.positions):
        x, y = place % 3, place // 3
        slow = [10000 ** -(k / 4) for k in range(4)]
        expected = [f(z * w) for z in (x, y) for f in (math.sin, math.cos) for w in slow]
        assert row.tolist() == pytest.approx(expected, abs=1e-5)


# How it begins -----------------------------------------------------------------------------------------------


def test_a_fresh_network_begins_as_in_the_paper(vit):
    net = vit(embed_dim=48, num_heads=4).net
    begin(net)
    for layer in (net.blocks[0].attn.qkv, net.blocks[0].mlp.fc1):
        limit = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.95 * limit < layer.weight.abs().max() <= limit
        assert not layer.bias.any()
    limit = math.sqrt(6 / (48 + 48))  # of 3 x 4 x 4 pixels
    assert 0.95 * limit < net.patch_embed.proj.weight.abs().max() <= limit
    assert not net.pos_embed[0, 0].any()
    assert net.pos_embed[0, 1].tolist() == [0.0] * 12 + [1.0] * 12 + [0.0] * 12 + [1.0] * 12
    assert 0.01 < net.cls_token.std() < 0.03


def test_positions_are_not_trained_and_the_rest_is(vit):
    backbone = vit()
    trained = tiny_train(lambda: method(lr=0.1), backbone=lambda: backbone, steps=2).backbone.net
    fresh = Decoder(16, (4, 4), 1, 48, 16, 1, 2)
    torch.testing.assert_close(trained.pos_embed[0, 1:], fresh.positions)
    assert trained.norm.bias.any()


def test_a_network_that_has_learned_keeps_what_it_has(vit):
    net = vit().net
    with torch.no_grad():
        net.norm.weight[0] = 1.01
    before = {name: value.clone() for name, value in net.state_dict().items()}
    begin(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.pos_embed.requires_grad


def test_what_comes_out_is_the_plain_transformer(vit, tmp_path, registry):
    trained = tiny_train(lambda: method(lr=0.1), backbone=vit, steps=8, epochs=2, out=tmp_path)
    loaded = load_backbone(trained.path, registry).backbone.eval()
    assert (loaded.spec.arch, loaded.spec.image_size) == ("timm:vit_base_patch16_224", (16, 16))
    plain = timm.create_model("vit_base_patch16_224", num_classes=0, **SMALL).eval()
    plain.load_state_dict(loaded.net.state_dict())
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        features, expected = loaded(images), plain.forward_features(loaded.normalise(images))
    torch.testing.assert_close(features.tokens, expected[:, 1:])
    torch.testing.assert_close(features.pooled, expected[:, 0])


# The recipe --------------------------------------------------------------------------------------------------


def test_the_optimiser_is_adamw_with_betas_of_its_own(vit, tmp_path):
    state, _ = ready(tmp_path, vit(), method(lr=1.5e-4))
    optimizer = state.recipe.optimizer(state.run, state.objective)
    matrices, vectors = optimizer.param_groups
    assert (matrices["betas"], matrices["weight_decay"], vectors["weight_decay"]) == ((0.9, 0.95), 0.05, 0.0)
    assert matrices["lr"] == pytest.approx(1.5e-4 * 8 / 256)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(state.run.backbone.net.pos_embed) not in held


def test_presets_fit_and_differ_in_what_is_seen():
    assert MAE().views() == (Augment(224, crop=(0.2, 1.0), interpolation="bicubic", jitter=None, gray=0.0),)
    benchmark = MAE(MAE.Options(**MAE.preset("objects").options))
    assert benchmark.views() == (Centre(64, share=1.0),)
    assert benchmark.options.weight_decay == 0.01


def test_it_learns_and_the_log_has_the_error_of_held_out_images(vit):
    trained = tiny_train(lambda: method(lr=0.1), backbone=vit, corpus=tiny_corpus(64), steps=40, epochs=5, knn_every=5)
    (told,) = [entry for entry in trained.log if "reconstruction_error" in entry]
    assert 0 < told["reconstruction_error"] < 0.95 * trained.log[0]["reconstruction"]


@pytest.mark.parametrize(
    ("arch", "options", "made", "problem", "fix"),
    [
        (None, {}, {}, "mae cannot train", "vit_base_patch16_224"),
        ("timm:vit_base_patch16_224", SMALL, {"size": 32}, "images of 16 pixels, not 32", "img_size=32"),
        ("timm:vit_base_patch16_224", {**SMALL, "patch_size": 5}, {}, "no whole number of patches of 5", "img_size=15"),
        ("timm:vit_base_patch16_224", SMALL, {"mask": 0.99}, "of 16 patches 0 are to be seen", "mae.mask"),
        ("timm:vit_base_patch16_224", {**SMALL, "pos_embed": "none"}, {}, "mae cannot train", "plain ViTs"),
    ],
    ids=["convolutions", "another size", "cut patches", "nothing visible", "no positions"],
)
def test_what_it_cannot_train_is_refused_before_any_work(arch, options, made, problem, fix, registry, tmp_path):
    backbone = build(arch, registry, **options) if arch else tiny_backbone()
    with pytest.raises(UsageError, match=problem) as refused:
        ready(tmp_path, backbone, method(**made))
    assert fix in refused.value.fix
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"mask": 1.0}, {"mask": 0.0}, {"decoder_width": 10, "decoder_heads": 4}], ids=str)
def test_numbers_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match=r"between 0 and 1|no multiple of decoder_heads"):
        method(**options)


def test_the_benchmarks_file_loads_without_a_flag(vit, tmp_path, registry):
    net = vit(embed_dim=64, depth=2, num_heads=1).net
    tensors = {f"_mae.{name}": value for name, value in net.state_dict().items()}
    tensors |= {"_mae.mask_token": torch.zeros(1, 1, 8), "_mae.decoder_embed.weight": torch.zeros(8, 64)}
    torch.save({"step": 1, "epoch": 0, "best_val_loss": 1.0, "ocr_module_state_dict": tensors}, tmp_path / "mae.pth")
    loaded = load_backbone(tmp_path / "mae.pth", registry)
    assert loaded.report.matched == 1.0
    spec = loaded.backbone.spec
    assert (spec.image_size, spec.mean, spec.std) == ((16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
