"""What a builder of backbones takes: options by name, with types and bounds, and which of them a file may set.

A builder declares its options by the annotations of its keyword parameters, ``Annotated[int, Field(ge=1, le=512)]``
with pydantic's ``Field``; one that takes ``**options`` by ``Unpack`` of a ``TypedDict``; one whose options depend on
the name by :func:`declared_by_name`. What users say of a declared option is held to its type and bounds. A file may
set only what is declared, only of types that are no free text, and never what :data:`LOADING` names.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

__all__ = [
    "LOADING", "NAME", "Blocks", "OptionError", "Share", "Side", "Width", "Word", "by_content", "check",
    "declared_by_name", "file_digest", "offline", "sayable",
]  # fmt: skip

Builder = Callable[..., Any]

# options that bring weights or settings from elsewhere: --backbone does that, and reports what was loaded
LOADING = frozenset({
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn", "weights",
    "weights_backbone", "checkpoint", "checkpoint_path", "ckpt", "ckpt_path", "cache_dir", "download", "url",
    "progress", "hub", "hf_hub_id", "repo_id", "revision", "features_only", "feature_cfg", "kwargs_filter", "model_cfg",
})  # fmt: skip
NAME = r"[A-Za-z0-9_][\w.+-]{0,79}"  # of an architecture or scheme in a file: no address, no path
# kinds that several builders share
Side = Annotated[int, Field(ge=1, le=4096)]  # pixels
Width = Annotated[int, Field(ge=1, le=1 << 14)]  # channels, heads
Blocks = Annotated[int, Field(ge=1, le=512)]  # of a stage, of a network
Share = Annotated[float, Field(ge=0, le=1)]
Word = Annotated[str, Field(pattern=r"^[a-z0-9_]{0,32}$")]  # looked up in a list of the library's own

LARGEST = 1 << 14  # of a number without bounds of its own that a file sets
LONGEST = 64  # items of a list, likewise
CONTAINERS = (list, tuple, dict, Sequence, Mapping)
NETWORK = frozenset({"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"})


def by_content(options: Any) -> Any:
    """Options with what names a file in place replaced by a digest of what it holds, so that the same path with other
    content is another option, and a copy elsewhere the same.

    A path, and a text with a separator or a suffix, counts as a name where there is such a file, or a folder, of which
    all files count with their places in it. Lists and dicts are looked into.
    """
    if isinstance(options, Mapping):
        return {name: by_content(value) for name, value in options.items()}
    if isinstance(options, list | tuple):
        return [by_content(value) for value in options]
    if not isinstance(options, str | os.PathLike):
        return options
    text = os.fspath(options)
    looks = isinstance(options, os.PathLike) or os.sep in text or bool(os.path.splitext(text)[1])
    if not looks or "\0" in text or len(text) > 4096:
        return text
    if os.path.isfile(text):
        return f"sha256:{file_digest(text)}"
    if os.path.isdir(text):
        inside = sorted(os.path.join(folder, name) for folder, _, names in os.walk(text) for name in names)
        files = [(os.path.relpath(path, text), file_digest(path)) for path in inside if os.path.isfile(path)]
        return f"sha256:{hashlib.sha256(json.dumps(files).encode()).hexdigest()}"
    return text


def file_digest(path: str) -> str:
    """The sha256 of a regular file; each state of it is read once."""
    state = os.stat(path)
    return _digest(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1024)
def _digest(path: str, mtime: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OptionError(ValueError):
    """An option that a builder does not take, or not from there."""


def declared_by_name(find: Callable[[str], Builder | None]) -> Callable[[Builder], Builder]:
    """Of a builder ``build(name, **options)``: ``find(name)`` is the function whose parameters declare the options of
    that name, or None."""

    def mark(builder: Builder) -> Builder:
        builder.declared_by_name = find  # type: ignore[attr-defined]
        return builder

    return mark


def check(builder: Builder, name: str, options: Mapping[str, Any]) -> None:
    """What a user says: declared options have their types and bounds, and none brings weights.

    Raises :class:`OptionError`. What is not declared is left to the builder, which refuses names that it does not know.
    """
    declared = _declared(builder, name)
    for option, value in options.items():
        if option in LOADING:
            raise OptionError(f"{option} is no option: weights come by --backbone FILE or --backbone SCHEME:NAME")
        if option in declared:
            _check_value(option, declared[option], value)


def sayable(builder: Builder, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, once each option is known to be one that it may set, of its type and within its bounds.

    Raises :class:`OptionError`.
    """
    declared = _declared(builder, name)
    able = sorted(option for option, kind in declared.items() if option not in LOADING and _plain(kind))
    for option, value in options.items():
        if option not in able:
            raise OptionError(f"{option[:80]!r} is not among what a file may set: {', '.join(able) or 'nothing'}")
        _check_value(option, _bounded(declared[option]), value)
    return dict(options)


