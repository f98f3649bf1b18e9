"""Results of strangers, mutated: none ends the check of a submission, or the board that others are on."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalsuite.board.report import report
from evalsuite.board.site import build
from evalsuite.board.submissions import check
from evalsuite.board.table import collect
from evalsuite.hooks import Registry

made = runpy.run_path(str(Path(__file__).parents[1] / "evalsuite" / "board" / "test_submissions.py"))
EXAMPLES = max(1, settings.default.max_examples // 5)
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 5e-324, "", "x" * 5000, "\ud800", "\0",
    "\x1b[2J", "<script>alert(1)</script>", "../../x", "2.0", "NaN", [], {}, [[]], [None], {"": None}, {"a": {"b": []}},
    [1, "a", None], {"evalsuite": None}, "1e400", "https://evil.example", "\u202egnp.exe", "{{ 7 * 7 }}",
]  # fmt: skip
RAW = ["1e400", "-1e999", "NaN", "Infinity", "1" * 5000, "[" * 100 + "]" * 100, "{", '"\\ud800"', '{"a": 1, "a": 2}']
MARK = "a place for raw text"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON tree but the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutated(data: st.DataObject, content: dict[str, Any]) -> str:
    """The JSON text after one to three changes: other values, keys taken away or added, text that is hardly JSON."""
    content, raw = copy.deepcopy(content), None
    odd = st.sampled_from(ODD).map(copy.deepcopy)  # the next change may be to what this one put there
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(content))))
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        change = data.draw(st.sampled_from(["odd", "odd", "json", "drop", "add", "raw"]))
        if change == "drop":
            del inner[path[-1]]
        elif change == "add" and isinstance(inner, dict):
            inner[data.draw(st.sampled_from(["", "evil", "encoded", "log", "curve", "top1", "\ud800"]))] = data.draw(
                odd
            )
        elif change == "json":
            inner[path[-1]] = data.draw(st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists))
        elif change == "raw":
            inner[path[-1]], raw = MARK, data.draw(st.sampled_from(RAW))
        else:
            inner[path[-1]] = data.draw(odd)
        if not content:
            break
    text = json.dumps(content)
    return text if raw is None else text.replace(json.dumps(MARK), raw)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole submission, with details of every kind that a report draws."""
    root: Path = made["submission"](tmp_path_factory.mktemp("ours"), seeds=1)
    path = made["cell"](root)
    content = json.loads(path.read_text())
    content["selected"] = {"k": 20, "T": 0.07}
    content["timings"] = {"encode": 2.0, "fit": 0.5, "total": 3.0}
    content["details"] = {
        "encoded": 1000, "log": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
        "curve": [{"steps": 1, "success": 0.1}, {"steps": 2, "success": 0.4}],
        "validation": [{"k": 5, "T": 0.07, "score": 0.4}, {"k": 20, "T": 0.07, "score": 0.5}],
        "accuracy_by_class": {"cat": 0.5, "dog": None}, "precision_by_recall": {"0.5": [1.0, 0.5]},
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = made["submission"](tmp_path_factory.mktemp("theirs"), seeds=1)
    path = made["cell"](root)
    content = json.loads(path.read_text())
    content["backbone"]["identity"] = "cd" * 32
    path.write_text(json.dumps(content))
    return root


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_result_of_a_stranger_ends_everybodys_board(
    ours: Path, theirs: Path, registry: Registry, data: st.DataObject
):
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "s"
        shutil.copytree(ours, root)
        path = made["cell"](root)
        path.write_text(mutated(data, json.loads(path.read_text())))
        faults = check(root, registry)
        assert all("\n" not in str(fault) for fault in faults)
        assert all(str(fault).encode() for fault in faults)
        board = collect([root, theirs])
        assert any(contender.identity == "cd" * 32 for contender in board.contenders)
        build(board, Path(scratch) / "site")
        if not faults:
            report(root, Path(scratch) / "report.html")
