"""SLATE, the original and the benchmark's, on the official code's values, through files with the official names.

The official modules of singhgautam/slate (06f63c53) and jsikyoon/OCRL (01d0bd56) were executed in evaluation mode on
these tensors, with these numbers in the place of random ones.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evalsuite_objects.slate import SLATE, PixelSLATE
from evalsuite_objects.slate_method import SlateMethod
from torch import Tensor

from evalsuite import load_backbone
from pretrain import Run

SIZES: dict[str, Any] = {"slots": 3, "size": 16, "words": 16, "width": 8, "hidden": 12, "blocks": 2, "heads": 2}
OFFICIAL = {
    "dvae.encoder": "_dvae._encoder", "dvae.decoder": "_dvae._decoder", "cnn": "_enc._encoder",
    "position.dense": "_enc_pos.channels_map", "slot_attn": "_slotattn", "slot_proj": "_slotproj",
    "dictionary": "_dict", "bos.token": "_bos_token._bos_token", "positional_encoder": "_z_pos", "tf_dec": "_tfdec",
    "out": "_out",
}  # fmt: skip


def hashed(shape: tuple[int, ...], k: float) -> Tensor:
    """Numbers in [-1, 1) that look like noise: twice the fraction of 43758.5453 sin(12.9898 i + 0.7 k), less one."""
    x = torch.sin(12.9898 * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) + 0.7 * k) * 43758.5453
    return (2 * (x - x.floor()) - 1).view(shape).float()


IMAGES = (hashed((2, 3, 16, 16), 0.5) + 1) / 2


class Known:
    """In the place of noise."""

    draws = 0

    def normal(self, like: Tensor) -> Tensor:
        return wave(like.shape, 0.71, 0.3)

    def exponential(self, like: Tensor) -> Tensor:
        self.draws += 1
        return wave(like.shape, 0.57, 0.9 * self.draws) + 1.05


def wave(shape: torch.Size, a: float, b: float) -> Tensor:
    return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b).view(shape).float()


def digest(state: dict[str, Tensor]) -> str:
    """Of names and shapes."""
    lines = "\n".join(f"{name} {tuple(value.shape)}" for name, value in sorted(state.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def filled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensor number k in the order of names is 0.3 times :func:`hashed`; the gain of a norm 1 plus a tenth of that."""
    new = {}
    for k, (name, value) in enumerate(sorted(state.items())):
        values = 0.3 * hashed(tuple(value.shape), k)
        gain = value.ndim == 1 and name.endswith("weight")
        new[name] = (1 + 0.1 * values if gain else values) if value.is_floating_point() else value
    return new


def ocrl(decoder: bool = False) -> dict[str, Tensor]:
    """The tensors of OCRL's SLATE under its names; with ``decoder`` those of its Slot Attention."""
    state = PixelSLATE(channels=6, slot_width=10, **SIZES).state_dict()
    found = {}
    for name, value in state.items():
        part = next(part for part in OFFICIAL if name.startswith(part))
        found[OFFICIAL[part] + name.removeprefix(part)] = value
    found["_enc_pos.channels_map.weight"] = found["_enc_pos.channels_map.weight"][..., None, None]
    found["_enc_pos.linear_position_embedding"] = torch.zeros(1, 4, 16, 16)
    if decoder:
        for place, inputs in enumerate((10, 6, 6)):
            found[f"_dec._decoder.{place}.m.weight"] = torch.zeros(6, inputs, 5, 5)
            found[f"_dec._decoder.{place}.m.bias"] = torch.zeros(6)
        found |= {"_dec._decoder.3.weight": torch.zeros(4, 6, 3, 3), "_dec._decoder.3.bias": torch.zeros(4)}
        found |= {f"_dec._pos_emb.{k.removeprefix('_enc_pos.')}": v for k, v in found.items() if "_enc_pos." in k}
        found["_dec._pos_emb.channels_map.weight"] = torch.zeros(10, 4, 1, 1)
        found["_dec._pos_emb.channels_map.bias"] = torch.zeros(10)
    return filled(found)


def load(content: Any, folder: Path, registry: Any, **options: Any) -> Any:
    torch.save(content, folder / "official.pth")
    return load_backbone(folder / "official.pth", registry, options=options)


def assert_sums(found: Tensor, first: list[float], total: float, absolute: float) -> None:
    assert found.flatten()[: len(first)].tolist() == pytest.approx(first, abs=2e-6)
    assert float(found.double().sum()) == pytest.approx(total, abs=1e-4)
    assert float(found.double().abs().sum()) == pytest.approx(absolute, abs=1e-4)


