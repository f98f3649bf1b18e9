"""Refusals: every way the suite says no, each with its exit code and a problem, a cause and a fix."""

from __future__ import annotations

import re

__all__ = [
    "BackboneError",
    "DataError",
    "ImageError",
    "PluginError",
    "Refusal",
    "RegressionError",
    "ResourceError",
    "SubmissionError",
    "TrainingError",
    "UsageError",
    "printable",
]

# what a terminal obeys or is confused by: control characters, directions of writing, and what no output can hold
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, keep: str = "") -> str:
    """A text for people, whoever wrote it: characters that would act on a terminal are shown as ``\\x1b``.

    ``keep`` are characters to leave as they are. Everything that the suite prints goes through here.
    """
    return UNPRINTABLE.sub(
        lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape", "surrogatepass").decode(), str(text)
    )


LONGEST = 1200  # characters of a line of a refusal: a file's own words in it may be endless


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 300]} [{len(text) - LONGEST:,} characters left out] {text[-300:]}"


class Refusal(Exception):
    """Something the suite will not do, told in three lines; the middle of a very long one is left out there.

    ``code`` is the exit code of the process that ends with it (docs/troubleshooting.md lists them).
    """

    code = 1

    def __init__(self, problem: str, *, cause: str, fix: str) -> None:
        super().__init__(problem, cause, fix)
        self.problem, self.cause, self.fix = problem, cause, fix

    def __str__(self) -> str:
        return "\n".join(
            f"{word}: {_shortened(printable(part))}"
            for word, part in (("error", self.problem), ("cause", self.cause), ("fix", self.fix))
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problem, self.cause, self.fix))


def _rebuild(kind: type[Refusal], problem: str, cause: str, fix: str) -> Refusal:
    """Keyword-only arguments do not survive pickling by default, and data workers pickle what they raise."""
    return kind(problem, cause=cause, fix=fix)


class TrainingError(Refusal):
    """Training cannot go on: the loss is not finite. The cell failed."""

    code = 1


class UsageError(Refusal):
    """The request makes no sense: an unknown name, an option of the wrong type."""

    code = 2


class DataError(Refusal):
    """Data are missing or broken."""

    code = 3


class ImageError(DataError):
    """One image cannot be read. Without ``--strict`` a task may leave it out, count it and go on."""


class BackboneError(Refusal):
    """A backbone did not load, or does not give what a task needs."""

    code = 4


class PluginError(Refusal):
    """A plugin is at fault."""

    code = 5


class RegressionError(Refusal):
    """A score is worse than allowed."""

    code = 6


class ResourceError(Refusal):
    """The machine lacks what the request takes: memory, disk, a device."""

    code = 7


class SubmissionError(Refusal):
    """A submission is invalid."""

    code = 8
