"""IODINE: inference by gradients, wherever it is asked for; its loss; and the published file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evalsuite_objects.iodine import IODINE, Iodine, iodine

from evalsuite import UsageError, load_backbone
from evalsuite.testing import check_backbone
from pretrain import Corpus, Recipe, Worlds
from pretrain.testing import check_method, losses, tiny_backbone, tiny_corpus, tiny_train
from pretrain.train import Plan, prepare

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def small(**options):
    torch.manual_seed(0)
    return iodine(**{**IODINE.small_arch, **options})


def method(**options) -> IODINE:
    return IODINE(IODINE.Options(**{"size": 16} | options))


def test_what_every_method_and_backbone_owes(registry):
    check_method(method, backbone=small)
    check_backbone(small, registry=registry)


def test_sizes_are_those_of_the_benchmark():
    net = iodine().net
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    assert shapes["refine.mlc.layers.0.weight"] == (64, 17, 3, 3)
    assert shapes["refine.lstm.weight_ih"] == (4 * 256, 256 + 4 * 64)
    assert shapes["decoder.mlc.layers.0.weight"] == (64, 66, 3, 3)
    assert shapes["decoder.conv.weight"] == (4, 64, 3, 3)
    assert (net.slots, net.iterations, net.sigma, net.beta) == (6, 5, 0.35, 1.0)
    strides = {layer.stride for layer in net.refine.mlc.layers}
    assert (len(net.refine.mlc.layers), strides) == (4, {(2, 2)})


# Inference ---------------------------------------------------------------------------------------------------


def test_it_infers_the_same_wherever_it_is_asked():
    backbone = small().eval()
    learning = backbone(IMAGES)
    with torch.no_grad():
        quiet = backbone(IMAGES)
    with torch.inference_mode():
        inferring = backbone(IMAGES.clone())
    frozen = backbone.requires_grad_(False)(IMAGES)
    assert learning.tokens.requires_grad
    for found in (quiet, inferring, frozen):
        assert not found.tokens.requires_grad
        for name in ("pooled", "tokens", "masks", "rebuilt", "likelihoods", "divergences"):
            assert torch.equal(getattr(found, name), getattr(learning, name)), name


def test_evaluation_draws_nothing_and_training_does():
    backbone = small()
    evaluated = [backbone.eval()(IMAGES).tokens for _ in range(2)]
    trained = [backbone.train()(IMAGES).tokens for _ in range(2)]
    assert torch.equal(*evaluated)
    assert not torch.equal(*trained)


def test_slots_are_apart_and_share_each_place():
    found = small(slots=4).eval()(IMAGES)
    assert found.tokens.shape == (3, 4, 4)
    assert torch.pdist(found.tokens[0].detach()).min() > 1e-3
    torch.testing.assert_close(found.masks.sum(dim=1), torch.ones(3, 16, 16))
    mixed = (found.masks.unsqueeze(2) * found.colours).sum(dim=1)
    torch.testing.assert_close(found.rebuilt, mixed)


def test_every_weight_is_reached_in_training_and_in_evaluation():
    """A policy trains its encoder in evaluation mode."""
    for mode in (True, False):
        backbone = small().train(mode)
        backbone(IMAGES).tokens.sum().backward()
        silent = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == []


def test_gradients_of_the_bound_are_not_differentiated():
    """What a slot is drawn to is an input like any other: with the refiner's reading of it zero, nothing flows."""
    net = small().net
    images = IMAGES.clone().requires_grad_()
    with torch.no_grad():
        net.refine.mlc.layers[0].weight[:, [0, 1, 2, *range(15, 17)]] = 0  # of image and coordinates
        net.refine.mlc.layers[0].weight[:, 8] = 0  # of the mask's posterior, which is no gradient
    net.eval()(images).tokens.sum().backward()
    assert not images.grad.any()


