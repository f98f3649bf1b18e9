"""mmpretrain's vision transformers: the tensors under its names, and its forward pass written out plainly."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evalsuite.checkpoints import Loaded, load_backbone
from evalsuite.errors import BackboneError
from evalsuite.hooks import Registry

State = dict[str, Tensor]
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
WIDTH, DEPTH, PATCH, SIDE = 32, 2, 8, 4


def drawn(
    *,
    width: int = WIDTH,
    prefix: int = 1,
    positions: bool = True,
    beit: int = 0,
    scale: bool = False,
    gated: bool = False,
    ends: tuple[str, ...] = ("ln1",),
) -> State:
    """A network's tensors. ``prefix`` tokens come before the patches, ``beit`` is a number of heads with relative
    positions, ``ends`` are the norms after the last layer."""
    rng = torch.Generator().manual_seed(1)
    state: State = {}

    def put(name: str, *shape: int, spread: float = 0.2, shift: float = 0.0) -> None:
        state[name] = torch.randn(*shape, generator=rng, dtype=torch.float64) * spread + shift

    def linear(name: str, inside: int, out: int, bias: bool = True) -> None:
        put(f"{name}.weight", out, inside)
        if bias:
            put(f"{name}.bias", out)

    def norm(name: str) -> None:
        put(f"{name}.weight", width, shift=1.0)
        put(f"{name}.bias", width)

    put("cls_token", 1, 1, width)
    if prefix == 2:
        put("dist_token", 1, 1, width)
    if positions:
        put("pos_embed", 1, SIDE**2 + prefix, width)
    put("patch_embed.projection.weight", width, 3, PATCH, PATCH, spread=0.05)
    put("patch_embed.projection.bias", width)
    for i in range(DEPTH):
        at = f"layers.{i}"
        norm(f"{at}.ln1")
        norm(f"{at}.ln2")
        linear(f"{at}.attn.qkv", width, 3 * width, bias=not beit)
        linear(f"{at}.attn.proj", width, width)
        if beit:
            put(f"{at}.attn.q_bias", width)
            put(f"{at}.attn.v_bias", width)
            put(f"{at}.attn.relative_position_bias_table", (2 * SIDE - 1) ** 2 + 3, beit)
            state[f"{at}.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
            put(f"{at}.gamma_1", width)
            put(f"{at}.gamma_2", width)
        linear(f"{at}.ffn.{'w12' if gated else 'layers.0.0'}", width, (4 if gated else 2) * width)
        linear(f"{at}.ffn.{'w3' if gated else 'layers.1'}", 2 * width, width)
        if scale:
            put(f"{at}.attn.gamma1.weight", width)
            put(f"{at}.ffn.gamma2.weight", width)
    for end in ends:
        norm(end)
    return state


# ------------------------------------------------------------------------------------------- a plain reference


def relative_index(side: int) -> Tensor:
    """Which row of a table each pair of tokens has (BEiT's modeling_finetune.py), pair by pair."""
    count = (2 * side - 1) ** 2
    index = torch.empty(side**2 + 1, side**2 + 1, dtype=torch.int64)
    index[0, :], index[:, 0], index[0, 0] = count, count + 1, count + 2
    for a in range(side**2):
        for b in range(side**2):
            down, right = a // side - b // side, a % side - b % side
            index[a + 1, b + 1] = (down + side - 1) * (2 * side - 1) + right + side - 1
    return index


def tokens(state: State, x: Tensor, heads: int) -> Tensor:
    """All tokens after the last layer, before any norm."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", bias)

    x = F.conv2d(x, state["patch_embed.projection.weight"], state["patch_embed.projection.bias"], PATCH)
    x = x.flatten(2).transpose(1, 2)
    before = [state[k].expand(len(x), -1, -1) for k in ("cls_token", "dist_token") if k in state]
    x = torch.cat([*before, x], 1) + state.get("pos_embed", torch.zeros(1, dtype=x.dtype))
    for i in range(DEPTH):
        at = f"layers.{i}"
        bias = None
        if f"{at}.attn.q_bias" in state:
            queries, values = state[f"{at}.attn.q_bias"], state[f"{at}.attn.v_bias"]
            bias = torch.cat([queries, torch.zeros_like(queries), values])
        q, k, v = linear(norm(x, f"{at}.ln1"), f"{at}.attn.qkv", bias).unflatten(2, (3, heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        if f"{at}.attn.relative_position_bias_table" in state:
            scores = scores + state[f"{at}.attn.relative_position_bias_table"][relative_index(SIDE)].permute(2, 0, 1)
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + linear(y, f"{at}.attn.proj") * state.get(f"{at}.attn.gamma1.weight", state.get(f"{at}.gamma_1", 1))
        y = norm(x, f"{at}.ln2")
        if f"{at}.ffn.w12.weight" in state:
            one, two = linear(y, f"{at}.ffn.w12").chunk(2, -1)
            y = linear(F.silu(one) * two, f"{at}.ffn.w3")
        else:
            y = linear(F.gelu(linear(y, f"{at}.ffn.layers.0.0")), f"{at}.ffn.layers.1")
        x = x + y * state.get(f"{at}.ffn.gamma2.weight", state.get(f"{at}.gamma_2", 1))
    return x


def end(state: State, x: Tensor, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def of_class(state: State, x: Tensor) -> Tensor:
    return end(state, x, "ln1")[:, 0]


def of_both(state: State, x: Tensor) -> Tensor:
    return end(state, x, "ln1")[:, :2].mean(1)


def averaged(state: State, x: Tensor) -> Tensor:
    return end(state, x[:, 1:].mean(1), "ln2")


# ---------------------------------------------------------------------------------------------------- the layouts

Case = tuple[State, Callable[[State, Tensor], Tensor], int, str, dict[str, Any]]
CASES: dict[str, Callable[[], Case]] = {
    "MAE": lambda: (drawn(), of_class, 1, "vit_base_patch16_224", {"mlp_ratio": 2.0}),
    "MAE, fine-tuned": lambda: (drawn(ends=("ln2",)), averaged, 1, "vit_base_patch16_224", {"global_pool": "avg"}),
    "DINOv2": lambda: (drawn(scale=True), of_class, 1, "vit_base_patch16_224", {"init_values": 1.0}),
    "DINOv2, gated": lambda: (
        drawn(scale=True, gated=True, width=64), of_class, 1, "vit_giant_patch14_dinov2", {"mlp_ratio": 4.0},
    ),
    "DeiT, distilled": lambda: (drawn(prefix=2), of_both, 1, "deit_base_distilled_patch16_224", {}),
    "BEiT": lambda: (
        drawn(positions=False, beit=4, ends=("ln2",)), averaged, 4, "beit_base_patch16_224", {"num_heads": 4},
    ),
    "BEiT, pre-trained": lambda: (
        drawn(positions=False, beit=4), of_class, 4, "beit_base_patch16_224", {"global_pool": "token"},
    ),
}  # fmt: skip


def load(state: State, path: Path, registry: Registry, **beside: Tensor) -> Loaded:
    """The file of a training run: the network, what it was trained with, and mmengine's own entries."""
    names = {f"backbone.{k}": v for k, v in state.items()} | {"head.fc.weight": torch.ones(9, WIDTH)} | beside
    names |= {"backbone.mask_token": torch.ones(1, 1, WIDTH), "data_preprocessor.mean": torch.ones(3, 1, 1)}
    torch.save({"meta": {"epoch": 3}, "state_dict": names, "message_hub": {}}, path / "epoch_3.pth")
    return load_backbone(path / "epoch_3.pth", registry)


@pytest.mark.parametrize("name", CASES)
def test_a_vit_of_mmpretrain_is_recognised_and_gives_the_features_of_a_plain_reference(name, tmp_path, registry):
    state, pooled, heads, arch, options = CASES[name]()
    loaded = load(state, tmp_path, registry)
    report, backbone = loaded.report, loaded.backbone.double()
    assert report.arch.partition("_patch")[0] == f"timm:{arch}".partition("_patch")[0]  # the patch is in the tensors
    assert (report.layout, report.naming) == ("mmselfsup", "openmmlab-vit")
    assert {k: report.options[k] for k in options} == options
    assert (report.matched, report.missing, report.leftover) == (1, (), ())
    with torch.no_grad():
        wanted = pooled(state, tokens(state, backbone.normalise(PIXELS), heads))
        torch.testing.assert_close(backbone(PIXELS).pooled, wanted, rtol=1e-5, atol=1e-5)


def test_a_small_vit_of_moco_v3_has_twelve_heads(tmp_path, registry):
    """mmpretrain's mocov3-small, as facebookresearch/moco-v3's vit_small."""
    state = drawn(width=384)
    moving = {"momentum_encoder.module.0.cls_token": torch.ones(1, 1, 384)}
    assert load(state, tmp_path, registry, **moving).backbone.net.blocks[0].attn.num_heads == 12
    assert load(state, tmp_path, registry).backbone.net.blocks[0].attn.num_heads == 6


def test_a_vit_with_a_norm_before_and_one_after_averaging_is_refused(tmp_path, registry):
    with pytest.raises(BackboneError, match="final_norm and avg_featmap"):
        load(drawn(ends=("ln1", "ln2")), tmp_path, registry)


@pytest.mark.parametrize("part", ["layers.1.ffn.layers.1", "layers.0.attn.proj", "pos_embed", "patch_embed"])
def test_a_vit_of_mmpretrain_with_a_part_missing_is_refused(part, tmp_path, registry):
    with pytest.raises(BackboneError):
        load({k: v for k, v in drawn().items() if part not in k}, tmp_path, registry)


def test_a_resnet_of_mmpretrain_has_torchvisions_names(tmp_path, registry):
    import torchvision

    net = torchvision.models.resnet18().state_dict()
    state = {k: v for k, v in net.items() if not re.match(r"fc\.", k)}
    loaded = load(state, tmp_path, registry)
    assert (loaded.report.arch, loaded.report.layout) == ("torchvision:resnet18", "mmselfsup")
    assert loaded.report.matched == 1
