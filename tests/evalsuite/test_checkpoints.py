"""Strangers' checkpoints: the zoo of layouts, wrong architectures, hostile and broken files, and the sanity gate."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import re
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

import evalsuite.backbones
import evalsuite.checkpoints
from evalsuite.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneSpec, Features, build
from evalsuite.checkpoints import Candidate, State, describe, load_backbone, natural_images, reading, sanity
from evalsuite.errors import BackboneError, PluginError
from evalsuite.hooks import Registry

PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
SMALL_PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def registry() -> Registry:
    """Our own shelves, through the same hook as everybody's."""
    registry = Registry()
    evalsuite.backbones.evalsuite_register(registry)
    evalsuite.checkpoints.evalsuite_register(registry)
    return registry


# ------------------------------------------------------------------------------------------------- source modules


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every number drawn anew, running statistics too, so that a tensor left out shows."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
            elif tensor.is_floating_point():
                spread = 0.5 * (tensor[0].numel() ** -0.5) if tensor.ndim > 1 else 0.1
                shift = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
                tensor.copy_(torch.randn(tensor.shape, generator=rng) * spread + shift)
    return net.eval()


@functools.cache
def resnet(seed: int = 0, name: str = "resnet10", padding: int = 1) -> nn.Module:
    """A narrow ResNet for small images, of torchvision's class and names: most layouts do not care which ResNet."""
    registry = Registry()
    evalsuite.backbones.evalsuite_register(registry)
    return trained(build(f"small:{name}", registry, width=8, stem_padding=padding).net, seed)


@functools.cache
def resnet18() -> nn.Module:
    return trained(torchvision.models.resnet18(num_classes=10))


@functools.cache
def vit(seed: int = 0, **kwargs: Any) -> nn.Module:
    given = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 64, "num_classes": 0, **kwargs}
    return trained(timm.create_model("vit_base_patch16_224", **given), seed)


@functools.cache
def timm_net(name: str, **kwargs: Any) -> nn.Module:
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()}
    return trained(timm.create_model(name, num_classes=0, **lists))


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def pooled(net: nn.Module, pixels: Tensor = PIXELS) -> Tensor:
    """What the source module itself makes of pixels, before any head."""
    x = normalised(pixels)
    with torch.no_grad():
        if hasattr(net, "forward_head"):
            return net.forward_head(net.forward_features(x), pre_logits=True)
        if isinstance(net, ResNet):
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            return net.layer4(net.layer3(net.layer2(net.layer1(x)))).mean((2, 3))
        if isinstance(net, torchvision.models.VisionTransformer):
            heads, net.heads = net.heads, nn.Identity()
            out = net(x)
            net.heads = heads
            return out
        if isinstance(net, torchvision.models.swin_transformer.SwinTransformer):
            return net.norm(net.features(x)).mean((1, 2))
        x = net.features(x)
        if isinstance(net, torchvision.models.DenseNet):
            x = x.relu()
        x = x.mean((2, 3), keepdim=True)
        return (net.classifier[0](x) if isinstance(net, torchvision.models.ConvNeXt) else x).flatten(1)


def state(net: nn.Module, prefix: str = "", drop: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in net.state_dict().items() if not k.startswith(drop or "\0")}


def head(name: str, out: int = 16, width: int = 512) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.randn(out, width), f"{name}.bias": torch.randn(out)}


class Made:
    """Classes of packages that are not installed here, made for saving a file and taken away again."""

    def __init__(self, *names: str, base: type = object) -> None:
        self.classes = {}
        for full in names:
            module, _, name = full.rpartition(".")
            self.classes[full] = type(name, (base,), {"__module__": module})

    def __getitem__(self, full: str) -> Any:
        return self.classes[full]

    def save(self, content: Any, path: Path) -> None:
        added, hidden = {}, []
        for full, kind in self.classes.items():
            module = full.rpartition(".")[0]
            parts = module.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                if name not in sys.modules:
                    added[name] = sys.modules[name] = types.ModuleType(name)
            home = sys.modules[module]
            hidden.append((home, kind.__name__, getattr(home, kind.__name__, None)))
            setattr(home, kind.__name__, kind)
        try:
            torch.save(content, path)
        finally:
            for home, name, real in hidden:
                setattr(home, name, real)
            for name in added:
                del sys.modules[name]


# ----------------------------------------------------------------------------------------------- the zoo of layouts

Case = tuple[nn.Module, str]  # the module that the file should give back, and the layout's name in the report
ZOO: dict[str, Callable[[Path], Case]] = {}
INPUTS: dict[str, Tensor] = {}


def layout(name: str, pixels: Tensor = PIXELS) -> Callable[[Callable[[Path], Case]], Callable[[Path], Case]]:
    def keep(write: Callable[[Path], Case]) -> Callable[[Path], Case]:
        ZOO[name], INPUTS[name] = write, pixels
        return write

    return keep


@layout("torchvision, resnet18")
def _(path: Path) -> Case:
    torch.save(resnet18().state_dict(), path)
    return resnet18(), "plain"


@layout("torchvision behind DDP, in torch's old file format")
def _(path: Path) -> Case:
    net = resnet()
    torch.save({"state_dict": state(net, "module.")}, path, _use_new_zipfile_serialization=False)
    return net, "ddp"


@layout("timm training file with a moving average")
def _(path: Path) -> Case:
    net = resnet()
    content = {"epoch": 3, "arch": "resnet18", "state_dict": state(resnet(seed=1)), "state_dict_ema": state(net)}
    torch.save(content | {"args": Namespace(lr=0.1, out=PurePosixPath("a/b")), "metric": np.float64(71.2)}, path)
    return net, "timm"


@layout("timm ResNet-D found by its stem")
def _(path: Path) -> Case:
    net = timm_net("resnet18d")
    torch.save({"state_dict": state(net), "arch": "resnet18d", "version": 2}, path)
    return net, "timm"


@layout("MoCo v1")
def _(path: Path) -> Case:
    net = trained(torchvision.models.resnet50())
    content = state(net, "module.encoder_q.", ("fc",)) | state(
        trained(torchvision.models.resnet50(), 1), "module.encoder_k."
    )
    content |= head("module.encoder_q.fc", 128, 2048) | {
        "module.queue": torch.randn(128, 64),
        "module.queue_ptr": torch.zeros(1).long(),
    }
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": content, "optimizer": {"state": {}}}, path)
    return net, "moco"


@layout("MoCo v2")
def _(path: Path) -> Case:
    net = resnet()
    content = state(net, "module.encoder_q.", ("fc",)) | state(resnet(seed=1), "module.encoder_k.", ("fc",))
    content |= (
        head("module.encoder_q.fc.0", 512) | head("module.encoder_q.fc.2", 128) | {"module.queue": torch.randn(128, 64)}
    )
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": content}, path)
    return net, "moco"


