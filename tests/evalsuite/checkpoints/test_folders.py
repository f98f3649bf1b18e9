"""Folders of hubs: which file is meant, its parts, and what is written beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from evalsuite.backbone import IMAGENET_MEAN, IMAGENET_STD
from evalsuite.checkpoints import load_backbone
from evalsuite.errors import BackboneError

HALF = (0.5, 0.5, 0.5)
SIZES: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
CONFIG: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "global_pool": "token",
    "model_args": SIZES,
    "pretrained_cfg": {"mean": list(HALF), "std": list(HALF), "input_size": [3, 32, 32]},
}


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **(SIZES | options))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def write(folder: Path, tensors: dict[str, Tensor], **texts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    for name, content in texts.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def features(loaded: Any, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    centre, spread = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        theirs = net.forward_head(net.forward_features((pixels - centre) / spread), pre_logits=True)  # type: ignore[operator]
        return loaded.backbone(pixels).pooled, theirs


def test_a_hub_folder_says_its_heads_and_its_normalisation(tmp_path, registry):
    net = vit()
    folder = write(tmp_path / "vit-of-mine", net.state_dict(), config=CONFIG)
    (folder / "README.md").write_text("# a model")
    for spec in (folder, folder / "model.safetensors"):
        loaded = load_backbone(spec, registry)
        assert loaded.backbone.spec.options["num_heads"] == 3
        assert (loaded.backbone.spec.mean, loaded.backbone.spec.std) == (HALF, HALF)
        assert loaded.report.arch == "timm:vit_tiny_patch16_224"
        assert loaded.report.input["source"] == "config.json beside the file"
        assert loaded.name == "vit-of-mine"
        torch.testing.assert_close(*features(loaded, net, HALF, HALF), rtol=1e-5, atol=1e-5)


def test_pooling_and_activation_are_taken_from_the_word_of_the_hub(tmp_path, registry):
    net = vit(global_pool="avg", fc_norm=False, act_layer="quick_gelu")
    options = SIZES | {"fc_norm": False, "act_layer": "quick_gelu"}
    config = CONFIG | {"global_pool": "avg", "model_args": options}
    loaded = load_backbone(write(tmp_path / "a", net.state_dict(), config=config), registry)
    torch.testing.assert_close(*features(loaded, net, HALF, HALF), rtol=1e-5, atol=1e-5)


def test_the_word_of_the_user_stands_above_that_of_the_hub(tmp_path, registry):
    folder = write(tmp_path / "a", vit().state_dict(), config=CONFIG)
    loaded = load_backbone(folder, registry, options={"num_heads": 6, "mean": [0.1, 0.2, 0.3], "std": 1})
    assert loaded.backbone.spec.options["num_heads"] == 6
    assert (loaded.backbone.spec.mean, loaded.report.input["source"]) == ((0.1, 0.2, 0.3), "given")


@pytest.mark.parametrize(
    "config",
    [
        {k: v for k, v in CONFIG.items() if k != "pretrained_cfg"} | CONFIG["pretrained_cfg"],
        CONFIG | {"architecture": "vit_tiny_patch16_224.mine"},
    ],
    ids=["all in one object", "a tag in the name"],
)
def test_other_forms_of_a_hubs_text_are_read(config, tmp_path, registry):
    spec = load_backbone(write(tmp_path / "a", vit().state_dict(), config=config), registry).backbone.spec
    assert (spec.mean, spec.options["num_heads"]) == (HALF, 3)


HOSTILE: dict[str, Any] = {
    "another architecture": CONFIG | {"architecture": "resnet50", "model_args": {}},
    "a network too large for the machine": CONFIG | {"architecture": "vit_7b_patch16_dinov3", "model_args": {}},
    "code and addresses": CONFIG
    | {
        "model_args": {"embed_layer": "os.system", "checkpoint_path": "/etc/passwd", "pretrained": True, "num_heads": 5}
    },
    "sizes without end": CONFIG | {"model_args": {"depth": 10**9, "embed_dim": 1e300, "num_heads": [3] * 99}},
    "no JSON": "{",
    "a list": "[]",
    "brackets without end": "[" * 100_000,
    "a number of a million digits": '{"architecture": ' + "9" * 100_000 + "}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_text_that_does_not_fit_the_tensors_is_passed_over_and_named(kind, tmp_path, registry):
    folder = write(tmp_path / "a", vit().state_dict(), config=HOSTILE[kind])
    loaded = load_backbone(folder, registry)
    assert loaded.backbone.spec.mean == IMAGENET_MEAN
    assert loaded.report.options["num_heads"] == 1
    assert "config.json beside it" in "; ".join(loaded.report.reason)


@pytest.mark.parametrize("mean", [[0.5], [123.7, 116.3, 103.5], ["a", "b", "c"], None, [float("nan")] * 3])
def test_a_mean_that_makes_no_sense_is_not_taken(mean, tmp_path, registry):
    config = CONFIG | {"pretrained_cfg": {"mean": mean, "std": list(HALF)}}
    loaded = load_backbone(write(tmp_path / "a", vit().state_dict(), config=config), registry)
    assert loaded.backbone.spec.mean == IMAGENET_MEAN
    assert "nothing says otherwise" in loaded.report.input["source"]


@pytest.mark.parametrize("std", [[1], [1, 1, 1], [58.4, 57.1], 1])
def test_a_std_alone_that_makes_no_sense_is_passed_over(std, tmp_path, registry):
    config = CONFIG | {"pretrained_cfg": {"std": std}}
    loaded = load_backbone(write(tmp_path / "a", vit().state_dict(), config=config), registry)
    assert loaded.backbone.spec.std in (IMAGENET_STD, (1.0, 1.0, 1.0))


def test_the_text_beside_a_file_of_another_name_is_believed_only_where_it_fits(tmp_path, registry):
    folder = write(tmp_path / "a", vit().state_dict(), config=CONFIG)
    torch.save(vit().state_dict(), folder / "mine.pth")
    torch.save(timm.create_model("test_convnext", num_classes=0).state_dict(), folder / "other.pth")
    assert load_backbone(folder / "mine.pth", registry).backbone.spec.mean == HALF
    other = load_backbone(folder / "other.pth", registry, arch="timm:test_convnext")
    assert other.backbone.spec.mean == IMAGENET_MEAN


def test_the_preprocessing_of_transformers_is_read(tmp_path, registry):
    config = {"model_type": "someones", "architectures": ["SomeonesModel"]}
    text = {"image_mean": list(HALF), "image_std": [0.25] * 3, "size": {"shortest_edge": 48}}
    loaded = load_backbone(write(tmp_path / "a", vit().state_dict(), config=config, preprocessor_config=text), registry)
    assert (loaded.backbone.spec.mean, loaded.backbone.spec.std) == (HALF, (0.25,) * 3)
    assert loaded.report.input["source"] == "preprocessor_config.json beside the file"
    assert loaded.backbone.spec.image_size == (32, 32)  # the table of positions is of this size


# --------------------------------------------------------------------------------------------- which file is meant


def cache(root: Path, tensors: dict[str, Tensor]) -> Path:
    """A model's folder as the Hugging Face cache keeps it: blobs by digest, links under names."""
    model = root / "hub" / "models--timm--vit_of_mine"
    snapshot = model / "snapshots" / "0123abcd"
    write(model / "blobs", tensors, config=CONFIG)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("model.safetensors", "config.json")):
        (model / "blobs" / name).rename(model / "blobs" / f"{number:064x}")
        (snapshot / name).symlink_to(f"../../blobs/{number:064x}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123abcd")
    return model


