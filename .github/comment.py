"""The Markdown of what a check of submissions found: python3 comment.py OUTCOME.json prints it.

The outcome may come from a run that a stranger can shape, so it is data and no text: every value is held to its kind
and length, numbers are formatted here, and words stand as code, in which nothing is a link, a name or HTML.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST = 5 << 20  # bytes of an outcome
BYTES = 60_000  # of a comment: GitHub takes 65,536
LINES = 100  # of one list
WORDS = 400  # characters of one text
WHY = {
    "nothing": "There is nothing to compare with yet.",
    "disjoint": "The submission has no task, protocol and data in common with the baseline.",
    "many": "Not compared: the baseline holds more backbones than make a table that can be read. Name a smaller one.",
}


def rendered(outcome: Any) -> str:
    """Markdown of an outcome as submission.py writes it. Raises ValueError for anything else."""
    lines = list(_lines(_object(outcome)))
    text = "\n".join(lines) + "\n"
    if len(text.encode()) <= BYTES:
        return text
    return text.encode()[:BYTES].decode(errors="ignore") + "\n\n(cut: it was longer)\n"


def _lines(outcome: dict[str, Any]) -> Iterator[str]:
    refused, errors = _array(outcome.get("refused")), _array(outcome.get("errors"))
    for each in refused:
        submission = _object(each)
        faults = _array(submission.get("faults"))
        yield from ("This submission cannot be taken:", "", *_block([submission.get("name")]))
        yield from (*_block(faults), f"{len(faults)} fault{'s' if len(faults) != 1 else ''}.", "")
    if errors:
        yield from ("The check did not come to its end:", "", *_block(errors))
    if refused or errors:
        return
    yield from ("The submission can be taken.", "")
    if left_out := _array(outcome.get("left_out")):
        yield from ("Left out of the leaderboard:", "", *_block(left_out))
    if outcome.get("comparison") is None:
        yield WHY[_word(outcome.get("why"), WHY)]
    else:
        yield from _comparison(_object(outcome["comparison"]))


def _comparison(report: dict[str, Any]) -> Iterator[str]:
    for each in _array(report.get("comparisons"))[:LINES]:
        part = _object(each)
        better = "higher" if part.get("higher_is_better") is True else "lower"
        recipe = f"{_text(part.get('task'))}@{_text(part.get('protocol'))}"
        yield from (f"## {_code(recipe)}: {_code(part.get('metric'))}, {better} is better", "")
        yield from ("| backbone | score | interval | seeds |", "|---|---|---|---|")
        for label, score in list(_object(part.get("scores")).items())[:LINES]:
            one = _object(score)
            yield f"| {_code(label)} | {_number(one.get('value'))} | {_interval(one)} | {_count(one.get('seeds'))} |"
        yield from ("", "| pair | difference | interval | p (Holm) | significant |", "|---|---|---|---|---|")
        for pair in map(_object, _array(part.get("pairs"))[:LINES]):
            adjusted = pair.get("adjusted")
            verdict = "no samples" if adjusted is None else "yes" if pair.get("separable") is True else "no"
            p = "" if adjusted is None else _number(adjusted, ".4g")
            yield (
                f"| {_code(pair.get('second'))} less {_code(pair.get('first'))} "
                f"| {_number(pair.get('difference'), '+.4f')} | {_interval(pair)} | {p} | {verdict} |"
            )
        yield ""
        for group in _array(part.get("groups"))[:LINES]:
            if len(tied := _array(group)) > 1:
                yield from (f"Not separable: {', '.join(map(_code, tied[:LINES]))}", "")
    yield "p after Holm over all pairs and tasks; significant below 0.05. Intervals are of 95 %."
    if skipped := _array(report.get("skipped")):
        yield from ("", "Not compared:", "", *_block(skipped))


# --- values of strangers ----------------------------------------------------------------------------------------


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"an object is due, not {type(value).__name__}")
    return value


def _array(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"a list is due, not {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    """One line of printable characters, and not too long."""
    if not isinstance(value, str):
        raise ValueError(f"text is due, not {type(value).__name__}")
    return "".join(c if c.isprintable() else " " for c in value[:WORDS])


def _word(value: Any, known: dict[str, str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"one of {', '.join(known)} is due")
    return value


def _code(value: Any) -> str:
    """Words inside a line: code, which no character of theirs can end, nor the cell of a table."""
    return f"`{_text(value).replace('`', chr(39)).replace('|', '/').strip() or ' '}`"


def _block(values: list[Any]) -> list[str]:
    """Words as lines of indented code: none can end the block."""
    more = [f"    and {len(values) - LINES} more"] if len(values) > LINES else []
    return [*(f"    {_text(value)}" for value in values[:LINES]), *more, ""]


def _number(value: Any, form: str = ".4f") -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e15 < value < 1e15:
        raise ValueError("a number is due")
    return format(value, form)


def _count(value: Any) -> str:
    return _number(value, ".0f")


def _interval(values: dict[str, Any]) -> str:
    low, high = values.get("low"), values.get("high")
    return "" if low is None or high is None else f"[{_number(low)}, {_number(high)}]"


def read(path: Path) -> Any:
    """The content of a JSON file that is not too large. Raises ValueError for anything else."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > LARGEST:
        raise ValueError("there is no such file, or it is too large")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


if __name__ == "__main__":
    try:
        sys.stdout.write(rendered(read(Path(sys.argv[1]))))
    except ValueError as error:
        sys.exit(
            f"error: this is no outcome of a check\ncause: {error}\nfix: run the check of the default branch again"
        )
