"""Slot attention and SLATE on the official functions' values (singhgautam/slate, on formula-filled tensors)."""

from __future__ import annotations

import math

import pytest
import torch
from evalsuite_objects.iodine import Iodine
from evalsuite_objects.slate import SLATE, DiscreteVae, TransformerDecoder, gumbel_softmax
from evalsuite_objects.slots import BroadcastDecoder, SlotAttention
from evalsuite_objects.vae import Decoder, Encoder, divergence
from evalsuite_objects.zoo import build
from torch import Tensor, nn


def wave(shape: tuple[int, ...], a: float, b: float, scale: float = 1.0) -> Tensor:
    whole = torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b)
    return (scale * whole).view(shape).float()


def filled(module: nn.Module, scale: float) -> nn.Module:
    """Parameter number k is ``scale`` sin(0.37 i + 0.11 + 0.5 k); the gain of a norm is 1 plus a tenth of that."""
    with torch.no_grad():
        for k, (name, parameter) in enumerate(module.named_parameters()):
            if parameter.dtype == torch.bool:
                continue
            values = wave(tuple(parameter.shape), 0.37, 0.11 + 0.5 * k, scale)
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * values if gain else values)
    return module.eval().requires_grad_(False)


SLOTS = wave((2, 4, 8), 0.83, 0.2)


