"""Sizes, orders and one value of the benchmark's own poolings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.errors import BackboneError, UsageError
from evalsuite.features.poolings import NatureCNN, ObservationEncoder, RelationNetwork, pooling


def wave(shape: tuple[int, ...], a: float, b: float, s: float = 1.0) -> Tensor:
    return s * torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b).view(shape)


def test_the_pair_term_of_the_relation_network_has_the_official_value():
    x, w = wave((2, 3, 4), 0.21, 0.4), wave((5, 8), 0.37, 0.11, 0.3)
    found = (RelationNetwork.pairs(x) @ w.T).relu().sum(dim=1)[0]
    assert found.numpy() == pytest.approx([7.28900576, 0, 6.38454342, 0, 4.64715290], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "tokens", "width"),
    [("transformer", 6, 128), ("relation", 6, 64), ("mlp", 6, 128), ("identity", 6, 6 * 12), ("transformer", 1, 128),
     ("cnn-linear", 4096, 512), ("cnn-transformer", 4096, 128)],
)  # fmt: skip
def test_widths(name: str, tokens: int, width: int):
    pool = pooling(name, tokens, 12).eval()
    assert pool.width == width
    assert pool(torch.rand(2, tokens, 12)).shape == (2, width)


@pytest.mark.parametrize("name", ["transformer", "relation"])
def test_sets_have_no_order(name: str):
    pool, x = pooling(name, 5, 8).eval(), torch.rand(3, 5, 8)
    torch.testing.assert_close(pool(x), pool(x[:, torch.randperm(5)]), atol=1e-5, rtol=1e-5)


def test_places_give_an_order():
    torch.manual_seed(0)
    pool, x = pooling("transformer", 5, 8, position=True).eval(), torch.rand(3, 5, 8)
    assert (pool(x) - pool(x.flip(1))).abs().max() > 1e-6
    assert pool.places[0, 1::2].tolist() == pytest.approx([0.001] * 64)  # the class token's, the cosines of zero
    assert "places" not in dict(pool.named_parameters())


def test_the_transformer_is_torchs_own_after_norm_with_dropout():
    layer = pooling("transformer", 5, 8, layers=3).encoder.layers
    assert len(layer) == 3
    assert (layer[0].norm_first, layer[0].dropout.p, layer[0].linear1.out_features) == (False, 0.1, 2048)
    assert layer[0].self_attn.num_heads == 8


def test_the_relation_network_has_the_published_layers():
    pool = RelationNetwork(12)
    linear = [m for m in pool.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [256, 256, 256, 256, 256, 128, 64, 64]
    assert linear[0].in_features == 24
    assert isinstance(pool.f[-1], nn.ReLU)


def test_the_convolutions_turn_64_pixels_into_1024_numbers():
    assert NatureCNN(3)(torch.rand(1, 3, 64, 64)).flatten(1).shape == (1, 1024)


def test_what_cannot_be_pooled_is_refused():
    with pytest.raises(UsageError, match="no pooling 'max'"):
        pooling("max", 6, 12)
    with pytest.raises(UsageError, match="cannot pool 6 tokens") as refusal:
        pooling("cnn-linear", 6, 12)
    assert "36 x 36" in refusal.value.cause


class _Slots(nn.Module):
    def forward(self, x: Tensor) -> Features:
        means = x.mean(dim=(2, 3))
        return Features(pooled=means, tokens=torch.stack([means, -means], dim=1))


def backbone(*gives: str) -> Backbone:
    spec = BackboneSpec(arch="test:slots", dim=3, strides={}, gives=frozenset(gives), image_size=(32, 32))
    return Backbone(_Slots(), spec).eval()


def test_an_encoder_reads_tokens_where_there_are_any():
    seen = np.zeros((4, 64, 64, 3), np.uint8)
    encoder = ObservationEncoder(backbone("tokens", "pooled"), torch.device("cpu"))
    assert encoder.encode(seen).shape == (4, 2, 3)
    assert (encoder.reads, encoder.pooling, encoder.calls, encoder.encoded) == ("tokens", "transformer", 1, 4)
    vector = ObservationEncoder(backbone("pooled"), torch.device("cpu"))
    assert vector.encode(seen).shape == (4, 1, 3)
    assert (vector.reads, vector.pooling) == ("pooled", "mlp")


def test_an_encoder_is_shown_images_of_its_own_size_in_its_own_range():
    encoder = ObservationEncoder(backbone("pooled"), torch.device("cpu"))
    white = encoder.encode(np.full((1, 64, 64, 3), 255, np.uint8))[0, 0]
    mean, std = torch.tensor(encoder.backbone.spec.mean), torch.tensor(encoder.backbone.spec.std)
    assert white == pytest.approx(((1 - mean) / std).numpy(), abs=1e-5)
    assert encoder.size == (32, 32)


class _Kinds(nn.Module):
    """A layer on whatever it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Features:
        found = self.layer(x if x.ndim == 3 else x.mean(dim=(2, 3)).unsqueeze(1))
        self.kind = found.dtype
        return Features(tokens=found)


@pytest.mark.parametrize(("gives", "kind"), [("pixels", torch.bfloat16), ("state", torch.float32)])
def test_in_mixed_precision_images_are_and_coordinates_are_not(gives, kind):
    spec = BackboneSpec(arch="test:kinds", dim=3, strides={}, gives=frozenset({"tokens", gives}), image_size=(32, 32))
    encoder = ObservationEncoder(Backbone(_Kinds(), spec).eval(), torch.device("cpu"), precision="bf16-mixed")
    if gives == "state":  # shown as it is, as the ground truth is
        encoder.backbone.normalise = lambda state: state
    seen = np.zeros((2, 4, 3), np.float32) if gives == "state" else np.zeros((2, 32, 32, 3), np.uint8)
    assert encoder.encode(seen).dtype == np.float32
    assert encoder.backbone.net.kind == kind


def test_an_encoder_without_what_is_read_is_refused():
    with pytest.raises(BackboneError, match="tokens are to be pooled"):
        ObservationEncoder(backbone("pooled"), torch.device("cpu"), reads="tokens")