def test_a_model_in_the_hub_cache_is_taken_with_what_lies_beside_the_link(tmp_path, registry):
    model = cache(tmp_path, vit().state_dict())
    snapshot = model / "snapshots" / "0123abcd"
    for spec in (model, snapshot, snapshot / "model.safetensors"):
        loaded = load_backbone(spec, registry)
        assert loaded.backbone.spec.mean == HALF
        assert loaded.name == "timm-vit_of_mine"


def test_a_download_that_did_not_end_is_named(tmp_path, registry):
    model = cache(tmp_path, vit().state_dict())
    (model / "blobs" / f"{0:064x}").unlink()
    with pytest.raises(BackboneError, match="did not end"):
        load_backbone(model, registry)


def test_of_several_revisions_the_main_one_is_taken_or_a_name_asked_for(tmp_path, registry):
    model = cache(tmp_path, vit().state_dict())
    (model / "snapshots" / "ffff").mkdir()
    assert load_backbone(model, registry).backbone.spec.mean == HALF
    (model / "refs" / "main").unlink()
    with pytest.raises(BackboneError, match="2 revisions"):
        load_backbone(model, registry)


def test_a_folder_of_one_checkpoint_is_that_checkpoint(tmp_path, registry):
    (tmp_path / "run").mkdir()
    torch.save(vit().state_dict(), tmp_path / "run" / "last.pth")
    (tmp_path / "run" / "log.txt").write_text("loss 1")
    assert load_backbone(tmp_path / "run", registry).name == "last"


