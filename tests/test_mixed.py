"""What a machine with a GPU does by default, on a CPU: bfloat16, channels last, pinned memory, workers.

The cases are those of ``python -m benchmarks mixed``: every engine by every dense protocol, every head and probe, the
agents, every method and modifier that is registered. Each runs once in float32 and is then held against itself.
"""

from __future__ import annotations

import multiprocessing
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data.dataloader import _BaseDataLoaderIter

from benchmarks.mixed import BF16, Case, Numbers, Way, apart, cases
from evalsuite.hooks import load
from evalsuite.task import Protocol, Task

# The largest differences measured are a third of these: of bfloat16, whose numbers have three digits, and of float32
# that is summed in another order.
BOUNDS = {"bfloat16": {"loss": 0.1, "gradient": 0.6}, "channels last": {"loss": 1e-5, "gradient": 0.01}}
OTHERS = {"bfloat16": 0.1, "channels last": 1e-4}
CASES = cases(load(environ={"EVALSUITE_PLUGINS": ""}).registry)
READING = list({case.loader: case for case in reversed(CASES) if case.loader}.values())


def each(chosen: list[Case]) -> Any:
    marks = {"detectron2": [pytest.mark.detectron2], "mmseg": [pytest.mark.mmseg], None: []}
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=marks[c.package]) for c in chosen])


def hold(way: str, far: dict[str, float]) -> None:
    assert all(value <= BOUNDS[way].get(name, OTHERS[way]) for name, value in far.items()), far


@cache
def plain(name: str) -> Numbers:
    """In float32, once."""
    return next(case for case in CASES if case.name == name)()


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them is half of so short a run."""
    monkeypatch.setattr("pretrain.train.plot", lambda *_: None)


class Narrow(TorchDispatchMode):
    """Notes what is computed in half precision of that which must not be: losses, softmax, norms, boxes."""

    WIDE = frozenset({
        "_softmax", "_log_softmax", "logsumexp", "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "huber_loss",
        "smooth_l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "log", "exp",
        "linalg_vector_norm", "cosine_similarity", "var", "std", "topk", "nms", "roi_align",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in self.WIDE:
            # of regions only where they lie, and not the map that they are drawn from
            seen = args[1:] if name == "roi_align" else args
            if any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in tree_leaves(seen)):
                self.found.add(name)
        return func(*args, **(kwargs or {}))


@each(CASES)
def test_in_bfloat16_all_is_near_what_it_is_in_float32(case: Case):
    with Narrow() as narrow:
        found = case(BF16)
    assert not narrow.found, "computed in half precision"
    hold("bfloat16", apart(found, plain(case.name)))


# the others see features of the cache, or frames by an encoder that has this layout anyway
@each([case for case in CASES if case.loader not in ("", "heads")])
def test_channels_last_moves_nothing(case: Case):
    hold("channels last", apart(case(Way(channels_last=True)), plain(case.name)))


def same(one: Numbers, other: Numbers) -> bool:
    return all(
        mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
        for mine, theirs in ((one.losses, other.losses), (one.others, other.others))
    )


@each(READING)
def test_with_workers_it_ends_in_the_same_bits(case: Case):
    assert same(case(Way(workers=2)), plain(case.name))
    assert not multiprocessing.active_children(), "workers outlive their run, and would keep the process from ending"


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """torch's loader puts batches into page-locked memory as if there was a GPU; here that is a copy. What was put."""
    found: list[torch.Tensor] = []
    begin = _BaseDataLoaderIter.__init__

    def pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        found.append(tensor)
        return tensor.clone()

    def begin_pinning(self: Any, loader: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator is found")
            begin(self, loader)
        self._pin_memory = loader.pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(_BaseDataLoaderIter, "__init__", begin_pinning)
    return found


# dense engines copy what they need themselves
PINNED = [case for case in READING if case.loader.partition(",")[0] in ("features", "heads", "pretrain")]


@each(PINNED)
def test_batches_from_pinned_memory_are_the_same(case: Case, pinned: list[torch.Tensor]):
    assert same(case(Way(pin_memory=True)), plain(case.name))
    assert pinned


def test_nothing_that_runs_a_network_is_left_out():
    registry = load(environ={"EVALSUITE_PLUGINS": ""}).registry
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    told = {name for shelf in ("method", "modifier") for name in (f"{shelf}: {n}" for n in registry.names(shelf))}
    assert told <= set(names)
    assert all(any(name.startswith(f"{engine}: ") for name in names) for engine in registry.names("engine"))
    loaders = {case.loader for case in CASES}
    assert {"native", "native, encoded", "torchvision", "mmseg", "heads", "heads, tuned", "features"} <= loaders


def test_a_kind_of_protocol_that_nobody_can_make_small_is_told():
    registry = load(environ={"EVALSUITE_PLUGINS": ""}).registry
    registry.task("odd", f"{__name__}:Odd")
    with pytest.raises(NotImplementedError, match="OddProtocol"):
        cases(registry)


@dataclass(frozen=True, kw_only=True)
class OddProtocol(Protocol):
    pass


class Odd(Task):
    name, metrics, primary, needs = "odd", (), "none", frozenset[str]()
    protocols = (OddProtocol(id="odd", version=1),)

    def run(self, backbone: Any, setup: Any) -> Any:
        raise NotImplementedError

    def fingerprint(self, setup: Any) -> str:
        return "odd"
