"""Pickles of strangers: tensors and arrays in plain containers are rebuilt, by functions of ours, and nothing is run.

A pickle is a program: it names functions and classes, calls them with arguments of its own making, and sets the state
of what they return. So a list of names that may be called is not enough. Here

- the instructions are read first (:func:`_inspect`): how many, how deep tuples are nested, how far memory is addressed;
- every name stands for a function or class in this file, which distrusts its arguments: sizes are bounded by the
  bytes that the file has, dtypes are booleans, integers, floats and complex numbers, and their state is a byte order;
- classes and functions given to a pickle cannot be changed by it.

Files of ``torch.save``, of both its formats, are read the same way: their pickles by the same unpickler, their tensors
from the bytes behind them. :class:`Forbidden` names what else a pickle needs.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

__all__ = ["Forbidden", "Parameter", "load_legacy", "load_pickle", "load_zip"]

INSTRUCTIONS = 20_000_000  # of one pickle
DEEPEST = 1000  # tuples in tuples: to hash them takes that much of the processor's stack
SPARE = 64 << 20  # bytes that a small file may take
SHARED = 8  # times its own size that tensors of a file may be in all, for several names may share their numbers


class Forbidden(pickle.UnpicklingError):
    """A pickle names a global that is not allowed; the message is its full name."""


def load_pickle(path: Path) -> Any:
    """The content of a plain pickle, numpy arrays in plain containers. Raises as any reader of broken bytes does."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Unpickler(content, len(content)).load()


def load_zip(path: Path) -> Any:
    """The content of a file of ``torch.save``, tensors mapped from the file. Raises as :func:`load_pickle`."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if sum(member.file_size for member in members.values()) > SHARED * size + SPARE:
            raise pickle.UnpicklingError("it unpacks to many times its size: torch never compresses")
        name = next(n for n in members if n.endswith("data.pkl"))
        root = name.removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("its numbers are in big-endian order; save it again on a usual machine")
        program = archive.read(name)
        return _Unpickler(io.BytesIO(program), size, _Archive(path, archive, f"{root}data/", members).storage).load()


def load_legacy(path: Path) -> Any:
    """The content of a file of ``torch.save`` before torch 1.6. Raises as :func:`load_pickle`."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(3):  # magic number, protocol, sizes of the system's types
            _Unpickler(content, size).load()
        storages = _Legacy(size)
        tree = _Unpickler(content, size, storages.storage).load()
        keys = _Unpickler(content, size).load()
        storages.fill(content, keys)
    return tree


def _inspect(stream: Any) -> None:
    """Refuse a pickle whose instructions alone could exhaust memory or the stack; the stream comes back where it was.

    Depths are those of tuples in tuples, the only containers that are hashed, followed through the stack and the memo.
    """
    start = stream.tell()
    try:
        _count(stream)
    except (ValueError, IndexError, KeyError) as error:  # what is no pickle, or not the whole of one
        raise pickle.UnpicklingError(f"it is truncated or no pickle: {error}") from error
    stream.seek(start)


def _count(stream: Any) -> None:
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    argument: Any
    for count, (code, argument, _) in enumerate(pickletools.genops(stream)):
        if count > INSTRUCTIONS:
            raise pickle.UnpicklingError(f"more than {INSTRUCTIONS} instructions")
        name = code.name
        if name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument > count:
                raise pickle.UnpicklingError(f"index {argument} of its memory after {count} instructions")
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        else:
            _follow(code, name, stack, marks)


def _follow(code: Any, name: str, stack: list[int], marks: list[int]) -> None:
    """What an instruction does to the depths on the stack."""
    before, after = code.stack_before, code.stack_after
    if pickletools.markobject in before:
        cut = marks.pop()
        taken = stack[cut:]
        keep = before.index(pickletools.markobject)  # APPENDS and its like take what is below the mark, too
        del stack[cut:]
    else:
        keep = len(before)
        taken = stack[len(stack) - keep :]
    if keep > len(stack):
        raise pickle.UnpicklingError("it takes more from its stack than is there")
    below = stack[len(stack) - keep :]
    del stack[len(stack) - keep :]
    depth = 0
    if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"):
        depth = 1 + max([*taken, *below], default=0)
        if depth > DEEPEST:
            raise pickle.UnpicklingError(f"tuples nested more than {DEEPEST} levels deep")
    elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
        depth = below[0]
    stack.extend([depth] * len(after))


# ---------------------------------------------------------------------------------------------------------------
# What a pickle may name. Nothing in these lists is imported: each name gives a stand-in.


class _Fixed(type):
    """The type of classes that a pickle may hold, and may not change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a pickle may not change a class")


class _Function:
    """A function that a pickle may call, and may not change."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a pickle may not change a function")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


