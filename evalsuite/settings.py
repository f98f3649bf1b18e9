"""The one reader of ``key=value`` text: ``--set``, ``--arch-option``, ``--backbone-arg`` and what the documents show.

A value is JSON, or what people write instead: a bare word, ``none``, ``True``, ``.5``, a list without its brackets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from evalsuite.errors import UsageError

__all__ = ["assignments", "shown", "typed", "untyped"]

EMPTY = "(empty)"  # how a list of nothing is shown
_WORDS = {"none": "null", "null": "null", "true": "true", "false": "false"}


def assignments(items: Iterable[str], flag: str) -> dict[str, str]:
    """``key=value`` texts by key, the last of a key; :class:`UsageError` where a key or ``=`` is missing."""
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (key.strip() and equals):
            raise UsageError(f"{flag} {item} is no setting", cause="it has no '='", fix=f"{flag} name=value")
        pairs[key.strip()] = value.strip()
    return pairs


def typed(text: str, kind: Any, name: str, now: Any) -> Any:
    """``text`` as a value of the type ``kind``; ``name`` and the present value ``now`` are for messages.

    Raises :class:`UsageError` where it is none.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    reasons = []
    for spelled in _spellings(text):
        try:
            return adapter.validate_json(spelled, strict=True)
        except ValidationError as error:
            reasons.append(error.errors()[0])
    read = [r["msg"] for r in reasons if r["type"] not in ("json_invalid", "none_required")]
    raise UsageError(
        f"--set {name}={text} cannot be read",
        cause=f"{read[0] if read else reasons[0]['msg']}; now it is {shown(now)}",
        fix=f"for example --set {name}={shown(now)}",
    )


def untyped(text: str) -> Any:
    """``text`` as a value of no known type: a number, a truth, None, a tuple of such, or else the text itself."""
    for spelled in (text, f"[{text}]" if "," in text else text, _spelled(text)):
        try:
            value = json.loads(spelled)
        except json.JSONDecodeError:
            continue
        return tuple(value) if isinstance(value, list) else value
    return text


def shown(value: Any) -> str:
    """A value as one would write it after ``--set``."""
    if isinstance(value, (tuple, list)):
        nested = any(isinstance(item, (tuple, list, dict)) for item in value)
        return (json.dumps(value)[1:-1] if nested else ",".join(map(shown, value))) or EMPTY
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _spellings(text: str) -> Iterator[str]:
    """The JSON texts that ``text`` may stand for, the likeliest first."""
    if text in ("", EMPTY):
        yield "[]"
    yield from (text, f"[{text}]")
    for spell in (_spelled, json.dumps):
        whole, parts = spell(text), f"[{','.join(spell(part.strip()) for part in text.split(','))}]"
        yield from (parts, whole) if "," in text else (whole, parts)


def _spelled(word: str) -> str:
    """A bare word in JSON: a number, a truth or none where it is one."""
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", word, re.IGNORECASE) and math.isfinite(float(word)):
        return word if re.fullmatch(r"-?(0|[1-9]\d*)", word) else repr(float(word))
    return json.dumps(word)
