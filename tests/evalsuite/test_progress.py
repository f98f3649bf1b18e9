"""Bars on a terminal, few lines in a log, nothing when quiet."""

from __future__ import annotations

import io
import re
import time

import pytest

from evalsuite.progress import Progress


def untimed(stream: io.StringIO) -> list[str]:
    """The lines, with every time of the clock replaced: machines are slow now and then."""
    return [re.sub(r"\d+:\d\d", "<t>", line) for line in stream.getvalue().splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_the_start_and_one_at_the_end():
    stream = io.StringIO()
    with Progress(stream=stream, interval=3600).track("train", 100) as meter:
        for step in range(1, 101):
            meter.update(step, loss=1 / step)
    first, last = untimed(stream)
    assert first == "train: 0/100"
    assert last == "train: 100/100 loss 0.01 in <t>"


def test_a_log_gets_a_line_an_interval_with_numbers_and_what_is_left():
    stream = io.StringIO()
    with Progress(stream=stream, interval=0.0).track("train", 3) as meter:
        for step in (1, 2, 3):
            meter.update(step, loss=0.123456, rate=12345.678)
    assert untimed(stream) == [
        "train: 0/3",
        "train: 1/3 loss 0.1235 rate 1.235e+04 eta <t>",
        "train: 2/3 loss 0.1235 rate 1.235e+04 eta <t>",
        "train: 3/3 loss 0.1235 rate 1.235e+04 in <t>",
    ]


def test_a_resumed_run_starts_where_it_was():
    stream = io.StringIO()
    with Progress(stream=stream).track("train", 10, done=7):
        pass
    assert untimed(stream) == ["train: 7/10", "train: 7/10 in <t>"]


def test_a_failed_activity_claims_no_end():
    stream = io.StringIO()

    def fail() -> None:
        with Progress(stream=stream).track("train", 10):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - ours, without a message
        fail()
    assert stream.getvalue().splitlines() == ["train: 0/10"]


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with Progress(stream=stream).track("train", 4) as meter:
        meter.update(4, loss=0.5)
    assert "train" in stream.getvalue()
    assert "4/4" in stream.getvalue()
    assert "loss 0.5" in stream.getvalue()


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_quiet_says_nothing(stream):
    progress = Progress(quiet=True, stream=stream)
    progress.say("hello")
    with progress.track("train", 2) as meter:
        meter.update(2, loss=0.5)
    assert stream.getvalue() == ""


def test_say_is_one_line():
    stream = io.StringIO()
    Progress(stream=stream).say("hello")
    assert stream.getvalue() == "hello\n"


def test_what_is_left_is_told_in_minutes_and_hours(monkeypatch):
    clock = iter([0.0, 36.0, 3600.0, 3665.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress(stream=stream, interval=1).track("train", 101) as meter:
        meter.update(1)
        meter.update(100)
    assert [line.split()[-1] for line in stream.getvalue().splitlines()[1:]] == ["1:00:00", "0:36", "1:01:05"]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("evalsuite.progress.PATIENCE", 0.01)


def wait_for(stream: io.StringIO, line: str) -> None:
    until = time.monotonic() + 30
    while line not in stream.getvalue():
        assert time.monotonic() < until, stream.getvalue()
        time.sleep(0.01)


def test_what_takes_long_says_what_it_is_and_again(impatient):
    stream = io.StringIO()
    with Progress(stream=stream, interval=0.0).doing("reading"):
        wait_for(stream, "reading\nreading (0:00)\n")


def test_what_is_quick_or_quiet_says_nothing(impatient):
    stream = io.StringIO()
    with Progress(stream=stream, interval=0.0, quiet=True).doing("reading"):
        time.sleep(0.3)
    with Progress(stream=stream).doing("reading"):
        pass
    assert stream.getvalue() == ""


def test_the_innermost_of_several_is_said_and_none_beside_steps_that_are_counted(impatient):
    stream = io.StringIO()
    progress = Progress(stream=stream, interval=3600)
    with progress.doing("outer"):
        with progress.doing("inner"):
            wait_for(stream, "inner\n")
        with progress.track("train", 2):
            time.sleep(0.3)
    assert "outer" not in stream.getvalue()
