"""Headers of strangers, mutated: none ends the process, takes memory that the file has not, opens another file or asks
the network, and each is read or refused."""

from __future__ import annotations

import json
import runpy
import socket
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalsuite.backbone import HEADER, build
from evalsuite.checkpoints import load_backbone
from evalsuite.errors import Refusal
from evalsuite.hooks import Registry

EXAMPLES = settings.default.max_examples if settings.default.max_examples > 1000 else 80
REPOSITORY = Path(__file__).parents[2]
mutated: Callable[[st.DataObject, dict[str, Any]], str] = runpy.run_path(
    str(Path(__file__).with_name("test_results.py"))
)["mutated"]
ARCHES = [
    "small:resnet", "small:resnet20", "small:wrn16_8", "timm:test_vit", "timm:test_resnet", "torchvision:resnet18",
    "timm:vit_giant_patch14_dinov2", "torchvision:vit_h_14", "objects:slate", "objects:state", "rotnet:nin4",
    "timm:hf-hub:a/b",
]  # fmt: skip
OPTIONS: dict[str, list[Any]] = {
    "img_size": [8, 100_000, [4096, 4096], "8"], "pretrained": [True], "checkpoint_path": ["/etc/passwd"],
    "depth": [512, 10**9], "embed_dim": [1, 1 << 14], "layers": [[1, 1], [512] * 16, []], "width": [1, 1 << 14, -1],
    "pretrained_cfg": [{"url": "http://evil.example/x"}], "patch_size": [1, 256], "image_size": [1, 4096],
    "act_layer": ["gelu", "os.system"], "norm_layer": ["layernorm", ""], "norm_eps": [1e-6, {"": 0.5}, float("nan")],
    "num_heads": [0, 3, 1 << 14], "mlp_ratio": [64, 1e-300], "window_size": [256], "reg_tokens": [256],
    "slots": [256], "size": [1024], "words": [1 << 16], "init_values": [0.0, 1e400],
}  # fmt: skip
SHAPES: list[list[int]] = [[], [0], [1 << 40, 0], [2**62], [-1], [1] * 70, [1 << 20, 1 << 20], [3, 3]]
BESIDE = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 8, 8]}, "architecture": "test_vit",
          "model_args": {"depth": 2, "img_size": 8}, "num_attention_heads": 2, "hidden_size": 8}  # fmt: skip


TOUCHED: list[Any] = []  # what a child touched that it must not


def consume(folder: Path, file: Any, registry: Registry) -> None:
    """Load a file, which is loaded or refused in three lines and touches nothing else."""
    _watch(folder.parent)
    path = folder / "model.safetensors"
    path.write_bytes(file.content)
    if file.beside:
        path.with_name("config.json").write_text(file.beside, encoding="utf-8", errors="surrogatepass")
    told = ""
    try:
        load_backbone(path, registry)
    except Refusal as refusal:
        told = str(refusal)
    assert len(told.splitlines()) in (0, 3)
    assert len(told.encode()) < 4000
    assert not TOUCHED


@lru_cache(maxsize=1)
def _watch(folder: Path) -> None:
    mine = (str(folder), str(REPOSITORY), sys.prefix, sys.base_prefix, "/proc/", "/sys/", "/dev/")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        other = event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith(mine)
        if other or event in ("os.system", "subprocess.Popen", "socket.connect", "socket.getaddrinfo"):
            TOUCHED.append((event, arguments))

    def refuse(*arguments: Any, **options: Any) -> Any:
        TOUCHED.append(arguments)
        raise OSError("the network was asked")

    sys.addaudithook(watch)
    socket.create_connection = refuse


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header, content[8 + length :]


def whole(header: str, tensors: bytes, length: int | None = None) -> bytes:
    raw = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if length is None else length) + raw + tensors


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> bytes:
    """A file of this suite's. It and ``theirs`` are loaded once: children neither grow nor wait by imports."""
    path = tmp_path_factory.mktemp("ours") / "backbone.safetensors"
    build("small:resnet", registry, layers=[1, 1], width=4, image_size=8).save(path, {"method": "none", "epochs": 3})
    load_backbone(path, registry)
    return path.read_bytes()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> bytes:
    path = tmp_path_factory.mktemp("theirs") / "model.safetensors"
    state = build("small:resnet10", registry, width=4).net.state_dict()
    header = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]", "image_size": "32"}
    safetensors.torch.save_file(
        {k: v.clone() for k, v in state.items()}, path, header | {"note": "RGB in [0,1], 32x32"}
    )
    load_backbone(path, registry)
    return path.read_bytes()


