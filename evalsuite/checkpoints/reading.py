"""Reading a stranger's file without running anything in it."""

from __future__ import annotations

import hashlib
import pickle
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from evalsuite.errors import BackboneError

__all__ = ["ENDINGS", "NOTE", "File", "State", "read", "states"]

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
        """The first text found under one of ``names`` in the file's top level or in its saved arguments."""
        tree = self.tree if isinstance(self.tree, Mapping) else {}
        saved = [tree.get(k) for k in ("args", "opt", "config", "cfg", "hyper_parameters")]
        for place in [tree, *saved]:
            values = place if isinstance(place, Mapping) else getattr(place, "__dict__", {})
            for name in names:
                if isinstance(values.get(name), str):
                    return str(values[name])
        return None


@dataclass(frozen=True)
class State:
    """One dict of tensors in a file, the path of keys that leads to it ("" for the top level), and the file."""

    tensors: Mapping[str, Tensor]
    container: str
    file: File


def read(path: str | Path, *, trust: bool = False) -> File:
    """Read a checkpoint of any known format.

    torch files go through ``torch.load(weights_only=True)``, plain pickles through an unpickler that knows numpy
    arrays only. Classes of configuration that training files often carry become inert stand-ins; their packages
    are not imported. ``trust`` lets a file that asks for more run what it asks for, and the result says so.

    Raises :class:`BackboneError` for anything that is missing, broken, or asks for more than that.
    """
    path = Path(path)
    start = _first_bytes(path)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(path, trust)
    if start.startswith(LEGACY):
        return _read_torch(path, trust, mmap=False)
    if start[8:9] == b"{" and (start[:1] != b"\x80" or int.from_bytes(start[:8], "little") < path.stat().st_size):
        return _read_safetensors(path)  # it begins with the length of its header, whose first byte may be a pickle's
    if start[:1] == b"\x80":
        return _read_pickle(path, trust)
    _refuse_format(path, start)


def states(file: File) -> list[State]:
    """Every dict of tensors in a file, in the order met; what optimizers and schedulers keep is left out."""
    return list(_walk(file.tree, "", file, 0))


def _walk(node: Any, where: str, file: File, depth: int) -> Iterator[State]:
    if isinstance(node, nn.Module):
        node = node.state_dict()
    if not isinstance(node, Mapping) or depth > 8:
        return
    named = {k: v for k, v in node.items() if isinstance(k, str)}
    tensors = {k: t for k, v in named.items() if (t := _tensor(v)) is not None}
    if tensors:
        yield State(tensors, where, file)
    for key, value in named.items():
        if not re.match(r"optim|opt_|scheduler|lr_sched|scaler|amp$|fp16_scaler|callbacks|rng|meters", key):
            yield from _walk(value, f"{where}.{key}" if where else key, file, depth + 1)


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value))  # a copy: pickled arrays may be read-only
    return None


def _first_bytes(path: Path) -> bytes:
    try:
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
    except (zipfile.BadZipFile, OSError) as error:
        raise BackboneError(
            f"{path} is truncated or damaged", cause=f"broken zip archive: {error}", fix=BROKEN
        ) from error
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
    return _read_torch(path, trust, mmap=True)


def _read_torch(path: Path, trust: bool, mmap: bool) -> File:
    notes: tuple[str, ...] = ()
    trusted = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stranger's pickle protocol or storage type is not the user's affair
        try:
            with torch.serialization.safe_globals(_safe_globals()):
                tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # torch raises a dozen types for a broken file
            asked = _asked_of(path, error)
            if asked is None:
                _refuse_broken(path, error)
            if not trust:
                _refuse_global(path, asked)
            tree = torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
            trusted, notes = True, (f"read with --trust-checkpoint: it asked for {asked}",)
    return File(path, tree, _sha256(path), _noted(tree), trusted, notes)


def _read_pickle(path: Path, trust: bool) -> File:
    try:
        with path.open("rb") as file:
            tree = _NumpyUnpickler(file, encoding="latin1").load()
    except _Forbidden as error:
        if not trust:
            _refuse_global(path, str(error))
        with path.open("rb") as file:
            tree = pickle.load(file, encoding="latin1")
        return File(
            path,
            tree,
            _sha256(path),
            trusted=True,
            notes=(f"read with --trust-checkpoint: it asked for {error}",),
        )
    except Exception as error:  # pickle raises any type for broken bytes
        _refuse_broken(path, error)
    return File(path, tree, _sha256(path), _noted(tree))


def _noted(tree: Any) -> dict[str, str]:
    note = tree.get(NOTE) if isinstance(tree, Mapping) else None
    return {k: v for k, v in note.items() if isinstance(v, str)} if isinstance(note, Mapping) else {}


def _refuse_broken(path: Path, error: Exception) -> NoReturn:
    told = " ".join(str(error).split())[:200]
    raise BackboneError(
        f"{path} is truncated or damaged",
        cause=f"{type(error).__name__}: {told or 'it ends too early'}",
        fix=BROKEN,
    ) from error


def _refuse_global(path: Path, asked: str) -> NoReturn:
    whole = asked.startswith(("torch.nn.modules.", "torchvision.models", "timm.models", "__main__."))
    what = "it is a pickled module, not a dict of tensors" if whole else "reading weights never needs it"
    raise BackboneError(
        f"{path} asks to run {asked}", cause=f"unpickling it would import and call {asked}; {what}", fix=TRUST
    )


# ---------------------------------------------------------------------------------------------------------------
# What a pickle may name. Nothing in these lists is imported: each name gives an inert stand-in.