def test_a_folder_of_several_checkpoints_or_none_is_refused_by_names_of_weights_alone(tmp_path, registry):
    for name in ("config.json", ".metadata", "args.yaml"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(BackboneError) as refused:
        load_backbone(tmp_path, registry)
    assert "without weights" in refused.value.problem
    for name in ("epoch1.pth", "epoch2.pth", ".hidden.pth"):
        torch.save(vit().state_dict(), tmp_path / name)
    with pytest.raises(BackboneError) as several:
        load_backbone(tmp_path, registry)
    assert "epoch1.pth, epoch2.pth" in several.value.cause
    for text in (str(refused.value), str(several.value)):
        assert not any(word in text for word in ("config.json", ".metadata", "args.yaml", ".hidden"))


def test_the_text_alone_is_refused_with_a_word_on_where_the_weights_are(tmp_path, registry):
    folder = write(tmp_path / "a", vit().state_dict(), config=CONFIG)
    with pytest.raises(BackboneError) as refused:
        load_backbone(folder / "config.json", registry)
    assert "without its weights" in refused.value.cause
    assert str(folder) in refused.value.fix


def shards(folder: Path, save: Callable[[dict[str, Tensor], Path], Any], stem: str, ending: str) -> Path:
    folder.mkdir()
    tensors = vit().state_dict()
    names = [f"{stem}-0000{i}-of-00002{ending}" for i in (1, 2)]
    table = {k: names[i % 2] for i, k in enumerate(tensors)}
    for name in names:
        save({k: v.clone() for k, v in tensors.items() if table[k] == name}, folder / name)
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize(
    ("save", "stem", "ending"),
    [(safetensors.torch.save_file, "model", ".safetensors"), (torch.save, "pytorch_model", ".bin")],
    ids=["safetensors", "bin"],
)
def test_shards_are_read_as_one(save, stem, ending, tmp_path, registry):
    folder = shards(tmp_path / "big", save, stem, ending)
    found = {
        load_backbone(spec, registry).report.identity
        for spec in (folder, folder / f"{stem}{ending}.index.json", folder / f"{stem}-00002-of-00002{ending}")
    }
    whole = load_backbone(write(tmp_path / "one", vit().state_dict(), config=CONFIG), registry)
    assert found == {whole.report.identity}
    report = load_backbone(folder, registry).report
    assert "read from 2 shards" in report.reason
    assert len(report.sha256) == 64


def test_shards_that_are_not_whole_or_lie_elsewhere_are_refused(tmp_path, registry):
    folder = shards(tmp_path / "big", safetensors.torch.save_file, "model", ".safetensors")
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": told["weight_map"] | {"more": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(BackboneError, match="1 tensors are missing, first more"):
        load_backbone(folder, registry)
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(BackboneError, match="outside of its folder"):
        load_backbone(folder, registry)
    index.write_text(json.dumps(told))
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(BackboneError, match="lacks 1 of 2 shards"):
        load_backbone(folder, registry)
    index.write_text("{}")
    with pytest.raises(BackboneError, match="no weight_map"):
        load_backbone(folder, registry)


def test_nothing_beside_the_weights_is_imported(tmp_path, registry):
    config = CONFIG | {
        "auto_map": {"AutoModel": "modeling_evil.Evil"},
        "model_args": SIZES | {"act_layer": "antigravity"},
    }
    folder = write(tmp_path / "a", vit().state_dict(), config=config)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    load_backbone(folder, registry)
    assert not {"antigravity", "modeling_evil"} & set(sys.modules)