@layout("MoCo v3, ViT-S with twelve heads")
def _(path: Path) -> Case:
    net = vit(embed_dim=384, num_heads=12)
    content = state(net, "module.base_encoder.") | state(
        vit(1, embed_dim=384, num_heads=12), "module.momentum_encoder."
    )
    content |= head("module.base_encoder.head.0", 64, 384) | {"module.predictor.0.weight": torch.randn(8, 64)}
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": content}, path)
    return net, "moco-v3"


@layout("Hallucinator")
def _(path: Path) -> Case:
    net = resnet()
    content = state(net, "module.encoder_q.", ("fc",)) | state(resnet(seed=1), "module.encoder_k.", ("fc",))
    torch.save({"moco_state": content | head("module.generator.fc1"), "boxes": torch.rand(4, 4), "epoch": 9}, path)
    return net, "hallucinator"


@layout("SimCLR port with convnet and projection")
def _(path: Path) -> Case:
    net = resnet()
    torch.save(state(net, "convnet.", ("fc",)) | head("projection.layer1"), path)
    return net, "simclr"


@layout("SimCLR port that indexes children as f", SMALL_PIXELS)
def _(path: Path) -> Case:
    net = resnet()
    f = nn.Sequential(net.conv1, net.bn1, net.relu, net.layer1, net.layer2, net.layer3, net.layer4)
    torch.save(state(f, "f.") | head("g.0"), path)
    return net, "simclr"


@layout("SimCLR port with a backbone whose fc is the head")
def _(path: Path) -> Case:
    net = resnet()
    torch.save({"arch": "resnet18", "state_dict": state(net, "backbone.", ("fc",)) | head("backbone.fc.0", 512)}, path)
    return net, "simclr"


@layout("SimSiam")
def _(path: Path) -> Case:
    net = resnet()
    content = state(net, "module.encoder.", ("fc",)) | head("module.encoder.fc.0") | head("module.predictor.0")
    torch.save({"epoch": 100, "arch": "resnet18", "state_dict": content}, path)
    return net, "simsiam"


@layout("BYOL port: online before target")
def _(path: Path) -> Case:
    net = resnet()
    content = state(resnet(seed=1), "target_network.", ("fc",)) | state(net, "online_network.", ("fc",))
    torch.save(content | head("online_predictor.0"), path)
    return net, "byol"


@layout("SwAV, flat")
def _(path: Path) -> Case:
    net = resnet()
    extra = head("module.projection_head.0") | {"module.prototypes.weight": torch.randn(30, 16)}
    torch.save(OrderedDict(state(net, "module.", ("fc",)) | extra), path)
    return net, "swav"


@layout("DINO: teacher before student")
def _(path: Path) -> Case:
    net = vit()
    student = state(vit(1), "module.backbone.") | {"module.head.mlp.0.weight": torch.randn(8, 64)}
    teacher = state(net, "backbone.") | {"head.last_layer.weight_g": torch.randn(8, 1)}
    torch.save({"student": student, "teacher": teacher, "epoch": 5, "args": Namespace(arch="vit_small")}, path)
    return net, "dino"


@layout("DINO, ResNet teacher")
def _(path: Path) -> Case:
    net = resnet()
    content = {"student": state(resnet(seed=1), "module.backbone."), "teacher": state(net, "backbone.", ("fc",))}
    torch.save(content | {"dino_loss": {"center": torch.zeros(1, 16)}}, path)
    return net, "dino"


@layout("iBOT")
def _(path: Path) -> Case:
    net = vit(init_values=0.1)
    masked = {"module.backbone.masked_embed": torch.zeros(1, 64), "module.backbone.mask_token": torch.zeros(1, 1, 64)}
    content = {
        "student": state(vit(1, init_values=0.1), "module.backbone.") | masked,
        "teacher": state(net, "backbone."),
    }
    content["teacher"] |= {"head.mlp2.0.weight": torch.randn(8, 64), "backbone.mask_token": torch.zeros(1, 1, 64)}
    torch.save({"ibot_loss": {"center": torch.zeros(1, 8)}} | content, path)
    return net, "ibot"


@layout("MAE: the decoder is left")
def _(path: Path) -> Case:
    net = vit()
    decoder = {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 17, 32)}
    decoder |= {f"decoder_{k}": v for k, v in state(vit(1)).items() if k.startswith("blocks")} | head(
        "decoder_embed", 32, 64
    )
    torch.save({"model": state(net) | decoder, "args": Namespace(model="mae_vit_tiny")}, path)
    return net, "mae"


@layout("MAE fine-tuned with average pooling")
def _(path: Path) -> Case:
    net = vit(global_pool="avg")
    torch.save({"model": state(net) | head("head", 10, 64)}, path)
    return net, "plain"


@layout("DINOv2 with registers")
def _(path: Path) -> Case:
    net = vit(reg_tokens=4, no_embed_class=True, init_values=1.0, patch_size=14, img_size=56)
    content = state(net)
    content["register_tokens"] = content.pop("reg_token")
    first = torch.randn(1, 1, 64)
    content["cls_token"] = content["cls_token"] - first  # published files keep its position apart
    content["pos_embed"] = torch.cat([first, content["pos_embed"]], 1)
    torch.save(content | {"mask_token": torch.zeros(1, 64)}, path)
    return net, "dinov2"


INPUTS["DINOv2 with registers"] = torch.rand(2, 3, 56, 56)


@layout("OBoW's own names")
def _(path: Path) -> Case:
    net = resnet()
    names = {"conv1": "0.Conv", "bn1": "0.bn"} | {f"layer{i}": str(i) for i in (1, 2, 3, 4)}

    def blocks(net: nn.Module, whose: str) -> dict[str, Tensor]:
        kept = {k.partition(".")[::2]: v for k, v in state(net, drop=("fc",)).items()}
        return {f"module.{whose}._feature_blocks.{names[top]}.{rest}": v for (top, rest), v in kept.items()}

    content = blocks(resnet(seed=1), "feature_extractor_teacher") | blocks(net, "feature_extractor")
    torch.save({"epoch": 200, "network": content | {"module.bow_predictor.scale": torch.ones(1)}}, path)
    return net, "obow"


@layout("OBoW's export to torchvision")
def _(path: Path) -> Case:
    net = resnet()
    torch.save({"network": state(net, "", ("fc",)) | head("fc", 8192)}, path)
    return net, "plain"


@layout("PixPro")
def _(path: Path) -> Case:
    net = resnet()
    content = state(net, "module.encoder.", ("fc",)) | state(resnet(seed=1), "module.encoder_k.", ("fc",))
    content |= {
        "module.value_transform.weight": torch.randn(8, 8, 1, 1),
        "module.projector.linear1.weight": torch.randn(8, 512, 1, 1),
    }
    torch.save({"opt": Namespace(lr=1.0), "model": content, "optimizer": {}, "epoch": 100, "amp": {}}, path)
    return net, "pixpro"