@settings(max_examples=5 * EXAMPLES // 8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_header_of_ours_that_was_changed_does_harm(files: Any, ours: bytes, theirs: bytes, data: st.DataObject):
    header, tensors = parts(ours)
    inner = json.loads(header["__metadata__"][HEADER])
    if data.draw(st.booleans()):
        inner["spec"]["arch"] = data.draw(st.sampled_from(ARCHES))
    names = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=3, unique=True))
    inner["spec"]["options"] |= {name: data.draw(st.sampled_from(OPTIONS[name])) for name in names}
    text = mutated(data, inner) if data.draw(st.booleans()) else json.dumps(inner)
    header["__metadata__"][HEADER] = text
    files.add(whole(json.dumps(header), tensors))


@settings(max_examples=EXAMPLES // 4, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_safetensors_header_that_was_changed_does_harm(files: Any, ours: bytes, theirs: bytes, data: st.DataObject):
    header, tensors = parts(data.draw(st.sampled_from([ours, theirs])))
    for name in data.draw(st.lists(st.sampled_from(sorted(header.keys() - {"__metadata__"})), max_size=4)):
        field = data.draw(st.sampled_from(["shape", "dtype", "data_offsets"]))
        header[name][field] = data.draw(
            {
                "shape": st.sampled_from(SHAPES),
                "dtype": st.sampled_from(["F64", "F8_E4M3", "BOOL", "I64", "U8", "C64", "X"]),
                "data_offsets": st.lists(st.sampled_from([0, 4, 36, 2**31, 2**63, -1]), max_size=3),
            }[field]
        )
    text = mutated(data, header) if data.draw(st.booleans()) else json.dumps(header)
    length = data.draw(st.sampled_from([None, None, None, 0, 1, 2**31, 2**63, 2**64 - 1]))
    cut = data.draw(st.sampled_from([None, None, -1, 0, 7]))
    files.add(whole(text, tensors[:cut], length))


@settings(max_examples=EXAMPLES // 8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_words_of_strangers_do_harm(files: Any, theirs: bytes, data: st.DataObject):
    header, tensors = parts(theirs)
    odd = st.sampled_from(
        ["NaN", "1e400", "[" * 3000, '["a"]', "[1,2,3]", "0", "-1", "9" * 400, "\ud800", "\x1b[2J", *ARCHES]
    )
    for name in data.draw(st.lists(st.sampled_from(["arch", "mean", "std", "image_size", "note", HEADER]), max_size=3)):
        header["__metadata__"][name] = data.draw(odd)
    files.add(whole(json.dumps(header), tensors), mutated(data, BESIDE) if data.draw(st.booleans()) else "")


KNOWN = {
    "as deep as the stack": '{"spec": ' * 100_000,
    "twice the same key": '{"format": 1, "format": 1, "spec": {}, "spec": null}',
    "a long one": '{"format": 1, "x": "' + "x" * (3 << 20) + '"}',
    "a number of too many digits": '{"format": ' + "1" * 10_000 + "}",
}


def test_headers_that_are_known_to_hurt(files: Any, ours: bytes):
    header, tensors = parts(ours)
    for text in KNOWN.values():
        header["__metadata__"][HEADER] = text
        files.add(whole(json.dumps(header), tensors))


def test_a_file_that_is_whole_is_loaded(ours: bytes, theirs: bytes, registry: Registry, tmp_path: Path):
    for name, content in (("ours", ours), ("theirs", theirs)):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        loaded = load_backbone(tmp_path / f"{name}.safetensors", registry)
        assert loaded.report.matched == 1
        assert torch.isfinite(loaded.backbone(torch.zeros(1, 3, 32, 32)).pooled).all()