def _check_value(option: str, kind: Any, value: Any) -> None:
    try:
        _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[-1]["msg"]
        raise OptionError(f"{option}={_short(value)}: {fault[:1].lower()}{fault[1:]}") from None
    except (TypeError, ValueError, RecursionError) as error:  # what is no JSON, or too deep or long for it
        raise OptionError(f"{option}={type(value).__name__}: {' '.join(str(error).split())[:80]}") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@lru_cache(maxsize=1024)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _declared(builder: Builder, name: str) -> dict[str, Any]:
    """The annotations of what a builder takes by keyword: option -> type."""
    by_name = getattr(builder, "declared_by_name", None)
    builder = builder if by_name is None else by_name(name)
    if builder is None:
        return {}
    try:
        hints = get_type_hints(builder, include_extras=True)
        parameters = inspect.signature(builder).parameters.values()
    except (TypeError, ValueError, NameError):  # without a signature, or annotated by names that are not there
        return {}
    declared: dict[str, Any] = {}
    for i, parameter in enumerate(parameters):
        hint = hints.get(parameter.name)
        if hint is None or (i == 0 and by_name is None and parameter.kind is not parameter.KEYWORD_ONLY):
            continue  # the first one is the architecture's name
        if parameter.kind is not parameter.VAR_KEYWORD:
            declared[parameter.name] = hint
        elif get_origin(hint) is Unpack and is_typeddict(get_args(hint)[0]):
            declared |= get_type_hints(get_args(hint)[0], include_extras=True)
    return declared


def _plain(kind: Any) -> bool:
    """Whether a type is of numbers, truth values, listed words and patterns alone, or of lists and dicts of such."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _plain(inside[0]) or (inside[0] is str and any(map(_has_pattern, inside[1:])))
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType, *CONTAINERS):
        return all(part is Ellipsis or _plain(part) for part in inside) and bool(inside)
    return kind in (bool, int, float, type(None))


def _has_pattern(extra: Any) -> bool:
    return isinstance(extra, FieldInfo) and any(getattr(part, "pattern", None) for part in extra.metadata)


def _bounded(kind: Any) -> Any:
    """The type with bounds where its author gave none."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is int or kind is float or (origin is Annotated and inside[0] in (int, float)):
        base, extras = (kind, ()) if origin is None else (inside[0], inside[1:])
        given = {name for extra in extras for name in _bounds(extra)}
        finite = () if base is int else (Field(allow_inf_nan=False),)
        lower = () if given & {"ge", "gt"} else (Field(ge=-LARGEST),)
        upper = () if given & {"le", "lt"} else (Field(le=LARGEST),)
        return Annotated[(base, *extras, *finite, *lower, *upper)]
    if origin is Annotated:
        return Annotated[(_bounded(inside[0]), *inside[1:])]
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_bounded, inside))]  # noqa: UP007  # of a tuple there is no other form
    if origin in CONTAINERS:
        parts = tuple(part if part is Ellipsis else _bounded(part) for part in inside)
        return Annotated[origin[parts], Field(max_length=LONGEST)]
    return kind


def _bounds(extra: Any) -> Iterator[str]:
    for part in extra.metadata if isinstance(extra, FieldInfo) else [extra]:
        yield from (name for name in ("ge", "gt", "le", "lt") if getattr(part, name, None) is not None)


_sealed = threading.local()


@contextmanager
def offline() -> Iterator[None]:
    """Within the block this thread can neither look up a host nor connect to one, whatever a builder tries."""
    _install()
    before = getattr(_sealed, "on", False)
    _sealed.on = True
    try:
        yield
    finally:
        _sealed.on = before


@lru_cache(maxsize=1)
def _install() -> None:
    sys.addaudithook(_refuse_network)


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event in NETWORK and getattr(_sealed, "on", False):
        raise OptionError("it asks the network, which no file may have it do")
