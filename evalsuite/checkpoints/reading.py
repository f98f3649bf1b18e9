"""Reading a stranger's file without running anything in it."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import re
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from evalsuite.checkpoints.unpickling import Forbidden, Parameter, load_legacy, load_pickle, load_zip
from evalsuite.checkpoints.wrappers import unwrapped
from evalsuite.errors import BackboneError

__all__ = ["ENDINGS", "NOTE", "File", "State", "read", "states", "unnamed"]

DEEPEST, WIDEST = 8, 64  # how far containers in containers are followed, and how many items of a list

ENDINGS = (".pth", ".pt", ".tar", ".ckpt", ".th", ".bin", ".safetensors", ".pkl")
NOTE = "evalsuite.convert"  # the key of what we note beside the tensors of files that others read

# every torch.save of the old format begins with this pickled number (torch.serialization.MAGIC_NUMBER)
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
HDF5 = b"\x89HDF"
GZIP = b"\x1f\x8b"
TRUST = "convert it to safetensors where it came from, or, if you trust its author, pass --trust-checkpoint"
BROKEN = "copy or download it again, and compare its size or checksum with the source"


@dataclass(frozen=True)
class File:
    """A checkpoint file as read: its content, the text of a safetensors header (or what this suite notes under ``NOTE``
    in files of other formats), sha256 of its bytes, how it was read, and the JSON files beside it by their names."""

    path: Path
    tree: Any
    sha256: str
    header: Mapping[str, str] = field(default_factory=dict)
    trusted: bool = False
    notes: tuple[str, ...] = ()
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def hint(self, *names: str) -> str | None:
        """The first text under one of ``names`` in the file's top level or in its saved arguments."""
        tree = self.tree if isinstance(self.tree, Mapping) else {}
        saved = [tree.get(k) for k in ("args", "opt", "config", "cfg", "hyper_parameters")]
        for holder in [tree, *saved]:
            values = holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
            for name in names:
                if isinstance(values.get(name), str):
                    return str(values[name])
        return None


@dataclass(frozen=True)
class State:
    """One dict of tensors in a file, the path of keys that leads to it ("" for the top level), and the file.

    ``tensors`` are without what wrappers leave in names; ``names`` are the file's where they differ, and ``wrappers``
    what was taken off.
    """

    tensors: Mapping[str, Tensor]
    container: str
    file: File
    names: Mapping[str, str] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()


def read(path: str | Path, *, trust: bool = False) -> File:
    """Read a checkpoint of any known format.

    Pickles, those of torch files among them, go through an unpickler that rebuilds tensors and numpy arrays and runs
    nothing (:mod:`evalsuite.checkpoints.unpickling`). Classes of configuration that training files often carry become
    inert stand-ins; their packages are not imported. ``trust`` lets a file that needs more run what it names,
    and the result says so.

    Raises :class:`BackboneError` for anything that is missing, broken, or needs more than that.
    """
    path = Path(path)
    start = _first_bytes(path)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(path, trust)
    if start.startswith(LEGACY):
        return _read_pickled(path, load_legacy, trust)
    if start[8:9] == b"{" and (start[:1] != b"\x80" or int.from_bytes(start[:8], "little") < path.stat().st_size):
        return _read_safetensors(path)  # it begins with the length of its header, whose first byte may be a pickle's
    if start[:1] == b"\x80":
        return _read_pickled(path, load_pickle, trust)
    _refuse_format(path, start)


def states(file: File) -> list[State]:
    """Every dict of tensors in a file, in the order met; what optimizers and schedulers keep is left out.

    Dicts in lists and tuples, and under numbers, are read too: their path is written ``[0]``. A list of pairs of a
    name and a tensor is a dict.
    """
    return list(_walk(file.tree, "", file, 0, set()))


def unnamed(node: Any) -> int:
    """How many tensors lie in lists and tuples, where nothing names them."""
    return _unnamed(node, 0, set())


def _unnamed(node: Any, depth: int, seen: set[int]) -> int:
    if depth > DEEPEST or not isinstance(node, Mapping | list | tuple) or id(node) in seen:
        return 0
    seen.add(id(node))
    items = list(node.values()) if isinstance(node, Mapping) else node[:WIDEST]
    here = 0 if isinstance(node, Mapping) else sum(_tensor(v) is not None for v in node)
    return here + sum(_unnamed(v, depth + 1, seen) for v in items)


def _walk(node: Any, where: str, file: File, depth: int, seen: set[int]) -> Iterator[State]:
    if depth > DEEPEST or id(node) in seen:  # a few containers in each other are many ways
        return
    if isinstance(node, Mapping | list | tuple):
        seen.add(id(node))
    if isinstance(node, nn.Module):
        node = node.state_dict()
    if isinstance(node, list | tuple) and node and all(map(_pair, node)):
        node = dict(node)
    if isinstance(node, list | tuple):
        for index, value in enumerate(node[:WIDEST]):
            yield from _walk(value, f"{where}[{index}]", file, depth + 1, seen)
    if not isinstance(node, Mapping):
        return
    named = {k: v for k, v in node.items() if isinstance(k, str)}
    numbered = ((k, v) for k, v in node.items() if isinstance(k, int) and not depth)  # below, an optimizer's
    for number, value in itertools.islice(numbered, WIDEST):
        yield from _walk(value, f"{where}[{number}]", file, depth + 1, seen)
    tensors = {k: t for k, v in named.items() if (t := _tensor(v)) is not None}
    if tensors:
        plain = unwrapped(tensors)
        yield State(plain.tensors, where, file, plain.names, plain.wrappers)
    for key, value in named.items():
        if not re.match(r"optim|opt_|opt$|scheduler|lr_sched|scaler|amp$|fp16_scaler|callbacks|rng|meters", key):
            yield from _walk(value, f"{where}.{key}" if where else key, file, depth + 1, seen)


