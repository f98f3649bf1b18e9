"""Strangers' checkpoints: the zoo of layouts, wrong architectures, hostile and broken files, and the sanity gate."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
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
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import evalsuite.backbones
import evalsuite.checkpoints
from evalsuite.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneSpec, Features, build
from evalsuite.checkpoints import Candidate, State, describe, load_backbone, natural_images, sanity
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
def resnet(depths: tuple[int, ...] = (1, 1, 1, 1), seed: int = 0, **kwargs: Any) -> nn.Module:
    return trained(ResNet(BasicBlock, list(depths), num_classes=10, **kwargs), seed)


@functools.cache
def cifar(padding: int = 1, seed: int = 0) -> nn.Module:
    """ResNet-18 as ports of SimCLR change it for small images."""
    net = torchvision.models.resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
    net.maxpool = nn.Identity()
    return trained(net, seed)


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
        added = {}
        for full, kind in self.classes.items():
            module = full.rpartition(".")[0]
            parts = module.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                if name not in sys.modules:
                    added[name] = sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[module], kind.__name__, kind)
        try:
            torch.save(content, path)
        finally:
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
    net = trained(torchvision.models.resnet18())
    torch.save(net.state_dict(), path)
    return net, "plain"


@layout("torchvision, resnext50 behind DDP")
def _(path: Path) -> Case:
    net = trained(torchvision.models.resnext50_32x4d())
    torch.save({"state_dict": state(net, "module.")}, path)
    return net, "ddp"


@layout("torchvision, old file format and old DenseNet names")
def _(path: Path) -> Case:
    net = trained(torchvision.models.densenet121())
    old = {k: v for k, v in state(net).items()}
    for name in list(old):
        if "denselayer" in name:
            where, layer, rest = name.rpartition(next(p for p in (".norm1", ".norm2", ".conv1", ".conv2") if p in name))
            old[f"{where}{layer[:-1]}.{layer[-1]}{rest}"] = old.pop(name)
    torch.save(old, path, _use_new_zipfile_serialization=False)
    return net, "plain"


@layout("timm training file with a moving average")
def _(path: Path) -> Case:
    net = resnet()
    content = {"epoch": 3, "arch": "resnet18", "state_dict": state(resnet(seed=1)), "state_dict_ema": state(net)}
    torch.save(content | {"args": Namespace(lr=0.1, out=PurePosixPath("a/b")), "metric": np.float64(71.2)}, path)
    return net, "timm"


@layout("timm ResNet-D found by its stem")
def _(path: Path) -> Case:
    net = timm_net("resnet18d")
    torch.save({"state_dict": state(net), "arch": "resnet18d"}, path)
    return net, "timm"


@layout("MoCo v1")
def _(path: Path) -> Case:
    net = trained(torchvision.models.resnet50())
    content = state(net, "module.encoder_q.", ("fc",)) | state(trained(torchvision.models.resnet50(), 1), "module.encoder_k.")
    content |= head("module.encoder_q.fc", 128, 2048) | {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1).long()}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": content, "optimizer": {"state": {}}}, path)
    return net, "moco"


@layout("MoCo v2")
def _(path: Path) -> Case:
    net = resnet()
    content = state(net, "module.encoder_q.", ("fc",)) | state(resnet(seed=1), "module.encoder_k.", ("fc",))
    content |= head("module.encoder_q.fc.0", 512) | head("module.encoder_q.fc.2", 128) | {"module.queue": torch.randn(128, 64)}
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": content}, path)
    return net, "moco"


@layout("MoCo v3, ViT-S with twelve heads")
def _(path: Path) -> Case:
    net = vit(embed_dim=384, num_heads=12)
    content = state(net, "module.base_encoder.") | state(vit(1, embed_dim=384, num_heads=12), "module.momentum_encoder.")
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
    net = cifar()
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
    content = {"student": state(vit(1, init_values=0.1), "module.backbone.") | masked, "teacher": state(net, "backbone.")}
    content["teacher"] |= {"head.mlp2.0.weight": torch.randn(8, 64), "backbone.mask_token": torch.zeros(1, 1, 64)}
    torch.save({"ibot_loss": {"center": torch.zeros(1, 8)}} | content, path)
    return net, "ibot"


@layout("MAE: the decoder is left")
def _(path: Path) -> Case:
    net = vit()
    decoder = {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 17, 32)}
    decoder |= {f"decoder_{k}": v for k, v in state(vit(1)).items() if k.startswith("blocks")} | head("decoder_embed", 32, 64)
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
    return net, "obow"


@layout("PixPro")
def _(path: Path) -> Case:
    net = resnet()
    content = state(net, "module.encoder.", ("fc",)) | state(resnet(seed=1), "module.encoder_k.", ("fc",))
    content |= {"module.value_transform.weight": torch.randn(8, 8, 1, 1), "module.projector.linear1.weight": torch.randn(8, 512, 1, 1)}
    torch.save({"opt": Namespace(lr=1.0), "model": content, "optimizer": {}, "epoch": 100, "amp": {}}, path)
    return net, "pixpro"


@layout("InterCLR: backbone before its aliases")
def _(path: Path) -> Case:
    net = resnet()
    content = state(resnet(seed=1), "encoder_k.0.", ("fc",)) | state(net, "encoder_q.0.", ("fc",)) | state(net, "backbone.", ("fc",))
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
    net = cifar(padding=2)
    made = Made("omegaconf.dictconfig.DictConfig", "omegaconf.base.ContainerMetadata", "omegaconf.nodes.AnyNode")
    config = made["omegaconf.dictconfig.DictConfig"]()
    config.__dict__ |= {
        "_content": {"method": made["omegaconf.nodes.AnyNode"]()},
        "_metadata": made["omegaconf.base.ContainerMetadata"](),
        "_kind": Any,
    }
    content = state(net, "backbone.", ("fc",)) | state(cifar(2, seed=1), "momentum_backbone.", ("fc",))
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
    torch.save(content | {"hyper_parameters": {"lr": 0.1}, "optimizer_states": [{"state": {0: {"m": torch.ones(3)}}}]}, path)
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
    whole = trained(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10))
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


@layout("ConvNeXt under torchvision's names")
def _(path: Path) -> Case:
    net = trained(torchvision.models.convnext_tiny())
    torch.save({"model_ema": state(net, "module.")}, path)
    return net, "timm"


@layout("Swin under its official names")
def _(path: Path) -> Case:
    net = timm_net("swin_tiny_patch4_window7_224", embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    official = {}
    for name, tensor in net.state_dict().items():
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        official[name] = tensor
    official["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    torch.save({"model": official | head("head", 10, 256)}, path)
    return net, "plain"


@layout("Swin under torchvision's names")
def _(path: Path) -> Case:
    net = trained(torchvision.models.swin_t())
    torch.save(state(net), path)
    return net, "plain"


@layout("ViT under torchvision's names", torch.rand(1, 3, 64, 64))
def _(path: Path) -> Case:
    net = trained(torchvision.models.vit_b_32(image_size=64))
    torch.save(state(net), path)
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
    assert not loaded.report.missing and not loaded.report.mismatched and not loaded.report.leftover
    assert loaded.report.layout == expected
    assert not loaded.report.trusted
    assert not loaded.backbone.training


def test_the_zoo_is_large_enough():
    assert len(ZOO) >= 40