class _Inert(metaclass=_Fixed):
    """Stands in for an object we have no use for; keeps its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)})

    def __hash__(self) -> int:
        return id(self)


class _InertDict(OrderedDict[Any, Any], metaclass=_Fixed):
    """Stands in for a dict and its subclasses, whatever they are called with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass  # attributes of a dict (the _metadata of a state dict): nothing reads them


class Parameter(metaclass=_Fixed):
    """A parameter as old files pickle it; ``data`` is its tensor, None where there is none."""

    def __init__(self, data: Any = None, *rest: Any) -> None:
        self.data = data if isinstance(data, Tensor) else None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and state and isinstance(state[0], Tensor):
            self.data = state[0]

    def __hash__(self) -> int:
        return id(self)


class _Dtype(metaclass=_Fixed):
    """A numpy dtype: the text it is made of, and its byte order. ``plain`` is None for one that holds no numbers."""

    def __init__(self, text: Any = "", *rest: Any) -> None:
        self.text, self.order = text if isinstance(text, str) else "", "="

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("a dtype whose state is more than a byte order")
        self.order = order

    def __hash__(self) -> int:
        return id(self)

    @property
    def plain(self) -> np.dtype[Any] | None:
        kind, width = self.text[:1], self.text[1:]
        if kind not in tuple("biufc") or width not in ("1", "2", "4", "8", "16"):
            return None
        try:
            return np.dtype(f"{self.order}{self.text}")
        except TypeError:
            return None


class _Array(np.ndarray[Any, Any]):
    """A numpy array whose numbers are plain; one of objects or text stays empty."""

    def __new__(cls, *args: Any) -> _Array:
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 4:
            raise pickle.UnpicklingError("an array whose state is no tuple of shape, dtype, order and numbers")
        shape, dtype, fortran, content = state[-4:]
        numbers = _numbers(content, dtype, shape)
        if numbers is not None:
            checked: Any = (1, shape, numbers.dtype, isinstance(fortran, int) and bool(fortran), numbers.tobytes())
            super().__setstate__(checked)


def _numbers(content: Any, dtype: Any, shape: Any) -> np.ndarray[Any, Any] | None:
    """Bytes as a row of numbers, just as many as the shape says; None for a dtype of something else."""
    kind = dtype.plain if type(dtype) is _Dtype else None
    if type(dtype) is not _Dtype or not isinstance(shape, tuple) or not all(_natural(n) for n in shape):
        raise pickle.UnpicklingError("an array of no dtype, or no shape")
    if kind is None:
        return None
    raw = content.encode("latin1") if isinstance(content, str) else content  # text is what Python 2 called bytes
    if not isinstance(raw, bytes | bytearray) or len(shape) > 32 or len(raw) != math.prod(shape) * kind.itemsize:
        raise pickle.UnpicklingError("an array with more or fewer numbers than its shape")
    return np.frombuffer(raw, kind)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _reconstruct(*args: Any) -> _Array:
    return _Array()


def _scalar(dtype: Any, content: Any = b"") -> Any:
    numbers = _numbers(content, dtype, (1,))
    return _Inert() if numbers is None else numbers[0]


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    numbers = _numbers(bytes(content) if isinstance(content, pickle.PickleBuffer) else content, dtype, shape)
    return _Inert() if numbers is None else numbers.reshape(shape, order="F" if order == "F" else "C")


def _encode(text: Any, encoding: Any = None) -> bytes:
    """What ``_codecs.encode`` does in a pickle of bytes written for Python 2, and no other codec."""
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise pickle.UnpicklingError(f"codec {str(encoding)[:20]!r} is not allowed")
    return text.encode("latin1")


def _bytearray(content: Any = b"", encoding: Any = "latin1") -> bytearray:
    if isinstance(content, str) and encoding in ("latin1", "latin-1"):
        content = content.encode("latin1")
    if not isinstance(content, bytes | bytearray | list):  # of a number it would be as many zeros
        raise pickle.UnpicklingError("a bytearray of what is no bytes")
    return bytearray(content)


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple | set):
        raise pickle.UnpicklingError("a set of what is no list")
    return set(items)


def _size(items: Any = ()) -> tuple[int, ...]:
    if not isinstance(items, list | tuple) or not all(_natural(n) for n in items):
        raise pickle.UnpicklingError("a torch.Size that is no row of numbers")
    return tuple(items)


def _parameter(data: Any, *rest: Any) -> Any:
    return data if isinstance(data, Tensor) else Parameter()


