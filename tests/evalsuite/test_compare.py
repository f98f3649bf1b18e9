"""Comparing: the tests' own error rates, which differences are significant from result files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from evalsuite import statistics
from evalsuite.cli import app
from evalsuite.compare import compare, refuse_worse
from evalsuite.errors import DataError, RegressionError, UsageError
from evalsuite.features import Cache
from evalsuite.results import BackboneRecord, ProtocolRecord, Result, Score, cell_path

N = 200
WEIGHTS = statistics.resample_weights(N, 400, seed=0).astype(np.float64)


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Write a cell as the runner does; returns the folder of results."""

    def write(
        out: str, hits: np.ndarray, *, backbone: str = "net", task: str = "cifar10", seed: int = 0,
        samples: bool = True, replicates: bool = True, ids: list[str] | None = None, groups: np.ndarray | None = None,
        **fields: Any,
    ) -> Path:  # fmt: skip
        folder = tmp_path / out
        protocol = fields.pop("protocol", ProtocolRecord(id="linear", version=1, hash="abc"))
        identity = fields.pop("identity", backbone.encode().hex().ljust(64, "0"))
        path = cell_path(folder, backbone, identity, task, protocol, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: dict[str, Any] = {"ids": ids or [str(i) for i in range(len(hits))]}
        if samples:
            kept["samples/top1"] = hits.astype(np.float32)
        if replicates:
            kept["replicates/top1"] = WEIGHTS[:, : len(hits)] @ hits / WEIGHTS[:, : len(hits)].sum(axis=1)
        if groups is not None:
            kept["samples/group"] = groups
        np.savez(path.with_name(f"{path.stem}.samples.npz"), **kept)
        content: Mapping[str, Any] = {
            "status": "ok", "task": task, "task_version": 1, "protocol": protocol, "seed": seed, "primary": "top1",
            "backbone": BackboneRecord(name=backbone, request=backbone, identity=identity, spec={}, parameters=1),
            "scores": {"top1": Score(value=float(hits.mean()))}, "data": {"fingerprint": "data"},
            "files": {"samples": f"{path.stem}.samples.npz"} if samples or replicates else {},
            "created": "2026-01-01T00:00:00+00:00",
        }  # fmt: skip
        Result(**{**content, **fields}).write(path)
        return folder

    return write


def hits(share: float, seed: int, n: int = N) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(np.float64)


# ---------------------------------------------------------------------------------------------------- statistics


def test_tests_have_their_nominal_error_rate_where_nothing_differs():
    rng = np.random.default_rng(0)
    trials, below = 1000, {"mcnemar": 0, "permutation": 0, "bootstrap": 0}
    for seed in range(trials):
        a, b = rng.random((2, N)) < 0.7
        below["mcnemar"] += statistics.mcnemar_test(a, b) < 0.05
        noise = rng.standard_exponential(N) - rng.standard_exponential(N)
        below["permutation"] += statistics.permutation_test(noise, permutations=300, seed=seed) < 0.05
        below["bootstrap"] += statistics.bootstrap_test(WEIGHTS @ noise / WEIGHTS.sum(axis=1)) < 0.05
    for name, count in below.items():
        assert 0.03 <= count / trials <= 0.07, name


def test_flipping_samples_of_a_group_apart_would_find_what_is_not_there():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(20), 10)
    together = apart = 0
    for seed in range(300):
        noise = np.repeat(rng.normal(size=20), 10) + 0.1 * rng.normal(size=200)
        together += statistics.permutation_test(noise, groups, permutations=200, seed=seed) < 0.05
        apart += statistics.permutation_test(noise, permutations=200, seed=seed) < 0.05
    assert together / 300 < 0.1
    assert apart / 300 > 0.3


@pytest.mark.parametrize("seed", range(4))
def test_the_permutation_test_is_scipys(seed):
    differences = np.random.default_rng(seed).normal(0.15, 1, 40)
    zeros = np.zeros_like(differences)
    expected = stats.permutation_test(
        (differences, zeros), lambda a, b, axis: (a - b).mean(axis=axis), vectorized=True, n_resamples=20000,
        permutation_type="samples", random_state=0,
    ).pvalue  # fmt: skip
    assert statistics.permutation_test(differences, permutations=20000) == pytest.approx(expected, abs=0.012)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_exact_test_less_half_of_what_was_seen(only_a, only_b):
    a = np.array([1] * only_a + [0] * only_b + [1, 0], dtype=bool)
    b = np.array([0] * only_a + [1] * only_b + [1, 0], dtype=bool)
    p = statistics.mcnemar_test(a, b)
    assert p == statistics.mcnemar_test(b, a)
    if only_a == only_b:
        assert p == pytest.approx(1)
    else:
        exact = stats.binomtest(only_a, only_a + only_b).pvalue
        assert p == pytest.approx(exact - stats.binom.pmf(only_a, only_a + only_b, 0.5))


