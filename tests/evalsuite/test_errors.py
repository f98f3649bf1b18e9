"""A refusal is three lines that a terminal can show, whatever is in it."""

from __future__ import annotations

from evalsuite.errors import LONGEST, DataError


def test_the_middle_of_endless_words_is_left_out_where_they_are_printed():
    refusal = DataError("p", cause="a" * 5000 + "\n" + "z" * 5000, fix="f")
    problem, cause, fix = str(refusal).splitlines()
    assert (problem, fix) == ("error: p", "fix: f")
    assert len(cause) < LONGEST + 100
    assert cause.startswith("cause: aaa")
    assert cause.endswith("zzz")
    assert "characters left out" in cause
    assert len(refusal.cause) == 10_001


def test_a_line_that_fits_is_whole():
    assert str(DataError("p", cause="x" * LONGEST, fix="f")).splitlines()[1] == f"cause: {'x' * LONGEST}"
