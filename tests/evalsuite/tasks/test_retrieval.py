"""Retrieval end to end: oracles of image and text at the top, a collapsed backbone at chance, and who is refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.data.chexpert import RETRIEVED, Chexpert8x200
from evalsuite.data.classification import Arrays, ClassificationSet
from evalsuite.errors import BackboneError, DataError
from evalsuite.features import Output, Texts
from evalsuite.hooks import Registry
from evalsuite.progress import Progress
from evalsuite.results import Result, read_all
from evalsuite.runner import run
from evalsuite.task import Metric, Setup, evaluate
from evalsuite.tasks.retrieval import Retrieval, RetrievalProtocol, same


class Towers(nn.Module):
    """An image's finding is its grey level, and a sentence's the one it names; vectors are one-hot.

    ``shifted`` reads every sentence as the next finding, ``collapsed`` gives the same vector for every image.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("name", torch.tensor([float(ord(kind[0])), float(len(kind))]))

    def forward(self, x: Tensor) -> Features:
        level = (x.mean((1, 2, 3)) * 8).long().clamp(0, 7)
        seen = torch.ones(len(x), 8) if self.kind == "collapsed" else torch.eye(8)[level]
        return Features(seen, joint=seen if self.kind != "eye" else None)


def read(net: nn.Module, texts: Sequence[str]) -> Tensor:
    if net.kind == "mute":
        return torch.full((len(texts), 8), float("nan"))
    found = [next(i for i, name in enumerate(RETRIEVED) if name.lower() in text.lower()) for text in texts]
    return torch.eye(8)[(torch.tensor(found) + (net.kind == "shifted")) % 8]


def towers(name: str) -> Backbone:
    gives = frozenset({"pooled"} if name == "eye" else {"pooled", "joint"})
    spec = BackboneSpec(f"towers:{name}", 8, {}, gives, image_size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Backbone(Towers(name), spec, read=None if name == "eye" else read)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ask(registry, monkeypatch, tmp_path) -> Callable[..., Result]:
    module = types.ModuleType("towers_of_the_test")
    module.towers = towers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "towers_of_the_test", module)
    shelf = Registry()
    for entry in registry.entries():
        getattr(shelf, entry.shelf)(entry.name, entry.target, entry.summary)
    shelf.backbone("towers", "towers_of_the_test:towers")

    def ask(backbone: str, root: Path | None, protocol: str = "image", **flags: Any) -> Result:
        given = {"out": tmp_path / "out", "data_root": root, **flags}
        (result,) = run(f"random:towers:{backbone}", "chexpert-retrieval", registry=shelf, protocol=protocol, **given)
        return result

    return ask


@pytest.fixture
def world(tmp_path) -> Path:
    """The demo world's lists; an image is a square at the level of its finding, so that the towers see it."""
    path = Chexpert8x200().demo(tmp_path / "data", images=64)
    for split in ("candidates", "queries"):
        part = Chexpert8x200().load(path, split)
        labels = part.labels if split == "queries" else part.labels.argmax(axis=1)
        for place, label in zip(part.places.tolist(), labels.tolist(), strict=True):
            Image.new("L", (16, 16), 16 + 32 * label).save(part.pixels.path(place))
    return tmp_path / "data"


def values(result: Result) -> dict[str, float | None]:
    assert result.error is None
    return {name: score.value for name, score in result.scores.items()}


def test_an_oracle_finds_all_and_a_collapsed_backbone_what_chance_finds(ask, world):
    # 64 candidates, 8 of each finding.
    best = {"precision@5": 1.0, "precision@10": 0.8, "precision@50": 0.16, "precision@100": 0.08, "map": 1.0}
    for protocol in ("image", "image-joint", "text"):
        assert values(ask("oracle", world, protocol)) == pytest.approx(best)
        chance = values(ask("collapsed", world, protocol))
        assert chance == pytest.approx({**dict.fromkeys(best, 1 / 8), "precision@100": 0.08})
    assert values(ask("shifted", world, "text"))["precision@5"] == 0
    assert values(ask("eye", world)) == pytest.approx(best)


def test_what_is_kept_of_queries(ask, world, tmp_path):
    result = ask("oracle", world)
    (path,) = (p for p, r in read_all(tmp_path / "out") if r == result)
    with np.load(path.with_name(result.files["samples"])) as kept:
        assert kept["samples/precision@10"].shape == (16,)
        assert kept["samples/group"].shape == (16,)
        assert kept["replicates/map"].shape == (1000,)
        assert kept["ids"][0].startswith("train/patient90016")
    assert result.primary == "precision@10"
    assert (result.data["queries"], result.data["candidates"]) == (16, 64)
    assert result.details["precision@10_by_finding"] == dict.fromkeys(RETRIEVED, pytest.approx(0.8))
    assert ask("oracle", world, "image-joint").details["encoded"] == 80
    again = ask("oracle", world, "text")
    assert again.details["encoded"] == 16  # the sentences; the candidates are in the cache
    assert ask("oracle", world, "text", out=tmp_path / "other").details["encoded"] == 0  # and now all are
    assert again.data["queries"] == 16


