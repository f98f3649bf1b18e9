"""One self-contained page of all results below a folder, for people: it loads nothing, and prints."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image
from sklearn.metrics import precision_recall_curve

from evalsuite.board.charts import bars, lines, matrix, whisker
from evalsuite.board.pages import environment, frame
from evalsuite.errors import DataError
from evalsuite.files import write_text
from evalsuite.results import BY_FILE_SIZES, Result, Score, arrays, read_all

__all__ = ["report"]

WIDEST = 1200  # pixels of a picture
HEAVIEST = 600_000  # bytes of a picture in the page
KINDS = {".png": "PNG", ".gif": "GIF"}  # suffixes of pictures, each with the one decoder that may read it
LARGEST = 64 << 20  # bytes of a picture's file
PIXELS = 50_000_000  # of a picture, decoded
CLASSES = 40  # a confusion matrix has at most
CURVES = 6  # precision-recall curves in one plot
Arrays = Mapping[str, npt.NDArray[Any]]
Drawn = TypeVar("Drawn")


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
    matrix: Markup
    pictures: list[_Picture]


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write ``report.html`` of the results below ``folder`` (there, or to ``out``) and return its path.

    Raises :class:`DataError` where there is no result.
    """
    folder = Path(folder)
    results = _distinct(read_all(folder)) if folder.is_dir() else []
    if not results:
        raise DataError(
            f"{folder} holds no result", cause="there is no seed-*.json below it", fix="give the --out of evalsuite run"
        )
    cells = [_cell(number, path, result) for number, (path, result) in enumerate(results)]
    backbones = {r.backbone.identity: r.backbone for _, r in results}
    environments = {json.dumps(r.environment, sort_keys=True): r.environment for _, r in results}
    pages = environment()
    pages.filters["number"] = lambda value: f"{value:.4g}" if isinstance(value, float) else value
    page = pages.get_template("report.html.j2").render(
        title=f"Results in {folder.resolve().name}", cells=cells, backbones=list(backbones.values()),
        environments=list(environments.values()), **frame(),
    )  # fmt: skip
    out = Path(out) if out is not None else folder / "report.html"
    write_text(out, page)
    return out


def _distinct(cells: Iterable[tuple[Path, Result]]) -> list[tuple[Path, Result]]:
    """All cells, and of several seeds by a protocol that draws nothing the first."""
    kept: dict[Path, tuple[Path, Result]] = {}
    for path, result in cells:
        repeatable = result.status == "ok" and not result.protocol.seeded
        kept.setdefault(path.parent if repeatable else path, (path, result))
    return list(kept.values())


def _cell(number: int, path: Path, result: Result) -> _Cell:
    main = result.scores.get(result.primary)
    main = main if main is not None and main.value is not None else None
    notes = [*_marks(result), *result.warnings]
    predictions: Arrays = dict(_drawn("the predictions", lambda: arrays(path, result, "predictions").items(), notes))
    return _Cell(
        result=result,
        anchor=f"result-{number}",
        main=main,
        bar=Markup("") if main is None or main.value is None else whisker(main.value, main.low, main.high, (0.0, 1.0)),
        plots=[
            *_drawn("the validation scores", lambda: _sweep(result), notes),
            *_drawn("the curves", lambda: _curves(result), notes),
            *_drawn("precision over recall", lambda: _precision_recall(predictions), notes),
        ],
        by_class=_drawn("the scores by class", lambda: _by_class(result), notes),
        matrix=Markup("").join(_drawn("the confusion matrix", lambda: _confusion(predictions), notes)),
        pictures=[_picture(path, name, file) for name, file in result.files.items() if Path(file).suffix in KINDS],
        notes=notes,
    )


def _drawn(what: str, draw: Callable[[], Iterable[Drawn]], notes: list[str]) -> list[Drawn]:
    """Details have a form of their own only where they are ours: what cannot be drawn costs itself, and a note."""
    try:
        return list(draw())
    except Exception as error:
        notes.append(f"{what} cannot be shown: {type(error).__name__}: {error}"[:500])
        return []


def _marks(result: Result) -> Iterator[str]:
    """What keeps a result from being compared."""
    if result.by_file_sizes:
        yield f"It was {BY_FILE_SIZES}: it is compared with no other result, and the same command evaluates it again."
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


