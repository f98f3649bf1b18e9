"""Each fault of a submission is told on its own line, and none that is hostile is opened."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from evalsuite.board.submissions import check
from evalsuite.cli import app
from evalsuite.errors import DataError
from evalsuite.hooks import load
from evalsuite.results import BackboneRecord, ProtocolRecord, Result, Score, cell_path
from evalsuite.statistics import bootstrap_mean, score_interval

REGISTRY = load().registry
Change = Callable[[Path, Path], None]


def submission(root: Path, seeds: int = 2) -> Path:
    """A whole one: CIFAR-10 by k-NN, from made-up hits."""
    task = REGISTRY.get("task", "cifar10")()
    protocol = task.protocol("knn")
    record = ProtocolRecord(id=protocol.id, version=protocol.version, hash=protocol.hash, fields=protocol.fields())
    backbone = BackboneRecord(
        name="runs-a.safetensors", request="runs/a.safetensors", identity="ab" * 32, spec={"arch": "timm:resnet18"},
        parameters=11_000_000,
    )  # fmt: skip
    (root / "submission.json").parent.mkdir(parents=True, exist_ok=True)
    (root / "submission.json").write_text(json.dumps({"name": "A", "authors": ["B"], "licence": "CC-BY-4.0"}))
    for seed in range(seeds):
        hits = (np.random.default_rng(seed).random(500) < 0.7).astype(np.float32)
        replicates = bootstrap_mean(hits)
        low, high = score_interval(replicates, hits)
        path = cell_path(root, backbone.name, backbone.identity, "cifar10", record, seed)
        files = {"samples": f"seed-{seed}.samples.npz"}
        promised = [metric.name for metric in task.promises(protocol)]
        values = {name: Score(value=0.5, higher_is_better=name != "ece") for name in promised}
        values["top1"] = Score(value=float(hits.mean()), low=low, high=high)
        Result(
            status="ok", backbone=backbone, task="cifar10", task_version=task.version, protocol=record, seed=seed,
            primary="top1", scores=values, files=files, data={"fingerprint": "f" * 32}, command="evalsuite run",
            environment={"packages": {"evalsuite": "0.1.0"}}, created="2026-11-21T00:00:00+00:00",
        ).write(path)  # fmt: skip
        np.savez_compressed(
            path.with_name(files["samples"]), ids=np.arange(500).astype(str),
            **{"samples/top1": hits, "replicates/top1": replicates},
        )  # fmt: skip
    return root


def cell(root: Path) -> Path:
    return next(root.rglob("seed-0.json"))


def edit(*keys: str, value: Any) -> Change:
    """Set a value deep in the cell of seed 0."""

    def change(root: Path, path: Path) -> None:
        content = json.loads(path.read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(content))

    return change


def test_a_whole_submission_has_no_fault(tmp_path: Path):
    assert check(submission(tmp_path), REGISTRY) == []
    done = CliRunner().invoke(app, ["submit", "check", str(tmp_path)])
    assert done.exit_code == 0
    assert "no fault" in done.stdout


def _pickle(root: Path, path: Path) -> None:
    with (path.parent / "weights.pkl").open("wb") as file:
        pickle.dump([1], file)


def _pickled_array(root: Path, path: Path) -> None:
    with (
        zipfile.ZipFile(path.with_name("seed-0.samples.npz"), "w") as archive,
        archive.open("samples/top1.npy", "w") as f,
    ):
        np.lib.format.write_array(f, np.array([{}], dtype=object), allow_pickle=True)


def _member_outside(root: Path, path: Path) -> None:
    with zipfile.ZipFile(path.with_name("seed-0.samples.npz"), "a") as archive:
        archive.writestr("../../evil.npy", b"x")


def _bomb(root: Path, path: Path) -> None:
    whole = zipfile.ZipFile(path.with_name("seed-0.samples.npz"), "w", zipfile.ZIP_DEFLATED)
    with whole as archive, archive.open("samples/top1.npy", "w", force_zip64=True) as file:
        file.write(bytes(6 << 20))


def _large(root: Path, path: Path) -> None:
    with (path.parent / "film.gif").open("wb") as file:
        file.truncate(1 << 30)


def _link(root: Path, path: Path) -> None:
    (path.parent / "secret.json").symlink_to("/etc/passwd")


def _copy(root: Path, path: Path) -> None:
    other = path.parent.with_name(path.parent.name + "+again")
    other.mkdir()
    for file in path.parent.glob("seed-0*"):
        (other / file.name).write_bytes(file.read_bytes())


def _doctored(root: Path, path: Path) -> None:
    edit("scores", "top1", "value", value=0.93)(root, path)


def _infinite(root: Path, path: Path) -> None:
    path.write_text(path.read_text().replace('"value": 0.5', '"value": NaN', 1))


def _deep(root: Path, path: Path) -> None:
    path.write_text("[" * 50_000 + "]" * 50_000)


def _nested(root: Path, path: Path) -> None:
    value: Any = 1
    for _ in range(40):
        value = [value]
    edit("details", value={"x": value})(root, path)


def _truncated(root: Path, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _no_card(root: Path, path: Path) -> None:
    (root / "submission.json").unlink()


def _bad_card(root: Path, path: Path) -> None:
    (root / "submission.json").write_text(
        json.dumps({"name": "A", "authors": ["B"], "licence": "MIT", "url": "javascript:x"})
    )


def _moved(root: Path, path: Path) -> None:
    path.parent.parent.rename(path.parent.parent.with_name("somebody-else"))


def _draws_nothing(root: Path, path: Path) -> None:
    protocol = REGISTRY.get("task", "cifar10")().protocol("knn-20")
    for name in ("id", "version", "hash"):
        edit("protocol", name, value=getattr(protocol, name))(root, path)


def _stray(root: Path, path: Path) -> None:
    (path.parent / "stray.png").write_bytes(b"x")


def _nothing(root: Path, path: Path) -> None:
    for file in root.rglob("seed-*"):
        file.unlink()


def _overflowing(root: Path, path: Path) -> None:
    path.write_text(path.read_text().replace('"arch": "timm:resnet18"', '"arch": "timm:resnet18", "width": 1e400', 1))


def arrays(**changed: Any) -> Change:
    """Replace arrays of the cell of seed 0, and its score by what they say."""

    def change(root: Path, path: Path) -> None:
        file = path.with_name("seed-0.samples.npz")
        with np.load(file) as archive:
            content = dict(archive)
        if "ids" in changed:
            content["replicates/top1"] = bootstrap_mean(changed["samples/top1"])
            low, high = score_interval(content["replicates/top1"], changed["samples/top1"])
            score = {"value": float(changed["samples/top1"].mean()), "low": low, "high": high}
            edit("scores", "top1", value=score)(root, path)
        np.savez_compressed(file, **{**content, **changed})

    return change


HOSTILE: dict[str, tuple[Change, str]] = {
    "script in a name": (edit("backbone", "name", value="<script>alert(1)</script>"), "backbone name '<script>"),
    "a path in a file name": (edit("files", "samples", value="../../../etc/passwd"), "leads out of its folder"),
    "pickle": (_pickle, "files of kind .pkl are not taken"),
    "pickled array": (_pickled_array, "pickled objects, which are never opened"),
    "archive member outside": (_member_outside, "'../../evil.npy' leads out of the archive"),
    "archive bomb": (_bomb, "6 MiB unpacked"),
    "NaN": (_infinite, "NaN is no number"),
    "wrong hash": (edit("protocol", "hash", value="0" * 16), "protocol knn has hash"),
    "seeds that move nothing": (_draws_nothing, "protocol knn-20 draws nothing, and this counts its seeds"),
    "unknown protocol": (edit("protocol", "id", value="knn-best"), "no protocol of task 'cifar10' named 'knn-best'"),
    "unknown task": (edit("task", value="cifar11"), "no task named 'cifar11'"),
    "doctored score": (_doctored, "score top1 is said to be 0.93, its samples say 0."),
    "doctored interval": (edit("scores", "top1", "low", value=0.1), "its samples say"),
    "doctored score without samples": (edit("files", value={}), "its scores cannot be checked"),
    "out of range": (edit("scores", "balanced_accuracy", "value", value=1.7), "is 1.7, outside [0, 1]"),
    "gigabyte": (_large, "1024 MiB; 8 MiB are taken of .gif"),
    "link": (_link, "a link; it could lead anywhere"),
    "duplicate cell": (_copy, "the same cell as"),
    "demo": (edit("demo", value=True), "it is of a demo world"),
    "modified": (edit("protocol", "modified", value=["ks"]), "it is of a modified protocol"),
    "limited": (edit("limited", value=100), "it is limited"),
    "failed": (edit("status", value="failed"), "only results that came to an end"),
    "missing metric": (edit("scores", value={}), "score top1 is missing"),
    "other direction": (edit("scores", "ece", "higher_is_better", value=True), "score ece: lower is better"),
    "no identity": (edit("backbone", "identity", value="x"), "no sha256"),
    "no command": (edit("command", value=""), "command is empty"),
    "data by names and sizes": (
        edit("data", "fingerprint", value=f"{'0' * 16}-{'a' * 16}"),
        "made before data fingerprints were of content",
    ),
    "unknown field": (edit("admin", value=True), "unknown field admin"),
    "wrong type": (edit("seed", value="zero"), "seed: Input should be a valid integer"),
    "deeply nested": (_deep, "not JSON"),
    "nested": (_nested, "nested more than 30 levels"),
    "truncated": (_truncated, "not JSON"),
    "no card": (_no_card, "it is missing: name, authors, licence"),
    "bad card": (_bad_card, "url: String should match pattern"),
    "moved": (_moved, "it belongs to results/runs-a.safetensors-abababab/cifar10@knn-2/seed-0.json"),
    "stray file": (_stray, "no result refers to this file"),
    "nothing": (_nothing, "there is no result"),
    "other version": (edit("protocol", "version", value=9), "protocol knn is of version 2 now, this is of 9"),
    "other primary": (edit("primary", value="ece"), "the metric that counts is top1, not ece"),
    "no packages": (edit("environment", "packages", value=None), "which version of evalsuite"),
    "other schema": (edit("schema_version", value="2.0"), "schema version '2.0'; this version reads 1.0"),
    "a number without end": (edit("backbone", "parameters", value=10**400), "backbone.parameters"),
    "a number without end in details": (edit("details", value={"x": [10**30]}), "more than 64 bits"),
    "more than anything measures": (edit("scores", "top1", "low", value=1e308), "scores.top1.low"),
    "infinity": (_overflowing, "backbone.spec: Value error, inf is no number"),
    "half a character": (edit("backbone", "provenance", value={"recipe": "\ud800"}), "lone surrogate"),
    "arch of another type": (edit("backbone", "spec", value={"arch": {"a": 1}}), "spec is incomplete"),
    "empty replicates": (arrays(**{"replicates/top1": np.zeros(0)}), "replicates/top1 is no row of numbers"),
    "replicates that are no numbers": (arrays(**{"replicates/top1": np.full(9, np.nan)}), "is no row of numbers"),
    "samples in a table": (arrays(**{"samples/top1": np.ones((500, 2))}), "is no row of finite numbers"),
    "more samples than ids": (arrays(**{"samples/top1": np.ones(501)}), "has 501 values, and there are 500 ids"),
    "seeds on other samples": (
        arrays(**{"samples/top1": np.array([1.0] * 7 + [0.0] * 3), "ids": np.arange(10).astype(str)}),
        "no comparison can be made of it: the seeds of runs-a.safetensors",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_each_fault_has_a_line_of_its_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evalsuite.results.UNPACKED", 4 << 20)
    change, line = HOSTILE[name]
    root = submission(tmp_path / "s")
    change(root, cell(root))
    done = CliRunner().invoke(app, ["submit", "check", str(root)])
    faults = [str(fault) for fault in check(root, REGISTRY)]
    assert any(line in fault for fault in faults), faults
    assert all("\n" not in fault for fault in faults)
    assert isinstance(done.exception, Exception)
    assert getattr(done.exception, "code", None) == 8
    assert done.stdout.splitlines() == faults


def test_a_doctored_cell_is_the_only_one_that_is_told(tmp_path: Path):
    root = submission(tmp_path)
    _doctored(root, cell(root))
    (first, second) = check(root, REGISTRY)
    assert first.path == second.path == cell(root).relative_to(root).as_posix()
    assert "no replicate of it is as far out" in str(first) + str(second)


def test_terminals_are_not_steered_by_names(tmp_path: Path):
    root = submission(tmp_path)
    (root / "\x1b[2Jx.json").write_text("{}")
    (fault,) = check(root, REGISTRY)
    assert "\x1b" not in str(fault)
    assert "characters that are not taken" in str(fault)


def test_too_many_files_are_not_all_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evalsuite.board.submissions.MANY", 50)
    root = submission(tmp_path)
    folder = root / "many"
    folder.mkdir()
    for number in range(80):
        os.mknod(folder / f"{number}.png")
    faults = check(root, REGISTRY)
    assert any("more than 50 files" in fault.problem for fault in faults)
    assert len(faults) <= 51


def test_what_is_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="is no folder"):
        check(tmp_path / "nothing", REGISTRY)
