"""Rows of strings, whose features are cached as those of images are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from evalsuite.errors import DataError

__all__ = ["Texts"]


@dataclass(frozen=True, eq=False)
class Texts:
    """N texts as a split of a data set: :meth:`evalsuite.features.Cache.features` takes them.

    ``labels`` are N of whatever a task makes of them; features do not depend on them. Ids are the number and the text.
    Raises :class:`DataError` where one is no string, or there are not as many labels.

    >>> Texts(["a cat", "a dog"], np.array([0, 1])).ids
    ['000 a cat', '001 a dog']
    """

    rows: Sequence[str]
    labels: npt.NDArray[Any] | None = None
    split: str = "texts"
    groups: npt.NDArray[np.str_] | None = None
    kind: ClassVar[str] = "text"
    notes: ClassVar[tuple[str, ...]] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        odd = next((row for row in self.rows if not isinstance(row, str)), None)
        if isinstance(self.rows, str) or odd is not None:
            raise DataError(
                f"{self.rows if odd is None else odd!r} is no row of texts",
                cause="texts are a list of strings, one a row",
                fix="give each text as a string",
            )
        for name, values in (("labels", self.labels), ("groups", self.groups)):
            if values is not None and len(values) != len(self.rows):
                raise DataError(
                    f"{len(values)} {name} for {len(self.rows)} texts",
                    cause="there is one for each",
                    fix="give as many",
                )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> str:
        return self.rows[index]

    @cached_property
    def ids(self) -> list[str]:
        """The number and the text of each."""
        return [f"{index:03d} {text}" for index, text in enumerate(self.rows)]

    @cached_property
    def fingerprint(self) -> str:
        """Of the texts alone: features are the same whatever the labels say."""
        digest = hashlib.sha256()
        for text in self.rows:
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(encoded)}:".encode() + encoded)
        return f"texts:{digest.hexdigest()}"

    @cached_property
    def digest(self) -> str:
        """Of texts and labels: what a score depends on."""
        labels = [] if self.labels is None else map(str, self.labels.tolist())
        return hashlib.sha256("\0".join([*labels, *self.rows]).encode("utf-8", "surrogatepass")).hexdigest()
