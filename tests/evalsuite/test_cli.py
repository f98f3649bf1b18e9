"""The command line, as a user meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from evalsuite.cli import _seeds, main
from evalsuite.data import source
from evalsuite.errors import UsageError

SITE = Path(__file__).resolve().parent.parent / "fixtures" / "site"
QUICK = ["--protocol", "smoke", "--set", "min_sizes=64", "--set", "max_size=96", "--set", "test_min_size=64"]


@pytest.fixture
def evalsuite(monkeypatch, capsys):
    """Run a command in this process: its exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evalsuite", *arguments])
        with pytest.raises(SystemExit) as leave:
            main()
        said = capsys.readouterr()
        return int(leave.value.code or 0), said.out, said.err

    monkeypatch.setattr("evalsuite.progress.PATIENCE", 3600.0)  # a busy machine has more to say
    monkeypatch.setenv("EVALSUITE_PLUGINS", "")
    monkeypatch.delenv("EVALSUITE_DATA", raising=False)
    return call


def three_lines(text: str) -> bool:
    return re.fullmatch(r"error: .+\ncause: .+\nfix: .+\n", text) is not None


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["run"], 2, "Missing option"),
        (["run", "--nope"], 2, "No such option"),
        (["frobnicate"], 2, "No such command"),
        (["list", "tasks"], 2, "did you mean 'task'"),
        (["run", "-b", "random:timm:test_resnet", "-t", "cocoo"], 2, "did you mean 'coco'"),
        (["run", "-b", "random:timm:test_resnet", "-t", "coco"], 3, "no data root"),
        (["run", "-b", "random:timm:test_resnet", "-t", "coco", "--data-root", "nowhere"], 3, "not a folder"),
        (["run", "-b", "nowhere.pth", "-t", "coco", "--demo"], 4, "nowhere.pth"),
        (["run", "-b", "random:timm:test_resnet", "-t", "coco", "--seeds", "-1"], 2, "--seeds"),
        (["run", "-b", "random:timm:test_resnet", "-t", "coco", "--set", "lr"], 2, "no setting"),
        (["data", "where", "coco"], 3, "no data root"),
        (["data", "verify", "voc:nowhere"], 3, "not a folder"),
        (["inspect", "nowhere.pth"], 4, "nowhere.pth"),
    ],
)
def test_what_is_wrong_is_told_in_three_lines_with_its_code(evalsuite, arguments, code, text, monkeypatch, tmp_path):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    status, out, err = evalsuite(*arguments)
    assert status == code
    assert out == ""
    assert three_lines(err), err
    assert text in err


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [0, 1, 2]), ("0,7", [0, 7]), ("1234,", [1234]), ("0", None), (",", None), ("1,,2", None)]
)
def test_seeds_are_a_count_or_a_list(text, seeds):
    if seeds is None:
        with pytest.raises(UsageError, match="makes no sense"):
            _seeds(text)
    else:
        assert _seeds(text) == seeds