INERT_DICTS = (
    "addict.addict.Dict", "collections.defaultdict", "collections.OrderedDict", "collections.Counter",
    "classy_vision.generic.util.AttrDict", "detectron2.config.config.CfgNode", "fvcore.common.config.CfgNode",
    "yacs.config.CfgNode", "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict", "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict", "mmengine.config.ConfigDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "vissl.config.attr_dict.AttrDict", "vissl.utils.hydra_config.AttrDict", "easydict.EasyDict", "munch.Munch",
)  # fmt: skip
INERT = (
    "argparse.Namespace", "types.SimpleNamespace", "typing.Any", "datetime.datetime", "datetime.timedelta",
    *(f"pathlib.{local}{kind}Path" for local in ("", "_local.") for kind in ("", "Posix", "Windows")),
    *(f"pathlib.{local}Pure{kind}Path" for local in ("", "_local.") for kind in ("", "Posix", "Windows")),
    *(f"builtins.{kind}" for kind in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes", "complex")),
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.base.{kind}" for kind in ("ContainerMetadata", "Metadata", "Node")),
    *(f"omegaconf.nodes.{kind}Node" for kind in
      ("Any", "Integer", "Float", "String", "Boolean", "Bytes", "Path", "Enum", "Value", "InterpolationResult")),
    "mmengine.config.config.Config", "mmcv.utils.config.Config", "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.random._pickle.__randomstate_ctor", "numpy.random._pickle.__generator_ctor",
    "numpy.random._pickle.__bit_generator_ctor", "torch.device", "torch.serialization._get_layout", "torch.Tensor",
    *(f"torch._utils._rebuild_{kind}" for kind in
      ("sparse_tensor", "qtensor", "meta_tensor_no_storage", "wrapper_subclass", "device_tensor_from_numpy",
       "device_tensor_from_cpu_tensor")),
    *(f"torch.per_{kind}" for kind in
      ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric", "channel_affine_float_qparams")),
)  # fmt: skip
STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip


def _allowed() -> dict[str, Any]:
    """Stand-ins by the full names that a pickle may use."""
    functions: dict[str, Callable[..., Any]] = {
        "_codecs.encode": _encode, "builtins.bytearray": _bytearray, "builtins.set": _set, "torch.Size": _size,
        "torch._utils._rebuild_parameter": _parameter, "torch._utils._rebuild_parameter_with_state": _parameter,
    }  # fmt: skip
    for module in ("numpy.core", "numpy._core"):  # numpy 1's and numpy 2's names
        functions |= {
            f"{module}.multiarray._reconstruct": _reconstruct, f"{module}.multiarray.scalar": _scalar,
            f"{module}.numeric._frombuffer": _frombuffer,
        }  # fmt: skip
    return {
        **dict.fromkeys(INERT, _Inert), **dict.fromkeys(INERT_DICTS, _InertDict),
        **dict.fromkeys((f"numpy.dtypes.{name}" for name in np.dtypes.__all__), _Dtype),
        "numpy.dtype": _Dtype, "numpy.ndarray": _Array,
        "torch.nn.parameter.Parameter": Parameter, "torch.nn.parameter.Buffer": Parameter,
        **{f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()},
        "torch.storage.UntypedStorage": torch.uint8, "torch.storage._UntypedStorage": torch.uint8,
        **{f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
        **{name: _Function(call) for name, call in functions.items()},
    }  # fmt: skip


_ALLOWED = _allowed()


# ---------------------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors and arrays in plain containers and nothing else. ``size`` is that of the file in bytes;
    ``storage(key, dtype, numel, view)`` gives the bytes of tensors."""

    def __init__(self, stream: Any, size: int, storage: Callable[..., Storage] | None = None) -> None:
        _inspect(stream)
        super().__init__(stream, encoding="latin1")
        self._most, self._storage = SHARED * size + SPARE, storage

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"  # pickles of protocol 2 keep Python 2's names
        if full in _ALLOWED:
            return _ALLOWED[full]
        if full in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return _Function(self._tensor)
        if full == "torch._utils._rebuild_tensor_v3":
            return _Function(lambda s, o, n, by, grad, hooks, dtype, *rest: self._tensor(s, o, n, by, dtype=dtype))
        if full == "torch._tensor._rebuild_from_type_v2":
            return _Function(self._of_type)
        raise Forbidden(full)

    def persistent_load(self, pid: Any) -> Any:
        parts = [p.decode("ascii") if isinstance(p, bytes) else p for p in pid] if isinstance(pid, tuple) else []
        if self._storage is None or len(parts) not in (5, 6) or parts[0] != "storage":
            raise pickle.UnpicklingError("it refers to what is no storage of tensors")
        _, dtype, key, _, numel, *view = parts
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str | int) or not _natural(numel):
            raise pickle.UnpicklingError("a storage of no dtype, name or size")
        return self._storage(str(key), dtype, numel, view[0] if view else None)

    def _of_type(self, call: Any, kind: Any, args: Any, state: Any = None) -> Any:
        if type(call) is not _Function or not isinstance(args, tuple):
            raise pickle.UnpicklingError("a tensor made by no function that is known")
        return call(*args)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None) -> Tensor:
        """A tensor on a storage that has all of its numbers."""
        if type(storage) is not Storage or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise pickle.UnpicklingError("a tensor of no storage, size or stride")
        kind = dtype if isinstance(dtype, torch.dtype) else storage.dtype
        if len(size) != len(stride) or not all(map(_natural, (offset, *size, *stride))) or len(size) > 32:
            raise pickle.UnpicklingError("a tensor of no offset, size or stride")
        numel = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if numel else 0
        if last * kind.itemsize > storage.data.nbytes():
            raise pickle.UnpicklingError("a tensor with more numbers than its storage")
        self._most -= numel * kind.itemsize
        if self._most < 0:
            raise pickle.UnpicklingError("its tensors are many times as large as the file")
        tensor = torch.empty(0, dtype=kind).set_(storage.data, offset if numel else 0, size, stride)
        return tensor.as_subclass(_Tensor)


class _Tensor(Tensor):
    """A tensor whose size a pickle may not change once it was checked against its storage."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle may not change a tensor")


class Storage:
    """Bytes of tensors, and the dtype that they are of unless the tensor says otherwise."""

    __slots__ = ("data", "dtype")
    data: torch.UntypedStorage
    dtype: torch.dtype

    def __init__(self, data: torch.UntypedStorage, dtype: torch.dtype) -> None:
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "dtype", dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a pickle may not change a storage")


class _Archive:
    """The storages of a zip of ``torch.save``: mapped from the file, so that only what is used is read."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str, members: Mapping[str, Any]) -> None:
        self._archive, self._folder, self._members = archive, folder, members
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._known: dict[str, torch.UntypedStorage] = {}

    def storage(self, key: str, dtype: torch.dtype, numel: int, view: Any) -> Storage:
        member = self._members.get(self._folder + key)
        if member is None or view is not None or numel * dtype.itemsize > member.file_size:
            _short()
        if key not in self._known:
            self._known[key] = self._bytes(member)
        return Storage(self._known[key], dtype)

    def _bytes(self, member: zipfile.ZipInfo) -> torch.UntypedStorage:
        start = self._start(member)
        aligned = start % 16 == 0 and member.compress_type == zipfile.ZIP_STORED
        if member.file_size == 0:
            return torch.UntypedStorage(0)
        if not aligned:
            return torch.frombuffer(bytearray(self._archive.read(member)), dtype=torch.uint8).untyped_storage()
        if start + member.file_size > len(self._content):
            _short()
        part = torch.frombuffer(self._content, dtype=torch.uint8, count=member.file_size, offset=start)
        return part.untyped_storage()

    def _start(self, member: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin: behind a header whose names may be longer than the archive's list says."""
        header = self._content[member.header_offset : member.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            _short()
        name, extra = struct.unpack("<HH", header[26:30])
        return int(member.header_offset + 30 + name + extra)


class _Legacy:
    """The storages of the format before torch 1.6, whose bytes come behind the pickle that names them."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._known: dict[str, Storage] = {}

    def storage(self, key: str, dtype: torch.dtype, numel: int, view: Any) -> Storage:
        if key not in self._known:
            self._left -= numel * dtype.itemsize
            if self._left < 0:
                _short()
            self._known[key] = Storage(torch.UntypedStorage(numel * dtype.itemsize), dtype)
        whole = self._known[key]
        if view is None:
            return whole
        if not isinstance(view, tuple) or len(view) != 3 or not _natural(view[1]) or not _natural(view[2]):
            raise pickle.UnpicklingError("a view of a storage without offset and size")
        start, end = view[1] * dtype.itemsize, (view[1] + view[2]) * dtype.itemsize
        if end > whole.data.nbytes():
            _short()
        return Storage(whole.data[start:end], dtype)  # a slice shares its bytes

    def fill(self, content: Any, keys: Any) -> None:
        """Read the bytes of every storage, in the order of ``keys``."""
        if not isinstance(keys, list) or {str(key) for key in keys} != set(self._known):
            raise pickle.UnpicklingError("its list of storages is not that of its tensors")
        for key in keys:
            data, width = self._known[str(key)].data, self._known[str(key)].dtype.itemsize
            head = content.read(8)
            if len(head) < 8 or struct.unpack("<q", head)[0] * width != data.nbytes():
                _short()
            if data.nbytes():
                raw = content.read(data.nbytes())
                if len(raw) < data.nbytes():
                    _short()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that these bytes cannot be written: they are copied
                    data.copy_(torch.frombuffer(raw, dtype=torch.uint8).untyped_storage(), False)


def _short() -> NoReturn:
    raise pickle.UnpicklingError("a storage of tensors has fewer bytes than is said")