class _Inert:
    """Takes the place of an object we have no use for; keeps its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)})

    def __hash__(self) -> int:
        return id(self)


class _InertDict:
    """Takes the place of a subclass of dict; gives a plain OrderedDict, the one kind torch's unpickler fills."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


INERT_DICTS = (
    "addict.addict.Dict", "collections.defaultdict", "classy_vision.generic.util.AttrDict",
    "detectron2.config.config.CfgNode", "fvcore.common.config.CfgNode", "yacs.config.CfgNode",
    "lightning_fabric.utilities.data.AttributeDict", "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict", "pytorch_lightning.utilities.parsing.AttributeDict",
    "mmcv.utils.config.ConfigDict", "mmengine.config.config.ConfigDict", "mmengine.config.ConfigDict",
    "ml_collections.config_dict.config_dict.ConfigDict", "vissl.config.attr_dict.AttrDict",
    "vissl.utils.hydra_config.AttrDict", "easydict.EasyDict", "munch.Munch",
)  # fmt: skip
INERT = (
    "argparse.Namespace", "types.SimpleNamespace", "typing.Any", "datetime.datetime", "datetime.timedelta",
    *(f"pathlib.{local}{kind}Path" for local in ("", "_local.") for kind in ("", "Posix", "Windows")),
    *(f"pathlib.{local}Pure{kind}Path" for local in ("", "_local.") for kind in ("", "Posix", "Windows")),
    *(f"builtins.{kind}" for kind in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes")),
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.base.{kind}" for kind in ("ContainerMetadata", "Metadata", "Node")),
    *(f"omegaconf.nodes.{kind}Node" for kind in
      ("Any", "Integer", "Float", "String", "Boolean", "Bytes", "Path", "Enum", "Value", "InterpolationResult")),
    "mmengine.config.config.Config", "mmcv.utils.config.Config", "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.random._pickle.__randomstate_ctor", "numpy.random._pickle.__generator_ctor",
    "numpy.random._pickle.__bit_generator_ctor",
)  # fmt: skip


def _numpy_globals() -> dict[str, Any]:
    """What rebuilds numpy arrays, dtypes and scalars, under numpy 1's and numpy 2's module names."""
    from numpy._core import multiarray, numeric

    found: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for module in ("numpy.core", "numpy._core"):
        found[f"{module}.multiarray._reconstruct"] = multiarray._reconstruct
        found[f"{module}.multiarray.scalar"] = multiarray.scalar
        found[f"{module}.numeric._frombuffer"] = numeric._frombuffer  # type: ignore[attr-defined]
    return found


def _safe_globals() -> list[Any]:
    """For ``torch.serialization.safe_globals``: (stand-in, name) pairs."""
    pairs: list[Any] = [(found, name) for name, found in _numpy_globals().items()]
    pairs += [(_InertDict, name) for name in INERT_DICTS] + [(_Inert, name) for name in INERT]
    return pairs + [getattr(np.dtypes, name) for name in np.dtypes.__all__]  # the types that dtype instances have


def _full_name(module: str, name: str) -> str:
    """The Python 3 name of a global; pickles of protocol 2 keep Python 2's modules."""
    return f"{({'__builtin__': 'builtins', 'copy_reg': 'copyreg'}).get(module, module)}.{name}"


class _Forbidden(pickle.UnpicklingError):
    """A pickle asked for a global that is not allowed; the message is its full name."""


class _NumpyUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays in plain containers and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        full = _full_name(module, name)
        if full == "collections.OrderedDict":
            return OrderedDict
        if full == "_codecs.encode":
            return _latin1
        if full in INERT_DICTS:
            return _InertDict
        if full in INERT:
            return _Inert
        allowed = _numpy_globals()
        if full not in allowed:
            raise _Forbidden(full)
        return allowed[full]


def _latin1(text: str, encoding: str) -> bytes:
    """What ``_codecs.encode`` does in a pickle of bytes written for Python 2, and no other codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not allowed")
    return text.encode("latin1")


class _Names(pickle.Unpickler):
    """Collects the globals a pickle names. Every one becomes an inert stand-in, so nothing of it runs."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self.found: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        self.found.append(_full_name(module, name))
        return _Sponge

    def persistent_load(self, pid: Any) -> Any:
        return _Sponge()


class _Sponge(_Inert):
    """An inert stand-in that also takes items, so that a pickle can be followed to its end."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Sponge:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


def _asked_of(path: Path, error: Exception) -> str | None:
    """The full name of the global for which torch refused a file, or None if it was refused for something else."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    told = re.search(r"GLOBAL (\S+)", str(error))
    names = _named_in(path)
    if told:
        short = told[1]
        return next((n for n in names if n == short or n == f"builtins.{short}"), short)
    if "Unsupported operand" in str(error):  # a later pickle protocol: name what is beyond plain tensors
        known = {name for _, name in (p for p in _safe_globals() if isinstance(p, tuple))}
        odd = [n for n in names if n not in known and not re.match(r"torch\._utils\.|torch\.\w+$|collections\.O", n)]
        return odd[0] if odd else "a pickle protocol later than torch.save's own"
    return None


def _named_in(path: Path) -> list[str]:
    """All globals that the pickles of a torch file name."""
    found: list[str] = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            with archive.open(name) as stream:
                _follow(stream, found)  # type: ignore[arg-type]
        return found
    with path.open("rb") as stream:
        for _ in range(4):  # magic number, protocol, system, object
            _follow(stream, found)
    return found


def _follow(stream: BinaryIO, found: list[str]) -> None:
    names = _Names(stream)
    try:
        names.load()
    except Exception:  # a hostile pickle may end anyhow; what it named until then is what we want
        pass
    finally:
        found.extend(names.found)
