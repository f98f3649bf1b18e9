"""The kit itself: what is sound passes, and every seeded defect is named, by itself and precisely."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from evalsuite import conformance, hooks
from evalsuite.conformance import Finding, check_plugin
from evalsuite.errors import PluginError, UsageError
from evalsuite.testing import (
    OracleBackbone,
    RandomBackbone,
    check_checkpoint,
    check_dataset,
    check_engine,
    check_import,
    check_task,
    plugin_registry,
    tiny_world,
)
from pretrain.testing import check_method, small_options, tiny_method

DEFECTS = Path(__file__).parent.parent / "fixtures" / "defects"

# plugin -> all that the kit has to say of it, each as the beginning of its line
SEEDED = {
    "restless": [
        "backbone sound: in evaluation mode a forward pass changes net.norm.running_mean",
        "backbone sound: in evaluation mode a forward pass changes net.norm.running_var",
        "backbone sound: in evaluation mode a forward pass changes net.norm.num_batches_tracked",
        "backbone sound: pooled of an image depends on what else is in its batch",
        "backbone sound: the map of stride 4 of an image depends on what else is in its batch",
    ],
    "crowded": ["backbone sound: pooled of an image depends on what else is in its batch"],
    "rooted": [
        "backbone sound: a forward pass on another device, meta (a tensor of it is neither parameter nor buffer),"
    ],
    "narrow": [
        "backbone sound: pooled is (4, 16) for 4 images, and spec.dim is 32",
        "backbone sound: maps have the strides [4], and spec [8]",
    ],
    "overlapping": [
        "backbone sound: there are 3 masks an image, and 2 tokens",
        "backbone sound: masks are no shares of each place",
    ],
    "forgetful": [
        "task sound: a run raises PluginError: task 'sound' broke its promise (missing or unpromised metrics: corr"
    ],
    "upside": ["task sound: a backbone that sees has error 0.0"],
    "moody": ["task sound: error is 0.0"],
    "unwritable": [
        "task sound: its fingerprint of one setup is not one text: before, after, and in outcome.data",
        "task sound: details['spread'][0] is a numpy.float32, which no result file holds",
    ],
    "greedy": ["task sound: a run raises KeyError: 8"],
    "detached": ["method detached: no gradient reaches the backbone"],
    "lingering": ["modifier lingering: turned off, it still changes the losses"],
    "trainer": ["engine native-in-place: asked to segment, it changes the weights of the backbone it is given"],
    "grabbing": [
        "checkpoint grabbing: given no tensor, it claims torchvision:resnet18",
        "checkpoint grabbing: given one tensor of no network, it claims torchvision:resnet18",
        "checkpoint grabbing: given a network of another family, it claims torchvision:resnet18",
    ],
}


@pytest.fixture(autouse=True)
def _defects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEFECTS))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports are checked by tests of their own: each is a fresh interpreter."""
    monkeypatch.setattr(conformance, "_import", lambda plugin: Finding(f"import {plugin.module}", ()))


def checked(name: str) -> list[str]:
    module = f"evalsuite_{name}"
    found = list(check_plugin(module, hooks.load([module], environ={"EVALSUITE_PLUGINS": ""})))
    return [f"{finding.subject}: {fault}" for finding in found for fault in finding.faults]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SEEDED)
def test_each_seeded_defect_is_named_and_nothing_else(name):
    told = set(dict.fromkeys(checked(name)))
    unexplained = {line for line in told if not any(line.startswith(begin) for begin in SEEDED[name])}
    assert unexplained == set()
    assert [begin for begin in SEEDED[name] if not any(line.startswith(begin) for line in told)] == []


@pytest.mark.usefixtures("quick")
def test_the_plugin_they_are_made_of_has_no_fault():
    assert checked("sound") == []


def test_an_import_that_works_and_talks_or_asks_the_network_is_named():
    with pytest.raises(AssertionError) as told:
        check_import("evalsuite_fetches")
    assert str(told.value) == "importing evalsuite_fetches asks the network for 'updates.example.org'"
    with pytest.raises(AssertionError) as told:
        check_import("evalsuite_busy")
    busy, printed = str(told.value).splitlines()
    assert busy.startswith("importing evalsuite_busy works for 1.")
    assert printed == "importing evalsuite_busy prints 'the table is ready\\n', which breaks --json"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("import pydicom", "importing evalsuite_written loads pydicom: import it in the function that uses it"),
        ("raise ValueError('no licence')", "importing evalsuite_written raises ValueError: no licence"),
        ("import os; os._exit(0)", "importing evalsuite_written ends the interpreter"),
    ],
)
def test_an_import_is_told_what_it_does_wrong(text, fault, tmp_path, monkeypatch):
    (tmp_path / "evalsuite_written.py").write_text(text + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AssertionError, match=fault):
        check_import("evalsuite_written")


