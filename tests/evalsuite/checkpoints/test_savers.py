"""One network as many programs save it: containers, wrappers, steps of a training, and what is told of its pixels."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from evalsuite.checkpoints import load_backbone
from evalsuite.errors import BackboneError
from evalsuite.hooks import Registry

Tensors = dict[str, Tensor]
HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, embed_dim=48, depth=2, num_heads=3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return vit()


def same(loaded: Any, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    centre, spread = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        theirs = net.forward_head(net.forward_features((pixels - centre) / spread), pre_logits=True)  # type: ignore[operator]
        return torch.allclose(loaded.backbone(pixels).pooled, theirs, atol=1e-4)


CONTAINERS: dict[str, Callable[[Tensors], Any]] = {
    "a list of pairs": lambda held: [*held.items()],
    "pairs below a name": lambda held: {"epoch": 3, "model": tuple(held.items())},
    "under numbers": lambda held: {0: held, 1: {"lr": 0.1}},
    "DeepSpeed's": lambda held: {"module": held, "buffer_names": [], "ds_version": "0.14", "dp_world_size": 1},
    "a wrapper with a name of its own": lambda held: {
        re.sub(r"^(blocks\\.\\d)\\.", r"\\1._my_wrapped_module.", k): v for k, v in held.items()
    },
    "beside an average of another name": lambda held: {
        "model": vit(1).state_dict(), "model_averaged": {f"module.{k}": v for k, v in held.items()} | {
            "n_averaged": torch.tensor(5)
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_network_is_read_from_what_its_saver_puts_around_it(kind, net, tmp_path, registry: Registry):
    torch.save(CONTAINERS[kind](net.state_dict()), tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", registry, options={"num_heads": 3})
    assert same(loaded, net, *IMAGENET)


CFG = "model = dict(data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb={}))"
WORDS: dict[str, tuple[Callable[[Tensors], Any], bool, str]] = {
    "settings of a training": (
        lambda held: {"model": held, "args": argparse.Namespace(model="x", mean=[0.5] * 3, std=[0.5] * 3)}, True, "args"
    ),
    "OpenMMLab's": (lambda held: {"state_dict": held, "meta": {"cfg": CFG.format(True)}}, True, "meta.cfg"),
    "OpenMMLab's of blue, green and red": (
        lambda held: {"state_dict": held, "meta": {"cfg": CFG.format(False)}}, False, "ImageNet's"
    ),
    "a first module that normalises": (
        lambda held: {f"1.{k}": v for k, v in held.items()} | {
            "normalize.mean": torch.full((1, 3, 1, 1), 0.5), "normalize.std": torch.full((1, 3, 1, 1), 0.5)
        }, True, "normalize.mean",
    ),
    "numbers of something else": (
        lambda held: {"model": held, "args": {"mean": [0.5] * 3, "std": [0.0] * 3, "latent": {"mean": 4, "std": 2}}},
        False, "ImageNet's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WORDS)
def test_how_pixels_are_normalised_is_read_where_a_training_keeps_it(kind, net, tmp_path, registry: Registry):
    write, believed, whose = WORDS[kind]
    torch.save(write(net.state_dict()), tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", registry, options={"num_heads": 3})
    assert same(loaded, net, *(HALF if believed else IMAGENET))
    assert whose in loaded.report.input["source"]


def test_settings_in_yaml_beside_and_in_a_header_say_the_heads(net, tmp_path, registry: Registry):
    (tmp_path / "checkpoints").mkdir()
    ours = tmp_path / "checkpoints" / "last.pth"
    torch.save(net.state_dict(), ours)
    assert "num_heads=1 is a guess" in " ".join(load_backbone(ours, registry).report.guesses)
    for place, text in (("hparams.yaml", "net:\n  num_heads: 3\n"), ("checkpoints/config.yaml", "num_heads: 3")):
        (tmp_path / place).write_text(text)
        assert same(load_backbone(ours, registry), net, *IMAGENET)
        (tmp_path / place).unlink()
    (tmp_path / "hparams.yaml").write_text("a: !!python/object/apply:os.getcwd []\nnum_heads: 3")
    loaded = load_backbone(ours, registry)
    assert "hparams.yaml beside it is passed over" in "; ".join(loaded.report.reason)
    assert loaded.report.guesses
    header = {"format": "pt", "config": json.dumps({"embed_dim": 48, "num_heads": 3})}
    safetensors.torch.save_file(net.state_dict(), tmp_path / "c.safetensors", header)
    assert same(load_backbone(tmp_path / "c.safetensors", registry), net, *IMAGENET)


def test_settings_of_a_network_of_another_width_say_nothing(net, tmp_path, registry: Registry):
    settings = {"student": {"embed_dim": 48, "num_heads": 3}, "teacher": {"embed_dim": 96, "num_heads": 6}}
    torch.save({"model": net.state_dict(), "config": settings}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", registry)
    assert same(loaded, net, *IMAGENET)
    assert not loaded.report.guesses


def steps(root: Path, held: Tensors) -> None:
    (root / "global_step9").mkdir()
    (root / "latest").write_text("global_step9\n")
    torch.save({"module": held}, root / "global_step9" / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, root / "global_step9" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def trainer(root: Path, held: Tensors) -> None:
    torch.save(held, root / "weights.pth")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth", "scaler.pt"):
        torch.save({"param_groups": []}, root / name)


@pytest.mark.parametrize("write", [steps, trainer])
def test_what_a_training_keeps_beside_its_weights_is_no_choice(write, net, tmp_path, registry: Registry):
    write(tmp_path, net.state_dict())
    assert same(load_backbone(tmp_path, registry, options={"num_heads": 3}), net, *IMAGENET)


def test_parts_of_tensors_and_numbers_that_are_not_there_are_named(net, tmp_path, registry: Registry):
    torch.save({"module": {k: torch.empty(0) for k in net.state_dict()}}, tmp_path / "zero.pt")
    torch.save({k: v.to(torch.int8) for k, v in net.state_dict().items()}, tmp_path / "int8.pth")
    (tmp_path / "many").mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / "many" / name).touch()
    for name, message in (("zero.pt", "ZeRO"), ("int8.pth", "quantised"), ("many", "dcp_to_torch")):
        with pytest.raises(BackboneError) as refused:
            load_backbone(tmp_path / name, registry)
        assert message in str(refused.value)
        assert refused.value.code == 4
