"""Refusals: every way the suite says no, each with its exit code and a problem, a cause and a fix."""

from __future__ import annotations

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
]


class Refusal(Exception):
    """Something the suite will not do, told in three lines.

    ``code`` is the exit code of the process that ends with it (docs/troubleshooting.md lists them).
    """

    code = 1

    def __init__(self, problem: str, *, cause: str, fix: str) -> None:
        super().__init__(problem, cause, fix)
        self.problem, self.cause, self.fix = problem, cause, fix

    def __str__(self) -> str:
        return f"error: {self.problem}\ncause: {self.cause}\nfix: {self.fix}"

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
