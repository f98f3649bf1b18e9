"""From a request to cells, with an engine that knows the truth in place of one that learns."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import evalsuite
from evalsuite.backbone import build
from evalsuite.data import source
from evalsuite.errors import BackboneError, DataError, ImageError, PluginError, TrainingError, UsageError
from evalsuite.hooks import Registry
from evalsuite.metrics.detection import Detections
from evalsuite.preflight import Fits, TooLarge
from evalsuite.progress import Progress
from evalsuite.protocols import JOBS, Detected, job
from evalsuite.results import read, read_all
from evalsuite.runner import run
from evalsuite.tasks.detection import Voc

FORK = multiprocessing.get_context("fork")


class Oracle:
    """An engine that finds everything: scores must be perfect, whatever the backbone."""

    name = "torchvision"
    job = "detect"
    calls: ClassVar[list[tuple[str, int]]] = []
    failure: BaseException | None = None

    def version(self) -> str:
        return "oracle 1"

    def detect(self, backbone, protocol, train, test, setup) -> Detected:
        self.calls.append((test.name, setup.seed))
        if Oracle.failure is not None:
            raise Oracle.failure
        return Detected([self.see(test, record) for record in test.records], [], {"train": 0.0}, {})

    def see(self, test, record) -> Detections:
        keep = ~record.crowd
        masks = tuple(m for m, k in zip(test.rles(record), keep, strict=True) if k) if test.has_masks else None
        boxes, labels = record.boxes[keep], record.labels[keep]
        return Detections(record.image_id, boxes, np.linspace(0.9, 0.5, len(labels)), labels, masks)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def oracle(registry, monkeypatch) -> Registry:
    module = types.ModuleType("oracle_engine")
    module.Oracle = Oracle
    monkeypatch.setitem(sys.modules, "oracle_engine", module)
    monkeypatch.setattr(Oracle, "calls", [])
    monkeypatch.setattr(Oracle, "failure", None)
    ours = Registry()
    for entry in registry.entries():
        target = "oracle_engine:Oracle" if (entry.shelf, entry.name) == ("engine", "torchvision") else entry.target
        getattr(ours, entry.shelf)(entry.name, target, entry.summary)
    return ours


@pytest.fixture(scope="session")
def root(tmp_path_factory, registry) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("coco", "voc"):
        source(registry, name).demo(root, seed=0, images=12)
    return root


@pytest.fixture
def ask(oracle, root, tmp_path):
    def ask(task="coco", backbone="random:timm:test_resnet", **flags: Any):
        flags = {"protocol": "smoke", "data_root": root, "out": tmp_path / "out", **flags}
        return run(backbone, task, registry=oracle, **flags)

    return ask


def test_an_oracle_is_perfect_in_boxes_and_masks(ask):
    (result,) = ask("coco")
    assert result.status == "ok"
    for name in ("AP", "AP50", "mask_AP", "mask_AP75"):
        assert result.scores[name].value == pytest.approx(1.0)
        assert result.scores[name].low == pytest.approx(1.0)
    (voc,) = ask("voc")
    assert voc.scores["AP50"].value == pytest.approx(1.0)


@pytest.fixture
def own(root, tmp_path) -> Path:
    """A copy of the demo world, to be spoilt."""
    return shutil.copytree(root / "coco", tmp_path / "own")


def images(own: Path, split: str) -> list[Path]:
    return sorted((own / split).iterdir())


def test_unreadable_images_are_left_out_before_training_and_counted(ask, own):
    train, test = images(own, "train2017"), images(own, "val2017")
    for path in (train[0], train[3], test[1]):
        path.write_bytes(path.read_bytes()[:400])
    (result,) = ask("detect", data=f"coco:{own}", backbone=["random:timm:test_resnet", "random:timm:test_vit"])[:1]
    assert result.status == "ok"
    assert result.scores["AP"].value == pytest.approx(1.0)
    assert (result.data["train_images"], result.data["train_unreadable"]) == (len(train) - 2, 2)
    assert (result.data["test_images"], result.data["test_unreadable"]) == (len(test) - 1, 1)
    assert any("train2017: 2 images cannot be read and are left out" in told for told in result.warnings)
    with pytest.raises(ImageError, match="2 of 12 images cannot be read"):  # known by now, and before any work
        ask("detect", data=f"coco:{own}", strict=True)


def test_strict_refuses_unreadable_images_before_training(ask, own):
    images(own, "val2017")[0].write_bytes(b"")
    (result,) = ask("detect", data=f"coco:{own}", strict=True)
    assert (result.status, result.error_code) == ("failed", 3)
    assert "1 of 4 images cannot be read" in result.error
    assert Oracle.calls == []


def test_images_in_two_splits_are_a_warning(ask, own):
    (train, *_), (test, *_) = images(own, "train2017"), images(own, "val2017")
    for part in ("train2017", "val2017"):
        file = own / "annotations" / f"instances_{part}.json"
        document = json.loads(file.read_text())
        document["images"][0] |= dict(zip(("height", "width"), (120, 160), strict=True))
        document["annotations"] = [a | {"bbox": [1, 1, 5, 5], "segmentation": []} for a in document["annotations"]]
        file.write_text(json.dumps(document))
        name = own / part / document["images"][0]["file_name"]
        Image.new("RGB", (160, 120), "red").save(name)
    (result,) = ask("detect", data=f"coco:{own}")
    assert [told for told in result.warnings if "scores are too high" in told] == [
        f"1 of the images of val2017 are in train2017 too, so that scores are too high: {test} is {train} there"
    ]


def test_a_task_of_masks_is_refused_where_there_are_none(ask, own):
    file = own / "annotations" / "instances_val2017.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["segmentation"] = [[0, 0, 1, 1]]
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match="val2017 has no masks") as told:
        ask("coco", data_root=own)
    assert told.value.fix == "train boxes alone: --set masks=false"
    (result,) = ask("coco", data_root=own, settings={"masks": "false"})
    assert not any(name.startswith("mask_") for name in result.scores)
    small = [
        told for told in result.warnings if told.endswith("no object of the test images is of more than 96x96 pixels")
    ]
    assert small == ["APl, ARl have no value: no object of the test images is of more than 96x96 pixels"]


def test_a_cell_holds_what_is_needed_to_trust_and_repeat_it(ask, tmp_path):
    (result,) = ask("coco", seeds=[3], command="evalsuite run ...")
    ((path, back),) = read_all(tmp_path / "out")
    assert back == result
    assert path.name == "seed-3.json"
    assert not result.ranked  # by a smoke test
    assert result.protocol.seeded
    assert result.protocol.fields["iterations"] == 150
    assert len(result.protocol.hash) == 16
    assert len(result.backbone.identity) == 64
    assert result.engine == "torchvision"
    assert result.engine_version == "oracle 1"
    assert result.data["test_images"] > 0
    assert result.environment["packages"]["torch"]
    assert {"train", "score", "total"} <= set(result.timings)
    with Image.open(path.with_name(result.files["detections"])) as picture:
        assert picture.format == "PNG"
        assert picture.width > 300
    with np.load(path.with_name(result.files["samples"]), allow_pickle=False) as samples:
        assert samples["replicates/AP"].shape == (1000,)
        assert len(samples["ids"]) == result.data["test_images"]
    assert not (tmp_path / "out" / "work").exists()


def test_parameters_are_those_that_features_depend_on(ask, registry, tmp_path):
    (result,) = ask("voc", backbone="random:torchvision:squeezenet1_0")
    assert result.backbone.parameters == 735_424  # its classifier has 513,000 more
    saved = build("torchvision:squeezenet1_0", registry)
    saved.save(tmp_path / "own.safetensors")
    (own,) = ask("voc", backbone=str(tmp_path / "own.safetensors"))
    assert own.backbone.parameters == result.backbone.parameters


def test_what_was_guessed_of_a_backbone_is_a_warning_before_work_and_in_the_result(ask, registry, tmp_path, capsys):
    torch.save(build("timm:test_vit", registry).net.state_dict(), tmp_path / "vit.pth")
    (result,) = ask("voc", backbone=str(tmp_path / "vit.pth"), progress=Progress())
    assert any("num_heads=1 is a guess" in warning for warning in result.warnings)
    assert "warning: vit: num_heads=1 is a guess" in capsys.readouterr().err.splitlines()[0]
    (given,) = ask("voc", backbone=str(tmp_path / "vit.pth"), backbone_options={"num_heads": 2}, out=tmp_path / "b")
    assert not any("guess" in warning for warning in given.warnings)


@pytest.mark.parametrize("name", ["voc", "detect", "segment", "cifar10", "classify", "object-discovery"])
def test_smoke_tests_are_not_for_ranking(registry, name):
    protocols = registry.get("task", name)().protocols
    assert [p.id for p in protocols if not p.ranked] == ["smoke"]


def test_the_same_request_again_runs_nothing(ask):
    first = ask(["coco", "voc"], seeds=[0, 1])
    assert len(Oracle.calls) == 4
    assert ask(["coco", "voc"], seeds=[0, 1]) == first
    assert len(Oracle.calls) == 4
    ask(["coco", "voc"], seeds=[0, 1, 2], workers=3)
    assert len(Oracle.calls) == 6


def test_what_differs_in_kind_does_not_overwrite(ask, tmp_path):
    ask("coco")
    ask("coco", limit=2)
    ask("coco", settings={"iterations": "7"})
    paths = [path for path, _ in read_all(tmp_path / "out")]
    assert len(paths) == 3
    limited = [r for _, r in read_all(tmp_path / "out") if r.limited == 2]
    assert limited[0].data["test_images"] == 2
    assert not limited[0].ranked


def test_a_result_on_other_data_is_not_passed_off_as_this_one(ask, root, tmp_path, registry):
    ask("voc")
    other = tmp_path / "other"
    source(registry, "voc").demo(other, seed=1, images=4)
    with pytest.raises(UsageError, match="holds the result on other data"):
        ask("voc", data_root=other)


def test_a_result_by_a_recipe_that_was_changed_since_is_not_passed_off_as_this_one(ask, monkeypatch):
    ask("voc")
    with monkeypatch.context() as changed:
        changed.setattr(Voc, "protocols", tuple(dataclasses.replace(p, lr=2 * p.lr) for p in Voc.protocols))
        with pytest.raises(UsageError, match=r"holds the result by another smoke-1\n.*hash"):
            ask("voc")
    monkeypatch.setattr(Voc, "version", Voc.version + 1)
    with pytest.raises(UsageError, match="of another version of voc"):
        ask("voc")
    assert len(Oracle.calls) == 1


def test_a_failed_cell_is_a_result_the_others_go_on_and_it_is_run_again(ask):
    Oracle.failure = TrainingError("the loss is not finite", cause="c", fix="f")
    results = ask(["coco", "voc"])
    assert [r.status for r in results] == ["failed", "failed"]
    assert results[0].error_code == 1
    assert "not finite" in results[0].error
    Oracle.failure = None
    assert [r.status for r in ask(["coco", "voc"])] == ["ok", "ok"]


def test_a_cell_that_cannot_be_done_here_names_the_protocol_that_can(ask, monkeypatch):
    tried = []

    def detect(self, backbone, protocol, train, test, setup):
        tried.append(protocol.id)
        if len(tried) > 1 and protocol.id == "frozen-fpn":
            raise Fits(600.0)
        raise TooLarge(f"{protocol.id} would take days", cause="it is long", fix="--yes")

    monkeypatch.setattr(Oracle, "detect", detect)
    (result,) = ask(protocol="fpn-1x", device="cpu")
    assert (result.status, result.error_code) == ("failed", 7)
    assert "fpn-1x would take days" in result.error
    assert result.error.endswith("fix: --protocol frozen-fpn (10 minutes or more), or --yes")
    assert tried == ["fpn-1x", "frozen-fpn"]  # fpn-2x and c4-1x are as much work
    tried.clear()
    (result,) = ask(protocol="smoke", device="cpu")
    assert result.error.endswith("fix: --yes")
    assert tried == ["smoke"]


@pytest.mark.parametrize(
    ("members", "problem", "cause"),
    [
        ({}, "engine 'deep' of plugin 'depths' is of an unknown kind", "its job is None; .* it has none"),
        ({"job": "estimate"}, "is of an unknown kind", "its job is 'estimate'"),
        ({"job": "detect"}, "is of an unknown kind", "it has none"),
        ({"job": "segment", "detect": print}, "is of an unknown kind", "it has detect"),
        ({"detect": print, "segment": print}, "is of an unknown kind", "it has detect, segment"),
    ],
)
def test_an_engine_of_an_unknown_kind_is_refused_with_its_plugin(ask, oracle, members, problem, cause):
    sys.modules["oracle_engine"].Deep = type("Deep", (), {"name": "deep", **members})
    oracle.owner = "depths"
    oracle.engine("deep", "oracle_engine:Deep")
    with pytest.raises(PluginError, match=problem) as refusal:
        ask("coco", engine="deep")
    assert re.search(cause, refusal.value.cause)
    assert refusal.value.code == 5


def test_an_engine_that_does_not_say_its_job_is_of_its_one_methods_kind(registry):
    class Old:
        def segment(self): ...

    with pytest.warns(DeprecationWarning, match='does not say its job; give its class job = "segment"'):
        assert job(Old) == "segment"
    Old.job = "segment"
    assert job(Old) == "segment"
    assert [job(registry.get("engine", name)) for name in ("torchvision", "native", "sb3")] == list(JOBS)


def test_an_unforeseen_error_leaves_its_trace_in_the_cell(ask):
    Oracle.failure = ZeroDivisionError("division by zero")
    (result,) = ask("coco")
    assert result.status == "failed"
    assert "ZeroDivisionError" in result.error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), 7, "reads images was killed"),
        (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"), 7, "reads images was killed"),
        (MemoryError(), 7, "ran out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 7, "ran out of memory"),
        (SystemExit(0), 1, "SystemExit"),  # as a script's code ends, not a task's
        (SystemExit("no"), 1, "SystemExit: no"),
        (DataError("no caf\udce9.png", cause="c", fix="f"), 3, "no caf\\udce9.png"),  # a name in no encoding
        (ValueError("x" * 2_000_000), 1, "xxx"),
    ],
)
def test_whatever_ends_a_cell_is_recorded_and_the_next_seed_runs(ask, error, code, text):
    Oracle.failure = error
    results = ask("voc", seeds=2)
    assert [(r.status, r.error_code) for r in results] == [("failed", code)] * 2
    assert text in results[0].error
    if code == 7:
        assert [line.split(":")[0] for line in results[0].error.splitlines()] == ["error", "cause", "fix"]


def test_a_signal_ends_the_run(ask, tmp_path):
    Oracle.failure = SystemExit(143)
    with pytest.raises(SystemExit):
        ask("coco")
    assert list(read_all(tmp_path / "out")) == []


HOARD: list[bytearray] = []


def hoard(in_a_frame: bool) -> None:
    """Take all the memory there is."""
    held = [] if in_a_frame else HOARD
    for size in (1 << 24, 1 << 20, 1 << 16):
        with suppress(MemoryError):
            while True:
                held.append(bytearray(size))
    raise MemoryError


@pytest.mark.parametrize("in_a_frame", [True, False])
def test_out_of_memory_is_recorded_though_there_is_none(ask, tmp_path, monkeypatch, in_a_frame):
    def detect(self, backbone, protocol, train, test, setup):
        if setup.seed == 0:
            hoard(in_a_frame)
        return whole(self, backbone, protocol, train, test, setup)

    def confined() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (200 << 20),) * 2)
        ask("voc", seeds=2 if in_a_frame else 1)  # what is held for good leaves nothing to the next seed
        os._exit(0)

    whole = Oracle.detect
    monkeypatch.setattr(Oracle, "detect", detect)
    child = FORK.Process(target=confined)
    child.start()
    child.join(300)
    child.kill()
    assert child.exitcode == 0
    first, *others = (result for _, result in read_all(tmp_path / "out"))
    assert (first.status, first.error_code) == ("failed", 7)
    assert "ran out of memory" in first.error
    assert [result.status for result in others] == ["ok"] * in_a_frame


# Two at once


@pytest.fixture
def busy(ask, monkeypatch):
    """Another process in the middle of the cell: it goes on when it is let."""
    inside, go_on = FORK.Event(), FORK.Event()
    detect, parent = Oracle.detect, os.getpid()

    def stop(self, *arguments):
        if os.getpid() != parent:
            inside.set()
            assert go_on.wait(60)
        return detect(self, *arguments)

    monkeypatch.setattr(Oracle, "detect", stop)
    child = FORK.Process(target=ask, args=("voc",))
    child.start()
    assert inside.wait(60)
    yield child, go_on
    child.kill()
    child.join()


def waiting_for(process) -> tuple[Progress, io.StringIO]:
    """What is called when a run says that it waits."""
    stream = io.StringIO()
    said = stream.write

    def write(text: str) -> int:
        if "waiting for process" in text:
            process()
        return said(text)

    stream.write = write
    return Progress(stream=stream), stream


def test_a_second_run_waits_for_the_first_and_takes_its_result(ask, busy):
    child, go_on = busy
    progress, stream = waiting_for(go_on.set)
    (result,) = ask("voc", progress=progress)
    assert result.status == "ok"
    assert Oracle.calls == []
    assert f"waiting for process {child.pid} on " in stream.getvalue()
    assert "there already" in stream.getvalue()


def test_it_does_the_work_where_the_first_is_killed_and_says_so(ask, busy, tmp_path):
    child, _ = busy
    progress, stream = waiting_for(child.kill)
    (result,) = ask("voc", progress=progress)
    assert result.status == "ok"
    assert len(Oracle.calls) == 1
    assert f"process {child.pid} on " in stream.getvalue()
    assert "was killed at it" in stream.getvalue()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results"]


def test_several_processes_of_one_run_do_not_wait(ask, busy, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(evalsuite.ResourceError, match="being done by another process"):
        ask("voc", devices=2)


def test_a_failure_never_takes_the_place_of_a_result(ask, tmp_path, monkeypatch):
    (first,) = ask("voc")
    ((path, _),) = read_all(tmp_path / "out")
    content = path.read_text()
    path.unlink()

    def detect(self, *arguments):
        path.write_text(content)  # as another process does, where locks do not hold
        raise TrainingError("the loss is not finite", cause="c", fix="f")

    monkeypatch.setattr(Oracle, "detect", detect)
    assert ask("voc") == [first]
    assert path.read_text() == content


@pytest.mark.parametrize("content", ['{"status": "o', "[" * 100_000])
def test_a_file_that_is_no_result_is_set_aside_and_the_cell_is_run(ask, tmp_path, content):
    ask("voc")
    ((path, _),) = read_all(tmp_path / "out")
    path.write_text(content)
    stream = io.StringIO()
    (result,) = ask("voc", progress=Progress(stream=stream))
    assert result.status == "ok"
    assert f"warning: {path} is no result" in stream.getvalue()
    assert path.with_name("seed-0.json.aside-1").read_text() == content
    assert [p for p, _ in read_all(tmp_path / "out")] == [path]


def test_a_process_killed_between_its_result_and_its_clean_up_leaves_nothing_for_long(ask, tmp_path):
    (first,) = ask("voc")
    ((path, _),) = read_all(tmp_path / "out")
    work = tmp_path / "out" / "work" / path.parent.parent.name / path.parent.name / path.stem
    for left in (work / "state.pt", work.with_name("seed-0.lock"), None):
        work.parent.mkdir(parents=True, exist_ok=True)
        if left is not None:
            left.parent.mkdir(exist_ok=True)
            left.touch()
        assert ask("voc") == [first]
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["results"]
    assert len(Oracle.calls) == 1


def test_what_killed_writers_left_is_removed_and_what_was_set_aside_stays(ask, tmp_path, monkeypatch):
    ask("voc")
    ((path, _),) = read_all(tmp_path / "out")
    path.unlink()
    litter = [path.with_name(name) for name in (".seed-0.samples.npz.x.partial", ".seed-0.json.y.partial")]
    kept = path.with_name(".seed-01.json.y.partial")
    for file in (*litter, kept):
        file.touch()

    def detect(self, backbone, protocol, train, test, setup):
        (setup.work / "deep").mkdir()
        for name in ("state.pt", "state.pt.aside-1", "deep/a"):
            (setup.work / name).touch()
        return whole(self, backbone, protocol, train, test, setup)

    whole = Oracle.detect
    monkeypatch.setattr(Oracle, "detect", detect)
    ask("voc")
    assert not any(file.exists() for file in litter)
    assert kept.exists()
    assert [p.name for p in (tmp_path / "out" / "work").rglob("*") if p.is_file()] == ["state.pt.aside-1"]


@pytest.mark.parametrize(
    ("changes", "refusal", "text"),
    [
        ({"task": "cocoo"}, UsageError, "did you mean 'coco'"),
        ({"protocol": "smok"}, UsageError, "did you mean 'smoke'"),
        ({"engine": "detectron"}, UsageError, "did you mean 'detectron2'"),
        ({"settings": {"iteration": "3"}}, UsageError, "did you mean 'iterations'"),
        ({"data_root": None}, DataError, "no data root"),
        ({"data": "voc:."}, UsageError, "has its own data set"),
        ({"task": "detect"}, UsageError, "detect needs data"),
        ({"limit": 0}, UsageError, "leaves nothing"),
        ({"device": "cuda:7"}, evalsuite.ResourceError, "cannot be used"),
        ({"task": "voc", "protocol": "c4", "backbone": "random:timm:test_vit"}, BackboneError, "fpn or frozen-fpn"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(ask, changes, refusal, text, monkeypatch):
    monkeypatch.delenv("EVALSUITE_DATA", raising=False)
    with pytest.raises(refusal, match=text):
        ask(**changes)
    assert Oracle.calls == []


def test_the_demo_world_is_made_on_first_use_and_marked(ask, monkeypatch, tmp_path):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))
    (result,) = ask("coco", data_root=None, demo=True)
    assert result.demo
    assert not result.ranked
    assert list((tmp_path / "cache").rglob("instances_train2017.json"))


def test_anybodys_data_in_either_layout(ask, tmp_path, registry):
    for name in ("coco", "voc"):
        path = source(registry, name).demo(tmp_path / name, seed=0, images=6)
        folder = path / "VOC2012" if name == "voc" else path
        (result,) = ask("detect", data=f"{name}:{folder}", data_root=None)
        assert result.scores["AP"].value == pytest.approx(1.0)


def test_a_backbone_gives_way_to_what_a_task_needs(ask, registry):
    with pytest.raises(BackboneError):
        ask("coco", backbone="random:timm:no_such_model")


def test_requests_are_frozen():
    from evalsuite.runner import Request

    with pytest.raises(dataclasses.FrozenInstanceError):
        Request(backbones=["a"], tasks=["b"]).limit = 3


def test_reading_what_was_written_gives_it_back(ask, tmp_path):
    (result,) = ask("voc")
    ((path, _),) = read_all(tmp_path / "out")
    assert read(path) == result
