"""Checkpoints of strangers, made up and mutated: none ends the process, none takes memory that the file has not, and
each is read or refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalsuite.checkpoints.reading import read, states
from evalsuite.checkpoints.unpickling import _ALLOWED
from evalsuite.errors import BackboneError
from evalsuite.hooks import Registry

EXAMPLES = settings.default.max_examples // 2 if settings.default.max_examples > 1000 else 80
NAMES = sorted(_ALLOWED)
HOSTILE = ["posix.system", "builtins.eval", "torch.load", "numpy.lib.npyio.load", "evalsuite.errors.Refusal", "a.b"]
REBUILD = [f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter")]


def consume(folder: Path, file: Any, registry: Registry) -> None:
    """Read a file and compute with its tensors."""
    path = folder / "model.pth"
    path.write_bytes(file.content)
    try:
        for state in states(read(path)):
            for tensor in state.tensors.values():
                tensor.double().sum()
    except BackboneError:
        pass
    except RuntimeError as error:  # of sums of what has none
        if "not implemented" not in str(error) and "not supported" not in str(error):
            raise


# --- a grammar of pickles ---------------------------------------------------------------------------------------


def name(full: str) -> bytes:
    module, _, attribute = full.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def octets(value: bytes) -> bytes:
    return b"C" + bytes([len(value)]) + value


sizes = st.sampled_from([0, 1, 2, 3, 8, -1, 255, 2**31 - 1, 2**31, 2**40, 2**62, 2**64])
words = st.sampled_from(
    [
        "f4",
        "i8",
        "O8",
        "V8",
        "O",
        "b",
        "U4",
        "M8",
        "<",
        ">",
        "|",
        "latin1",
        "zip",
        "storage",
        "cpu",
        "0",
        "w",
        "__class__",
    ]
)
names = st.sampled_from(NAMES) | st.sampled_from(REBUILD) | st.sampled_from(HOSTILE)
leaves = st.one_of(
    sizes.map(number), words.map(text), st.binary(max_size=16).map(octets), names.map(name),
    st.sampled_from([b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"]), st.integers(0, 3).map(lambda i: b"h%c" % i),
)  # fmt: skip


def grown(parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    several = st.lists(parts, max_size=5)
    return st.one_of(
        several.map(lambda items: b"(" + b"".join(items) + b"t"),
        several.map(lambda items: b"](" + b"".join(items) + b"e"),
        st.lists(st.tuples(words.map(text) | parts, parts), max_size=4).map(
            lambda items: b"}(" + b"".join(k + v for k, v in items) + b"u"
        ),
        st.tuples(names.map(name) | parts, several).map(lambda p: p[0] + b"(" + b"".join(p[1]) + b"tR"),  # a call
        st.tuples(names.map(name) | parts, several).map(
            lambda p: p[0] + b"(" + b"".join(p[1]) + b"t\x81"
        ),  # a new object
        st.tuples(parts, parts).map(lambda p: p[0] + p[1] + b"b"),  # a state
        st.tuples(parts, st.integers(0, 3)).map(lambda p: p[0] + b"q%c" % p[1]),
        st.tuples(names.map(name), st.sampled_from(["0", "1", "x"]), sizes).map(  # a storage of tensors
            lambda p: b"(" + text("storage") + p[0] + text(p[1]) + text("cpu") + number(p[2]) + b"tQ"
        ),
        parts.map(lambda part: part + b"\x85" * 40),
    )


programs = st.recursive(leaves, grown, max_leaves=30).map(lambda body: b"\x80\x02" + body + b".")


def zipped(program: bytes, storages: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
    return out.getvalue()


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(program=programs, as_zip=st.booleans())
def test_made_up_pickles_are_read_or_refused(files: Any, program: bytes, as_zip: bool):
    files.add(zipped(program, {"0": bytes(64), "1": bytes(8)}) if as_zip else program)


# --- mutations of real files ------------------------------------------------------------------------------------


def _saved(content: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def _rezipped(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A zip of torch.save with another program in it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, raw in members.items():
            archive.writestr(member, change(raw) if member.endswith("data.pkl") else raw)
    return out.getvalue()


STATE = OrderedDict(
    a=torch.arange(24.0).view(2, 3, 4).transpose(0, 2), b=torch.ones(3, dtype=torch.int64), c=torch.zeros(2, 2).half()
)
ARRAYS = {"model": {"w": np.arange(6.0).reshape(2, 3), "n": np.float32(2), "k": np.ones((2, 2), np.int64, order="F")}}
REAL = {
    "zip": _saved({"state_dict": STATE, "epoch": 3, "rng": np.random.RandomState(0).get_state()}),
    "legacy": _saved(STATE, _use_new_zipfile_serialization=False),
    **{f"pickle {protocol}": pickle.dumps(ARRAYS, protocol) for protocol in (2, 4, 5)},
}


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    kinds = ["flip", "cut", "twice", "number", "splice"]
    steps = draw(
        st.lists(st.tuples(st.sampled_from(kinds), st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4)
    )

    def change(content: bytes) -> bytes:
        for kind, share, new in steps:
            at = int(share * max(0, len(content) - 1))
            if kind == "flip":
                content = content[:at] + bytes([content[at] ^ (new[0] or 1)]) + content[at + 1 :]
            elif kind == "cut":
                content = content[:at] + content[at + new[0] :]
            elif kind == "twice":
                content = content[: at + new[0]] + content[at:]
            elif kind == "number":
                content = content[:at] + b"\xff\xff\xff\x7f" + content[at + 4 :]
            else:
                content = content[:at] + new + content[at:]
            if not content:
                break
        return content

    return change


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from([*REAL, "program"]), change=mutations())
def test_mutated_files_are_read_or_refused(files: Any, kind: str, change: Callable[[bytes], bytes]):
    files.add(_rezipped(REAL["zip"], change) if kind == "program" else change(REAL[kind]))


# --- attacks that are known -------------------------------------------------------------------------------------


DTYPE = name("numpy.dtype") + b"(" + text("O8") + b"\x89\x88tR"
CLEARED = DTYPE + b"(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
ATTACKS = {
    "a scalar of cleared objects": name("numpy.core.multiarray.scalar") + CLEARED + octets(b"A" * 8) + b"\x86R",
    "an array of cleared objects": name("numpy.core.multiarray._reconstruct")
    + name("numpy.ndarray") + number(0) + b"\x85" + octets(b"b") + b"\x87R"
    + b"(" + number(1) + number(4) + b"\x85" + CLEARED + b"\x89" + octets(b"A" * 32) + b"tb",
    "a new array of any size": name("numpy.ndarray") + number(2**34) + b"\x85\x85\x81",
    "as many zeros as it likes": name("builtins.bytearray") + number(2**34) + b"\x85R",
    "tuples as deep as the stack": b")" + b"\x85" * 300_000 + b"}" + b")" + b"\x85" * 300_000 + b"Ns0",
    "a memo of gigabytes": b"Nr" + struct.pack("<I", 2**31),
    "a class that is changed": name("argparse.Namespace") + b"N}" + text("__hash__") + b"Ns\x86b",
    "a function that is changed": name("torch.Size") + b"N}" + text("_call") + b"Ns\x86b",
    "a tensor behind its storage": name("torch._utils._rebuild_tensor_v2")
    + b"((" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + number(4) + b"tQ" + number(0)
    + number(2**33) + b"\x85" + number(1) + b"\x85\x89Nt" + b"R",
    "a tensor of one number, many times": name("torch._utils._rebuild_tensor_v2")
    + b"((" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + number(4) + b"tQ" + number(0)
    + number(2**40) + b"\x85" + number(0) + b"\x85\x89Nt" + b"R",
}  # fmt: skip


def test_known_attacks_do_nothing(files: Any):
    for attack in ATTACKS.values():
        program = b"\x80\x02}" + text("w") + attack + b"s."
        files.add(program)
        files.add(zipped(program, {"0": bytes(16)}))


def test_a_file_that_unpacks_to_many_times_its_size_is_refused(files: Any):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(100):
                member.write(bytes(1 << 20))
    files.add(out.getvalue())


def test_shared_parts_are_walked_once(tmp_path: Path):
    node: dict[str, Any] = {"w": np.ones(3, np.float32)}
    for _ in range(6):
        node = {str(i): node for i in range(20)}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(node, 4))
    assert len(states(read(path))) == 1


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(BackboneError, match="no regular file"):
        read(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", REAL)
def test_real_files_come_back_as_they_were(kind: str, tmp_path: Path):
    path = tmp_path / "x.pth"
    path.write_bytes(REAL[kind])
    (state,) = states(read(path))
    wanted: dict[str, Any] = (
        dict(STATE)
        if kind in ("zip", "legacy")
        else {k: torch.as_tensor(v) for k, v in ARRAYS["model"].items() if np.ndim(v)}
    )
    assert set(state.tensors) == set(wanted)
    assert all(torch.equal(state.tensors[k], wanted[k]) and state.tensors[k].dtype == wanted[k].dtype for k in wanted)