def test_holm_is_the_textbooks():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_never_helps(ps):
    adjusted = statistics.holm(ps)
    assert all(a >= p for a, p in zip(adjusted, ps, strict=True))
    order = np.argsort(ps, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_ties_are_maximal_runs():
    assert statistics.ties("abcd", {("a", "c"), ("a", "d"), ("b", "d")}) == [["a", "b"], ["b", "c"], ["c", "d"]]
    assert statistics.ties("abc", set()) == [["a", "b", "c"]]
    assert statistics.ties("ab", {("a", "b")}) == [["a"], ["b"]]


def test_several_seeds_widen_an_interval_by_how_they_differ():
    rng = np.random.default_rng(2)
    alike = [rng.normal(0.5, 0.01, 2000) for _ in range(3)]
    unlike = [replicates + shift for replicates, shift in zip(alike, (-0.1, 0.0, 0.1), strict=True)]
    widths = [np.subtract(*statistics.interval(statistics.over_seeds(r))[::-1]) for r in (alike, unlike)]
    assert widths[1] > 5 * widths[0]
    np.testing.assert_array_equal(statistics.over_seeds(alike[:1]), alike[0])


def test_undefined_replicates_are_left_out():
    assert statistics.bootstrap_test([np.nan, np.nan]) == 1
    assert statistics.bootstrap_test([np.nan, *[1.0] * 99]) == pytest.approx(0.02)
    assert statistics.bootstrap_test([0.0] * 99) == 1


# ------------------------------------------------------------------------------------------------ result files


def test_equal_backbones_are_told_apart_no_more_often_than_by_chance(write):
    rng = np.random.default_rng(3)
    found = 0
    for trial in range(120):
        a, b = (rng.random((2, N)) < 0.7).astype(np.float64)
        report = compare([write(f"a{trial}", a, backbone="a"), write(f"b{trial}", b, backbone="b")])
        found += report.comparisons[0].pairs[0].separable
    assert found / 120 < 0.11


def test_two_copies_of_one_backbone_are_not_separable(write):
    found = hits(0.8, 0)
    report = compare([write("one", found), write("two", found)])
    (comparison,) = report.comparisons
    (pair,) = comparison.pairs
    assert pair.p == pair.adjusted == 1
    assert not pair.separable
    assert pair.improvement == 0.5
    assert (pair.low, pair.high) == (0, 0)
    assert len(comparison.groups) == 1
    assert len(set(report.backbones.values())) == 1
    assert "Not separable: net" in report.markdown()


def test_a_better_backbone_is_told_apart_and_how_much(write):
    a, b = hits(0.6, 1), hits(0.85, 2)
    report = compare([write("a", a, backbone="a"), write("b", b, backbone="b")])
    (comparison,) = report.comparisons
    (pair,) = comparison.pairs
    assert pair.difference == pytest.approx(b.mean() - a.mean())
    assert pair.low < pair.difference < pair.high
    assert pair.low > 0
    assert pair.test == "mcnemar"
    assert set(pair.tests) == {"mcnemar", "permutation", "bootstrap"}
    assert pair.p == pytest.approx(statistics.mcnemar_test(a, b))
    assert pair.separable
    assert pair.improvement == 1
    assert comparison.groups == (("b",), ("a",))
    assert "| b less a |" in report.markdown()
    assert json.loads(json.dumps(report.to_json()))["comparisons"][0]["pairs"][0]["separable"] is True


def test_holm_is_over_all_tasks(write):
    rng = np.random.default_rng(4)
    base = hits(0.6, 5)
    better = np.where((base == 0) & (rng.random(N) < 0.13), 1.0, base)
    worse = np.where((base == 1) & (rng.random(N) < 0.015), 0.0, better)
    for backbone, values in (("a", base), ("b", worse)):
        write("one", values, backbone=backbone)
        for i in range(7):
            write("many", values if i == 0 else base, backbone=backbone, task=f"task{i}")
    alone = compare([write("one", base, backbone="a")]).comparisons[0].pairs[0]
    assert alone.adjusted == alone.p
    among = compare([write("many", base, backbone="a", task="task1")])
    pair = next(c.pairs[0] for c in among.comparisons if c.task == "task0")
    assert pair.p == alone.p
    assert pair.adjusted == pytest.approx(min(1, 7 * pair.p))


def test_groups_seeds_and_missing_samples_choose_the_test(write):
    a, b, groups = hits(0.6, 1), hits(0.85, 2), np.repeat(np.arange(20), 10)
    report = compare([write("a", a, backbone="a", groups=groups), write("b", b, backbone="b", groups=groups)])
    pair = report.comparisons[0].pairs[0]
    assert pair.test == "permutation"
    assert pair.p == statistics.permutation_test(b - a, groups)
    for seed in (0, 1):
        folders = [write(f"s{n}", v, backbone=n, seed=seed) for n, v in (("a", a), ("b", b))]
    pair = compare(folders).comparisons[0].pairs[0]
    assert pair.test == "bootstrap"
    folders = [write(f"r{n}", v, backbone=n, samples=False) for n, v in (("a", a), ("b", b))]
    assert compare(folders).comparisons[0].pairs[0].test == "bootstrap"
    folders = [write(f"n{n}", v, backbone=n, samples=False, replicates=False) for n, v in (("a", a), ("b", b))]
    report = compare(folders)
    assert report.comparisons[0].pairs[0].p is None
    assert not report.comparisons[0].pairs[0].separable
    assert "no samples" in report.markdown()


def test_seeds_of_a_protocol_that_draws_nothing_are_one_run(write):
    plain = ProtocolRecord(id="knn-20", version=1, hash="abc", seeded=False)
    runs = [write(name, hits(0.5 + i / 4, 3), backbone=name, protocol=plain) for i, name in enumerate("ab")]
    once = compare(runs)
    for seed in (1, 2):
        write("a", hits(0.5, 3), backbone="a", protocol=plain, seed=seed)
    assert compare(runs) == once
    assert (once.comparisons[0].pairs[0].test, once.comparisons[0].scores["a"].seeds) == ("mcnemar", None)
    assert f"| {once.comparisons[0].scores['a'].value:.4f} |" in once.markdown()


def test_only_like_is_compared_with_like(write):
    a = write("a", hits(0.6, 1), backbone="a")
    write("a", hits(0.6, 1), backbone="a", task="voc")
    b = write("b", hits(0.9, 2), backbone="b", protocol=ProtocolRecord(id="linear", version=2, hash="other"))
    with pytest.raises(UsageError, match="no task in common") as told:
        compare([a, b])
    assert "nobody else by this protocol" in told.value.cause
    write("b", hits(0.6, 1), backbone="b", task="voc", status="failed", error="it broke")
    write("a", hits(0.7, 1), backbone="a", task="stl10")
    write("b", hits(0.7, 2), backbone="b", task="stl10")
    report = compare([a, b])
    assert [c.task for c in report.comparisons] == ["stl10"]
    assert "b on voc@linear-1, seed 0: it failed" in report.skipped
    assert len(report.skipped) == 4
    assert "Not compared:" in report.markdown()


def test_what_cannot_be_compared_is_refused(write, tmp_path):
    a = write("a", hits(0.6, 1), backbone="a")
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([a])
    with pytest.raises(DataError, match="not found"):
        compare([a, tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no result"):
        compare([a, tmp_path / "empty"])
    b = write("b", hits(0.6, 1), backbone="b", ids=[f"x{i}" for i in range(N)])
    with pytest.raises(DataError, match="other samples"):
        compare([a, b])
    (broken,) = b.rglob("*.npz")
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read"):
        compare([a, b])


def test_files_and_folders_of_several_backbones_are_taken(write):
    folder = write("all", hits(0.5, 1), backbone="a")
    write("all", hits(0.7, 2), backbone="b")
    write("all", hits(0.9, 3), backbone="c")
    assert list(compare([folder]).backbones) == ["a", "b", "c"]
    assert len(compare([folder]).comparisons[0].pairs) == 3
    files = sorted(folder.rglob("seed-*.json"))
    assert list(compare(files[:2]).backbones) == ["a", "b"]


def test_names_of_strangers_make_no_table_and_no_html(write):
    a = write("a", hits(0.6, 1), backbone="a|b\n<script>")
    text = compare([a, write("b", hits(0.6, 2), backbone="b")]).markdown()
    assert "<script>" not in text
    assert "a\\|b &lt;script&gt;" in text


def test_a_loss_beyond_what_is_allowed_is_a_regression(write):
    a, b = hits(0.8, 1), hits(0.8, 1)
    b[np.flatnonzero(b)[:10]] = 0  # 5 points
    report = compare([write("a", a, backbone="a"), write("b", b, backbone="b")])
    refuse_worse(report, {"cifar10": 0.051})
    with pytest.raises(RegressionError, match="worse than a") as told:
        refuse_worse(report, {"cifar10": 0.049})
    assert told.value.code == 6
    assert "b on cifar10@linear-1 by 0.0500 top1" in told.value.cause
    refuse_worse(compare([write("b", b, backbone="b"), write("a", a, backbone="a")]), {"cifar10": 0})
    with pytest.raises(UsageError, match="voc"):
        refuse_worse(report, {"voc": 0.1})


def test_where_lower_is_better_a_rise_is_the_loss(write):
    score = {name: {"top1": Score(value=v, higher_is_better=False)} for name, v in (("a", 0.1), ("b", 0.2))}
    folders = [write(n, np.full(N, v["top1"].value), backbone=n, scores=v) for n, v in score.items()]
    report = compare(folders)
    assert report.comparisons[0].groups[0] == ("a",)
    assert report.comparisons[0].pairs[0].improvement == 0
    with pytest.raises(RegressionError):
        refuse_worse(report, {"cifar10": 0.05})


def test_a_backbone_that_failed_does_not_pass_the_gate(write):
    folders = [write(n, hits(0.8, i), backbone=n) for i, n in enumerate("ab")]
    folders.append(write("c", hits(0.8, 4), backbone="c", status="failed", error="it broke"))
    with pytest.raises(UsageError, match="c was not compared with a"):
        refuse_worse(compare(folders), {"cifar10": 0.5})


# ------------------------------------------------------------------------------------------------ command line


def test_compare_on_the_command_line(write):
    a, b = write("a", hits(0.9, 1), backbone="a"), write("b", hits(0.5, 2), backbone="b")
    told = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert told.exit_code == 0
    assert told.stdout.startswith("- **a**")
    told = CliRunner().invoke(app, ["compare", str(a), str(b), "--json"])
    assert json.loads(told.stdout)["comparisons"][0]["task"] == "cifar10"
    told = CliRunner().invoke(app, ["compare", str(a), str(b), "--fail-if-worse", "cifar10:0.1"])
    assert isinstance(told.exception, RegressionError)
    for limit in ("cifar10", "cifar10:much", ":0.1", "cifar10:-1", "cifar10:nan"):
        told = CliRunner().invoke(app, ["compare", str(a), str(b), "--fail-if-worse", limit])
        assert isinstance(told.exception, UsageError), limit


class Grey:
    """Two images."""

    fingerprint, split, ids, labels = "grey", "train", ("a", "b"), None

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full((160, 160, 3), 90 + index, dtype=np.uint8)


def test_the_cache_on_the_command_line(tmp_path, monkeypatch, registry):
    from evalsuite.backbone import build

    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path))
    assert CliRunner().invoke(app, ["cache", "ls"]).stdout.strip() == "nothing"
    Cache().features(build("timm:test_resnet", registry), Grey(), ("pooled", "map32"))
    entries = json.loads(CliRunner().invoke(app, ["cache", "ls", "--json"]).stdout)
    assert len(entries) == 2
    listed = CliRunner().invoke(app, ["cache", "ls"]).stdout
    assert all(e["digest"][:12] in listed for e in entries)
    assert "2 x " in listed
    assert CliRunner().invoke(app, ["cache", "verify"]).exit_code == 0
    first = entries[0]["digest"]
    (path,) = tmp_path.rglob(f"{first}/features.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    told = CliRunner().invoke(app, ["cache", "verify", "--json"])
    assert told.exit_code == 3
    assert first in told.stdout
    assert "removed 1 entries" in CliRunner().invoke(app, ["cache", "rm", first[:12]]).stdout
    assert isinstance(CliRunner().invoke(app, ["cache", "rm", first[:12]]).exception, UsageError)
    assert "removed 0 entries" in CliRunner().invoke(app, ["cache", "gc", "--max-size", "1GB"]).stdout
    assert "removed 1 entries" in CliRunner().invoke(app, ["cache", "gc", "--max-size", "0"]).stdout
    for size in ("much", "-1GB", "1x", ""):
        assert isinstance(CliRunner().invoke(app, ["cache", "gc", "--max-size", size]).exception, UsageError), size