def _pair(item: Any) -> bool:
    """Whether something is a name and a tensor, as ``state_dict().items()`` gives them."""
    return (
        isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str) and _tensor(item[1]) is not None
    )


def _tensor(value: Any) -> Tensor | None:
    value = value.data if isinstance(value, Parameter) else value
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written: nobody does
            return torch.from_numpy(value.view(np.ndarray).astype(value.dtype.newbyteorder("="), copy=False))
    return None


def _first_bytes(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise BackboneError(
                f"{path} is not a checkpoint", cause="it is no regular file: a pipe or a device", fix="name a file"
            )
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise BackboneError(
            f"{path} cannot be opened",
            cause=error.strerror or str(error),
            fix="check the path; published weights are timm:NAME or torchvision:NAME, fresh ones random:ARCH",
        ) from error
    if not start:
        raise BackboneError(f"{path} is empty", cause="the file has no bytes: a broken copy or download", fix=BROKEN)
    return start


def _refuse_format(path: Path, start: bytes) -> NoReturn:
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        cause, fix = (
            "it is a web page: the download gave an error or login page",
            "open the address in a browser",
        )
    elif text.startswith(b"version https://git-lfs"):
        cause, fix = "it is a Git LFS pointer, not the file itself", "git lfs pull"
    elif text.startswith(b"{"):
        cause, fix = (
            "it is text that describes a network, without its weights",
            f"name the folder {path.parent}, or the file of weights in it",
        )
    elif start.startswith(HDF5):
        cause, fix = (
            "it is HDF5 (Keras); its layers have no known torch names",
            "convert it to a torch state dict",
        )
    elif start.startswith(GZIP):
        cause, fix = "it is compressed with gzip", f"gunzip it, or unpack it: tar xf {path.name}"
    elif tarfile.is_tarfile(path):
        cause, fix = (
            "it is an archive of files",
            f"unpack it (tar xf {path.name}) and name the checkpoint in it",
        )
    else:
        cause = f"its first bytes {start[:8]!r} belong to no checkpoint format (torch, pickle, safetensors)"
        fix = BROKEN
    raise BackboneError(f"{path} is not a checkpoint", cause=cause, fix=fix)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> File:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
        tree = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise BackboneError(f"{path} cannot be read", cause=f"broken safetensors file: {error}", fix=BROKEN) from error
    return File(path, tree, _sha256(path), header)


def _read_zip(path: Path, trust: bool) -> File:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # names and numbers of a broken archive raise any type
        _refuse_broken(path, error, "broken zip archive, ")
    if any(name.endswith("/constants.pkl") for name in names):
        raise BackboneError(
            f"{path} is a TorchScript program",
            cause="it holds code to run, not only weights",
            fix="save its weights where it came from: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')",
        )
    if not any(name.endswith("data.pkl") for name in names):
        held = ", ".join(names[:3])
        raise BackboneError(
            f"{path} is not a checkpoint",
            cause=f"a zip archive of {held}",
            fix="unpack it and name the checkpoint in it",
        )
    return _read_pickled(path, load_zip, trust)


def _read_pickled(path: Path, load: Callable[[Path], Any], trust: bool) -> File:
    """A file of ``torch.save`` or a plain pickle, by our own unpickler; where trusted, by what wrote it."""
    notes: tuple[str, ...] = ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stranger's pickle protocol or storage type is not the user's affair
        try:
            tree = load(path)
        except Forbidden as error:
            if not trust:
                _refuse_global(path, str(error))
            tree, notes = _trusted(path, load), (f"read with --trust-checkpoint: it asked for {error}",)
        except Exception as error:  # broken bytes raise any type
            _refuse_broken(path, error)
    return File(path, tree, _sha256(path), _noted(tree), bool(notes), notes)


def _trusted(path: Path, load: Callable[[Path], Any]) -> Any:
    if load is not load_pickle:
        return torch.load(path, map_location="cpu", weights_only=False)
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")


def _noted(tree: Any) -> dict[str, str]:
    note = tree.get(NOTE) if isinstance(tree, Mapping) else None
    return {k: v for k, v in note.items() if isinstance(v, str)} if isinstance(note, Mapping) else {}


def _refuse_broken(path: Path, error: Exception, what: str = "") -> NoReturn:
    message = " ".join(str(error).split())[:200]
    raise BackboneError(
        f"{path} is truncated or damaged",
        cause=f"{what}{type(error).__name__}: {message or 'it ends too early'}",
        fix=BROKEN,
    ) from error


def _refuse_global(path: Path, name: str) -> NoReturn:
    whole = name.startswith(("torch.nn.modules.", "torchvision.models", "timm.models", "__main__."))
    what = "it is a pickled module, not a dict of tensors" if whole else "reading weights never needs it"
    raise BackboneError(
        f"{path} asks to run {name}", cause=f"unpickling it would import and call {name}; {what}", fix=TRUST
    )
