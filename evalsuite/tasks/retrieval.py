"""Retrieval of radiographs that show a finding, asked for by an image or by a sentence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from evalsuite.backbone import Backbone
from evalsuite.data import source
from evalsuite.data.chexpert import Chexpert8x200
from evalsuite.data.classification import ClassificationSet
from evalsuite.data.digests import fingerprint
from evalsuite.errors import BackboneError
from evalsuite.features import Encoded, Output, Preprocess
from evalsuite.metrics.retrieval import Retrieved, retrieve
from evalsuite.probing import on_readable, refuse_known
from evalsuite.statistics import REPLICATES, weight_blocks
from evalsuite.task import Metric, Outcome, Protocol, Setup, Task

__all__ = ["ChexpertRetrieval", "RetrievalProtocol"]

KS = (5, 10, 50, 100)
_TEXTS = 64  # sentences read at once

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RetrievalProtocol(Protocol):
    """Candidates ranked by the cosine of their features to a query's.

    ``output`` is what is read off the network for images (:class:`evalsuite.features.Output`); a sentence is compared
    with ``joint``, the space it shares with images. ``exclude_patients``: a query does not retrieve images of its own
    patient. ``rule``, ``ratio`` and ``interpolation`` say how an image becomes the network's input.
    """

    query: Literal["image", "text"]
    output: str = "pooled"
    exclude_patients: bool = False
    rule: Literal["crop", "squash", "pad"] = "pad"
    ratio: float = 224 / 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @property
    def seeded(self) -> bool:
        return False  # nothing is drawn


class ChexpertRetrieval(Task):
    """CheXpert 8x200 (ConVIRT): precision among the first k of 1600 candidates, 200 of each of eight findings.

    A candidate is a hit if it shows the finding that the query stands for; chance is 0.125. ``image`` (default) asks
    by 80 images with any backbone, by its pooled features; ``image-joint`` does in the space shared with text.
    ``text`` asks by 40 sentences, and needs a backbone that gives ``joint`` and reads text. Six patients are among
    both queries and candidates, as published; ``--set exclude_patients=true`` keeps a query from its own.
    """

    name = "chexpert-retrieval"
    metrics = (*(Metric(f"precision@{k}") for k in KS), Metric("map"))
    primary = "precision@10"
    needs = frozenset({"pooled"})
    protocols = (
        RetrievalProtocol(id="image", version=1, query="image"),
        RetrievalProtocol(id="image-joint", version=1, query="image", output="joint"),
        RetrievalProtocol(id="text", version=1, query="text", output="joint"),
    )

    def requires(self, protocol: Protocol) -> frozenset[str]:
        recipe = _recipe(protocol)
        return Output.parse(recipe.output).needs | ({"text"} if recipe.query == "text" else set())

    def fingerprint(self, setup: Setup) -> str:
        candidates, queries, (findings, sentences) = self._read(setup)
        refuse_known(setup, candidates, *(() if queries is None else (queries,)))
        asked = hashlib.sha256("\0".join([*map(str, findings.tolist()), *sentences]).encode()).hexdigest()
        return fingerprint(candidates.digest, asked if queries is None else queries.digest)

    def run(self, backbone: Backbone, setup: Setup) -> Outcome:
        candidates, queries, sentences = self._read(setup)
        if queries is None:
            return on_readable(lambda found: self._by_text(backbone, found, sentences, setup), setup, candidates)
        return on_readable(
            lambda found, asked: self._by_image(backbone, found, asked, setup), setup, candidates, queries
        )

    def _read(
        self, setup: Setup
    ) -> tuple[ClassificationSet, ClassificationSet | None, tuple[npt.NDArray[np.int64], list[str]]]:
        """Candidates, and queries by image or by sentence."""
        layout = source(setup.registry, self.name)
        assert isinstance(layout, Chexpert8x200)
        path = layout.locate(setup.data_root)
        candidates = layout.load(path, "candidates").limit(setup.limit)
        if _recipe(setup.protocol).query == "image":
            return candidates, layout.load(path, "queries").limit(setup.limit), (np.zeros(0, np.int64), [])
        findings, sentences = layout.sentences(path)
        return candidates, None, (findings, sentences)

    def _by_image(
        self, backbone: Backbone, candidates: ClassificationSet, queries: ClassificationSet, setup: Setup
    ) -> Outcome:
        recipe, began = _recipe(setup.protocol), monotonic()
        bank, asked = (_encode(backbone, part, setup) for part in (candidates, queries))
        encoded = monotonic()
        apart = recipe.exclude_patients
        found = retrieve(
            asked.arrays[recipe.output], bank.arrays[recipe.output], queries.labels, candidates.labels, KS,
            query_groups=queries.groups if apart else None, candidate_groups=candidates.groups if apart else None,
            device=setup.device,
        )  # fmt: skip
        assert queries.groups is not None
        assert candidates.groups is not None
        shared = len(set(queries.groups.tolist()) & set(candidates.groups.tolist()))
        told = [f"{shared} patients are among both queries and candidates"] if shared and not apart else []
        return self._outcome(
            found, queries.labels, candidates, setup, ids=queries.ids, groups=queries.groups,
            queries={"queries": len(queries), **{f"queries_{why}": n for why, n in queries.left_out.items()}},
            timings={"encode": encoded - began, "score": monotonic() - encoded},
            encoded=bank.encoded + asked.encoded, warnings=(*told, *_notes(candidates), *_notes(queries)),
        )  # fmt: skip

    def _by_text(
        self,
        backbone: Backbone,
        candidates: ClassificationSet,
        sentences: tuple[npt.NDArray[np.int64], list[str]],
        setup: Setup,
    ) -> Outcome:
        began = monotonic()
        findings, texts = sentences
        bank = _encode(backbone, candidates, setup)
        asked = _read_texts(backbone.to(setup.device), texts)
        encoded = monotonic()
        found = retrieve(asked, bank.arrays[_recipe(setup.protocol).output], findings, candidates.labels, KS,
                         device=setup.device)  # fmt: skip
        return self._outcome(
            found, findings, candidates, setup, ids=[f"{i:03d} {text}" for i, text in enumerate(texts)], groups=None,
            queries={"queries": len(texts)}, timings={"encode": encoded - began, "score": monotonic() - encoded},
            encoded=bank.encoded, warnings=_notes(candidates),
        )  # fmt: skip

    def _outcome(
        self,
        found: Retrieved,
        findings: npt.NDArray[np.int64],
        candidates: ClassificationSet,
        setup: Setup,
        *,
        ids: Sequence[str],
        groups: npt.NDArray[np.str_] | None,
        queries: dict[str, int],
        timings: dict[str, float],
        encoded: int,
        warnings: tuple[str, ...],
    ) -> Outcome:
        table: dict[str, Floats] = {f"precision@{k}": found.precision[k] for k in KS} | {"map": found.ap}
        samples: dict[str, npt.NDArray[Any]] = {
            name: v.astype(np.float32) for name, v in table.items() if np.isfinite(v).all()
        }
        if groups is not None:
            samples["group"] = np.unique(groups, return_inverse=True)[1]
        scores, replicates = _resampled(table, groups)
        left_out = {f"candidates_{why}": n for why, n in candidates.left_out.items()}
        return Outcome(
            scores=scores, replicates=replicates, samples=samples, ids=ids, timings=timings, warnings=warnings,
            data={"fingerprint": self.fingerprint(setup), "candidates": len(candidates), **left_out, **queries},
            details={"encoded": encoded, "precision@10_by_finding": _by_finding(found, findings, candidates.classes)},
        )  # fmt: skip


def _recipe(protocol: Protocol) -> RetrievalProtocol:
    assert isinstance(protocol, RetrievalProtocol)
    return protocol


def _encode(backbone: Backbone, data: ClassificationSet, setup: Setup) -> Encoded:
    recipe = _recipe(setup.protocol)
    height, width = backbone.spec.image_size
    return setup.cache.features(
        backbone, data, (recipe.output,), device=setup.device, precision=setup.precision, workers=setup.encode_workers,
        preprocess=Preprocess((height, width), recipe.rule, recipe.ratio, recipe.interpolation),
        channels_last=setup.channels_last, pin_memory=setup.pin_memory, progress=setup.progress,
    )  # fmt: skip


def _read_texts(backbone: Backbone, texts: Sequence[str]) -> torch.Tensor:
    """(Q, E) vectors of sentences, on the CPU. Raises :class:`BackboneError` for what is none."""
    with torch.inference_mode():
        parts = [backbone.encode_text(texts[at : at + _TEXTS]) for at in range(0, len(texts), _TEXTS)]
    found = torch.cat(parts).float().cpu()
    if found.ndim != 2 or len(found) != len(texts) or not torch.isfinite(found).all():
        raise BackboneError(
            f"{backbone.spec.arch} gave {tuple(found.shape)} for {len(texts)} sentences",
            cause="one finite vector a sentence was expected",
            fix="correct what reads text in the backbone",
        )
    return found


def _resampled(
    table: dict[str, Floats], groups: npt.NDArray[np.str_] | None
) -> tuple[dict[str, float | None], dict[str, Floats]]:
    """Means over the queries on which each is defined, and their bootstrap replicates: of patients, or of queries."""
    defined = {name: np.isfinite(values) for name, values in table.items()}
    scores = {n: float(v[defined[n]].mean()) if defined[n].any() else None for n, v in table.items()}
    parts: dict[str, list[Floats]] = {name: [] for name, score in scores.items() if score is not None}
    for block in weight_blocks(len(next(iter(table.values()))), REPLICATES, 0, groups):
        for name, part in parts.items():
            weights = block[:, defined[name]].astype(np.float64)
            with np.errstate(invalid="ignore"):  # a resample without a query on which it is defined
                part.append(weights @ table[name][defined[name]] / weights.sum(axis=1))
    return scores, {name: np.concatenate(part) for name, part in parts.items()}


def _by_finding(found: Retrieved, findings: npt.NDArray[np.int64], classes: Sequence[str]) -> dict[str, float]:
    return {
        name: float(found.precision[10][findings == i].mean())
        for i, name in enumerate(classes)
        if (findings == i).any()
    }


def _notes(data: ClassificationSet) -> tuple[str, ...]:
    return tuple(f"{data.split}: {note}" for note in data.notes)
