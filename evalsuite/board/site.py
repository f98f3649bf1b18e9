"""The leaderboard as a static site: a few files that need no server, no network and no other file.

Whatever a stranger wrote (names, provenance, commands) is escaped, and a content security policy lets pages load
nothing: styles and script are the pages' own.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from evalsuite.board.charts import scatter, whisker
from evalsuite.board.pages import embedded, environment, frame, text
from evalsuite.board.table import Board, Column, Contender, Standing
from evalsuite.errors import ResourceError
from evalsuite.files import write_text

__all__ = ["build", "serve"]

Scale = tuple[float, float]


@dataclass(frozen=True)
class _Row:
    """A line of a page's table."""

    label: str
    link: str
    column: Column
    standing: Standing
    bar: Markup
    of: int


def build(board: Board, out: str | Path, title: str = "Leaderboard") -> Path:
    """Write the site below ``out`` and return its ``index.html``; beside it ``leaderboard.json`` and ``.csv``."""
    out = Path(out)
    pages = environment()
    links = _links(board)
    for column_task, parts in _by_task(board).items():
        page = pages.get_template("task.html.j2").render(
            title=column_task, parts=[_part(board, column, links) for column in parts], **frame()
        )
        write_text(out / links[column_task], page)
    scales = {column.key: _scale(board.standings[column.key].values()) for column in board.columns}
    for contender in board.contenders:
        rows = _rows_of(board, contender, links, scales)
        page = pages.get_template("backbone.html.j2").render(
            title=contender.label, contender=contender, rows=rows,
            commands=sorted({row.standing.command for row in rows if row.standing.command}), **frame(),
        )  # fmt: skip
        write_text(out / links["backbone", contender.label], page)
    script = text("board.js")
    page = pages.get_template("index.html.j2").render(
        title=title, board=board, data=Markup(embedded(_compact(board, links))), script=Markup(script),
        tasks=[(task, links[task]) for task in _by_task(board)], **frame(script),
    )  # fmt: skip
    write_text(out / "leaderboard.json", json.dumps(board.to_json(), indent=1, allow_nan=False) + "\n")
    write_text(out / "leaderboard.csv", board.to_csv())
    write_text(out / "index.html", page)
    return out / "index.html"


def serve(out: str | Path, port: int = 8000) -> http.server.ThreadingHTTPServer:
    """A server of the site for this machine alone, not running yet. Raises :class:`ResourceError` for a taken port.

    What a link in the site leads out of it to is not there.
    """
    handler = partial(_Files, directory=str(Path(out).resolve()))
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise ResourceError(
            f"port {port} cannot be used", cause=str(error), fix="--port with another number, or 0 for any free one"
        ) from error


class _Files(http.server.SimpleHTTPRequestHandler):
    """Files of one folder; those that a link leads out of it to are not found."""

    def translate_path(self, path: str) -> str:
        there = Path(super().translate_path(path))
        return str(there if there.resolve().is_relative_to(self.directory) else Path(self.directory, "no-such-file"))


# --- pages ------------------------------------------------------------------------------------------------------


def _links(board: Board) -> dict[Any, str]:
    """Where each page lies, by task or ("backbone", label): file names made of letters, digits and a short hash."""
    links: dict[Any, str] = {task: f"tasks/{_slug(task)}.html" for task in _by_task(board)}
    return links | {("backbone", c.label): f"backbones/{_slug(c.label)}.html" for c in board.contenders}


def _slug(text: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:60].lower()
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _by_task(board: Board) -> dict[str, list[Column]]:
    columns: dict[str, list[Column]] = {}
    for column in board.columns:
        columns.setdefault(column.task, []).append(column)
    return columns


def _part(board: Board, column: Column, links: Mapping[Any, str]) -> dict[str, Any]:
    standings = board.standings[column.key]
    scale = _scale(standings.values())
    rows = [
        _Row(label, f"../{links['backbone', label]}", column, s, whisker(s.value, s.low, s.high, scale), len(standings))
        for label, s in standings.items()
    ]
    return {"column": column, "rows": rows, "plots": list(_plots(board, column))}


def _rows_of(board: Board, contender: Contender, links: Mapping[Any, str], scales: Mapping[str, Scale]) -> list[_Row]:
    rows = []
    for column in board.columns:
        standings = board.standings[column.key]
        if contender.label in standings:
            own, link = standings[contender.label], f"../{links[column.task]}"
            bar = whisker(own.value, own.low, own.high, scales[column.key])
            rows.append(_Row(contender.label, link, column, own, bar, len(standings)))
    return rows


def _compact(board: Board, links: Mapping[Any, str]) -> dict[str, Any]:
    """What the index page's script needs; cells are [column, backbone, value, low, high, rank, best, worst, tied]."""
    index_of = {contender.label: index for index, contender in enumerate(board.contenders)}
    return {
        "columns": [
            {"title": c.title, "task": c.task, "protocol": c.protocol, "engine": c.engine or "", "metric": c.metric,
             "higher": c.higher_is_better, "link": links[c.task]}
            for c in board.columns
        ],
        "backbones": [
            {"label": c.label, "arch": c.arch, "method": c.method, "link": links["backbone", c.label]}
            for c in board.contenders
        ],
        "cells": [
            [number, index_of[label], *map(_short, (s.value, s.low, s.high)), s.rank, s.best, s.worst, int(s.tied)]
            for number, column in enumerate(board.columns) for label, s in board.standings[column.key].items()
        ],
    }  # fmt: skip


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


# --- pictures ---------------------------------------------------------------------------------------------------


def _scale(standings: Iterable[Standing]) -> Scale:
    """Where the scores and intervals of a column begin, and how far they reach."""
    ends = [x for s in standings for x in (s.value, s.low, s.high) if x is not None]
    return min(ends), (max(ends) - min(ends)) or 1.0


def _plots(board: Board, column: Column) -> Iterator[Markup]:
    """Scores against parameters, operations, and encoding time; the latter of each device apart."""
    standings = board.standings[column.key]
    known = {c.label: c for c in board.contenders}
    kinds: dict[str, Callable[[str, Standing], float]] = {
        "parameters": lambda label, _: known[label].parameters,
        "FLOPs of an image": lambda label, _: known[label].flops or 0,
    }
    for device in sorted({s.device for s in standings.values() if s.encode_ms}):
        kinds[f"ms to encode an image on {device}"] = partial(_encoding, device)
    for what, of in kinds.items():
        points = [(of(label, s), s.value, s.low, s.high, label) for label, s in standings.items()]
        yield scatter(f"{column.metric} over {what}", what, points)


def _encoding(device: str, label: str, standing: Standing) -> float:
    return (standing.encode_ms or 0.0) if standing.device == device else 0.0
