"""How a check keeps its findings: every fault is a line, and what a plugin raises is a fault like any other."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from evalsuite.errors import Refusal

__all__ = ["Faults", "offline", "plain"]


class Faults:
    """What is wrong with one thing."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.first: Exception | None = None

    def unless(self, holds: bool, fault: str) -> bool:
        """Note ``fault`` if ``holds`` does not; returns ``holds``."""
        if not holds:
            self.lines.append(fault)
        return holds

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """What is raised inside is a fault: ``doing`` raises this or that."""
        try:
            yield
        except Exception as error:  # a plugin may raise anything
            self.first = self.first or error
            self.lines.append(f"{doing} raises {_reason(error)}")

    def settle(self) -> None:
        """Raise AssertionError with a line for each fault, if there is any."""
        if self.lines:
            raise AssertionError("\n".join(self.lines)) from self.first


def _reason(error: Exception) -> str:
    if isinstance(error, Refusal):
        return f"{type(error).__name__}: {error.problem} ({error.cause})"
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def plain(value: Any, where: str) -> Iterator[str]:
    """A line for everything in ``value`` that JSON does not give back as it was; tuples come back as lists."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                yield f"{where} has the key {key!r}, which JSON turns into text"
            yield from plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from plain(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        kind = f"{type(value).__module__}.{type(value).__name__}"
        yield f"{where} is a {kind}, which no result file holds: make it a plain number, text, list or dict"
    else:
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            yield f"{where} is {value}, which no result file holds"


@contextmanager
def offline() -> Iterator[None]:
    """Connecting anywhere fails inside."""

    def refuse(self: socket.socket, address: Any) -> NoReturn:
        raise RuntimeError(f"it connects to {address!r}, and nothing is to be fetched silently")

    names = ("connect", "connect_ex")
    before = {name: getattr(socket.socket, name) for name in names}
    for name in names:
        setattr(socket.socket, name, refuse)
    try:
        yield
    finally:
        for name in names:
            setattr(socket.socket, name, before[name])
