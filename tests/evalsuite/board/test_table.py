"""Columns that never mix, ranks with bounds, and a table a spreadsheet can open."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evalsuite.board.table import WIDTH, Board, collect
from evalsuite.errors import DataError
from evalsuite.results import ProtocolRecord

Write = Callable[..., Path]


def only(board: Board) -> dict[str, tuple[int, int | None, int | None, bool]]:
    (column,) = board.columns
    return {n: (s.rank, s.best, s.worst, s.tied) for n, s in board.standings[column.key].items()}


def test_ranks_have_bounds_where_intervals_meet(write: Write, tmp_path: Path):
    for name, value in {"a": 0.90, "b": 0.89, "c": 0.80, "d": 0.50}.items():
        write(tmp_path, name, value)
    assert only(collect([tmp_path])) == {
        "a": (1, 1, 2, False), "b": (2, 1, 2, True), "c": (3, 3, 3, False), "d": (4, 4, 4, False),
    }  # fmt: skip


def test_lower_may_be_better(write: Write, tmp_path: Path):
    write(tmp_path, "a", 0.2, better=False)
    write(tmp_path, "b", 0.1, better=False)
    assert only(collect([tmp_path])) == {"b": (1, 1, 1, False), "a": (2, 2, 2, False)}


def test_equal_scores_share_a_rank(write: Write, tmp_path: Path):
    for name in "abc":
        write(tmp_path, name, 0.5 if name != "c" else 0.4)
    assert {name: found[0] for name, found in only(collect([tmp_path])).items()} == {"a": 1, "b": 1, "c": 3}


def test_without_an_interval_nothing_is_said_of_the_bounds(write: Write, tmp_path: Path):
    write(tmp_path, "a", 0.9, half=None)
    write(tmp_path, "b", 0.8)
    assert only(collect([tmp_path])) == {"a": (1, None, None, False), "b": (2, 1, 2, False)}


def test_seeds_join_both_sources_of_doubt(write: Write, tmp_path: Path):
    values = [0.70, 0.72, 0.77]
    for seed, value in enumerate(values):
        write(tmp_path, "a", value, 0.02, seed=seed)
    board = collect([tmp_path])
    standing = board.standings[board.columns[0].key]["a"]
    half = WIDTH * np.sqrt((0.02 / WIDTH) ** 2 + np.std(values, ddof=1) ** 2 / 3)
    assert (standing.value, standing.seeds) == (pytest.approx(np.mean(values)), 3)
    assert (standing.low, standing.high) == (pytest.approx(standing.value - half), pytest.approx(standing.value + half))


def test_seeds_of_a_protocol_that_draws_nothing_are_one_run(write: Write, tmp_path: Path):
    for seed in (2, 1):
        write(tmp_path, "a", 0.7 + seed / 1000, 0.02, seed=seed, seeded=False)  # a last digit of another machine
    board = collect([tmp_path])
    standing = board.standings[board.columns[0].key]["a"]
    assert (standing.value, standing.seeds) == (0.701, None)
    assert (standing.low, standing.high) == (pytest.approx(0.681), pytest.approx(0.721))
    (row,) = csv.DictReader(io.StringIO(board.to_csv()))
    assert row["seeds"] == ""


@pytest.mark.parametrize(
    "other",
    [{"hash": "b" * 16}, {"engine": "detectron2"}, {"data": {"fingerprint": "e" * 32}}, {"task": "cifar100"}],
)
def test_what_is_measured_otherwise_has_a_column_of_its_own(write: Write, tmp_path: Path, other: dict):
    write(tmp_path, "a", 0.9)
    write(tmp_path, "a", 0.8, **other)
    board = collect([tmp_path])
    assert len(board.columns) == 2
    assert len({column.title for column in board.columns}) == 2
    assert all(len(board.standings[column.key]) == 1 for column in board.columns)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"demo": True}, "a demo world"), ({"limited": 10}, "limited data"), ({"status": "failed"}, "it failed"),
        ({"trusted": True}, "trusted blindly"), ({"partial": True}, "loaded in part"), ({"scores": {}}, "is undefined"),
        ({"protocol": ProtocolRecord(id="knn", version=1, hash="a" * 16, modified=("ks",))}, "a modified protocol"),
        ({"protocol": ProtocolRecord(id="smoke", version=1, hash="a" * 16, ranked=False)}, "for trying things out"),
    ],
)  # fmt: skip
def test_what_may_not_be_ranked_is_named(write: Write, tmp_path: Path, change: dict, reason: str):
    write(tmp_path, "a", 0.9)
    write(tmp_path, "b", 0.95, **change)
    board = collect([tmp_path])
    assert list(only(board)) == ["a"]
    assert reason in board.unranked[0]


def test_two_backbones_of_one_name_are_told_apart(write: Write, tmp_path: Path):
    write(tmp_path, "model", 0.9, identity="a" * 64)
    write(tmp_path, "model", 0.8, identity="b" * 64)
    assert set(only(collect([tmp_path]))) == {"model [aaaaaaaa]", "model [bbbbbbbb]"}


def test_names_that_end_alike_are_told_apart_too(write: Write, tmp_path: Path):
    identities = ["ab" * 32, "ab" * 31 + "cd", "ab" * 4 + "ef" * 28]
    for place, identity in enumerate(identities):
        write(tmp_path, "model", 0.5 + place / 10, identity=identity)
    found = only(collect([tmp_path]))
    assert len(found) == 3
    assert all(label.startswith("model [abababab") for label in found)


def test_a_file_that_is_no_result_costs_itself_alone(write: Write, tmp_path: Path):
    write(tmp_path, "a", 0.9)
    (tmp_path / "seed-9.json").write_text('{"schema_version": "2.0"}')
    os.mkfifo(tmp_path / "seed-8.json")
    board = collect([tmp_path])
    assert list(only(board)) == ["a"]
    assert board.unranked == (
        "seed-8.json: it cannot be read: it is no regular file",
        "seed-9.json: it cannot be read: schema version '2.0'; this version reads 1.0",
    )


@pytest.mark.parametrize("encoded", ["many", -5, 0, [3], None, {"a": 1}, True])
def test_an_odd_count_of_encoded_images_gives_no_time(write: Write, tmp_path: Path, encoded: object):
    write(tmp_path, "a", 0.9, details={"encoded": encoded}, timings={"encode": 1.0} if encoded is not True else {})
    board = collect([tmp_path])
    assert board.standings[board.columns[0].key]["a"].encode_ms is None


def test_a_cell_that_is_there_twice_counts_once(write: Write, tmp_path: Path):
    write(tmp_path, "a", 0.9)
    write(tmp_path, "a", 0.7)
    board = collect([tmp_path])
    assert board.standings[board.columns[0].key]["a"].seeds == 1
    assert "twice" in board.unranked[0]


def test_the_csv_runs_nothing_in_a_spreadsheet(write: Write, tmp_path: Path):
    write(tmp_path, "a", 0.9, provenance={"recipe": "=cmd|' /C calc'!A0"})
    (row,) = csv.DictReader(io.StringIO(collect([tmp_path]).to_csv()))
    assert row["method"] == "'=cmd|' /C calc'!A0"
    assert (row["rank"], row["tied"], float(row["value"])) == ("1", "False", 0.9)


def test_nothing_to_rank_is_said(tmp_path: Path):
    with pytest.raises(DataError, match="nothing to rank"):
        collect([tmp_path])
    with pytest.raises(DataError, match="is no folder"):
        collect([tmp_path / "x"])