@torch.no_grad()
def test_the_original_has_the_official_values(tmp_path, registry):
    state = filled(SLATE(**SIZES).state_dict())
    assert (len(state), digest(state)) == (121, "9c365345b137fa0b")
    loaded = load({"epoch": 3, "model": state, "optimizer": {}}, tmp_path, registry, heads=2)
    assert (loaded.backbone.spec.arch, loaded.report.naming, loaded.report.matched) == ("objects:slate", "slate", 1.0)
    assert loaded.report.parameters == 159_367
    assert all(name.endswith("self_attn_mask") for name in loaded.report.unexpected)
    assert "3 slots and 3 iterations" in loaded.report.reason[0]
    net = loaded.backbone.net
    soft, hard = (net.explain(IMAGES, 0.7, hard, Known()).losses for hard in (False, True))
    assert (float(soft["mse"]), float(hard["mse"])) == pytest.approx((1511.89916992, 1482.59460449), rel=1e-6)
    assert [float(terms["cross_entropy"]) for terms in (soft, hard)] == pytest.approx([45.98416138] * 2, rel=1e-6)
    net.slot_attn.noise = Known().normal(torch.empty(2, 3, 8))
    found = loaded.backbone(IMAGES)
    first = [-0.33632281, 0.22113687, -0.15659681, -0.32109427, 0.92331982, -1.11903679]
    assert_sums(found.tokens, first, -9.45333023, 25.15687025)
    first = [0.38571256, 0.33861995, 0.27566752, 0.37305588, 0.33783114, 0.28911299]
    assert_sums(found.masks.flatten(2).transpose(1, 2), first, 32.0, 32.0)
    first = [0.0, 0.31139719, 0.0, 0.33419213, 0.0, 0.23070261]
    assert_sums(net.generate(found.tokens), first, 306.19468191, 306.19468191)
    first_row = [9, 9, 14, 14, 9, 9, 9, 14, 14, 9, 9, 9, 9, 9, 9, 9]
    assert net.likeliest(IMAGES)[0].tolist() == first_row


@torch.no_grad()
def test_the_benchmarks_variant_has_the_official_values(tmp_path, registry):
    state = ocrl()
    assert (len(state), digest(state)) == (117, "0ca09d99b50463f1")
    content = {"step": 9, "epoch": 1, "best_val_loss": 1.0, "ocr_module_state_dict": state, "ocr_opt_state_dict": {}}
    loaded = load(content, tmp_path, registry, slots=3, heads=2)
    told = (loaded.backbone.spec.arch, loaded.report.naming, loaded.report.container, loaded.report.matched)
    assert told == ("objects:slate-pixels", "ocrl", "ocr_module_state_dict", 1.0)
    assert loaded.report.parameters == 161_429
    net = loaded.backbone.net
    terms = net.explain(IMAGES, 0.7, False, Known()).losses
    assert float(terms["mse"]) == pytest.approx(1057.75549316, rel=1e-6)
    assert float(terms["cross_entropy"]) == pytest.approx(48.97067261, rel=1e-6)
    net.slot_attn.noise = Known().normal(torch.empty(2, 3, 10))
    found = loaded.backbone(IMAGES)
    first = [0.04058981, -0.12751576, -0.92211199, -0.54979086, -1.1801194, -0.31702438]
    assert_sums(found.tokens, first, -7.01528145, 33.31708869)
    first = [0.31169724, 0.33090898, 0.35739377, 0.31000525, 0.33094829, 0.35904643]
    assert_sums(found.masks.flatten(2).transpose(1, 2), first, 512.0, 512.0)
    drawn = net.generate(found.tokens)
    assert float(drawn.double().sum()) == pytest.approx(594.31346044, abs=1e-3)


@torch.no_grad()
def test_the_benchmarks_slot_attention_has_the_official_values(tmp_path, registry):
    state = ocrl(decoder=True)
    assert (len(state), digest(state)) == (128, "b464429e23e368ef")
    loaded = load({"ocr_module_state_dict": state}, tmp_path, registry, slots=3)
    spec, report = loaded.backbone.spec, loaded.report
    assert (spec.arch, report.naming, report.matched) == ("objects:slot-attention", "ocrl", 1.0)
    assert (spec.image_size, spec.mean, spec.std) == ((16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert (spec.options["iterations"], spec.options["rectified"]) == (7, False)
    loaded.backbone.net.slots.noise = Known().normal(torch.empty(2, 3, 10))
    found = loaded.backbone(IMAGES)
    first = [1.53379488, -0.43264586, -0.27524233, -2.41918755, -1.01628017, 0.96391398]
    assert_sums(found.tokens, first, -26.71786781, 57.34713554)
    first = [0.34067902, 0.33132657, 0.32799447, 0.3386595, 0.3325057, 0.3288348]
    assert_sums(found.masks.flatten(2).transpose(1, 2), first, 512.0, 512.0)


@pytest.mark.parametrize(
    ("step", "warmup", "temperature"),
    [
        (0, 1 / 30_000, 1.0),
        (1, 2 / 30_000, 0.999999997532599),
        (7500, 0.25003333333333333, 0.8681980515339465),
        (15_000, 0.5000333333333333, 0.55),
        (29_999, 1.0, 0.1000000024674),
        (30_000, 1.0, 0.1),
        (200_000, 1.0, 0.1),
    ],
)
def test_schedules_are_the_official_ones(step, warmup, temperature):
    method = SlateMethod()
    run = Run(None, 0, torch.device("cpu"), Path(), 1, 50, 50, steps=10**6, epoch_steps=8000, step=step)
    stage = method.rate(run)
    next(stage)
    with pytest.raises(StopIteration) as ended:
        stage.send(1.0)
    assert ended.value.value == pytest.approx(warmup, rel=1e-12)
    assert method.temperature(step) == pytest.approx(temperature, rel=1e-12)