def test_help_loads_neither_torch_nor_a_plugin():
    code = (
        "import sys; sys.argv = ['evalsuite', '--help']\n"
        "from evalsuite.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'timm', 'evalsuite.tasks', 'evalsuite.backbones', 'pluggy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout


def test_lists_tell_what_there_is_and_who_brings_it(evalsuite):
    status, out, _ = evalsuite("list", "task")
    assert status == 0
    assert re.search(r"task\s+coco\s+.*evalsuite \d", out)
    status, out, _ = evalsuite("list", "--json")
    assert {"coco", "voc", "detect"} <= {entry["name"] for entry in json.loads(out)}


def test_broken_plugins_leave_the_command_line_working_and_are_reported():
    environment = {**os.environ, "PYTHONPATH": str(SITE)}
    environment.pop("EVALSUITE_PLUGINS", None)
    call = [sys.executable, "-m", "evalsuite"]
    listed = subprocess.run([*call, "list", "task"], capture_output=True, text=True, env=environment, check=True)
    assert "coco" in listed.stdout
    assert "is broken and was left out" in listed.stderr
    told = subprocess.run([*call, "plugins", "list", "--json"], capture_output=True, env=environment, check=True)
    rows = json.loads(told.stdout)
    broken = [row for row in rows if row["status"] == "broken"]
    assert broken
    assert all(row["reason"] and row["distribution"] for row in broken)
    assert any(row["status"] == "loaded" and row["distribution"] == "evalsuite" for row in rows)


def test_data_are_found_and_verified(evalsuite, registry, tmp_path):
    path = source(registry, "voc").demo(tmp_path, seed=0, images=4)
    status, out, _ = evalsuite("data", "where", "voc", "--data-root", str(tmp_path))
    assert (status, out.strip()) == (0, f"voc: {path}")
    status, out, _ = evalsuite("data", "verify", "voc", "--data-root", str(tmp_path))
    assert status == 0
    status, out, _ = evalsuite("data", "verify", "demo:16", "--json")
    assert (status, json.loads(out)["counts"]["train"]["images"]) == (0, 16)
    victim = sorted(path.rglob("*.jpg"))[0]
    victim.write_bytes(victim.read_bytes()[:200])
    status, out, _ = evalsuite("data", "verify", "voc", "--data-root", str(tmp_path), "--json")
    assert status == 3
    assert any(victim.name in fault for fault in json.loads(out)["faults"])


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("folder", ["PATH/train/CLASS/*.jpg", "evalsuite run --task classify --data folder:PATH"]),
        ("csv", ["PATH/list.csv", "evalsuite run --task classify-multilabel --data csv:PATH/list.csv"]),
        ("npz", ["PATH/data.npz", "evalsuite data verify npz:PATH/data.npz"]),
        ("pairs", ["PATH/images/train/*.jpg", "evalsuite run --task segment --data pairs:PATH"]),
        ("segment", ["PATH/masks/val/*.png", "evalsuite run --task segment --data pairs:PATH"]),
        ("detect", ["PATH/Annotations/*.xml", "--task detect --data voc:PATH", "--task detect --data coco:PATH"]),
        ("classify", ["--task classify --data folder:PATH", "csv:PATH/list.csv", "npz:PATH/data.npz"]),
        ("demo", ["generated, no file is needed", "--task classify --data demo:N", "evalsuite data verify demo:N"]),
        ("worlds", ["generated, no file is needed", "evalsuite pretrain --method simclr --data worlds:TASK"]),
    ],
)
def test_where_shows_the_tree_of_own_data_and_what_to_give(evalsuite, name, lines):
    status, out, err = evalsuite("data", "where", name)
    assert (status, err) == (0, "")
    for line in lines:
        assert line in out
    assert "``" not in out


def test_own_data_are_no_data_set_below_a_root(evalsuite):
    status, out, _ = evalsuite("data", "where")
    assert status == 0
    assert "folder: data of your own, --data folder:PATH" in out.splitlines()
    assert "demo: generated, --data demo:N" in out.splitlines()
    assert "cifar10: not found (no data root was given)" in out.splitlines()
    status, _, err = evalsuite("data", "where", "coco")
    assert "data of your own: --task detect --data coco:PATH" in err
    status, _, err = evalsuite("data", "where", "no-such")
    assert (status, three_lines(err)) == (2, True)


def test_a_checkpoint_is_inspected(evalsuite):
    status, out, _ = evalsuite("inspect", "random:timm:test_resnet", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["parameters"] > 1000
    assert told["flops"] > 1000
    status, out, _ = evalsuite("inspect", "random:timm:test_resnet", "--backbone-arg", "mean=[0.1,0.2,0.3]")
    assert "test_resnet" in out
    assert "mean [0.1, 0.2, 0.3]" in out


def test_a_run_ends_in_a_table_a_result_and_a_picture(evalsuite, monkeypatch, tmp_path):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "-b", "random:timm:test_resnet", "-t", "voc", "--demo", "--limit", "3", *QUICK]
    status, out, err = evalsuite(*arguments, "--set", "iterations=2")
    assert status == 0, err
    assert "AP50" in out
    assert "not for ranking: demo, limited to 3 images, modified protocol" in out
    result = Path(re.search(r"^result: (.+)$", out, re.MULTILINE)[1])
    content = json.loads(result.read_text())
    assert content["command"].startswith("evalsuite run -b random:timm:test_resnet")
    picture = Path(re.search(r"^picture of detections: (.+)$", out, re.MULTILINE)[1])
    with Image.open(picture) as opened:
        assert opened.format == "PNG"
    assert len(err.splitlines()) < 12, "a log must stay small"
    status, out, err = evalsuite(*arguments, "--set", "iterations=2", "--json", "-q")
    assert status == 0
    assert json.loads(out)[0]["created"] == content["created"], "a finished cell was run again"


def test_a_truncated_image_fails_its_cell_with_the_code_of_data(evalsuite, registry, monkeypatch, tmp_path):
    path = source(registry, "voc").demo(tmp_path, seed=0, images=4)
    for image in path.rglob("VOC2012/JPEGImages/*.jpg"):
        image.write_bytes(image.read_bytes()[:300])
    monkeypatch.chdir(tmp_path)
    status, out, err = evalsuite(
        "run", "-b", "random:timm:test_resnet", "-t", "voc", "--data-root", str(tmp_path), "--set", "iterations=2",
        *QUICK,
    )  # fmt: skip
    assert status == 3
    assert ".jpg" in err
    assert "failed" in out


