"""What readers of files owe: data sets and layouts of checkpoints."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from evalsuite.backbone import build
from evalsuite.checkpoints import Candidate, File, Layout, State, load_backbone
from evalsuite.data import Source
from evalsuite.errors import DataError, UsageError
from evalsuite.hooks import Registry, load
from evalsuite.seeding import manual_seed
from evalsuite.testing._faults import Faults

__all__ = ["check_checkpoint", "check_dataset"]

IMAGES = 12


def check_dataset(make: Callable[[], Source[Any]]) -> None:
    """Check what every data set owes: its demo world is found, read and sound, and what is missing is refused.

    Raises AssertionError with a line for each fault.
    """
    faults = Faults()
    with faults.during("making it"), tempfile.TemporaryDirectory() as folder:
        layout = make()
        for name in ("name", "tree", "homepage", "licence", "citation"):
            faults.unless(bool(getattr(layout, name, "")), f"it does not say its {name}")
        empty, root = Path(folder) / "empty", Path(folder) / "root"
        empty.mkdir()
        root.mkdir()
        with faults.during("locating it in an empty folder"), contextlib.suppress(DataError):
            there = layout.locate(empty)
            faults.unless(bool(layout.generated), f"it finds itself in an empty folder: {there}")
        with faults.during("its demo world"), contextlib.suppress(UsageError):  # a layout of others' data has none
            _check_demo(layout, root, faults)
    faults.settle()


def _check_demo(layout: Source[Any], root: Path, faults: Faults) -> None:
    path = layout.demo(root, 0, IMAGES)
    files = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    faults.unless(bool(files) or path.is_file(), "its demo world is empty")
    located = path in (layout.locate(path), _located(layout, root))
    faults.unless(located, f"its demo world lies in {path.name}, and is not found there")
    layout.demo(root, 0, IMAGES)
    again = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    faults.unless(again == files, "asked for again, the demo world is written anew")
    splits = layout.splits(path)
    for role, split in layout.roles(path).items():
        faults.unless(split in splits, f"its {role} split {split!r} is not among its splits")
    for split in splits:
        layout.load(path, split)
    if "train" in layout.roles(path):
        with contextlib.suppress(UsageError):  # data without images
            image = layout.learning(path).train[0]
            fits = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            faults.unless(fits, f"its images to learn from are {image.shape} {image.dtype}, not (H, W, 3) uint8")
    for fault in layout.verify(path).faults:
        faults.unless(False, f"its own demo world has a fault: {fault}")


def _located(layout: Source[Any], root: Path) -> Path | None:
    try:
        return layout.locate(root)
    except DataError:  # a layout of anybody's data is named by its own folder
        return None


def check_checkpoint(
    layout: Layout,
    *,
    arch: str | None = None,
    spell: Callable[[str], str] | None = None,
    registry: Registry | None = None,
) -> None:
    """Check what every layout owes: it passes over tensors that are not its own, and claims its own in full.

    ``arch`` is an architecture it knows, and ``spell`` gives a tensor's name in its files for the name in that
    architecture: a file is written so, and must load as the very weights. Raises AssertionError with a line for each
    fault.
    """
    faults, registry = Faults(), registry or load().registry
    strangers = {
        "no tensor": {},
        "one tensor of no network": {"x": torch.zeros(())},
        "a network of another family": {f"blocks.{i}.attention.w": torch.zeros(4, 4) for i in range(3)},
    }
    with tempfile.TemporaryDirectory() as folder:
        for what, tensors in strangers.items():
            with faults.during(f"given {what}, it"):
                candidates = [
                    c for c in layout(State(tensors, "", File(Path("x.pth"), tensors, ""))) if c.arch is not None
                ]
                claimed = ", ".join(str(c.arch) for c in candidates)
                faults.unless(not candidates, f"given {what}, it claims {claimed}")
        if arch is not None and spell is not None:
            with faults.during("reading a file of its own"):
                _check_own(layout, arch, spell, Path(folder) / "own.safetensors", registry, faults)
    faults.settle()


def _check_own(
    layout: Layout, arch: str, spell: Callable[[str], str], path: Path, registry: Registry, faults: Faults
) -> None:
    manual_seed(0)
    wanted = build(arch, registry).net.state_dict()
    tensors = {spell(name): value.contiguous() for name, value in wanted.items()}
    faults.unless(len(tensors) == len(wanted), "spell gives two tensors one name")
    safetensors.torch.save_file(tensors, path)
    candidates: list[Candidate] = list(layout(State(tensors, "", File(path, tensors, ""))))
    known = [c for c in candidates if c.arch == arch]
    if not faults.unless(bool(known), f"it does not know a file of {arch}: it claims {[c.arch for c in candidates]}"):
        return
    lacking = sorted(wanted.keys() - known[0].tensors.keys())
    faults.unless(not lacking, f"of a file of {arch} it leaves out {', '.join(lacking[:5])}")
    for name, source in known[0].sources.items():
        for each in (source,) if isinstance(source, str) else source:
            there = {each, known[0].prefix + each} & tensors.keys()
            faults.unless(bool(there), f"it says {name} came from {each}, which is not in the file")
    loaded = load_backbone(path, registry).backbone.net.state_dict()
    differ = [n for n, v in loaded.items() if n in wanted and not torch.equal(v, wanted[n]) and v.abs().sum() > 0]
    faults.unless(not differ, f"loaded, {', '.join(differ[:5])} are not what the file holds")
