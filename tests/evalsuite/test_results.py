from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.errors import DataError
from evalsuite.results import (
    GREATEST,
    BackboneRecord,
    ProtocolRecord,
    Result,
    Score,
    cell_path,
    read,
    read_all,
    validated,
)


def nested(levels: int) -> list:
    inner: list = []
    for _ in range(levels - 1):
        inner = [inner]
    return inner


def result(**changes) -> Result:
    values = {
        "status": "ok",
        "backbone": BackboneRecord(name="net", request="net.pth", identity="ab" * 32, spec={"arch": "x"}, parameters=3),
        "task": "coco",
        "task_version": 1,
        "protocol": ProtocolRecord(id="fpn-1x", version=1, hash="0" * 16),
        "seed": 0,
        "primary": "AP",
        "scores": {"AP": Score(value=0.5, low=0.4, high=0.6)},
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Result(**{**values, **changes})


finite = st.none() | st.floats(-GREATEST, GREATEST)


@given(values=st.dictionaries(st.text(max_size=8), finite, max_size=4), error=st.none() | st.text(max_size=20))
def test_a_result_comes_back_as_it_was_written(tmp_path_factory, values, error):
    path = tmp_path_factory.mktemp("cell") / "seed-0.json"
    made = result(scores={k: Score(value=v) for k, v in values.items()}, error=error)
    made.write(path)
    assert read(path) == made


def test_numbers_that_are_not_finite_cannot_be_written():
    with pytest.raises(ValueError, match="finite"):
        Score(value=float("nan"))


def test_a_later_minor_version_is_read_and_a_later_major_is_not(tmp_path):
    path = tmp_path / "seed-0.json"
    content = result().model_dump(mode="json")
    path.write_text(json.dumps({**content, "schema_version": "1.7", "novelty": 1}))
    assert read(path).scores["AP"].value == 0.5
    path.write_text(json.dumps({**content, "schema_version": "2.0"}))
    with pytest.raises(DataError, match="not a result"):
        read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"details": {"a": [1, 2.5, None, True, "\u00e9", {"b": -(2**63) + 1}]}},
        {"details": {"a": 2**63}},
        {"details": {"a": math.inf}},
        {"details": {"a": "\ud800"}},
        {"details": {"\udfff": 1}},
        {"details": {"a": nested(28)}},
        {"details": {"a": nested(29)}},
        {"details": {"a": "x" * 1_000_001}},
        {"schema_version": "2.0"},
        {"schema_version": 1},
        {"seed": 2**63},
        {"unknown": nested(500)},
        {"unknown": nested(900)},
    ],
)
def test_a_file_is_read_as_what_its_json_holds(tmp_path, changes):
    content = result().model_dump(mode="json") | changes
    path = tmp_path / "seed-0.json"
    path.write_text(json.dumps(content))
    assert outcome(lambda: read(path)) == outcome(lambda: validated(json.loads(path.read_text())))


def outcome(reading: Callable[[], Result]) -> Result | None:
    """A result; None where it is refused."""
    try:
        return reading()
    except (DataError, ValueError, RecursionError):
        return None


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"schema_version": "1.0"}', "\x00"])
def test_what_is_no_result_is_refused(tmp_path, text):
    path = tmp_path / "seed-0.json"
    path.write_text(text)
    with pytest.raises(DataError, match="not a result"):
        read(path)


@pytest.mark.parametrize(
    "mark",
    [
        {"demo": True},
        {"limited": 5},
        {"trusted": True},
        {"partial": True},
        {"status": "failed"},
        {"protocol": ProtocolRecord(id="p", version=1, hash="0", modified=("lr",))},
        {"protocol": ProtocolRecord(id="p", version=1, hash="0", ranked=False)},
    ],
)
def test_marked_results_are_never_ranked(mark):
    assert result().ranked
    assert not result(**mark).ranked


@given(name=st.text(min_size=1), task=st.text(min_size=1), variant=st.lists(st.text(max_size=5), max_size=2))
def test_a_cell_stays_below_its_folder_whatever_it_is_called(name, task, variant):
    protocol = ProtocolRecord(id="../p", version=1, hash="0")
    path = cell_path(Path("/out"), name, "ab" * 32, task, protocol, 3, tuple(variant))
    assert path.resolve().is_relative_to("/out/results")
    assert len(path.relative_to("/out").parts) == 4
    assert path.name == "seed-3.json"


def test_all_results_below_a_folder_are_found(tmp_path):
    for seed in (1, 0):
        result(seed=seed).write(tmp_path / "results" / "net" / "coco" / f"seed-{seed}.json")
    assert [r.seed for _, r in read_all(tmp_path)] == [0, 1]