@layout("InterCLR: backbone before its aliases")
def _(path: Path) -> Case:
    net = resnet()
    content = (
        state(resnet(seed=1), "encoder_k.0.", ("fc",))
        | state(net, "encoder_q.0.", ("fc",))
        | state(net, "backbone.", ("fc",))
    )
    content |= head("neck.mlp.0") | {"queue": torch.randn(16, 32), "memory_bank.feature_bank": torch.randn(10, 16)}
    torch.save({"state_dict": content, "meta": {"mmcv_version": "1.6"}}, path)
    return net, "interclr"


@layout("mmselfsup with its configuration")
def _(path: Path) -> Case:
    net = resnet()
    made = Made("mmengine.config.config.ConfigDict", base=dict)
    meta = {"cfg": made["mmengine.config.config.ConfigDict"](model="simclr", lr=0.3), "epoch": 200}
    made.save({"meta": meta, "state_dict": state(net, "backbone.", ("fc",)) | head("head.fc")}, path)
    return net, "mmselfsup"


@layout("solo-learn on CIFAR, a Lightning file with OmegaConf", SMALL_PIXELS)
def _(path: Path) -> Case:
    net = resnet(padding=2)
    made = Made("omegaconf.dictconfig.DictConfig", "omegaconf.base.ContainerMetadata", "omegaconf.nodes.AnyNode")
    config = made["omegaconf.dictconfig.DictConfig"]()
    config.__dict__ |= {
        "_content": {"method": made["omegaconf.nodes.AnyNode"]()},
        "_metadata": made["omegaconf.base.ContainerMetadata"](),
        "_kind": Any,
    }
    content = state(net, "backbone.", ("fc",)) | state(resnet(1, padding=2), "momentum_backbone.", ("fc",))
    content |= head("classifier", 10) | head("projector.0")
    made.save({"pytorch-lightning_version": "1.9", "state_dict": content, "hyper_parameters": {"cfg": config}}, path)
    return net, "solo-learn"


@layout("lightly: children by index")
def _(path: Path) -> Case:
    net = resnet()
    children = nn.Sequential(*list(net.children())[:-1])
    content = state(children, "backbone.") | head("projection_head.layers.0")
    other = nn.Sequential(*list(resnet(seed=1).children())[:-1])
    torch.save({"state_dict": content | state(other, "backbone_momentum."), "pytorch-lightning_version": "2.1"}, path)
    return net, "lightly"


@layout("VISSL")
def _(path: Path) -> Case:
    net = resnet()
    made = Made("vissl.config.attr_dict.AttrDict", base=dict)
    model = {"trunk": state(net, "_feature_blocks.", ("fc",)), "heads": head("0.clf.0")}
    config = made["vissl.config.attr_dict.AttrDict"](OPTIMIZER="sgd")
    made.save({"classy_state_dict": {"base_model": {"model": model}}, "config": config, "iteration": 7}, path)
    return net, "vissl"


@layout("Lightning with a model of its own name")
def _(path: Path) -> Case:
    net = resnet()
    content = {"state_dict": state(net, "model.net."), "pytorch-lightning_version": "2.4", "callbacks": {}}
    torch.save(
        content | {"hyper_parameters": {"lr": 0.1}, "optimizer_states": [{"state": {0: {"m": torch.ones(3)}}}]}, path
    )
    return net, "lightning"


@layout("torch.compile inside DDP")
def _(path: Path) -> Case:
    net = resnet()
    torch.save({"model": state(net, "module._orig_mod.")}, path)
    return net, "torch.compile"


@layout("detectron2 .pkl of numpy arrays")
def _(path: Path) -> Case:
    net = trained(ResNet(Bottleneck, [1, 1, 1, 1]))
    content = {}
    for name, tensor in state(net, drop=("fc",)).items():
        if name.endswith("num_batches_tracked"):
            continue
        if "layer" not in name:
            name = f"stem.{name}"
        for i in (1, 2, 3, 4):
            name = name.replace(f"layer{i}.", f"res{i + 1}.")
        for i in (1, 2, 3):
            name = name.replace(f"bn{i}.", f"conv{i}.norm.")
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        content[name] = tensor.numpy()
    with path.open("wb") as file:
        pickle.dump({"model": content, "__author__": "someone", "matching_heuristics": True}, file)
    return net, "detectron2"


@layout("detectron2 C4 detector, the last stage in its heads")
def _(path: Path) -> Case:
    net = trained(ResNet(Bottleneck, [1, 1, 1, 1]))
    content = {}
    for name, tensor in state(net, drop=("fc",)).items():
        top, _, rest = name.partition(".")
        place = f"backbone.stem.{top}" if "layer" not in top else f"backbone.res{int(top[-1]) + 1}"
        place = place.replace("backbone.res5", "roi_heads.res5").replace("bn1", "conv1.norm")
        for i in (1, 2, 3):
            rest = rest.replace(f"bn{i}.", f"conv{i}.norm.")
        rest = rest.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        content[f"{place}.{rest}"] = tensor
    torch.save({"model": content | head("roi_heads.box_predictor.cls_score", 4, 2048), "iteration": 24000}, path)
    return net, "detectron2"


@layout("safetensors, plain and in half precision")
def _(path: Path) -> Case:
    net = resnet()
    half = {k: v.half() if v.is_floating_point() else v for k, v in state(net).items()}
    safetensors.torch.save_file(half, path)
    whole = copy.deepcopy(net)
    whole.load_state_dict({k: v.float() if v.dtype is torch.half else v for k, v in half.items()})
    return whole, "safetensors"


