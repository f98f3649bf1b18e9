"""One self-contained page of all results below a folder, for people: it loads nothing, and prints."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image
from sklearn.metrics import precision_recall_curve

from evalsuite.board.charts import bars, lines, matrix, whisker
from evalsuite.board.pages import environment, frame
from evalsuite.errors import DataError
from evalsuite.files import write_text
from evalsuite.results import Result, Score, arrays, read_all

__all__ = ["report"]

WIDEST = 1200  # pixels of a picture
HEAVIEST = 600_000  # bytes of a picture in the page
CLASSES = 40  # a confusion matrix has at most
CURVES = 6  # precision-recall curves in one plot
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _Picture:
    name: str
    source: str
    note: str


@dataclass(frozen=True)
class _Cell:
    """A result with what is drawn of it."""

    result: Result
    anchor: str
    main: Score | None
    bar: Markup
    notes: list[str]
    plots: list[Markup]
    by_class: list[tuple[str, Markup]]
    matrix: Markup | None
    pictures: list[_Picture]


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write ``report.html`` of the results below ``folder`` (there, or to ``out``) and return its path.

    Raises :class:`DataError` where there is no result.
    """
    folder = Path(folder)
    found = list(read_all(folder)) if folder.is_dir() else []
    if not found:
        raise DataError(
            f"{folder} holds no result", cause="there is no seed-*.json below it", fix="give the --out of evalsuite run"
        )
    cells = [_cell(number, path, result) for number, (path, result) in enumerate(found)]
    backbones = {r.backbone.identity: r.backbone for _, r in found}
    environments = {json.dumps(r.environment, sort_keys=True): r.environment for _, r in found}
    pages = environment()
    pages.filters["number"] = lambda value: f"{value:.4g}" if isinstance(value, float) else value
    page = pages.get_template("report.html.j2").render(
        title=f"Results in {folder.resolve().name}", cells=cells, backbones=list(backbones.values()),
        environments=list(environments.values()), **frame(),
    )  # fmt: skip
    out = Path(out) if out is not None else folder / "report.html"
    write_text(out, page)
    return out


def _cell(number: int, path: Path, result: Result) -> _Cell:
    main = result.scores.get(result.primary)
    main = main if main is not None and main.value is not None else None
    predictions = arrays(path, result, "predictions")
    return _Cell(
        result=result,
        anchor=f"result-{number}",
        main=main,
        bar=Markup("") if main is None or main.value is None else whisker(main.value, main.low, main.high, (0.0, 1.0)),
        notes=[*_marks(result), *result.warnings],
        plots=[plot for plot in _plots(result, predictions) if plot],
        by_class=list(_by_class(result)),
        matrix=_confusion(predictions),
        pictures=list(_pictures(path, result)),
    )


def _marks(result: Result) -> Iterator[str]:
    """What keeps a result from being compared."""
    if result.demo:
        yield "A generated demo world: the numbers say that the machinery works, and nothing of the backbone."
    if result.limited is not None:
        yield f"Limited to {result.limited} images a split."
    if result.protocol.modified:
        yield f"The protocol was modified: {', '.join(result.protocol.modified)}."
    if result.partial or result.trusted:
        yield (
            "The checkpoint loaded in part." if result.partial else "The checkpoint was trusted without being checked."
        )


# --- plots ------------------------------------------------------------------------------------------------------


def _plots(result: Result, predictions: Arrays) -> Iterator[Markup]:
    details = result.details
    yield from _sweep(result)
    if isinstance(log := details.get("log"), list):
        names = sorted({name for row in log for name in row if "loss" in name})
        series = {n: [(row["step"], row[n]) for row in log if n in row and "step" in row] for n in names}
        yield lines("training loss", "step", series)
    if isinstance(curve := details.get("curve"), list):
        yield lines("success on the way", "step", {"success": [(p["steps"], p["success"]) for p in curve]})
    for name in ("precision_by_recall", "mask_precision_by_recall"):
        if isinstance(found := details.get(name), dict):
            series = {f"IoU {iou}": [(0.01 * i, y) for i, y in enumerate(ys)] for iou, ys in found.items()}
            yield lines(f"{'masks' if name.startswith('mask') else 'boxes'}: precision over recall", "recall", series)
    yield _precision_recall(predictions)


