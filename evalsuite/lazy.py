"""Public names that are imported when they are first touched (PEP 562), so that importing a package costs nothing."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping

__all__ = ["lazy", "moved"]


def lazy(package: str, homes: Mapping[str, Iterable[str]]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names are at home in its submodules: ``{submodule: names}``.

    A name must not be that of a submodule, which Python binds to the package as soon as it is imported.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        names = vars(sys.modules[package])
        return sorted({*names, *names["__all__"]})

    return __getattr__, __dir__


def moved(old: str, *homes: str, renamed: Mapping[str, str] | None = None) -> Callable[[str], object]:
    """``__getattr__`` of a module whose names are at home in ``homes`` now, or go by other names (``renamed``: the old
    one to the full new one): they are given, with a warning."""

    def __getattr__(name: str) -> object:
        candidates = [] if name.startswith("__") else [f"{home}.{name}" for home in homes]
        for new in [*candidates, *([renamed[name]] if renamed and name in renamed else [])]:
            home, _, attribute = new.rpartition(".")
            if hasattr(module := importlib.import_module(home), attribute):
                message = f"{old}.{name} is {new} now; the old name goes with the next version"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                return getattr(module, attribute)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return __getattr__