@layout("ConvNeXt under its official names")
def _(path: Path) -> Case:
    net = timm_net("convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 32, 64))
    official = {}
    for name, tensor in net.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            name = f"downsample_layers.0.{'.'.join(parts[1:])}"
        elif parts[2:3] == ["downsample"]:
            name = f"downsample_layers.{parts[1]}.{'.'.join(parts[3:])}"
        name = name.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("head.norm", "norm")
        official[name.replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")] = tensor
    torch.save({"model": official | head("head", 10, 64)}, path)
    return net, "plain"


@layout("ConvNeXt under timm's names")
def _(path: Path) -> Case:
    net = timm_net("convnext_atto")
    torch.save(state(net) | head("head.fc", 10, 320), path)
    return net, "plain"


@layout("Swin under its official names")
def _(path: Path) -> Case:
    net = timm_net(
        "swin_tiny_patch4_window7_224", embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), strict_img_size=False
    )
    official = {}
    for name, tensor in net.state_dict().items():
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        official[name] = tensor
    official["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    torch.save({"model": official | head("head", 10, 256)}, path)
    return net, "plain"


@layout("SqueezeNet told from its sister by shapes")
def _(path: Path) -> Case:
    net = trained(torchvision.models.squeezenet1_1())
    torch.save({"net": state(net, "module.")}, path)
    return net, "ddp"


@layout("MobileNet v3 told from its sister by shapes")
def _(path: Path) -> Case:
    net = trained(torchvision.models.mobilenet_v3_small())
    torch.save(state(net, "encoder."), path)
    return net, "plain"


ENDINGS = {"detectron2 .pkl of numpy arrays": "pkl", "safetensors, plain and in half precision": "safetensors"}


@pytest.mark.parametrize("name", ZOO)
def test_a_checkpoint_is_recognised_without_a_flag_and_gives_the_features_of_its_source(name, tmp_path, registry):
    path = tmp_path / f"checkpoint.{ENDINGS.get(name, 'pth')}"
    source, expected = ZOO[name](path)
    loaded = load_backbone(str(path), registry)
    with torch.no_grad():
        features = loaded.backbone(INPUTS[name])
    torch.testing.assert_close(features.pooled, pooled(source, INPUTS[name]), rtol=1e-5, atol=1e-5)
    assert loaded.report.matched == 1
    assert loaded.report.buffers == 1
    assert (loaded.report.missing, loaded.report.mismatched, loaded.report.leftover) == ((), (), ())
    assert loaded.report.layout == expected
    assert not loaded.report.trusted
    assert not loaded.backbone.training


def test_the_zoo_is_large_enough():
    assert len(ZOO) >= 35


# ------------------------------------------------------------------------------------- architectures from shapes


def bare(name: str, **kwargs: Any) -> dict[str, Tensor]:
    """A state dict without numbers: inference looks at names and shapes only."""
    scheme, _, name = name.partition(":")
    with torch.device("meta"):
        if scheme == "timm":
            return timm.create_model(name, num_classes=0, **kwargs).state_dict()
        return torchvision.models.get_model(name, weights=None, **kwargs).state_dict()


def inferred(tensors: dict[str, Tensor], registry: Registry) -> list[Candidate]:
    file = evalsuite.checkpoints.File(Path("x.pth"), tensors, "")
    entries = registry.entries("checkpoint")
    return [c for e in entries for c in registry.get("checkpoint", e.name)(State(tensors, "", file))]


RESNETS = [
    "resnet34",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
]
FEATURES = ["alexnet", "vgg11", "vgg16", "vgg19_bn", "squeezenet1_0", "densenet121", "densenet161", "mobilenet_v2"]
FEATURES += [
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_v2_s",
    "convnext_tiny",
    "convnext_small",
]
TIMM = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_small_patch8_224",
    "vit_base_patch32_224",
    "vit_large_patch14_224",
]
TIMM += ["convnext_atto", "convnext_nano", "convnext_tiny", "convnext_base", "swin_tiny_patch4_window7_224"]
TIMM += ["swin_base_patch4_window12_384"]


@pytest.mark.parametrize("name", [*RESNETS, *FEATURES, "swin_t", "swin_v2_t", "vit_b_16", "vit_l_32"])
def test_torchvision_architectures_are_told_by_their_shapes(name, registry):
    (candidate,) = inferred(bare(f"torchvision:{name}"), registry)
    assert (candidate.arch, dict(candidate.options)) == (f"torchvision:{name}", {})


@pytest.mark.parametrize("name", TIMM)
def test_timm_architectures_are_told_by_their_shapes(name, registry):
    (candidate,) = inferred(bare(f"timm:{name}"), registry)
    assert candidate.arch == f"timm:{name}"


VARIANTS = [
    {"img_size": 96},
    {"embed_dim": 128, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32},
    {"reg_tokens": 4},
    {"reg_tokens": 4, "no_embed_class": True},
    {"class_token": False, "global_pool": "avg", "fc_norm": False},
    {"global_pool": "avg", "fc_norm": True},
    {"init_values": 1e-5},
    {"qkv_bias": False},
    {"qk_norm": True},
    {"pre_norm": True},
    {"mlp_ratio": 3},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_of_a_vit_are_told_by_which_tensors_exist(options, registry):
    (candidate,) = inferred(bare("timm:vit_tiny_patch16_224", **options), registry)
    again = bare(candidate.arch, **candidate.options)
    wanted = bare("timm:vit_tiny_patch16_224", **options)
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in wanted.items()}
    assert json.loads(json.dumps(candidate.options)) == candidate.options


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("timm:convnextv2_atto", {}),
        ("timm:convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "conv_mlp": True}),
        ("timm:vit_giant_patch14_dinov2", {"embed_dim": 96, "depth": 2, "num_heads": 1, "img_size": 56}),
        ("timm:resnet26", {}),
        ("timm:resnet50d", {}),
        ("timm:resnet50", {"cardinality": 8, "base_width": 16}),
    ],
)
def test_an_uncommon_network_is_built_through_options(arch, options, registry):
    (candidate,) = inferred(bare(arch, **options), registry)
    rebuilt = bare(candidate.arch, **candidate.options)
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in bare(arch, **options).items()}


def test_a_small_resnet_is_told_with_its_width(registry):
    net = build("small:resnet10", registry, width=16).net
    (candidate,) = inferred(net.state_dict(), registry)
    assert (candidate.arch, candidate.options) == ("small:resnet10", {"width": 16})


def test_old_names_of_densenet_are_read(registry):
    modern = bare("torchvision:densenet121")
    old = {k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for k, v in modern.items()}
    (candidate,) = inferred(old, registry)
    assert set(candidate.tensors) == set(modern)