def test_slot_attention_has_the_official_values():
    module = filled(SlotAttention(6, 8, 12, iterations=3), 0.3)
    slots, attention = module(wave((2, 9, 6), 0.21, 0.4), SLOTS)
    expected = [0.46399373, 1.18634868, -0.08590150, -0.55548489, 1.07199764, -0.19779918, -0.70153898, 0.12980564]
    assert slots[0, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert float(slots.sum()) == pytest.approx(14.06767082, abs=1e-4)
    assert float(slots.abs().sum()) == pytest.approx(39.94657898, abs=1e-4)
    assert attention[0, 0].tolist() == pytest.approx([0.26347798, 0.25558129, 0.24546407, 0.23547667], abs=1e-5)


def test_two_heads_have_the_official_values():
    module = filled(SlotAttention(6, 8, 12, iterations=2, heads=2), 0.3)
    slots, attention = module(wave((2, 9, 6), 0.21, 0.4), SLOTS)
    assert float(slots.sum()) == pytest.approx(13.34519768, abs=1e-4)
    assert float(slots.abs().sum()) == pytest.approx(39.15715027, abs=1e-4)
    assert attention[0, 0].tolist() == pytest.approx([0.25526330, 0.25458834, 0.25020051, 0.23994789], abs=1e-5)


def test_the_decoder_has_the_official_values():
    module = filled(TransformerDecoder(2, 9, 8, 2), 0.3)
    out = module(wave((2, 5, 8), 0.31, 0.1), SLOTS)
    expected = [-1.15859640, -0.90013784, -0.73494327, 0.16070525, 0.58392620, 1.48812890, 1.10623264, 0.90285730]
    assert out[0, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert float(out.sum()) == pytest.approx(14.16888332, abs=1e-4)
    assert float(out.abs().sum()) == pytest.approx(73.78553772, abs=1e-4)


def test_sizes_are_the_official_ones():
    model = SLATE(slots=3, words=1024)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3_616_451
    assert len(model.state_dict()) == 159
    assert sum(p.numel() for p in DiscreteVae(16).parameters()) == 155_603


def test_names_are_those_of_the_published_files():
    names = set(SLATE().state_dict())
    assert {
        "dvae.encoder.0.m.weight", "dvae.encoder.7.bias", "dvae.decoder.11.weight", "positional_encoder.pe",
        "slot_attn.slot_mu", "slot_attn.slot_attention.gru.weight_ih", "slot_attn.mlp.2.bias", "out.weight",
        "dictionary.dictionary.weight", "tf_dec.blocks.3.self_attn_mask",
        "tf_dec.blocks.0.encoder_decoder_attn.proj_o.weight",
    } <= names  # fmt: skip


def test_a_hard_draw_is_one_hot_with_the_gradient_of_the_soft_one():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3, requires_grad=True)
    draw = gumbel_softmax(logits, 0.7, True)
    assert torch.allclose(draw.detach().sum(dim=1), torch.ones(2, 3))
    assert set(draw.detach().round(decimals=5).unique().tolist()) <= {0.0, 1.0}
    draw.square().sum().backward()
    assert logits.grad.abs().sum() > 0


def test_losses_are_sums_over_an_image_and_reach_every_part():
    torch.manual_seed(0)
    model = SLATE(slots=2, size=16, words=8, width=8, hidden=8, blocks=1, heads=2)
    losses = model.explain(torch.rand(3, 3, 16, 16), 1.0).losses
    assert losses["cross_entropy"].item() == pytest.approx(16 * math.log(8), rel=0.5)
    sum(losses.values()).backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


def test_slots_have_no_order_and_images_are_drawn_from_them():
    torch.manual_seed(0)
    decoder, slots = BroadcastDecoder(8, 16).eval(), torch.randn(2, 3, 8)
    image, colours, masks = decoder(slots)
    assert (image.shape, colours.shape, masks.shape) == ((2, 3, 16, 16), (2, 3, 3, 16, 16), (2, 3, 16, 16))
    torch.testing.assert_close(masks.sum(dim=1), torch.ones(2, 16, 16))
    torch.testing.assert_close(decoder(slots.flip(1))[0], image)


def test_generation_begins_with_nothing_and_fills_the_image():
    model = SLATE(slots=2, size=16, words=8, width=8, hidden=8, blocks=1, heads=2).eval()
    drawn = model.generate(model(torch.rand(2, 3, 16, 16)).tokens)
    assert drawn.shape == (2, 3, 16, 16)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1


@pytest.mark.parametrize("name", ["slot-attention", "slate"])
def test_as_backbones_they_give_slots_and_the_same_ones_again(name: str):
    options = {"words": 16, "width": 16} if name == "slate" else {"width": 16, "hidden": 16}
    backbone = build(name, slots=4, **options).eval()
    images = torch.rand(3, 3, 64, 64)
    first, again = backbone(images), backbone(images)
    assert first.tokens.shape == (3, 4, 16)
    assert torch.equal(first.tokens, again.tokens)
    torch.testing.assert_close(backbone(images[:1]).tokens, first.tokens[:1], atol=1e-5, rtol=1e-5)
    assert not torch.equal(backbone.train()(images).tokens, first.tokens)


# jsikyoon/OCRL at 01d0bd56, ocrs/iodine and ocrs/vaes, with noise that a wave gives: values, sums of gradients.

SEEN = 0.5 + 0.5 * wave((2, 3, 16, 16), 0.23, 0.3)


def waving(module: nn.Module, scale: float) -> nn.Module:
    """Parameter number k is ``scale`` sin(0.37 i + 0.11 + 0.5 k)."""
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter.copy_(wave(tuple(parameter.shape), 0.37, 0.11 + 0.5 * k, scale))
    return module


def steepness(*parameters: Tensor) -> list[float]:
    return [p.grad.abs().sum().item() for p in parameters]


def test_iodine_has_the_official_values():
    net = waving(Iodine(slots=3, width=4, iterations=3, channels=8, hidden=16, size=16), 0.3)
    found = net(SEEN, wave((2, 3, 3, 4), 0.71, 0.1))
    expected = [-0.14374864, 0.08927006, 0.49893981, 1.00446415]
    assert found.tokens[0, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert found.tokens.sum().item() == pytest.approx(19.382904, rel=1e-5)
    assert found.masks[0, :, 3, 5].tolist() == pytest.approx([0.15089901, 0.69303638, 0.15606460], abs=1e-5)
    assert found.rebuilt.clamp(0, 1).sum().item() == pytest.approx(387.01608, rel=1e-5)
    assert (SEEN - found.rebuilt).square().sum().item() / 2 == pytest.approx(1669.1155, rel=1e-4)
    assert found.divergences[:, -1].mean().item() == pytest.approx(7.4930234, rel=1e-5)
    loss = -(torch.arange(1, 4) / 3 * (found.likelihoods - found.divergences)).sum(dim=1).mean()
    assert loss.item() == pytest.approx(3345.5339, rel=1e-5)
    loss.backward()
    refine, decoder = net.refine, net.decoder
    begin = steepness(net.slot_mean_init, net.slot_logsig_init)
    assert begin == pytest.approx([1374.2725, 9438.3906], rel=1e-3)
    inner = steepness(refine.mlc.layers[0].weight, refine.mlp.weight, refine.lstm.weight_hh)
    assert inner == pytest.approx([53986.657, 26305.439, 449.56573], rel=1e-3)
    outer = steepness(decoder.mlc.layers[0].weight, decoder.conv.weight)
    assert outer == pytest.approx([581106.63, 102055.78], rel=1e-3)


def test_the_vae_has_the_official_values():
    encoder, spread, decoder = Encoder(16, 8), nn.Linear(1024, 8), Decoder(16, 8)
    waving(nn.ModuleList([encoder, spread, decoder]), 0.17)
    features = encoder(SEEN)
    expected = [0.14926553, 0.68206227, -0.79904193, -0.52039754, 0.71719557, -0.34964594, -0.87697989, 0.61388725]
    assert features.pooled[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert features.maps[4].abs().sum().item() == pytest.approx(671.70648, rel=1e-5)
    log_variance = spread(features.maps[4].flatten(1))
    rebuilt = decoder(features.pooled + (log_variance / 2).exp() * wave((2, 8), 0.71, 0.1))
    error = (SEEN - rebuilt).square().sum() / 2
    assert error.item() == pytest.approx(287.75439, rel=1e-5)
    kl = divergence(features.pooled, log_variance).mean()
    assert kl.item() == pytest.approx(2.4918921, rel=1e-5)
    (error + 5 * kl).backward()
    found = steepness(encoder.cnn[0].weight, encoder.mean.weight, spread.weight, decoder[0].weight, decoder[2].weight)
    assert found == pytest.approx([0.084792927, 7906.7544, 4159.4517, 0.65323925, 0.26824114], rel=1e-3)