def test_patients_on_both_sides_are_told_or_left_out(ask, world):
    told = ask("oracle", world)
    assert "3 patients are among both queries and candidates" in told.warnings
    apart = ask("oracle", world, settings={"exclude_patients": "true"})
    assert apart.warnings == ()
    # Three queries may not find their own patient's image of the same finding: seven are left of eight.
    assert apart.scores["precision@10"].value == pytest.approx((13 * 0.8 + 3 * 0.7) / 16)
    assert apart.protocol.modified == ("exclude_patients",)


def test_a_backbone_without_a_text_tower_is_refused_in_words(ask, world):
    with pytest.raises(BackboneError) as told:
        ask("eye", world, "text")
    assert "needs joint, which towers:eye does not give, and text, which it does not take" in told.value.problem
    assert told.value.fix == "--protocol image"
    with pytest.raises(BackboneError, match="needs joint"):
        ask("eye", world, "image-joint")
    with pytest.raises(BackboneError, match="does not take text"):
        towers("eye").encode_text(["a nodule"])
    assert towers("oracle").gives == {"pooled", "joint"}
    assert towers("oracle").takes == {"image", "text"}
    assert Output.parse("joint").read(Features(joint=torch.eye(3)), {}).shape == (3, 3)
    result = ask("mute", world, "text")
    assert (result.status, result.error_code) == ("failed", 4)
    assert "features of 'joint' are not finite" in result.error


def test_unreadable_candidates_are_counted_or_refused(ask, world, tmp_path):
    part = Chexpert8x200().load(Chexpert8x200().locate(world), "candidates")
    part.pixels.path(5).write_bytes(b"broken")
    part.pixels.path(6).unlink()
    refused = ask("oracle", world, strict=True, out=tmp_path / "strict")
    assert (refused.status, refused.error_code) == ("failed", 3)
    result = ask("oracle", world)
    assert result.data["candidates_unreadable"] == 2
    assert result.data["candidates"] == 62
    assert result.scores["precision@5"].value == 1.0
    assert any(w.startswith("candidates: 2 images cannot be read") for w in result.warnings)
    with pytest.raises(DataError, match="2 of 64 images cannot be read"):
        ask("oracle", world, "text", strict=True, out=tmp_path / "strict")


def test_a_demo_runs_and_is_marked(ask):
    result = ask("oracle", None, demo=True)
    assert result.error is None
    assert result.demo
    assert not result.ranked


# --- the base, of anybody's data


class Greys(Retrieval):
    """Which image has the query's grey, asked by an image among the candidates themselves, or by a text?"""

    name = "greys"
    ks = (1, 3)
    metrics = (Metric("precision@1"), Metric("recall@3"), Metric("hit@3"), Metric("map"))
    protocols = (
        RetrievalProtocol(id="image", version=1, query="image"),
        RetrievalProtocol(id="text", version=1, query="text", output="joint"),
    )

    def sets(self, setup):
        levels = np.arange(12) % 4
        images = np.broadcast_to((16 + 32 * levels)[:, None, None, None], (12, 8, 8, 3)).astype(np.uint8)
        pixels = Arrays(12, lambda: images, "greys")
        names = np.array([f"im{i}" for i in range(12)])
        gallery = ClassificationSet("greys", "all", tuple("abcd"), names, levels, pixels, np.arange(12))
        if setup.protocol.query == "image":
            return gallery, gallery
        return gallery, Texts([RETRIEVED[level] for level in range(4)], np.arange(4))

    def relevance(self, queries, candidates):
        return same(queries.labels, candidates.labels)

    def left_out(self, queries, candidates, protocol):
        return same(queries.ids, candidates.ids) if protocol.query == "image" else None


def test_a_task_of_ones_own_says_where_the_data_are_and_what_is_relevant(registry, tmp_path):
    def scores(backbone: str, protocol: str) -> dict[str, float | None]:
        recipe = Greys().protocol(protocol)
        (tmp_path / "work").mkdir(exist_ok=True)
        return dict(
            evaluate(Greys(), towers(backbone), Setup(recipe, tmp_path / "work", registry, Progress(quiet=True))).scores
        )

    # of twelve images three have each grey; an image does not find itself
    assert scores("oracle", "image") == pytest.approx({"precision@1": 1, "recall@3": 1, "hit@3": 1, "map": 1})
    assert scores("oracle", "text") == pytest.approx({"precision@1": 1, "recall@3": 1, "hit@3": 1, "map": 1})
    # a text that is read as the next grey finds none of its own, and of a grey that no image has, any
    assert scores("shifted", "text")["precision@1"] == pytest.approx(3 / 12 / 4)
    assert scores("collapsed", "image")["precision@1"] == pytest.approx(2 / 11)
    assert scores("collapsed", "text")["precision@1"] == pytest.approx(3 / 12)
