"""Nothing that is hashed depends on the processor it is computed on."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evalsuite import Backbone
from evalsuite.checkpoints import load_backbone
from evalsuite.errors import PluginError
from evalsuite.task import Protocol

# by its folder: "tests" is also the name of a package that some distributions install
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import portable


def floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from floats(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from floats(part)


def test_every_number_of_every_protocol_is_a_short_decimal(registry):
    protocols = [p for name in registry.names("task") for p in registry.get("task", name).protocols]
    numbers = [(p.id, number) for p in protocols for number in floats(dataclasses.asdict(p))]
    assert len(numbers) > 1000
    assert [(name, n) for name, n in numbers if float(f"{n:.8g}") != n] == []


@dataclass(frozen=True, kw_only=True)
class Grid(Protocol):
    costs: tuple[float, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()


def test_a_computed_grid_hashes_alike_on_every_processor():
    one = Grid(id="g", version=1, costs=tuple(np.logspace(-6, 5, 45).tolist()), ranges=((1 / 3, 4 / 3),))
    # what a processor with other vector instructions computes: the last digit is off
    other = tuple(float(np.nextafter(cost, 1e9)) for cost in np.logspace(-6, 5, 45))
    two = Grid(id="g", version=1, costs=other, ranges=((float(np.nextafter(1 / 3, 1)), 4 / 3),))
    assert one == two
    assert one.hash == two.hash
    assert one.costs[1] == 1.7782794e-06
    assert one.hash != dataclasses.replace(one, costs=(*one.costs[:-1], one.costs[-1] * 1.0000001)).hash


def test_a_number_that_is_rounded_to_what_it_was_modifies_nothing():
    grid = Grid(id="g", version=1, costs=(1 / 3,))
    assert grid.override({"costs": "0.33333333333"}) == grid


@dataclass(frozen=True, kw_only=True)
class Careless(Protocol):
    rate: float = 0.1

    def __post_init__(self) -> None:
        """It forgets the one before."""


def test_a_protocol_that_does_not_round_its_numbers_has_no_hash():
    assert Careless(id="c", version=1).hash
    with pytest.raises(PluginError, match="more than 8 digits in rate"):
        _ = Careless(id="c", version=1, rate=1 / 3).hash


def drawn(registry: Any, seed: int = 0, arch: str = "timm:test_vit", **options: Any) -> Backbone:
    return load_backbone(f"random:{arch}", registry, seed=seed, options=options).backbone


def test_fresh_weights_are_known_by_how_they_were_drawn(registry):
    one = drawn(registry)
    assert one.identity != one.digest
    assert one.identity == drawn(registry).identity
    others = [drawn(registry, 1), drawn(registry, arch="timm:test_vit2"), drawn(registry, init_values=0.1)]
    assert len({one.identity, *(other.identity for other in others)}) == 4


def test_weights_that_are_no_longer_those_drawn_are_known_by_their_numbers(registry, tmp_path):
    backbone = drawn(registry)
    fresh, state = backbone.identity, {k: v.clone() for k, v in backbone.net.state_dict().items()}
    with torch.no_grad():
        next(backbone.net.parameters()).add_(1)
    assert backbone.identity == backbone.digest != fresh
    backbone.net.load_state_dict(state)
    assert backbone.identity == fresh
    backbone.save(tmp_path / "b.safetensors")
    assert Backbone.load(tmp_path / "b.safetensors", registry).identity == backbone.digest


def test_what_a_file_lacks_is_known_by_how_it_was_drawn(registry, tmp_path):
    state = drawn(registry).net.state_dict()
    names = [name for name in state if "blocks.1" not in name]
    torch.save({name: state[name] for name in names}, tmp_path / "half.pth")
    load = functools.partial(load_backbone, tmp_path / "half.pth", registry, arch="timm:test_vit", allow_partial=True)
    half, again, other = load().backbone, load().backbone, load(seed=1).backbone
    assert half.identity == again.identity != half.digest
    assert half.identity not in (other.identity, drawn(registry).identity)
    torch.save(state, tmp_path / "whole.pth")
    whole = load_backbone(tmp_path / "whole.pth", registry, arch="timm:test_vit").backbone
    assert whole.identity == whole.digest


def test_hashes_fingerprints_and_identities_are_those_of_another_processor(registry):
    command = [sys.executable, portable.__file__]
    run = subprocess.run(command, env=os.environ | portable.portable(), capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == portable.digests(registry)