def test_a_light_import_is_light(tmp_path, monkeypatch):
    (tmp_path / "evalsuite_light.py").write_text("from evalsuite import hookimpl\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    told = check_import("evalsuite_light")
    assert told["own"] < 0.5
    assert told["torch"] is False


@pytest.mark.usefixtures("quick")
def test_what_does_not_load_or_is_not_there_is_told():
    sys.modules.pop("evalsuite_raises", None)
    broken = hooks.load(["evalsuite_nowhere"], environ={"EVALSUITE_PLUGINS": ""})
    (told,) = [f for finding in check_plugin("evalsuite_nowhere", broken) for f in finding.faults]
    assert told.startswith("ModuleNotFoundError")
    with pytest.raises(UsageError, match="did you mean 'tasks'"):
        list(check_plugin("task", broken))


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_the_tiny_world_is_told_and_is_no_fault(loaded):
    (adainf,) = [finding for finding in check_plugin("adainf", loaded) if finding.subject == "modifier adainf"]
    assert adainf.faults == ()
    assert adainf.note.startswith("not run: adainf has no generated images")


def test_faults_end_in_exit_code_5_and_none_in_none():
    conformance.refuse_faults("x", [Finding("task x", ())])
    with pytest.raises(PluginError, match="'x' has 2 faults") as refused:
        conformance.refuse_faults("x", [Finding("task x", ("one", "two"))])
    assert refused.value.code == 5
    assert str(Finding("task x", ("one", "two"))) == "fault  task x: one\nfault  task x: two"
    assert str(Finding("task x", (), "by knn", 1.0)) == "ok     task x (by knn), 1.0 s"


def test_the_blind_see_nothing_and_the_seeing_what_is_asked():
    images = torch.rand(3, 3, 64, 64)
    blind, seeing = RandomBackbone(gives={"pooled"}), OracleBackbone(lambda p: p.mean((2, 3)))
    assert torch.equal(blind(images).pooled, blind(images).pooled)
    assert not torch.allclose(blind(images).pooled, RandomBackbone(1)(images).pooled)
    assert blind(images).maps == {}
    assert seeing.spec.dim == 3
    assert torch.equal(seeing(images).pooled, images.mean((2, 3)))
    assert {s: m.shape[-1] for s, m in seeing(images).maps.items()} == {4: 16, 8: 8, 16: 4, 32: 2}
    assert blind.identity != seeing.identity


def test_our_own_names_pass(registry, tmp_path):
    check_dataset(registry.get("dataset", "cifar10"))
    check_dataset(registry.get("dataset", "pairs"))
    layout = registry.get("checkpoint", "resnet")
    check_checkpoint(layout, arch="small:resnet10", spell=lambda name: f"trunk.{name}", registry=registry)
    check_task(registry.get("task", "cifar10"), protocol="knn", registry=registry)
    assert (tiny_world("cifar10", tmp_path, images=8, registry=registry) / "train").is_dir()


def test_a_layout_that_leaves_tensors_out_is_found(registry):
    def lossy(state):
        for candidate in registry.get("checkpoint", "resnet")(state):
            kept = {name: tensor for name, tensor in candidate.tensors.items() if "layer4.0" not in name}
            yield type(candidate)(kept, candidate.arch, candidate.options)

    with pytest.raises(AssertionError, match=r"it leaves out layer4\.0\.bn1\.bias"):
        check_checkpoint(lossy, arch="torchvision:resnet18", spell=lambda name: name, registry=registry)


def test_an_engine_that_does_nothing_is_told(registry):
    class Idle:
        name = "idle"

        def version(self):
            return ""

    with pytest.raises(AssertionError, match=r"its version is '', no text\nengine 'idle' of .* is of an unknown kind"):
        check_engine(Idle, registry=registry)


def test_a_preset_that_does_not_fit_is_told():
    from pretrain import Preset

    class Wrong(type(tiny_method())):
        presets: ClassVar = {"paper": Preset("nobody", 1, 8, {"temprature": 1.0})}

    with pytest.raises(AssertionError, match="preset 'paper' does not fit the options"):
        check_method(lambda: Wrong(small_options(Wrong)))


def test_a_registry_with_a_plugin_in_it():
    assert "sound" in plugin_registry("evalsuite_sound").names("task")
    assert plugin_registry("evalsuite_gsimclr").entry("modifier", "gsimclr").owner == "gsimclr"
    with pytest.raises(PluginError, match="does not load"):
        plugin_registry("evalsuite_nowhere")
