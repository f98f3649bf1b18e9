"""Retrieval by the cosine of features: of anybody's images by images or texts, and of radiographs that show a
finding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from evalsuite.backbone import Backbone
from evalsuite.data import source
from evalsuite.data.chexpert import Chexpert8x200
from evalsuite.data.classification import ClassificationSet
from evalsuite.data.digests import fingerprint
from evalsuite.features import Encoded, Output, Preprocess, Texts
from evalsuite.metrics.retrieval import Retrieved, rank, relevance
from evalsuite.probing import on_readable, refuse_known
from evalsuite.statistics import REPLICATES, weight_blocks
from evalsuite.task import Metric, Outcome, Protocol, Setup, Task

__all__ = ["ChexpertProtocol", "ChexpertRetrieval", "Queries", "Retrieval", "RetrievalProtocol", "same"]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Queries = ClassificationSet | Texts


@dataclass(frozen=True, kw_only=True)
class RetrievalProtocol(Protocol):
    """Candidates ranked by the cosine of their features to a query's.

    ``output`` is what is read off the network for both (:class:`evalsuite.features.Output`); a text is compared in
    ``joint``, the space it shares with images. ``rule``, ``ratio`` and ``interpolation`` say how an image becomes the
    network's input.
    """

    query: Literal["image", "text"]
    output: str = "pooled"
    rule: Literal["crop", "squash", "pad"] = "pad"
    ratio: float = 224 / 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @property
    def seeded(self) -> bool:
        return False  # nothing is drawn


class Retrieval(Task[RetrievalProtocol]):
    """Queries, images or texts, that ask for candidates; how many of the first k are relevant.

    Subclasses say where both are (:meth:`sets`) and which candidates are relevant to which queries
    (:meth:`relevance`), and name the ``metrics`` that count: ``precision@k``, ``recall@k`` and ``hit@k`` of ``ks``, and
    ``map`` (:class:`evalsuite.metrics.retrieval.Retrieved`).
    """

    ks: ClassVar[tuple[int, ...]] = (1, 5, 10)
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("precision@1"), Metric("precision@5"), Metric("precision@10"),
        Metric("recall@1"), Metric("recall@5"), Metric("recall@10"), Metric("map"),
    )  # fmt: skip
    primary = "map"
    needs = frozenset({"pooled"})
    protocols: ClassVar[tuple[Protocol, ...]] = (RetrievalProtocol(id="image", version=1, query="image"),)

    @abstractmethod
    def sets(self, setup: Setup[RetrievalProtocol]) -> tuple[ClassificationSet, Queries]:
        """Candidates, and queries by image or by text, as the protocol has them."""

    @abstractmethod
    def relevance(self, queries: Queries, candidates: ClassificationSet) -> Bools:
        """(Q, N): which candidates answer which query."""

    def left_out(self, queries: Queries, candidates: ClassificationSet, protocol: RetrievalProtocol) -> Bools | None:
        """(Q, N): candidates that a query may not retrieve, itself or those of its patient (:func:`same`); None: all
        may."""
        return None

    def notes(self, queries: Queries, candidates: ClassificationSet, protocol: RetrievalProtocol) -> tuple[str, ...]:
        """Warnings of what the sets have in common."""
        return ()

    def details(self, retrieved: Retrieved, queries: Queries, candidates: ClassificationSet) -> dict[str, Any]:
        """What to tell beside the metrics."""
        return {}

    def requires(self, protocol: RetrievalProtocol) -> frozenset[str]:
        return Output.parse(protocol.output).needs | ({"text"} if protocol.query == "text" else set())

    def fingerprint(self, setup: Setup[RetrievalProtocol]) -> str:
        candidates, queries = self.sets(setup)
        refuse_known(setup, candidates, *([] if isinstance(queries, Texts) else [queries]))
        return fingerprint(candidates.digest, queries.digest)

    def run(self, backbone: Backbone, setup: Setup[RetrievalProtocol]) -> Outcome:
        candidates, queries = self.sets(setup)
        if isinstance(queries, Texts):
            return on_readable(lambda bank: self._search(backbone, queries, bank, setup), setup, candidates)
        return on_readable(lambda bank, asked: self._search(backbone, asked, bank, setup), setup, candidates, queries)

    def _search(
        self, backbone: Backbone, queries: Queries, candidates: ClassificationSet, setup: Setup[RetrievalProtocol]
    ) -> Outcome:
        protocol, began = setup.protocol, monotonic()
        output = protocol.output
        bank, points = (_encode(backbone, part, setup) for part in (candidates, queries))
        encoded = monotonic()
        retrieved = rank(
            points.arrays[output], bank.arrays[output], self.relevance(queries, candidates), self.ks,
            excluded=self.left_out(queries, candidates, protocol), device=setup.device,
        )  # fmt: skip
        measured = retrieved.table()
        table = {metric.name: measured[metric.name] for metric in self.metrics}
        samples: dict[str, npt.NDArray[Any]] = {
            name: values.astype(np.float32) for name, values in table.items() if np.isfinite(values).all()
        }
        if queries.groups is not None:
            samples["group"] = np.unique(queries.groups, return_inverse=True)[1]
        scores, replicates = _resampled(table, queries.groups)
        split_notes = (f"{part.split}: {note}" for part in (candidates, queries) for note in part.notes)
        return Outcome(
            scores=scores, replicates=replicates, samples=samples, ids=queries.ids,
            timings={"encode": encoded - began, "score": monotonic() - encoded},
            warnings=(*self.notes(queries, candidates, protocol), *split_notes),
            data={
                "fingerprint": self.fingerprint(setup), **_counted("candidates", candidates),
                **_counted("queries", queries),
            },
            details={
                "encoded": bank.encoded + points.encoded, **self.details(retrieved, queries, candidates),
            },
        )  # fmt: skip


def same(of_queries: Sequence[str] | npt.NDArray[Any], of_candidates: Sequence[str] | npt.NDArray[Any]) -> Bools:
    """(Q, N): where a candidate's group, or its id, is the query's."""
    equal: Bools = np.asarray(of_queries)[:, None] == np.asarray(of_candidates)[None]
    return equal


@dataclass(frozen=True, kw_only=True)
class ChexpertProtocol(RetrievalProtocol):
    """``exclude_patients``: a query does not retrieve images of its own patient."""

    exclude_patients: bool = False


class ChexpertRetrieval(Retrieval):
    """CheXpert 8x200 (ConVIRT): precision among the first k of 1600 candidates, 200 of each of eight findings.

    A candidate is a hit if it shows the finding that the query stands for; chance is 0.125. ``image`` (default) asks
    by 80 images with any backbone, by its pooled features; ``image-joint`` does in the space shared with text.
    ``text`` asks by 40 sentences, and needs a backbone that gives ``joint`` and takes text. Six patients are among
    both queries and candidates, as published; ``--set exclude_patients=true`` keeps a query from its own.
    """

    name = "chexpert-retrieval"
    ks = (5, 10, 50, 100)
    metrics = (*(Metric(f"precision@{k}") for k in (5, 10, 50, 100)), Metric("map"))
    primary = "precision@10"
    protocols = (
        ChexpertProtocol(id="image", version=1, query="image"),
        ChexpertProtocol(id="image-joint", version=1, query="image", output="joint"),
        ChexpertProtocol(id="text", version=1, query="text", output="joint"),
    )

    def sets(self, setup: Setup[RetrievalProtocol]) -> tuple[ClassificationSet, Queries]:
        layout = source(setup.registry, self.name)
        assert isinstance(layout, Chexpert8x200)
        path = layout.locate(setup.data_root)
        candidates = layout.load(path, "candidates").limit(setup.limit)
        if setup.protocol.query == "image":
            return candidates, layout.load(path, "queries").limit(setup.limit)
        findings, sentences = layout.sentences(path)
        return candidates, Texts(sentences, findings, "queries")

    def relevance(self, queries: Queries, candidates: ClassificationSet) -> Bools:
        assert queries.labels is not None
        return relevance(queries.labels, candidates.labels)

    def left_out(self, queries: Queries, candidates: ClassificationSet, protocol: RetrievalProtocol) -> Bools | None:
        assert isinstance(protocol, ChexpertProtocol)
        of_queries, of_candidates = queries.groups, candidates.groups
        if not protocol.exclude_patients or of_queries is None or of_candidates is None:
            return None  # a sentence is of no patient
        return same(of_queries, of_candidates)

    def notes(self, queries: Queries, candidates: ClassificationSet, protocol: RetrievalProtocol) -> tuple[str, ...]:
        assert isinstance(protocol, ChexpertProtocol)
        patients = [set() if part.groups is None else set(part.groups.tolist()) for part in (queries, candidates)]
        shared = len(patients[0] & patients[1])
        if not shared or protocol.exclude_patients:
            return ()
        return (f"{shared} patients are among both queries and candidates",)

    def details(self, retrieved: Retrieved, queries: Queries, candidates: ClassificationSet) -> dict[str, Any]:
        assert queries.labels is not None
        by_finding = {
            name: float(retrieved.precision[10][queries.labels == i].mean())
            for i, name in enumerate(candidates.classes)
            if (queries.labels == i).any()
        }
        return {"precision@10_by_finding": by_finding}


def _encode(backbone: Backbone, data: Queries, setup: Setup[RetrievalProtocol]) -> Encoded:
    recipe = setup.protocol
    height, width = backbone.spec.image_size
    return setup.cache.features(
        backbone, data, (recipe.output,), device=setup.device, precision=setup.precision, workers=setup.encode_workers,
        preprocess=Preprocess((height, width), recipe.rule, recipe.ratio, recipe.interpolation),
        channels_last=setup.channels_last, pin_memory=setup.pin_memory, progress=setup.progress,
    )  # fmt: skip


def _counted(what: str, part: Queries) -> dict[str, int]:
    return {what: len(part), **{f"{what}_{why}": count for why, count in part.left_out.items()}}


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
