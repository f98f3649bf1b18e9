"""The variational autoencoder: its loss, its encoder, and the published file."""

from __future__ import annotations

import pytest
import torch
from evalsuite_objects.vae import VAE, Decoder, Encoder, divergence, vae
from torch.distributions import Normal, kl_divergence

from evalsuite import BackboneError, UsageError, load_backbone
from evalsuite.backbone import build
from evalsuite.testing import check_backbone
from pretrain import Recipe
from pretrain.blocks import Noise
from pretrain.testing import check_method, losses, tiny_backbone, tiny_corpus, tiny_train
from pretrain.train import Plan, prepare


def method(**options) -> VAE:
    return VAE(VAE.Options(**{"size": 16} | options))


def small():
    torch.manual_seed(0)
    return vae(size=16, latent=8)


def state(out, made=None, backbone=None):
    plan = Plan(out=out, epochs=1, batch_size=8, device="cpu", workers=0)
    return prepare(Recipe(made or method()), backbone or small(), tiny_corpus(), plan), plan


def test_what_every_method_and_backbone_owes(registry):
    check_method(method, backbone=small)
    check_backbone(small, registry=registry)


def test_sizes_are_those_of_the_benchmark():
    backbone = vae()
    assert sum(p.numel() for p in backbone.net.cnn.parameters()) == sum(
        (inputs * kernel**2 + 1) * 64
        for stage in range(4)
        for inputs, kernel in ((64 if stage else 3, 2), (64, 1), (64, 1), (64, 1))
    ) + 64 * (64 + 1)
    assert backbone.net.mean.weight.shape == (256, 1024)
    features = backbone(torch.rand(2, 3, 64, 64))
    assert (features.pooled.shape, features.tokens.shape) == ((2, 256), (2, 16, 64))
    assert torch.equal(features.tokens[0, 4 * 2 + 1], features.maps[16][0, :, 2, 1])
    assert Decoder(64, 256)(torch.rand(2, 256)).shape == (2, 3, 64, 64)


def test_the_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(3, 5), torch.randn(3, 5)
    theirs = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(divergence(mean, log_variance), theirs)


def test_the_loss_is_a_sum_over_the_image_and_a_mean_over_images(tmp_path):
    made, plan = state(tmp_path, method(beta=3.0))
    run, recipe = made.run, made.recipe
    (draw, *_) = made.draws(plan)
    batch = draw.batch.to(run.device)
    run.rng.manual_seed(5)
    features = recipe.features(run, batch)
    found = recipe.losses(run, batch, features, [])
    images, learner = batch.views[0].data, recipe.method
    log_variance = learner.log_variance(features[0].maps[4].flatten(1))
    noise = Noise(torch.Generator().manual_seed(5), 8, run.device).normal(log_variance)
    rebuilt = learner.decoder(features[0].pooled + (log_variance / 2).exp() * noise)
    torch.testing.assert_close(found["reconstruction"], (images - rebuilt).square().flatten(1).sum(1).mean())
    torch.testing.assert_close(found["divergence"], 3 * divergence(features[0].pooled, log_variance).mean())


def test_images_are_seen_whole_and_unchanged(tmp_path):
    made, plan = state(tmp_path)
    (draw, *_) = made.draws(plan)
    row = int(draw.batch.index[0])
    assert torch.equal(draw.batch.views[0].data[0], made.data[row]["image"])


def test_it_learns_and_the_log_has_the_error_of_held_out_images():
    corpus = tiny_corpus(64)
    trained = tiny_train(lambda: method(lr=2e-3), backbone=small, corpus=corpus, steps=40, epochs=5, knn_every=5)
    (told,) = [entry for entry in trained.log if "reconstruction_error" in entry]
    first = losses(trained)[0]
    assert told["reconstruction_error"] < 0.5 * first["reconstruction"]
    assert losses(trained)[-1]["reconstruction"] < 0.5 * first["reconstruction"]
    assert told["divergence"] > 0


@pytest.mark.parametrize("backbone", [tiny_backbone, lambda: vae(size=32, latent=8)], ids=["another", "larger"])
def test_what_it_cannot_train_is_refused_before_any_work(tmp_path, backbone):
    with pytest.raises(UsageError, match=r"cannot train .* on images of 16 pixels") as refused:
        state(tmp_path, backbone=backbone())
    assert refused.value.fix == "--arch objects:vae --arch-option size=16"


@pytest.mark.parametrize(
    ("size", "cause"), [(48, "no 4 doubled"), (12, "no 4 doubled"), (3, "equal to 8"), (0, "equal to 8")]
)
def test_a_size_that_is_no_power_of_two_is_refused(registry, size, cause):
    with pytest.raises(BackboneError, match="cannot be built") as refused:
        build("objects:vae", registry, size=size)
    assert cause in refused.value.cause


def published(size: int, cells: int = 4):
    """``ocr_module_state_dict`` as jsikyoon/OCRL names its tensors."""
    net, stages = Encoder(size, 8), (size // 4).bit_length() - 1
    convs = [layer for layer in net.cnn if isinstance(layer, torch.nn.Conv2d)]
    tensors = {}
    for n, conv in enumerate(convs):
        name = f"_enc._encoder.{n}" + (".m" if n < 4 * stages else "")
        tensors |= {f"{name}.weight": conv.weight, f"{name}.bias": conv.bias}
    wide = torch.zeros(8, 64 * cells**2) if cells != 4 else net.mean.weight
    tensors |= {"_mu.weight": wide, "_mu.bias": net.mean.bias, "_var.weight": wide, "_var.bias": net.mean.bias}
    tensors |= {"_in_dec.weight": net.mean.weight.T, "_dec._decoder.0.m.weight": convs[1].weight}
    return net, {k: v.detach() for k, v in tensors.items()}


def test_a_published_file_loads_without_a_flag(tmp_path, registry):
    net, tensors = published(32)
    torch.save({"step": 1, "epoch": 0, "best_val_loss": 1.0, "ocr_module_state_dict": tensors}, tmp_path / "vae.pth")
    loaded = load_backbone(tmp_path / "vae.pth", registry)
    assert (loaded.report.arch, loaded.report.matched) == ("objects:vae", 1.0)
    assert loaded.backbone.spec.image_size == (32, 32)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone(images).pooled, net(images).pooled)


def test_a_published_file_of_another_map_is_told(tmp_path, registry):
    torch.save({"ocr_module_state_dict": published(32, cells=8)[1]}, tmp_path / "vae.pth")
    with pytest.raises(BackboneError, match="cannot be inferred") as refused:
        load_backbone(tmp_path / "vae.pth", registry)
    assert "a map of 64 places, where objects:vae has 16" in refused.value.cause
