"""What planning costs: memory of five backbones in one request against one, and cells that are there already.

Each is measured in a process of its own. Memory is the most that the process ever held; the five files hold ResNet-50s
of other weights, evaluated by k-NN on 24 small images. Of the cells nothing is known but their pickles.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision

from evalsuite.hooks import Registry, load
from evalsuite.progress import Progress
from evalsuite.runner import Cell, Request, plan, settle

BACKBONES, CELLS = 5, 10_000
EVALUATE = """
import pickle, resource, sys
from evalsuite.hooks import load
from evalsuite.progress import Progress
from evalsuite.runner import execute
results = execute(pickle.load(sys.stdin.buffer), load(environ={"EVALSUITE_PLUGINS": ""}).registry, Progress(quiet=True))
assert all(result.status == "ok" for _, result in results)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
DECIDE = """
import pickle, sys, time
began = time.perf_counter()
from evalsuite.runner import existing
there = sum(existing(cell) is not None for cell in pickle.load(sys.stdin.buffer))
print(there, time.perf_counter() - began, time.process_time(), "torch" in sys.modules)
"""


def run() -> Iterator[dict[str, Any]]:
    registry = load(environ={"EVALSUITE_PLUGINS": ""}).registry
    with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(os.environ, EVALSUITE_CACHE=f"{scratch}/cache"):
        root = Path(scratch)
        request = _request(root)
        for seed in range(BACKBONES):
            torch.manual_seed(seed)
            torch.save(torchvision.models.resnet50().state_dict(), root / f"net{seed}.pth")
        files = [str(root / f"net{seed}.pth") for seed in range(BACKBONES)]
        one, five = (_peak(replace(request, backbones=files[:n], out=root / f"out{n}")) for n in (1, BACKBONES))
        yield {
            "name": f"{BACKBONES} ResNet-50s in one request", "one_mb": one, "all_mb": five, "ratio": five / one,
            "goal": "<= 1.3",
        }  # fmt: skip
        cells = _there(replace(request, backbones=["random:timm:test_resnet"], out=root / "out"), registry)
        there, seconds, cpu, has_torch = _child(DECIDE, cells).split()
        yield {
            "name": "cells that are there", "cells": int(there), "seconds": float(seconds), "cpu_s": float(cpu),
            "cells_s": int(there) / float(seconds), "bytes_a_cell": len(pickle.dumps(cells[0])), "torch": has_torch,
            "goal": "10,000 in < 5 s without torch, <= 4,096 bytes",
        }  # fmt: skip


def _request(root: Path) -> Request:
    images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(24) % 2
    np.savez(
        root / "data.npz", train_images=images[:16], train_labels=labels[:16], test_images=images[16:],
        test_labels=labels[16:],
    )  # fmt: skip
    return Request(
        backbones=[], tasks=["classify"], protocol="knn", settings={"ks": "[1]"}, data=f"npz:{root / 'data.npz'}",
        device="cpu", workers=0, backbone_options={"image_size": 64}, command="evalsuite run",
    )  # fmt: skip


def _peak(request: Request) -> float:
    """MiB."""
    return float(_child(EVALUATE, request))


def _there(request: Request, registry: Registry) -> list[Cell]:
    """As many cells as of one request of that many seeds, with the result of the first one in the place of each."""
    (first,) = plan(request, registry, Progress(quiet=True))
    result = settle(first, registry)
    cells = []
    for seed in range(CELLS):
        path = first.path.with_name(f"seed-{seed}.json")
        path.write_text(result.model_copy(update={"seed": seed}).model_dump_json(indent=2))
        cells.append(replace(first, request=replace(first.request, seeds=(seed,)), path=path))
    return cells


def _child(code: str, given: Any) -> str:
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(given), capture_output=True, check=True)
    return done.stdout.decode()