def _start(folder: Path, cache: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "evalsuite", "run", "-b", "random:timm:test_resnet", "-t", "voc", "--demo", *QUICK,
        "--set", "iterations=12", "--set", "batch_size=2", "--limit", "4", "--out", str(folder), *more,
    ]  # fmt: skip
    environment = {**os.environ, "EVALSUITE_CACHE": str(cache), "EVALSUITE_PLUGINS": ""}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _finished(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return json.loads(Path(re.search(r"^result: (.+)$", out, re.MULTILINE)[1]).read_text())


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """The cache and the result of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("never-killed")
    return folder / "cache", _finished(_start(folder / "whole", folder / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_run_killed_in_mid_training_ends_in_the_same_scores(tmp_path, never_killed, number, code):
    cache, whole = never_killed
    process = _start(tmp_path / "cut", cache, "--save-every", "0")
    deadline = time.monotonic() + 600
    while not list((tmp_path / "cut").rglob("state.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=600)
    assert process.returncode == code
    assert not list((tmp_path / "cut").rglob("seed-0.json")), "it was killed too late to show anything"
    resumed = _finished(_start(tmp_path / "cut", cache))
    assert resumed["scores"] == whole["scores"]
    assert resumed["details"]["log"] == whole["details"]["log"]


def test_a_backbone_is_pretrained_and_goes_straight_into_an_evaluation(evalsuite, monkeypatch, tmp_path):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    status, out, err = evalsuite(
        "pretrain", "--method", "simclr", "--with", "hallucinator", "--data", "demo", "--arch", "small:resnet10",
        "--arch-option", "width=8", "--preset", "cifar", "--epochs", "1", "--batch-size", "64", "-o", "made",
        "--set", "hallucinator.reach=0.2",
    )  # fmt: skip
    assert status == 0, err
    identity = re.search(r"^identity: (\w{64})$", out, re.MULTILINE)[1]
    assert (tmp_path / "made" / "metrics.png").exists()
    status, out, _ = evalsuite("inspect", "made/backbone.safetensors", "--json")
    assert json.loads(out)["report"]["identity"] == identity
    quick = ["--demo", "--limit", "2", "--set", "iterations=1", *QUICK]
    status, out, err = evalsuite("run", "-b", "made/backbone.safetensors", "-t", "voc", "--json", "-q", *quick)
    assert status == 0, err
    assert json.loads(out)[0]["backbone"]["identity"] == identity


@pytest.mark.parametrize(
    "command",
    [
        "run -b nowhere.pth -t coco --demo --out",
        "pretrain -m simclr --data folder:nowhere --out",
        "convert nowhere.pth --to timm",
        "report nowhere --out",
        "leaderboard build nowhere --out",
        "plugins new my-method --kind method --out",
    ],
)
def test_an_out_that_cannot_be_written_is_refused_before_any_work(evalsuite, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.safetensors").write_text("mine")
    for out, codes in (("taken.safetensors/x.safetensors", (2,)), ("x" * 300 + "/x.safetensors", (7,))):
        status, _, err = evalsuite(*command.split(), out)
        assert status in codes
        assert three_lines(err), err
        assert "nowhere" not in err
    assert (tmp_path / "taken.safetensors").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_quiet_still_says_why_a_cell_failed(evalsuite, monkeypatch, tmp_path):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))
    quick = [*QUICK, "--limit", "2", "--set", "iterations=1", "--set", "lr=1e30", "--set", "clip_gradient=null"]
    for more in ([], ["--json"]):
        status, out, err = evalsuite(
            "run", "-q", "-b", "random:timm:test_resnet", "-t", "voc", "--demo", *quick, "--set", "iterations=4",
            "--out", str(tmp_path / "out"), *more,
        )  # fmt: skip
        assert status == 1
        assert re.search(r"seed 0: failed\nerror: .+\ncause: .+\nfix: .+\n", err)
        assert not more or json.loads(out)[0]["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--method", "simclrr"], "did you mean 'simclr'"),
        (["--method", "simclr", "--with", "halucinator"], "did you mean 'hallucinator'"),
        (["--method", "simclr", "--set", "simclr.temp=1"], "temperature"),
        (["--method", "simclr", "--set", "swav.temp=1"], "no part of the recipe"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(evalsuite, arguments, text, tmp_path):
    status, _, err = evalsuite("pretrain", *arguments, "--data", "demo", "-o", str(tmp_path / "made"))
    assert status == 2
    assert three_lines(err), err
    assert text in err
    assert not (tmp_path / "made").exists()