# --------------------------------------------------------------------------------------------- wrong architectures


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of many architectures."""
    folder = tmp_path_factory.mktemp("shelf")
    nets = {
        "resnet10": resnet(),
        "resnet18": resnet18(),
        "cifar18": resnet(name="resnet18"),
        "vit": vit(),
        "vit-registers": vit(reg_tokens=4, no_embed_class=True),
        "vit-scale": vit(init_values=0.1),
        "convnext": timm_net("convnext_atto"),
        "squeezenet1_0": torchvision.models.squeezenet1_0(),
        "mobilenet_v3_small": torchvision.models.mobilenet_v3_small(),
    }
    for name, net in nets.items():
        torch.save(net.state_dict(), folder / f"{name}.pth")
    return folder


VIT = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 64}
WRONG: list[tuple[str, str, dict[str, Any]]] = [
    ("resnet18", "torchvision:resnet34", {}),
    ("resnet18", "torchvision:resnet50", {}),
    ("resnet18", "torchvision:alexnet", {}),
    ("resnet18", "small:resnet18", {}),
    ("resnet18", "small:resnet10", {}),
    ("resnet18", "timm:resnet18d", {}),
    ("resnet18", "timm:resnet18", {"layers": [1, 1, 1, 1]}),
    ("resnet18", "timm:vit_tiny_patch16_224", {}),
    ("resnet10", "small:resnet10", {"width": 16}),
    ("resnet10", "timm:convnext_atto", {}),
    ("cifar18", "torchvision:resnet18", {}),
    ("cifar18", "small:resnet18", {"width": 32}),
    ("cifar18", "small:resnet10", {}),
    ("vit", "timm:vit_tiny_patch16_224", {}),
    ("vit", "timm:vit_base_patch16_224", VIT | {"depth": 3}),
    ("vit", "timm:vit_base_patch16_224", VIT | {"depth": 1}),
    ("vit", "timm:vit_base_patch16_224", VIT | {"patch_size": 8}),
    ("vit", "timm:vit_base_patch16_224", VIT | {"img_size": 96}),
    ("vit", "timm:vit_base_patch16_224", VIT | {"reg_tokens": 4}),
    ("vit", "timm:convnext_atto", {}),
    ("vit-registers", "timm:vit_base_patch16_224", VIT | {"reg_tokens": 0}),
    ("vit-scale", "timm:vit_small_patch16_224", {}),
    ("convnext", "timm:convnext_femto", {}),
    ("convnext", "timm:convnext_atto", {"depths": [2, 2, 5, 2]}),
    ("convnext", "torchvision:squeezenet1_0", {}),
    ("squeezenet1_0", "torchvision:squeezenet1_1", {}),
    ("squeezenet1_0", "torchvision:resnet18", {}),
    ("mobilenet_v3_small", "torchvision:mobilenet_v2", {}),
]


@pytest.mark.parametrize(("name", "arch", "options"), WRONG)
def test_a_wrong_architecture_is_refused(name, arch, options, shelf, registry):
    with pytest.raises(BackboneError) as refused:
        load_backbone(shelf / f"{name}.pth", registry, arch=arch, options=options)
    assert arch in refused.value.problem
    assert re.search(r"\d% of (parameters|running statistics) matched", refused.value.problem)
    assert "--allow-partial" in refused.value.fix
    assert str(refused.value).count("\n") == 2


def test_the_refusal_says_what_the_file_looks_like(shelf, registry):
    with pytest.raises(BackboneError) as refused:
        load_backbone(shelf / "resnet18.pth", registry, arch="torchvision:resnet34")
    assert "torchvision:resnet18" in refused.value.cause
    assert "torchvision:resnet18" in refused.value.fix


def test_less_than_98_per_cent_is_refused_and_allowed_only_when_asked(tmp_path, registry):
    part = {k: v for k, v in resnet().state_dict().items() if not k.startswith("layer4.0.conv2")}
    torch.save(part, tmp_path / "part.pth")
    with pytest.raises(BackboneError, match=r"\d\d\.\d% of parameters matched \(needs 98%\)"):
        load_backbone(tmp_path / "part.pth", registry, arch="small:resnet10", options={"width": 8})
    allowed = load_backbone(
        tmp_path / "part.pth", registry, arch="small:resnet10", options={"width": 8}, allow_partial=True
    )
    wanted = sum(p.numel() for k, p in resnet().named_parameters() if not k.startswith("fc"))
    given = sum(v.numel() for k, v in part.items() if "running" not in k and "num_b" not in k and "fc" not in k)
    assert allowed.report.matched == pytest.approx(given / wanted)
    assert all(name.startswith("layer4.0.conv2") for name in allowed.report.missing)
    again = load_backbone(
        tmp_path / "part.pth", registry, arch="small:resnet10", options={"width": 8}, allow_partial=True
    )
    assert again.report.identity == allowed.report.identity  # what is missing is drawn from the seed


def test_norms_without_running_statistics_are_refused(tmp_path, registry):
    lacking = {k: v for k, v in resnet().state_dict().items() if "running" not in k}
    torch.save(lacking, tmp_path / "no_statistics.pth")
    with pytest.raises(BackboneError, match=r"0\.0% of running statistics matched"):
        load_backbone(tmp_path / "no_statistics.pth", registry)


def test_tensors_inside_the_blocks_that_the_architecture_lacks_are_refused(tmp_path, registry):
    extra = {"blocks.0.attn.relative_position_bias_table": torch.randn(49, 1)}
    torch.save(state(vit()) | extra, tmp_path / "beit.pth")
    with pytest.raises(BackboneError, match="relative_position_bias_table"):
        load_backbone(tmp_path / "beit.pth", registry)


def test_a_resnet_nobody_has_is_refused_in_words(tmp_path, registry):
    net = {k: v for k, v in state(resnet18()).items() if not k.startswith("layer4")}
    torch.save(net, tmp_path / "three.pth")
    with pytest.raises(BackboneError, match="a ResNet with 3 stages and no 3x3 stem"):
        load_backbone(tmp_path / "three.pth", registry)


def test_tensors_of_no_known_family_are_refused_by_name(tmp_path, registry):
    torch.save({"tower.w": torch.randn(3, 4)}, tmp_path / "odd.pth")
    with pytest.raises(BackboneError, match=r"tower\.w \(3, 4\)"):
        load_backbone(tmp_path / "odd.pth", registry)


def test_a_given_architecture_finds_its_tensors_behind_any_prefix(tmp_path, registry):
    net = timm_net("mobilenetv3_small_050")
    torch.save({"a": {"b": state(net, "x.y.z.") | state(resnet(), "other.")}}, tmp_path / "deep.pth")
    loaded = load_backbone(tmp_path / "deep.pth", registry, arch="timm mobilenetv3_small_050")
    assert (loaded.report.container, loaded.report.prefix) == ("a.b", "x.y.z.")
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone(PIXELS).pooled, pooled(net), rtol=1e-5, atol=1e-5)


def test_the_files_own_word_for_its_architecture_is_taken(tmp_path, registry):
    net = timm_net("mobilenetv3_small_050")
    torch.save({"arch": "mobilenetv3_small_050", "state_dict": state(net)}, tmp_path / "hint.pth")
    assert load_backbone(tmp_path / "hint.pth", registry).report.arch == "timm:mobilenetv3_small_050"


# ------------------------------------------------------------------------------------------ hostile and broken files


class Hostile:
    """Pickles as a call of os.system that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


def zipped(content: Any, path: Path) -> None:
    torch.save(content, path)


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def late_protocol(content: Any, path: Path) -> None:
    torch.save(content, path, pickle_protocol=4)


