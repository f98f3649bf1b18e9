"""Small pictures as SVG or HTML inside a page: no library, no script, colours from the page's own style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

__all__ = ["Point", "bars", "lines", "matrix", "scatter", "si", "whisker"]

Point = tuple[float, float, float | None, float | None, str]  # x, y, its interval, and what it is
SIZE = (340, 230)  # pixels
INSET = (52, 12, 14, 36)  # margins: left, top, right, below
INKS = ("var(--mark)", "#d1495b", "#2a9d5c", "#b8860b", "#7b5ea7", "#2b8a9b")  # of lines


def whisker(value: float, low: float | None, high: float | None, scale: tuple[float, float]) -> Markup:
    """A value and its interval on a scale (start, width)."""
    start, width = scale

    def at(x: float) -> str:
        return f"{100 * (x - start) / width:.2f}%"

    half = ""
    if low is not None and high is not None:
        half = f'<i style="left:{at(low)};width:{100 * (high - low) / width:.2f}%"></i>'
    return Markup(f'<span class="whisker">{half}<b style="left:{at(value)}"></b></span>')


def scatter(title: str, across: str, points: Sequence[Point]) -> Markup:
    """Points with their intervals over a logarithmic axis; nothing where fewer than two can be drawn."""
    points = [point for point in points if point[0] > 0]
    if len(points) < 2:
        return Markup("")
    frame = _Frame([math.log10(p[0]) for p in points], [v for p in points for v in p[1:4] if v is not None])
    marks = []
    for x, y, low, high, label in points:
        cx, cy = frame.position(math.log10(x), y)
        if low is not None and high is not None:
            ends = frame.position(0, low)[1], frame.position(0, high)[1]
            marks.append(f'<line class="half" x1="{cx:.1f}" x2="{cx:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>')
        tooltip = escape(f"{label}: {y:.4f}")
        marks.append(f'<circle class="dot" cx="{cx:.1f}" cy="{cy:.1f}" r="3"><title>{tooltip}</title></circle>')
    return frame.drawn(title, across, si(10**frame.x0), si(10**frame.x1), "".join(marks))


def lines(
    title: str, across: str, series: Mapping[str, Sequence[tuple[float, float]]], *, logarithmic: bool = False,
    chosen: float | None = None,
) -> Markup:  # fmt: skip
    """Curves, each of points (x, y); ``chosen`` is an x to mark. Nothing where no curve has two points."""
    series = {name: [p for p in points if not logarithmic or p[0] > 0] for name, points in series.items()}
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return Markup("")

    def scaled(x: float) -> float:
        return math.log10(x) if logarithmic else x

    every = [point for points in series.values() for point in points]
    frame = _Frame([scaled(x) for x, _ in every], [y for _, y in every])
    marks = []
    if chosen is not None and (not logarithmic or chosen > 0):
        x = frame.position(scaled(chosen), frame.y0)[0]
        marks.append(f'<line class="chosen" x1="{x:.1f}" x2="{x:.1f}" y1="{INSET[1]}" y2="{SIZE[1] - INSET[3]}"/>')
    for number, (name, points) in enumerate(series.items()):
        path = " ".join("{:.1f},{:.1f}".format(*frame.position(scaled(x), y)) for x, y in points)
        ink = INKS[number % len(INKS)]
        marks.append(f'<polyline fill="none" stroke="{ink}" stroke-width="1.6" points="{path}"/>')
        if len(series) > 1:
            marks.append(
                f'<text x="{SIZE[0] - INSET[2]}" y="{INSET[1] + 12 * (number + 1)}" text-anchor="end" '
                f'style="fill:{ink}">{escape(name)}</text>'
            )
    low, high = (si(10**x) if logarithmic else f"{x:g}" for x in (frame.x0, frame.x1))
    return frame.drawn(title, across, low, high, "".join(marks))


def bars(values: Mapping[str, float | None], most: int = 200) -> Markup:
    """A bar a name, of shares in [0, 1], the longest first; names without a value last."""
    order = sorted(values.items(), key=lambda item: (item[1] is None, -(item[1] or 0.0), item[0]))
    rows = []
    for name, value in order[:most]:
        width, number = 100 * min(max(value or 0.0, 0.0), 1.0), "" if value is None else f"{value:.3f}"
        bar = f'<span class="track"><i style="width:{width:.1f}%"></i></span>'
        rows.append(f'<div><span>{escape(name)}</span>{bar}<span class="number">{number}</span></div>')
    left = f"<p>and {len(order) - most} more</p>" if len(order) > most else ""
    return Markup(f'<div class="bars">{"".join(rows)}</div>{left}')


def matrix(counts: npt.NDArray[np.int64], names: Sequence[str]) -> Markup:
    """A confusion matrix: rows are the truth, columns the prediction, shades the shares of a row."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for name, row, part in zip(names, counts.tolist(), shares.tolist(), strict=True):
        cells = "".join(
            f'<td style="--share:{share:.3f}" title="{share:.1%}">{count or ""}</td>'
            for count, share in zip(row, part, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return Markup(
        f'<div class="wide"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def si(value: float) -> str:
    """Three digits and a prefix."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


class _Frame:
    """Axes, and where points lie between them."""

    def __init__(self, across: Sequence[float], up: Sequence[float]) -> None:
        self.x0, self.x1, self.y0, self.y1 = min(across), max(across), min(up), max(up)

    def position(self, x: float, y: float) -> tuple[float, float]:
        (width, height), (left, top, right, below) = SIZE, INSET
        share_x = (x - self.x0) / (self.x1 - self.x0) if self.x1 > self.x0 else 0.5
        share_y = (y - self.y0) / (self.y1 - self.y0) if self.y1 > self.y0 else 0.5
        return left + (width - left - right) * share_x, height - below - (height - top - below) * share_y

    def drawn(self, title: str, across: str, low: str, high: str, marks: str) -> Markup:
        (width, height), (left, top, right, below) = SIZE, INSET
        floor, name = height - below, escape(title)
        return Markup(
            f'<figure><svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{name}"><line class="axis" x1="{left}" x2="{width - right}" y1="{floor}" y2="{floor}"/>'
            f'<line class="axis" x1="{left}" x2="{left}" y1="{top}" y2="{floor}"/>'
            f'<text x="{left}" y="{height - 20}">{escape(low)}</text>'
            f'<text x="{width - right}" y="{height - 20}" text-anchor="end">{escape(high)}</text>'
            f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">{escape(across)}</text>'
            f'<text x="{left - 6}" y="{floor}" text-anchor="end">{self.y0:.3f}</text>'
            f'<text x="{left - 6}" y="{top + 8}" text-anchor="end">{self.y1:.3f}</text>'
            f"{marks}</svg><figcaption>{name}</figcaption></figure>"
        )