def _curves(result: Result) -> Iterator[Markup]:
    details = result.details
    if isinstance(log := details.get("log"), list):
        names = sorted({name for row in log for name in row if "loss" in name})
        series = {n: [(row["step"], row[n]) for row in log if n in row and "step" in row] for n in names}
        yield lines("training loss", "step", series)
    if isinstance(curve := details.get("curve"), list):
        yield lines("success on the way", "step", {"success": [(p["steps"], p["success"]) for p in curve]})
    for name in ("precision_by_recall", "mask_precision_by_recall"):
        if isinstance(curves := details.get(name), dict):
            series = {f"IoU {iou}": [(0.01 * i, y) for i, y in enumerate(ys)] for iou, ys in curves.items()}
            yield lines(f"{'masks' if name.startswith('mask') else 'boxes'}: precision over recall", "recall", series)


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


def _precision_recall(predictions: Arrays) -> Iterator[Markup]:
    """Of several labels, or of two classes: those with the most positives."""
    if not {"labels", "scores", "classes", "names"} <= set(predictions):
        return
    labels, scores, names = predictions["labels"], predictions["scores"], predictions["names"]
    if labels.ndim == 1 and scores.shape[1] == 2 and len(names) == 2:
        positive = np.take_along_axis(scores, np.argsort(predictions["classes"], axis=1), axis=1)[:, 1]
        known = {str(names[1]): (labels == 1, positive)}
    elif labels.ndim == 2 and scores.shape == labels.shape:
        order = np.argsort(-(labels == 1).sum(axis=0), kind="stable")[:CURVES]
        known = {str(names[c]): (labels[labels[:, c] >= 0, c] == 1, scores[labels[:, c] >= 0, c]) for c in order}
    else:
        return
    series = {}
    for name, (truth, score) in known.items():
        if truth.any() and np.isfinite(score).all():
            precision, recall, _ = precision_recall_curve(truth, score)
            keep = np.unique(np.linspace(0, len(recall) - 1, 200).astype(int))
            series[name] = [(float(recall[i]), float(precision[i])) for i in keep]
    yield lines("precision over recall", "recall", series)


def _by_class(result: Result) -> Iterator[tuple[str, Markup]]:
    for name, values in result.details.items():
        if name.endswith(("_by_class", "_by_variant")) and isinstance(values, dict):
            shares = {str(k): v for k, v in values.items() if v is None or isinstance(v, int | float)}
            if shares and all(v is None or 0 <= v <= 1 for v in shares.values()):
                yield name.replace("_", " "), bars(shares)


def _confusion(predictions: Arrays) -> Iterator[Markup]:
    if not {"labels", "classes", "names"} <= set(predictions) or predictions["labels"].ndim != 1:
        return
    names = [str(name) for name in predictions["names"]]
    if len(names) > CLASSES:
        return
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (predictions["labels"], predictions["classes"][:, 0]), 1)
    yield matrix(counts, names)


# --- files beside a cell ----------------------------------------------------------------------------------------


def _picture(path: Path, name: str, file: str) -> _Picture:
    """A picture beside a cell as part of the page; of one that is not what its suffix says, or too large, a note."""
    where = path.with_name(Path(file).name)
    try:
        kind, content = _content(where)
    except Exception as error:  # on a broken file decoders raise nearly anything
        return _Picture(name, "", f"{where.name} cannot be shown: {error}"[:500])
    if len(content) > HEAVIEST:
        return _Picture(name, "", f"{where.name} is too large to be shown here ({len(content) / 1e6:.1f} MB)")
    return _Picture(name, f"data:image/{kind};base64,{b64encode(content).decode()}", "")


def _content(path: Path) -> tuple[str, bytes]:
    """Format and bytes: a GIF as it is, a PNG as it is light enough, at most so wide. Raises what decoders do."""
    if not path.is_file():
        raise ValueError("there is no such file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it has {path.stat().st_size >> 20} MiB; {LARGEST >> 20} are shown")
    with Image.open(path, formats=[KINDS[path.suffix]]) as picture:
        if picture.width * picture.height > PIXELS:
            raise ValueError(f"it has {picture.width}x{picture.height} pixels; {PIXELS:,} are shown")
        if path.suffix == ".gif":
            return "gif", path.read_bytes()
        whole = picture.convert("RGB")
    whole.thumbnail((WIDEST, 4 * WIDEST))
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 85}), ("JPEG", {"quality": 60})):
        out = io.BytesIO()
        whole.save(out, kind, **options)
        if out.tell() <= HEAVIEST:
            break
    return kind.lower(), out.getvalue()
