"""Killed at any write, by itself or with a second process beside it, a run ends with the numbers of one that was not.

``make fuzz`` takes every write of each kind of run, and fifty random moments; the ordinary suite some, always the same.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

DRIVER = Path(__file__).with_name("killing.py")
ROOT = DRIVER.parent.parent
LONG = hypothesis.settings.default.max_examples > 1000
STEP, OWN, MOMENTS = (1, 1, 50) if LONG else (33, 3, 1)  # one write in so many, of the second process, random moments
BOTH = ("first", "second")
KINDS = {"trains": "said", "classify": "said", "encode": "said", "pretrain": "ended"}  # who comes second waits or ends

pytestmark = pytest.mark.slow
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Has a trial made by the one process that is forked for all of them; what came of it."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with (
        (folder / "errors.txt").open("w") as errors,
        subprocess.Popen(
            [sys.executable, str(DRIVER), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, bufsize=1, env=environment,
        ) as driver,
    ):  # fmt: skip

        def asked(**trial: Any) -> dict[str, Any]:
            driver.stdin.write(json.dumps(trial) + "\n")
            if answer := driver.stdout.readline():
                return json.loads(answer)
            raise AssertionError(f"no answer to {trial}: {(folder / 'errors.txt').read_text()[-2000:]}")

        yield asked
    assert driver.returncode == 0


def fine(answers: list[dict[str, Any]]) -> None:
    faults = [answer["fault"] for answer in answers if "fault" in answer]
    assert not faults, f"{len(faults)} of {len(answers)} trials: " + "\n".join(faults)


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_two_processes_is_killed_at_any_write_of_the_first(ask, kind):
    answers, resumed = [], []
    for number, point in enumerate(range(STEP // 2 + 1, 10_000, STEP)):
        for victim in BOTH if LONG else (BOTH[number % 2],):
            answers.append(ask(kind=kind, point=point, victim=victim))
            if victim == "first":
                resumed += re.findall(r"^encode: (\d)/6", answers[-1].get("said", ""), re.MULTILINE)[:1]
        if answers[-1].get("first") == "ended":
            break
    fine(answers)
    assert point > 50
    beside = [answer["second"] for answer in answers if "second" in answer]
    assert beside.count(KINDS[kind]) > 0.5 * len(beside)  # from where it holds the lock on
    if kind == "encode":
        assert resumed == sorted(resumed)  # the later it was killed, the less was left to do
        assert set(resumed) == {"0", "4", "6"} if LONG else {"0"} < set(resumed) <= {"0", "4", "6"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_process_is_killed_at_any_write_of_its_own(ask, kind):
    answers = []
    for point in range(OWN, 100, OWN):
        answers.append(ask(kind=kind, point=30, victim="second", second_point=point))
        if answers[-1].get("second") != "stopped":
            break
    fine(answers)
    assert [answer["second"] for answer in answers] == ["stopped"] * (len(answers) - 1) + [KINDS[kind]]
    assert point > 2


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_two_processes_is_killed_at_a_random_moment(ask, kind):
    rng = random.Random(None if LONG else 0)
    fine([ask(kind=kind, share=rng.uniform(0, 1.5), victim=rng.choice(BOTH)) for _ in range(MOMENTS)])
