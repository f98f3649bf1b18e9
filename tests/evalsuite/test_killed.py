"""Killed at any write of a run, the next run ends with the same numbers, and nothing half-written is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Runs in a process of its own, and forks: children that are killed at each write point in turn, then one that is not.
WORLD = '''
import json, os, signal, sys
from pathlib import Path
import evalsuite
import evalsuite.backbones.torchvision_zoo, evalsuite.runner, evalsuite.tasks.classification  # once, not in each child
from evalsuite.hooks import load
from evalsuite.results import read_all

REGISTRY = load(environ={}).registry
NAMES = {"fsync": os, "replace": os, "rename": os, "mkdir": os, "unlink": os}

def evaluate(data, out):
    (result,) = evalsuite.run(
        "random:small:resnet10", "classify", registry=REGISTRY, data=f"npz:{data}", protocol="ridge", out=Path(out),
        backbone_options={"width": 4}, device="cpu", workers=0,
    )
    return {name: [score.value, score.low, score.high] for name, score in result.scores.items()}, result.status

def in_child(work, stop=0):
    """The child's answer, None where it was killed; it is killed before its write number ``stop``."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0
        def counted(real):
            def call(*arguments, **named):
                nonlocal count
                count += 1
                if count == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)
            return call
        if stop:
            for name, module in NAMES.items():
                setattr(module, name, counted(getattr(module, name)))
        answer = json.dumps(work()).encode()
        os.write(writer, answer)
        os._exit(0)
    os.close(writer)
    answer = b"".join(iter(lambda: os.read(reader, 65536), b""))
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else json.loads(answer)

data, place = sys.argv[1:]
stop = 1
while True:
    root = Path(place) / str(stop)
    os.environ["EVALSUITE_CACHE"] = str(root / "cache")
    killed = in_child(lambda: evaluate(data, root / "out"), stop) is None
    whole = sum(1 for _ in read_all(root / "out"))  # raises where one is half-written
    print(json.dumps({"stop": stop, "killed": killed, "whole": whole,
                      "again": in_child(lambda: evaluate(data, root / "out"))}), flush=True)
    if not killed:
        break
    stop += 1
'''


@pytest.mark.timeout(1800)  # minutes of one core, on a machine that may have none to spare
@pytest.mark.slow
def test_killed_at_any_write_the_next_run_ends_with_the_same_numbers(tmp_path: Path):
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=24)
    images = (rng.integers(0, 90, (24, 8, 8, 3)) + 120 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(
        tmp_path / "data.npz", train_images=images[:16], train_labels=labels[:16], test_images=images[16:],
        test_labels=labels[16:],
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WORLD, str(tmp_path / "data.npz"), str(tmp_path / "runs")],
        capture_output=True, text=True, check=False, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [run["killed"] for run in runs] == [True] * (len(runs) - 1) + [False]
    assert len(runs) > 20  # the cache, the samples, the predictions, the cell and the folders
    assert all(run["again"] == runs[-1]["again"] for run in runs)
    assert runs[-1]["again"][1] == "ok"
    assert runs[0]["whole"] == 0
    assert runs[-1]["whole"] == 1