def _sweep(result: Result) -> Iterator[Markup]:
    """The validation score over each hyper-parameter that took several values, the other ones as they were chosen."""
    rows = result.details.get("validation")
    if not isinstance(rows, list):
        return
    names = sorted({name for row in rows for name in row if name != "score"})
    for name in names:
        others = {n: result.selected[n] for n in names if n != name and n in result.selected}
        points = sorted(
            (float(row[name]), float(row["score"]))
            for row in rows
            if isinstance(row.get(name), int | float) and row.get("score") is not None
            and all(row.get(n) == value for n, value in others.items())
        )  # fmt: skip
        chosen = result.selected.get(name)
        wide = len(points) > 1 and points[0][0] > 0 and points[-1][0] / points[0][0] > 20
        yield lines(
            f"validation score over {name}, the choice dashed", name, {"score": points}, logarithmic=wide,
            chosen=float(chosen) if isinstance(chosen, int | float) else None,
        )  # fmt: skip


def _precision_recall(predictions: Arrays) -> Markup:
    """Of several labels, or of two classes: those with the most positives."""
    if not {"labels", "scores", "classes", "names"} <= set(predictions):
        return Markup("")
    labels, scores, names = predictions["labels"], predictions["scores"], predictions["names"]
    if labels.ndim == 1 and scores.shape[1] == 2 and len(names) == 2:
        positive = np.take_along_axis(scores, np.argsort(predictions["classes"], axis=1), axis=1)[:, 1]
        known = {str(names[1]): (labels == 1, positive)}
    elif labels.ndim == 2 and scores.shape == labels.shape:
        order = np.argsort(-(labels == 1).sum(axis=0), kind="stable")[:CURVES]
        known = {str(names[c]): (labels[labels[:, c] >= 0, c] == 1, scores[labels[:, c] >= 0, c]) for c in order}
    else:
        return Markup("")
    series = {}
    for name, (truth, score) in known.items():
        if truth.any() and np.isfinite(score).all():
            precision, recall, _ = precision_recall_curve(truth, score)
            keep = np.unique(np.linspace(0, len(recall) - 1, 200).astype(int))
            series[name] = [(float(recall[i]), float(precision[i])) for i in keep]
    return lines("precision over recall", "recall", series)


def _by_class(result: Result) -> Iterator[tuple[str, Markup]]:
    for name, values in result.details.items():
        if name.endswith(("_by_class", "_by_variant")) and isinstance(values, dict):
            shares = {str(k): v for k, v in values.items() if v is None or isinstance(v, int | float)}
            if shares and all(v is None or 0 <= v <= 1 for v in shares.values()):
                yield name.replace("_", " "), bars(shares)


def _confusion(predictions: Arrays) -> Markup | None:
    if not {"labels", "classes", "names"} <= set(predictions) or predictions["labels"].ndim != 1:
        return None
    names = [str(name) for name in predictions["names"]]
    if len(names) > CLASSES:
        return None
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (predictions["labels"], predictions["classes"][:, 0]), 1)
    return matrix(counts, names)


# --- files beside a cell ----------------------------------------------------------------------------------------


def _pictures(path: Path, result: Result) -> Iterator[_Picture]:
    for name, file in result.files.items():
        suffix = Path(file).suffix
        if suffix not in (".png", ".gif"):
            continue
        where = path.with_name(Path(file).name)
        try:
            content = where.read_bytes() if suffix == ".gif" else _small(where)
        except OSError as error:
            yield _Picture(name, "", f"{where.name} cannot be shown: {error}")
            continue
        if len(content) > HEAVIEST:
            yield _Picture(name, "", f"{where.name} is too large to be shown here ({len(content) / 1e6:.1f} MB)")
            continue
        kind = "gif" if suffix == ".gif" else "jpeg" if content[:2] == b"\xff\xd8" else "png"
        yield _Picture(name, f"data:image/{kind};base64,{b64encode(content).decode()}", "")


def _small(path: Path) -> bytes:
    """The picture as PNG if that is light enough, else as JPEG, at most so wide."""
    with Image.open(path) as picture:
        whole = picture.convert("RGB")
    whole.thumbnail((WIDEST, 4 * WIDEST))
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 85}), ("JPEG", {"quality": 60})):
        out = io.BytesIO()
        whole.save(out, kind, **options)
        if out.tell() <= HEAVIEST:
            break
    return out.getvalue()