def test_the_bound_is_that_of_a_mixture_of_each_channel_of_a_pixel():
    net = small().net.eval()
    slots = torch.randn(3, 2, 4)
    drawn = net.draw(slots, IMAGES)
    parts = torch.distributions.Normal(drawn.colours, 0.35).log_prob(IMAGES[:, None])
    mixture = (drawn.masks * parts.exp()).sum(dim=1, keepdim=True).log()
    torch.testing.assert_close(drawn.whole, mixture, rtol=1e-4, atol=1e-4)


# The method --------------------------------------------------------------------------------------------------


def ready(out, backbone, made=None):
    plan = Plan(out=out, epochs=1, batch_size=8, device="cpu", workers=0)
    return prepare(Recipe(made or method()), backbone, tiny_corpus(), plan), plan


def test_later_steps_weigh_more(tmp_path):
    state, plan = ready(tmp_path, small(beta=2.0))
    (draw, *_) = state.draws(plan)
    batch = draw.batch.to(state.run.device)
    state.run.rng.manual_seed(0)
    (found,) = state.recipe.features(state.run, batch)
    terms = state.recipe.losses(state.run, batch, [found], [])
    of = {"likelihood": -found.likelihoods.mean(dim=0), "divergence": 2 * found.divergences.mean(dim=0)}
    for name, (first, second, third) in of.items():
        torch.testing.assert_close(terms[name], first / 3 + second * 2 / 3 + third)


def test_it_learns_and_the_log_tells_whose_pixels_are_whose(tmp_path):
    learned, held_out = Worlds("random-objects", count=64), Worlds("random-objects", count=8, seed=1)
    corpus = Corpus(learned, (learned, held_out))
    trained = tiny_train(
        lambda: method(lr=3e-3), backbone=small, corpus=corpus, steps=48, epochs=6, knn_every=6, out=tmp_path
    )
    (told,) = [entry for entry in trained.log if "fg_ari" in entry]
    totals = [terms["likelihood"] + terms["divergence"] for terms in losses(trained)]
    assert np.mean(totals[-8:]) < 0.7 * np.mean(totals[:4])
    assert -1 < told["fg_ari"] <= 1
    assert told["divergence"] >= 0
    assert told["reconstruction_error"] > 0
    assert (tmp_path / "objects.png").stat().st_size > 1000


def test_without_segments_there_is_no_index_of_pixels(tmp_path):
    trained = tiny_train(method, backbone=small, steps=4, knn_every=1, out=tmp_path)
    told = [entry for entry in trained.log if "reconstruction_error" in entry]
    assert told
    assert all("fg_ari" not in entry for entry in told)


def test_gradients_are_clipped_by_their_length():
    assert (IODINE.Options().clip, IODINE.Options().clip_norm) == (5.0, "l2")


@pytest.mark.parametrize("backbone", [tiny_backbone, lambda: small(size=32)], ids=["another", "larger"])
def test_what_it_cannot_train_is_refused_before_any_work(tmp_path, backbone):
    with pytest.raises(UsageError, match=r"cannot train .* on images of 16 pixels") as refused:
        ready(tmp_path, backbone())
    assert refused.value.fix == "--arch objects:iodine --arch-option size=16"
    assert not any(tmp_path.iterdir())


def test_a_published_file_loads_without_a_flag(tmp_path, registry):
    net = Iodine(width=4, channels=8, hidden=16)
    tensors = {name.replace("refine.mlp.", "refine.mlp.layers.0."): value for name, value in net.state_dict().items()}
    assert "refine.mlp.layers.0.weight" in tensors
    tensors["slot_init"] = torch.zeros(1, 1, 4)
    torch.save({"step": 1, "epoch": 0, "best_val_loss": 1.0, "ocr_module_state_dict": tensors}, tmp_path / "i.pth")
    loaded = load_backbone(tmp_path / "i.pth", registry)
    assert (loaded.report.arch, loaded.report.matched) == ("objects:iodine", 1.0)
    assert loaded.backbone.spec.options["width"] == 4
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.backbone.eval()(images).tokens, net.eval()(images).tokens)
