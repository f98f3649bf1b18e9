"""A backbone written for torchvision, timm and detectron2, and read back as the very same."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision

from evalsuite import BackboneError, UsageError, load_backbone
from evalsuite.backbone import build
from evalsuite.checkpoints import convert
from evalsuite.checkpoints.exporting import RESNETS, _detectron2_name
from evalsuite.checkpoints.layouts import _from_detectron2


@pytest.fixture(scope="module")
def trained(registry):
    """A ResNet-18 of each zoo with weights and statistics of its own, normalised in its own way."""

    def made(arch):
        backbone = load_backbone(f"random:{arch}", registry).backbone
        with torch.no_grad():
            for name, value in backbone.net.named_buffers():
                value.add_(1) if name.endswith("tracked") else value.uniform_(0.5, 1.5)
        return backbone.respec(mean=(0.4, 0.5, 0.6), image_size=(192, 192))

    return {arch: made(arch) for arch in ("timm:resnet18", "torchvision:resnet18")}


ENDINGS = [("torchvision", ".safetensors"), ("timm", ".safetensors"), ("detectron2", ".pkl"), ("detectron2", ".pth")]


@pytest.mark.parametrize("arch", ["timm:resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize(("to", "ending"), ENDINGS, ids="".join)
def test_what_was_converted_is_read_back_without_a_flag_as_the_very_same(arch, to, ending, trained, tmp_path, registry):
    backbone, out = trained[arch], tmp_path / f"theirs{ending}"
    done = convert(backbone, to, out, registry)
    again = load_backbone(out, registry)
    assert again.backbone.identity == backbone.identity == done.identity
    assert again.report.arch == arch
    assert not again.report.trusted
    assert again.backbone.spec.mean == pytest.approx((0.4, 0.5, 0.6))
    assert again.backbone.spec.image_size == (192, 192)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("arch", ["timm:resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_torchvision_and_timm_load_it_strictly_and_say_the_same(arch, to, trained, tmp_path, registry):
    backbone = trained[arch]
    convert(backbone, to, tmp_path / "theirs.safetensors", registry)
    net = timm.create_model("resnet18", num_classes=0) if to == "timm" else torchvision.models.resnet18()
    net.load_state_dict(safetensors.torch.load_file(tmp_path / "theirs.safetensors"), strict=True)
    pixels = torch.rand(2, 3, 64, 64)
    if to == "torchvision":
        assert not net.fc.weight.any()
        net.fc = torch.nn.Identity()
    with torch.no_grad():
        found, expected = net.eval()(backbone.normalise(pixels)), backbone(pixels).pooled
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ending", [".pkl", ".pth"])
def test_the_file_for_detectron2_has_the_form_of_its_model_zoo(ending, trained, tmp_path, registry):
    """``convert_pretrain_to_d2.py`` of PixPro and of MoCo: names, ``__author__`` and ``matching_heuristics``."""
    backbone, out = trained["timm:resnet18"], tmp_path / f"theirs{ending}"
    done = convert(backbone, "detectron2", out, registry)
    content = pickle.loads(out.read_bytes()) if ending == ".pkl" else torch.load(out, weights_only=True)
    assert content["matching_heuristics"] is True
    assert content["__author__"]
    assert all(isinstance(v, np.ndarray if ending == ".pkl" else torch.Tensor) for v in content["model"].values())
    net = backbone.net.state_dict()
    for theirs, ours in (
        ("stem.conv1.weight", "conv1.weight"),
        ("stem.conv1.norm.running_var", "bn1.running_var"),
        ("res2.1.conv2.norm.bias", "layer1.1.bn2.bias"),
        ("res5.0.shortcut.weight", "layer4.0.downsample.0.weight"),
        ("res5.0.shortcut.norm.weight", "layer4.0.downsample.1.weight"),
    ):
        assert torch.equal(torch.as_tensor(content["model"][theirs]), net[ours])
    assert len(content["model"]) == len(net)
    assert done.use["MODEL.RESNETS.DEPTH"] == 18
    assert done.use["MODEL.RESNETS.RES2_OUT_CHANNELS"] == 64
    assert done.use["MODEL.PIXEL_MEAN"] == [102.0, 127.5, 153.0]
    assert (done.use["INPUT.FORMAT"], done.use["MODEL.RESNETS.STRIDE_IN_1X1"]) == ("RGB", False)


@pytest.mark.parametrize("name", RESNETS)
def test_names_for_detectron2_are_those_that_are_read_from_it(name):
    with torch.device("meta"):
        names = [k for k in torchvision.models.get_model(name).state_dict() if not k.startswith("fc.")]
    theirs = [_detectron2_name(k) for k in names]
    assert len(set(theirs)) == len(names)
    assert [_from_detectron2(k) for k in theirs] == names


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")  # detectron2 is older than the torch it runs on
@pytest.mark.parametrize("ending", [".pkl", ".pth"])
def test_detectron2s_own_checkpointer_fills_its_resnet_and_it_says_the_same(ending, trained, tmp_path, registry):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    backbone, out = trained["timm:resnet18"], tmp_path / f"theirs{ending}"
    done = convert(backbone, "detectron2", out, registry)
    settings = get_cfg()
    settings.merge_from_list([part for pair in done.use.items() for part in pair])
    settings.merge_from_list(["MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.OUT_FEATURES", ["res2", "res5"]])
    settings.merge_from_list(["MODEL.BACKBONE.FREEZE_AT", 0])
    net = torch.nn.Module()
    net.backbone = build_backbone(settings)
    odd = DetectionCheckpointer(net).load(str(out))
    assert odd["matching_heuristics"] is True
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(settings.MODEL[key]).view(1, 3, 1, 1) for key in ("PIXEL_MEAN", "PIXEL_STD"))
    with torch.no_grad():
        found, expected = net.backbone.eval()((255 * pixels - mean) / std), backbone(pixels).maps
    torch.testing.assert_close(found["res2"], expected[4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["res5"], expected[32], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arch", "to"),
    [("small:resnet18", "torchvision"), ("small:resnet10", "detectron2"), ("rotnet:nin4", "timm"),
     ("timm:resnet18d", "torchvision"), ("torchvision:mobilenet_v3_small", "timm")],
)  # fmt: skip
def test_an_architecture_without_such_names_is_refused_in_words(arch, to, tmp_path, registry):
    with pytest.raises(BackboneError, match=f"{arch} has no names in {to}") as refused:
        convert(build(arch, registry), to, tmp_path / ("a.pkl" if to == "detectron2" else "a.safetensors"), registry)
    assert "resnet50" in refused.value.cause
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"output_stride": 8}, {"layers": (1, 1, 1, 1)}], ids=str)
def test_a_network_that_its_options_made_another_is_refused(options, tmp_path, registry):
    """A dilated ResNet has the same tensors as a plain one, and other features."""
    with pytest.raises(BackboneError, match="timm:resnet18 is not the resnet18 of detectron2") as refused:
        convert(build("timm:resnet18", registry, **options), "detectron2", tmp_path / "a.pkl", registry)
    assert next(iter(options)) in refused.value.cause


def test_nothing_is_overwritten_and_endings_and_targets_are_checked(trained, tmp_path, registry):
    backbone, out = trained["timm:resnet18"], tmp_path / "a.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(UsageError, match="is there already"):
        convert(backbone, "timm", out, registry)
    assert out.read_bytes() == b"precious"
    with pytest.raises(UsageError, match="does not end as a file for detectron2 does") as refused:
        convert(backbone, "detectron2", tmp_path / "b.safetensors", registry)
    assert "b.pkl" in refused.value.fix
    with pytest.raises(UsageError, match="nothing is known of names of 'jax'"):
        convert(backbone, "jax", tmp_path / "b.safetensors", registry)


def test_a_file_that_would_read_back_otherwise_never_takes_its_name(trained, tmp_path, registry, monkeypatch):
    monkeypatch.setattr(
        "evalsuite.checkpoints.exporting._detectron2_name", lambda name: f"odd.{_detectron2_name(name)}"
    )
    monkeypatch.setattr(type(trained["timm:resnet18"]), "digest", property(lambda self: str(id(self))))
    with pytest.raises(BackboneError, match="would not come back from a file for detectron2"):
        convert(trained["timm:resnet18"], "detectron2", tmp_path / "a.pkl", registry)
    assert not list(tmp_path.iterdir())


def test_the_command_converts_and_tells_what_the_target_must_be_told(trained, tmp_path, monkeypatch, capsys):
    from evalsuite import cli

    trained["timm:resnet18"].save(tmp_path / "backbone.safetensors")
    monkeypatch.setenv("EVALSUITE_PLUGINS", "")
    arguments = [str(tmp_path / "backbone.safetensors"), "--to", "detectron2", str(tmp_path / "r18.pkl")]
    for extra, code in ((["--json"], 0), ([], 2)):
        monkeypatch.setattr("sys.argv", ["evalsuite", "convert", *arguments, *extra])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
        if code == 0:
            told = json.loads(capsys.readouterr().out)
    assert told["identity"] == trained["timm:resnet18"].identity
    assert told["read_back_as"] == "timm:resnet18"
    assert told["use"]["MODEL.RESNETS.DEPTH"] == 18
    assert "is there already" in capsys.readouterr().err
