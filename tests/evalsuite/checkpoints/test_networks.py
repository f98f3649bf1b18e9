"""Several networks in one file, wrappers inside names, lists as containers, and what a file is not claimed to be."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.utils import parametrizations

from evalsuite.backbone import build
from evalsuite.checkpoints import load_backbone
from evalsuite.checkpoints.wrappers import unwrapped
from evalsuite.errors import BackboneError, UsageError

SIZES: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 1, "img_size": 32}
POOLED = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def vit(seed: int = 0, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return timm.create_model("vit_base_patch16_224", num_classes=0, **(SIZES | options)).state_dict()


@pytest.fixture(scope="module")
def resnet(registry) -> Callable[[int], dict[str, Tensor]]:
    def draw(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return build("small:resnet10", registry, width=8).net.state_dict()

    return draw


def behind(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def holds(loaded: Any, tensors: dict[str, Tensor]) -> bool:
    held = loaded.backbone.net.state_dict()
    return all(torch.equal(value, tensors[name]) for name, value in held.items())


# ------------------------------------------------------------------------------------------------ several networks

MLP = {"0.weight": torch.ones(4, 4), "2.weight": torch.ones(4, 4)}
JEPA = {"module.predictor_embed.weight": torch.ones(4, 48), "module.mask_token": torch.ones(1, 1, 4)}
ONE, TWO = (lambda: vit(1, **POOLED)), (lambda: vit(2, **POOLED))
# what a file holds, with network 2 the one to judge, a part of the reason, and the report's layout
FILES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "I-JEPA": (
        lambda: {"encoder": behind("module.", ONE()), "predictor": JEPA, "target_encoder": behind("module.", TWO())},
        "the target encoder",
        "ijepa",
    ),
    "I-JEPA in one dict": (
        lambda: behind("encoder.", ONE()) | behind("target_encoder.", TWO()) | behind("predictor.", JEPA),
        "the target encoder",
        "ijepa",
    ),
    "MSN": (
        lambda: {"encoder": behind("module.", vit(1)), "prototypes": torch.ones(4, 8), "target_encoder": vit(2)},
        "the target encoder",
        "msn",
    ),
    "V-JEPA's keys": (lambda: {"target_encoder": TWO(), "encoder": ONE(), "epoch": 3}, "the target encoder", "plain"),
    "BYOL with a target encoder": (
        lambda: (
            behind("target_encoder.", vit(1)) | behind("online_encoder.", vit(2)) | behind("online_predictor.", MLP)
        ),
        "the online network",
        "byol",
    ),
    "BYOL whose online network is called encoder": (
        lambda: {"target_encoder": vit(1), "encoder": vit(2), "predictor": MLP},
        "",
        "plain",
    ),
    "mean teacher": (lambda: {"student": vit(1), "teacher": vit(2), "epoch": 1}, "the teacher", "plain"),
    "a moving average": (lambda: {"model": vit(1), "ema_state_dict": vit(2)}, "the moving average", "plain"),
    "a moving average in one dict": (
        lambda: behind("net.", vit(1)) | behind("ema_net.", vit(2)),
        "the moving",
        "plain",
    ),
    "MoCo": (
        lambda: behind("encoder_k.", vit(1)) | behind("encoder_q.", vit(2)) | {"queue": torch.ones(4, 8)},
        "the query encoder",
        "moco",
    ),
    "a momentum encoder": (lambda: behind("momentum_net.", vit(1)) | behind("net.", vit(2)), "", "plain"),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_network_that_its_authors_judge_is_taken_and_the_other_is_named(kind, tmp_path, registry):
    write, why, layout = FILES[kind]
    torch.save(write(), tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", registry)
    options = POOLED if "JEPA" in kind else {}
    assert holds(loaded, vit(2, **options))
    assert why in "; ".join(loaded.report.reason)
    assert loaded.report.layout == layout
    assert len(loaded.report.others) == 1
    assert f"network {loaded.report.others[0]}: fits as well, --network NAME takes it" in str(loaded.report)
    assert not any("network" in guess for guess in loaded.report.guesses)
    other = load_backbone(tmp_path / "a.pth", registry, network=loaded.report.others[0].split(" ")[0])
    assert holds(other, vit(1, **options))
    assert any("given as --network" in reason for reason in other.report.reason)


def test_a_network_is_chosen_by_a_part_of_its_place_and_an_unknown_one_refused(tmp_path, registry):
    content = {"teacher": behind("backbone.", vit(1)), "student": behind("module.backbone.", vit(2))}
    torch.save({"models": content}, tmp_path / "a.pth")
    assert holds(load_backbone(tmp_path / "a.pth", registry, network="student"), vit(2))
    assert holds(load_backbone(tmp_path / "a.pth", registry, network="models.student"), vit(2))
    assert holds(load_backbone(tmp_path / "a.pth", registry, network="student", arch="timm:vit_base_patch16_224",
                               options=SIZES), vit(2))  # fmt: skip
    with pytest.raises(UsageError) as refused:
        load_backbone(tmp_path / "a.pth", registry, network="tutor")
    assert "models.student.module.backbone, models.teacher.backbone" in refused.value.cause


def test_of_two_that_nothing_tells_apart_the_choice_is_told_as_a_guess(tmp_path, registry):
    torch.save(behind("left.", vit(1)) | behind("right.", vit(2)), tmp_path / "a.pth")
    report = load_backbone(tmp_path / "a.pth", registry).report
    assert any("the network left is a guess" in g and "--network right" in g for g in report.guesses)


def test_a_copy_of_the_same_tensors_is_no_other_network(tmp_path, registry):
    torch.save({"model": vit(1), "model_ema": vit(1)}, tmp_path / "a.pth")
    assert load_backbone(tmp_path / "a.pth", registry).report.others == ()


# --------------------------------------------------------------------------------------------------------- wrappers

INSIDE: dict[str, tuple[Callable[[str], str], str]] = {
    "torch.compile": (lambda k: k.replace("blocks.", "blocks._orig_mod.").replace("norm1", "norm1._orig_mod"), ""),
    "FSDP": (lambda k: "_fsdp_wrapped_module." + k.replace(".attn.", "._fsdp_wrapped_module.attn."), "FSDP"),
    "activation checkpointing": (lambda k: k.replace(".mlp.", "._checkpoint_wrapped_module.mlp."), "plain"),
    "Lightning Fabric": (lambda k: "_forward_module." + k, "lightning"),
    "data parallel": (lambda k: k.replace("patch_embed.", "patch_embed.module.").replace(".0.", ".0.module."), "plain"),
}


@pytest.mark.parametrize("wrapper", INSIDE)
@pytest.mark.parametrize("prefix", ["", "module.", "net.encoder."])
def test_wrappers_are_taken_off_at_any_depth_and_named(wrapper, prefix, tmp_path, registry):
    rename, layout = INSIDE[wrapper]
    torch.save({"model": {prefix + rename(k): v for k, v in vit(3).items()}}, tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", registry)
    assert holds(loaded, vit(3))
    assert loaded.report.matched == 1
    assert any(f"{wrapper} taken off" in reason for reason in loaded.report.reason)
    if not prefix:
        assert loaded.report.layout == (layout or wrapper)


def test_wrappers_within_wrappers_and_names_of_the_file_in_the_report(tmp_path, registry, resnet):
    def rename(name: str) -> str:
        wrapped = name.replace("layer1.0.", "layer1._fsdp_wrapped_module.0._checkpoint_wrapped_module._orig_mod.")
        return "module._orig_mod.module." + wrapped

    content = {rename(k): v for k, v in (resnet(3) | {"layer1.0.extra": torch.ones(3, dtype=torch.long)}).items()}
    torch.save(content, tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", registry)
    assert holds(loaded, resnet(3))
    assert loaded.report.layout == "FSDP"
    assert loaded.report.unexpected == (rename("layer1.0.extra"),)


def test_a_name_is_kept_where_another_tensor_has_the_shorter_one():
    given = {"a._orig_mod.weight": torch.ones(1), "a.weight": torch.zeros(1)}
    assert dict(unwrapped(given).tensors) == given


@pytest.mark.parametrize("name", ["blocks.0._flat_param", "_fsdp_wrapped_module._flat_param", "flat_param_0"])
def test_parameters_joined_end_to_end_are_refused_in_a_sentence(name, tmp_path, registry):
    torch.save({"model": {name: torch.randn(1000), "norm.weight": torch.ones(4)}}, tmp_path / "a.pth")
    with pytest.raises(BackboneError) as refused:
        load_backbone(tmp_path / "a.pth", registry)
    assert "one process's part" in refused.value.problem
    assert name in refused.value.cause


@pytest.mark.parametrize("kind", ["weight_norm", "weight_norm over all", "spectral_norm", "old weight_norm"])
def test_parametrised_weights_are_put_together(kind, tmp_path, registry, resnet):
    net = build("small:resnet10", registry, width=8).net
    net.load_state_dict(resnet(3))
    convolution = net.layer2[0].conv1
    plain = convolution.weight.detach().clone()
    if kind == "spectral_norm":
        parametrizations.spectral_norm(convolution)
        net.train()
        convolution.weight  # noqa: B018  # one step of the power iteration
        net.eval()
        plain = convolution.weight.detach().clone()
    else:
        parametrizations.weight_norm(convolution, dim=None if kind.endswith("all") else 0)
    content = net.state_dict()
    if kind.startswith("old"):
        for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
            content[f"layer2.0.conv1.{old}"] = content.pop(f"layer2.0.conv1.parametrizations.weight.{new}")
    torch.save(content, tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", registry)
    torch.testing.assert_close(loaded.backbone.net.state_dict()["layer2.0.conv1.weight"], plain)
    assert loaded.report.matched == 1
    assert any("normalisation taken off" in reason for reason in loaded.report.reason)


# ------------------------------------------------------------------------------------------------------------ lists

LISTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a list": (lambda s: [s], "[0]"),
    "a tuple of epoch and state": (lambda s: (3, s), "[1]"),
    "a list in a dict": (lambda s: {"models": [{"lr": 0.1}, {"state": behind("net.", s)}]}, "models[1].state"),
    "tuples in tuples": (lambda s: (1, ("a", [s])), "[1][1][0]"),
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_lists_and_tuples_are_containers(kind, protocol, tmp_path, registry, resnet):
    write, container = LISTS[kind]
    if protocol == 2:
        torch.save(write(resnet(3)), tmp_path / "a.pth")
    else:
        arrays = {k: v.numpy() for k, v in resnet(3).items()}
        (tmp_path / "a.pth").write_bytes(pickle.dumps(write(arrays), protocol=4))  # type: ignore[arg-type]
    loaded = load_backbone(tmp_path / "a.pth", registry)
    assert holds(loaded, resnet(3))
    assert loaded.report.container == container


@pytest.mark.parametrize("wrap", [list, tuple, lambda v: {"params": list(v)}, lambda v: [list(v), 3]])
def test_a_list_of_tensors_is_refused_clearly(wrap, tmp_path, registry, resnet):
    torch.save(wrap(resnet(0).values()), tmp_path / "a.pth")
    with pytest.raises(BackboneError) as refused:
        load_backbone(tmp_path / "a.pth", registry)
    assert "tensors in a list, without names" in refused.value.problem
    assert "state_dict" in refused.value.fix


# ----------------------------------------------------------------------------------------- no claim that is not certain

LINEAR = {"weight": torch.ones(3, 8), "bias": torch.ones(3)}
LIGHTNING = {"pytorch-lightning_version": "2.1", "epoch": 1}
UNCERTAIN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "Lightning with a projector": (
        lambda s: {**LIGHTNING, "state_dict": behind("backbone.", s) | behind("projector.0.", LINEAR)},
        "lightning",
    ),
    "Lightning with a linear classifier": (
        lambda s: {**LIGHTNING, "state_dict": behind("encoder.", s) | behind("linear.", LINEAR)},
        "lightning",
    ),
    "Lightning with a head": (
        lambda s: {**LIGHTNING, "state_dict": behind("backbone.", s) | behind("head.", LINEAR)},
        "lightning",
    ),
    "Lightning whose backbone has a head of two layers": (
        lambda s: {**LIGHTNING, "state_dict": behind("backbone.", s) | behind("backbone.fc.0.", LINEAR)},
        "lightning",
    ),
    "Lightning with a projection head of its own": (
        lambda s: {**LIGHTNING, "state_dict": behind("backbone.", s) | behind("projection_head.0.", LINEAR)},
        "lightning",
    ),
    "an encoder and a linear classifier": (lambda s: behind("encoder.", s) | behind("linear.", LINEAR), "plain"),
    "an encoder and a predictor": (lambda s: behind("encoder.", s) | behind("predictor.0.", LINEAR), "plain"),
    "a detector's neck": (lambda s: behind("backbone.", s) | behind("neck.lateral.0.", LINEAR), "plain"),
    "prototypes of somebody": (lambda s: behind("net.", s) | behind("prototypes.", LINEAR), "plain"),
    "a student and a teacher": (lambda s: {"student": s, "teacher": s, "epoch": 3}, "plain"),
    "PyTorch's own training script": (lambda s: {"arch": "resnet18", "state_dict": s, "best_acc1": 3.0}, "plain"),
    "a container called network": (lambda s: {"network": s}, "plain"),
    "a momentum encoder of somebody": (lambda s: behind("momentum_encoder.", s), "plain"),
}


@pytest.mark.parametrize("kind", UNCERTAIN)
def test_a_name_that_many_codes_give_is_no_claim_to_one(kind, tmp_path, registry, resnet):
    write, layout = UNCERTAIN[kind]
    torch.save(write(resnet(3)), tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", registry)
    assert loaded.report.layout == layout
    assert holds(loaded, resnet(3))


def test_heads_do_not_follow_from_a_claim_that_is_not_certain(tmp_path, registry):
    torch.save({"student": vit(1), "teacher": vit(2), "epoch": 3}, tmp_path / "a.pth")
    assert load_backbone(tmp_path / "a.pth", registry).report.guesses


def test_a_container_called_module_is_one(tmp_path, registry):
    torch.save({"module": vit(3), "ds_version": "0.1"}, tmp_path / "mp_rank_00_model_states.pt")
    loaded = load_backbone(tmp_path / "mp_rank_00_model_states.pt", registry)
    assert (loaded.report.container, holds(loaded, vit(3))) == ("module", True)