def plain_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def plain_pickle_2(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


WRITERS = [zipped, legacy, late_protocol, plain_pickle, plain_pickle_2]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("inside", ["top", "lightning"])
def test_a_malicious_pickle_never_runs_and_the_global_is_named(write, inside, tmp_path, registry):
    mark, path = tmp_path / "mark", tmp_path / "evil.ckpt"
    weights = {k: v.numpy() if "pickle" in write.__name__ else v for k, v in state(resnet()).items()}
    content: Any = {"pytorch-lightning_version": "2", "state_dict": weights, "hyper_parameters": {"x": Hostile(mark)}}
    write(content if inside == "lightning" else Hostile(mark), path)
    with pytest.raises(BackboneError) as refused:
        load_backbone(path, registry)
    assert not mark.exists()
    assert "posix.system" in refused.value.problem
    assert "--trust-checkpoint" in refused.value.fix
    assert refused.value.code == 4


@pytest.mark.parametrize("write", WRITERS)
def test_eval_is_named_in_full(write, tmp_path, registry):
    write({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(BackboneError, match=r"builtins\.eval"):
        load_backbone(tmp_path / "evil.pth", registry)


class Harmless:
    """A class of the file's author that is not on any list."""


@pytest.mark.parametrize("write", WRITERS)
def test_a_trusted_file_is_read_in_full_and_marked(write, tmp_path, registry):
    weights = {k: v.numpy() if "pickle" in write.__name__ else v for k, v in state(resnet()).items()}
    sys.modules.setdefault(Harmless.__module__, types.ModuleType(Harmless.__module__)).Harmless = Harmless
    write({"state_dict": weights, "config": Harmless()}, tmp_path / "own.pth")
    with pytest.raises(BackboneError, match="Harmless"):
        load_backbone(tmp_path / "own.pth", registry)
    loaded = load_backbone(tmp_path / "own.pth", registry, trust=True)
    assert loaded.report.trusted
    assert loaded.provenance["trusted"]
    assert any("Harmless" in reason for reason in loaded.report.reason)


def test_trust_is_not_recorded_where_it_was_not_needed(shelf, registry):
    assert not load_backbone(shelf / "resnet10.pth", registry, trust=True).report.trusted


def test_a_pickled_module_is_refused_and_loads_when_trusted(tmp_path, registry):
    torch.save(resnet18(), tmp_path / "module.pth")
    with pytest.raises(BackboneError, match="pickled module"):
        load_backbone(tmp_path / "module.pth", registry)
    loaded = load_backbone(tmp_path / "module.pth", registry, trust=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone(PIXELS).pooled, pooled(resnet18()), rtol=1e-5, atol=1e-5)


def test_no_package_is_imported_for_a_configuration(tmp_path, registry):
    made = Made("omegaconf.listconfig.ListConfig", "yacs.config.CfgNode")
    content = {"state_dict": state(resnet()), "a": made["omegaconf.listconfig.ListConfig"](), "rng": np.arange(3)}
    made.save(content | {"b": made["yacs.config.CfgNode"]()}, tmp_path / "config.pth")
    before = set(sys.modules)
    load_backbone(tmp_path / "config.pth", registry)
    assert not {name for name in set(sys.modules) - before if name.startswith(("omegaconf", "yacs"))}


def test_real_configuration_classes_load_without_being_allowed_to_run(tmp_path, registry):
    omegaconf = pytest.importorskip("omegaconf")
    yacs = pytest.importorskip("yacs.config")
    tree = {"method": "byol", "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "out": "${method}", "none": None}
    node = yacs.CfgNode({"A": {"B": [1, 2]}})
    content = {
        "state_dict": state(resnet()),
        "cfg": omegaconf.OmegaConf.create(tree),
        "args": Namespace(lr=np.float32(1)),
    }
    torch.save(content | {"node": node, "rng": np.random.get_state()}, tmp_path / "real.pth")
    assert load_backbone(tmp_path / "real.pth", registry).report.matched == 1


def html(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")


def truncated(path: Path) -> None:
    torch.save({"w": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_legacy(path: Path) -> None:
    legacy({"w": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_safetensors_file_whose_header_length_begins_like_a_pickle_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    for padding in range(0, 256, 8):
        safetensors.torch.save_file({"w": torch.ones(2)}, path, {"note": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert torch.equal(reading.read(path).tree["w"], torch.ones(2))


def truncated_safetensors(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": np.zeros(1000)})[:-100])


def archive(path: Path) -> None:
    import tarfile

    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("weights.pth")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))


def images(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a/1.jpg", "x")


def script(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as zipped:
        for name in ("data.pkl", "constants.pkl", "code/a.py"):
            zipped.writestr(f"m/{name}", "x")


def unreadable_name(path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, path)
    content = path.read_bytes()
    listed = content.rindex(b"data.pkl")  # in the archive's list of files, which says that names are UTF-8
    flags = content.rindex(b"PK\x01\x02", 0, listed) + 8
    path.write_bytes(content[:flags] + b"\0\x08" + content[flags + 2 : listed] + b"\xff" + content[listed + 1 :])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "No such file"),
    "zero bytes": (lambda path: path.write_bytes(b""), "no bytes"),
    "a directory": (lambda path: path.mkdir(), "a checkpoint is one file"),
    "a web page": (html, "web page"),
    "a Git LFS pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "truncated zip": (truncated, "broken zip archive"),
    "a zip with a name of no text": (unreadable_name, "broken zip archive, UnicodeDecodeError"),
    "truncated legacy": (truncated_legacy, "Error"),
    "truncated safetensors": (truncated_safetensors, "broken safetensors"),
    "truncated pickle": (truncated_pickle, "truncated"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(60)), "gzip"),
    "Keras": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60)), "Keras"),
    "a tar archive": (archive, "archive"),
    "a zip of images": (images, "zip archive of a/1.jpg"),
    "TorchScript": (script, "code to run"),
    "noise": (lambda path: path.write_bytes(bytes(range(1, 200))), "first bytes"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "it holds epoch"),
    "a lone number": (lambda path: torch.save(3, path), "it holds int"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_three_lines_with_its_own_cause(kind, tmp_path, registry):
    path = tmp_path / "ckpt.pth"
    write, told = BROKEN[kind]
    write(path)
    with pytest.raises(BackboneError) as refused:
        load_backbone(path, registry)
    assert told in refused.value.cause
    assert str(path) in refused.value.problem
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == ["error", "cause", "fix"]
    assert refused.value.code == 4


# ------------------------------------------------------------------------------------------- names, heads, headers


def test_random_weights_come_from_the_seed_and_leave_the_global_generator_alone(registry):
    before = torch.get_rng_state()
    a, b, c = (load_backbone("random:small:resnet10", registry, seed=s, options={"width": 8}) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.report.identity == b.report.identity != c.report.identity
    assert a.name == "random-small-resnet10"
    assert a.backbone.spec.options["width"] == 8


def test_a_bare_or_unknown_name_is_refused_with_a_way_out(registry):
    with pytest.raises(BackboneError, match="random:timm:resnet50"):
        load_backbone("resnet50", registry)
    with pytest.raises(BackboneError, match="no published weights"):
        load_backbone("small:resnet18", registry)


def test_weights_that_cannot_be_fetched_are_a_refusal(registry, monkeypatch):
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("evalsuite.checkpoints.hubs.reachable", lambda url: True)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(BackboneError) as refused:
        load_backbone("torchvision:squeezenet1_1", registry)
    assert "unreachable" in refused.value.cause
    assert "--arch torchvision:squeezenet1_1" in refused.value.fix
    with pytest.raises(BackboneError, match="no classifier 'resnet19'"):
        load_backbone("torchvision:resnet19", registry)


def test_published_weights_are_loaded_with_their_own_normalisation(registry, monkeypatch):
    weights = trained(torchvision.models.squeezenet1_1()).state_dict()
    monkeypatch.setattr("evalsuite.checkpoints.hubs.reachable", lambda url: True)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: weights)
    loaded = load_backbone("torchvision:squeezenet1_1", registry)
    assert loaded.report.layout == "published weights"
    assert torch.equal(loaded.backbone.net.state_dict()["features.0.weight"], weights["features.0.weight"])


def test_the_classifier_does_not_change_the_identity(tmp_path, registry):
    body = state(trained(torchvision.models.squeezenet1_1()), drop=("classifier",))
    torch.save(body | {"classifier.1.weight": torch.randn(1000, 512, 1, 1)}, tmp_path / "a.pth")
    torch.save(body | head("classifier.1", 7), tmp_path / "b.pth")
    torch.save(body, tmp_path / "c.pth")
    found = {load_backbone(tmp_path / f"{name}.pth", registry).report.identity for name in "abc"}
    assert len(found) == 1


def test_our_own_file_comes_back_as_it_was_also_from_its_directory(tmp_path, registry):
    first = load_backbone("random:small:resnet10", registry, options={"width": 8, "mean": [0.1, 0.2, 0.3]})
    first.backbone.save(tmp_path / "run-a" / "backbone.safetensors", {"method": "simclr"})
    for spec in (tmp_path / "run-a", tmp_path / "run-a" / "backbone.safetensors"):
        loaded = load_backbone(spec, registry)
        assert loaded.report.identity == first.backbone.digest  # of the tensors, however they were drawn
        assert loaded.backbone.spec == first.backbone.spec
        assert loaded.name == "run-a"
        assert loaded.provenance["method"] == "simclr"
    with pytest.raises(BackboneError, match="is small:resnet10, not torchvision:resnet18"):
        load_backbone(tmp_path / "run-a", registry, arch="torchvision:resnet18")


def test_normalisation_is_imagenets_unless_somebody_says_otherwise(tmp_path, registry):
    torch.save(state(vit()), tmp_path / "vit.pth")  # timm's own configuration of this architecture says 0.5
    plain = load_backbone(tmp_path / "vit.pth", registry)
    assert plain.backbone.spec.mean == IMAGENET_MEAN
    assert plain.backbone.spec.image_size == (64, 64)
    told = load_backbone(
        tmp_path / "vit.pth", registry, options={"mean": 0.5, "std": [0.5, 0.5, 0.5], "image_size": 96}
    )
    assert told.backbone.spec.mean == (0.5, 0.5, 0.5)
    assert told.backbone.spec.image_size == (96, 96)
    assert told.report.input["source"] == "given"
    with pytest.raises(BackboneError, match="makes no sense"):
        load_backbone(tmp_path / "vit.pth", registry, options={"std": 0})


@pytest.mark.parametrize(
    "header",
    [
        {"arch": "torchvision:resnet18", "mean": "[0.1, 0.2, 0.3]", "std": "[1, 1, 1]", "image_size": "[96, 128]"},
        {"arch": "resnet18", "input": "RGB in [0,1], mean (1/10, 2/10,0.3), std (1, 1, 1), 96x128"},
    ],
)
def test_a_safetensors_header_is_honoured(header, tmp_path, registry):
    safetensors.torch.save_file(state(resnet18()), tmp_path / "a.safetensors", header)
    spec = load_backbone(tmp_path / "a.safetensors", registry).backbone.spec
    assert spec.arch == "torchvision:resnet18"
    assert spec.mean == pytest.approx((0.1, 0.2, 0.3))
    assert (spec.std, spec.image_size) == ((1, 1, 1), (96, 128))


def test_the_report_is_json_and_reads_well(shelf, registry):
    loaded = load_backbone(shelf / "resnet18.pth", registry)
    again = json.loads(json.dumps(loaded.report.to_json()))
    assert again["matched"] == 1
    assert again["unexpected"] == ["fc.weight", "fc.bias"]
    text = str(loaded.report)
    assert "100.0% of 11,176,512 parameters" in text
    assert loaded.report.sha256 in text


# ------------------------------------------------------------------------------------------------- third parties


class TinyNet(nn.Module):
    """A stranger's network: one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Features:
        level = self.body(x)
        return Features(level.mean((2, 3)), {2: level})


def build_tiny() -> Backbone:
    return Backbone(TinyNet(), BackboneSpec("tiny", 4, {2: 4}, frozenset({"pooled", "maps"}), image_size=(32, 32)))


def read_tiny(found: State) -> Iterator[Candidate]:
    """What a third party writes: a few lines."""
    if "stem/kernel" in found.tensors:
        tensors = {
            "body.weight": found.tensors["stem/kernel"].permute(3, 2, 0, 1),
            "body.bias": found.tensors["stem/bias"],
        }
        yield Candidate(tensors, "tiny", mean=(0.5, 0.5, 0.5), std=(1, 1, 1))


def read_wrongly(found: State) -> Iterator[Candidate]:
    raise KeyError("no such thing")
    yield


@pytest.fixture
def with_plugin(registry, monkeypatch) -> Callable[..., Registry]:
    """A registry with ours and a third party's entries, whose module is this one."""
    module = types.ModuleType("somebodys_plugin")
    for part in (build_tiny, read_tiny, read_wrongly):
        setattr(module, part.__name__, part)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def make(layout: str, backbone: str) -> Registry:
        theirs = Registry()
        evalsuite.backbones.evalsuite_register(theirs)
        evalsuite.checkpoints.evalsuite_register(theirs)
        theirs.owner = "somebody"
        theirs.checkpoint("theirs", f"somebodys_plugin:{layout}")
        theirs.backbone(backbone, f"somebodys_plugin:build_{backbone}")
        return theirs

    return make


def test_a_third_partys_layout_takes_a_few_lines(tmp_path, with_plugin):
    kernel, bias = torch.randn(3, 3, 3, 4), torch.randn(4)
    torch.save({"stem/kernel": kernel, "stem/bias": bias}, tmp_path / "tiny.pth")
    theirs = with_plugin("read_tiny", "tiny")
    loaded = load_backbone(tmp_path / "tiny.pth", theirs)
    assert loaded.report.layout == "theirs"
    assert loaded.backbone.spec.mean == (0.5, 0.5, 0.5)
    wanted = nn.functional.conv2d(SMALL_PIXELS - 0.5, kernel.permute(3, 2, 0, 1), bias, stride=2, padding=1)
    torch.testing.assert_close(loaded.backbone(SMALL_PIXELS).maps[2], wanted)
    assert load_backbone("tiny", theirs).report.layout == "plugin"


def test_a_third_partys_layout_that_fails_is_its_own_fault(shelf, with_plugin):
    with pytest.raises(PluginError, match="somebody"):
        load_backbone(shelf / "resnet10.pth", with_plugin("read_wrongly", "tiny"))


@pytest.fixture(scope="module")
def squeezenet(realdata) -> Path:
    return realdata / "ckpt_squeezenet_dc" / "squeezenet1_0_rgb_fp16.safetensors"


def test_the_real_squeezenet_is_recognised_without_a_flag(squeezenet, registry):
    loaded = load_backbone(squeezenet, registry)
    spec = loaded.backbone.spec
    assert (spec.arch, spec.image_size) == ("torchvision:squeezenet1_0", (227, 227))
    assert spec.mean == pytest.approx((123 / 255, 117 / 255, 104 / 255))
    assert spec.std == pytest.approx((1 / 255,) * 3)
    assert loaded.report.matched == 1
    assert all(p.dtype is torch.float32 for p in loaded.backbone.parameters())
    report = sanity(loaded.backbone, registry, count=16)
    assert report.ok, str(report)
    assert not any("untrained" in w for w in report.warnings)


def test_the_real_squeezenet_is_recognised_by_its_shapes_alone(squeezenet, tmp_path, registry):
    torch.save(safetensors.torch.load_file(squeezenet), tmp_path / "bare.pth")
    assert load_backbone(tmp_path / "bare.pth", registry).backbone.spec.arch == "torchvision:squeezenet1_0"


# ------------------------------------------------------------------------------------------------- the sanity gate


@pytest.fixture
def fine(registry) -> Backbone:
    spec = {"width": 8, "image_size": 32}
    backbone = build("small:resnet10", registry, **spec)
    trained(backbone.net)
    return backbone.eval()


def test_natural_images_are_in_range_and_deterministic():
    images = natural_images(4, (33, 48), seed=2)
    assert images.shape == (4, 3, 33, 48)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, natural_images(4, (33, 48), seed=2))
    assert not torch.equal(images, natural_images(4, (33, 48), seed=3))
    assert (images.std((1, 2, 3)) > 0.05).all()


def test_a_sound_network_passes(fine, registry):
    fine.train()
    report = sanity(fine, registry)
    assert report.ok, str(report)
    assert not report.warnings
    assert report.numbers["effective_rank"] > 4
    assert fine.training  # as it came


def test_a_fresh_network_is_called_untrained_and_is_no_fault(registry):
    for spec in ("random:small:resnet10", "random:torchvision:squeezenet1_1"):
        loaded = load_backbone(spec, registry)
        loaded.backbone.respec(image_size=(64, 64))
        report = sanity(loaded.backbone, registry, count=8)
        assert report.ok, str(report)
        assert any("untrained" in w for w in report.warnings)


def test_a_few_steps_of_training_are_noticed(registry):
    backbone = load_backbone("random:small:resnet10", registry, options={"width": 8}).backbone.train()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    for _ in range(3):
        features = backbone(torch.rand(8, 3, 32, 32)).pooled
        optimizer.zero_grad()
        (features - 1).pow(2).mean().backward()
        optimizer.step()
    assert sanity(backbone, registry, count=8).numbers["like_fresh"] < 0.6


def spoil(backbone: Backbone, kind: str) -> None:
    net: Any = backbone.net
    with torch.no_grad():
        if kind == "NaN":
            net.layer2[0].conv1.weight[0, 0, 0, 0] = float("nan")
        elif kind == "constant":
            net.layer4[0].bn2.weight.zero_()
            net.layer4[0].downsample[1].weight.zero_()
            net.layer4[0].bn2.bias.fill_(1)
        elif kind == "insensitive":
            net.layer4[0].bn2.weight.mul_(1e-5)
            net.layer4[0].downsample[1].weight.mul_(1e-5)
            net.layer4[0].bn2.bias.fill_(1)
        elif kind == "collapsed":
            for conv, norm in ((net.layer4[0].conv2, net.layer4[0].bn2), (net.layer4[0].downsample[0],) * 2):
                conv.weight.copy_(conv.weight[:1].abs().expand_as(conv.weight))
                if norm is not conv:
                    norm.weight.zero_()
                    norm.bias.zero_()
            norm = net.layer4[0].downsample[1]
            norm.weight.fill_(1)
            norm.bias.fill_(5)
            norm.running_mean.zero_()
            norm.running_var.fill_(1)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("NaN", "NaN or infinite"),
        ("constant", "constant features"),
        ("insensitive", "insensitive to the input"),
        ("collapsed", "collapsed features"),
    ],
)
def test_a_spoilt_network_is_caught(kind, told, fine):
    spoil(fine, kind)
    report = sanity(fine)
    assert not report.ok
    assert any(told in fault for fault in report.faults), str(report)
    assert told in str(report)


def test_dead_channels_are_told(fine):
    with torch.no_grad():
        fine.net.bn1.weight[:6] = 0
        fine.net.bn1.bias[:6] = -1
        fine.net.layer1[0].bn2.weight[:6] = 0
        fine.net.layer1[0].bn2.bias[:6] = -1
    report = sanity(fine)
    assert report.numbers["dead_map_of_stride_1"] == pytest.approx(0.75)
    assert any("75% of the channels of map of stride 1" in w for w in report.warnings)


def test_inspect_tells_everything_as_json(registry):
    loaded = load_backbone("random:torchvision:squeezenet1_1", registry, options={"image_size": 64})
    told = json.loads(json.dumps(describe(loaded, registry)))
    assert told["parameters"] == sum(
        p.numel() for k, p in loaded.backbone.net.named_parameters() if "classifier" not in k
    )
    assert told["heads"] == 512 * 1000 + 1000
    assert told["shapes"]["pooled"] == [512]
    assert told["shapes"]["maps"]["16"][0] == 512
    assert told["sanity"]["ok"]
    first = 2 * 64 * 27 * 31 * 31  # of the first convolution: a multiplication and an addition a weight and place
    assert told["flops"] > first
    assert describe(loaded, registry, check=False)["sanity"] is None


def test_flops_are_counted_exactly_where_they_can_be_counted_by_hand(with_plugin):
    theirs = with_plugin("read_tiny", "tiny")
    assert describe(load_backbone("tiny", theirs), theirs, check=False)["flops"] == 2 * 4 * 27 * 16 * 16
