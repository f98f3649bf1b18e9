"""The four modifiers on the four base methods: what composes trains, and each does its part."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from evalsuite_adainf.modifier import AdaInf
from evalsuite_gsimclr.modifier import GSimCLR
from evalsuite_hallucinator.modifier import Hallucinator
from evalsuite_interclr.modifier import InterCLR

from pretrain.methods.byol import BYOL
from pretrain.methods.moco import MoCo
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam

METHODS = {
    "simclr": lambda: SimCLR(SimCLR.Options(width=8, size=16)),
    "moco": lambda: MoCo(MoCo.Options(width=8, queue=64, groups=1, size=16)),
    "simsiam": lambda: SimSiam(SimSiam.Options(width=8, bottleneck=4, size=16)),
    "byol": lambda: BYOL(BYOL.Options(width=8, hidden=16, size=16)),
}
NAMES = ("hallucinator", "adainf", "gsimclr", "interclr")


@pytest.fixture
def modifier(tmp_path):
    path = tmp_path / "generated.npz"
    np.savez(path, image=np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
    made = {
        "hallucinator": lambda: Hallucinator(),
        "adainf": lambda: AdaInf(AdaInf.Options(path, copies=1)),
        "gsimclr": lambda: GSimCLR(GSimCLR.Options(side=8, channels=(4,), epochs=1)),
        "interclr": lambda: InterCLR(),
    }
    return lambda name: made[name]()


@pytest.mark.parametrize("names", [c for n in (1, 2, 4) for c in combinations(NAMES, n)], ids="+".join)
@pytest.mark.parametrize("method", METHODS)
def test_every_composition_trains(bench, modifier, method, names):
    table = bench(METHODS[method](), *(modifier(name) for name in names))
    before = [p.detach().clone() for p in table.run.backbone.parameters()]
    steps = list(table.steps(table.run.epoch_steps + 2))
    assert all(math.isfinite(term) for terms in steps for term in terms.values())
    assert ("inter" in steps[-1]) == ("interclr" in names)
    moved = [not torch.equal(a, b) for a, b in zip(before, table.run.backbone.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("method", METHODS)
def test_modifiers_of_other_stages_may_stand_in_any_order(bench, modifier, method):
    """G-SimCLR, InterCLR and AdaInf touch different stages: either order gives the same numbers."""
    runs = []
    for names in (("adainf", "gsimclr"), ("gsimclr", "adainf")):
        table = bench(METHODS[method](), *(modifier(name) for name in names))
        runs.append(list(table.steps(3)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("official", "keys"), [(False, 16), (True, 32)])
def test_moco_queues_each_key_once_or_officially_twice(bench, official, keys):
    method = METHODS["moco"]()
    table = bench(method, Hallucinator(Hallucinator.Options(official_duplicates=official)))
    assert isinstance(method, MoCo)
    list(table.steps(1))
    assert int(method.queue.pushed) == keys
    twice = torch.equal(method.queue.rows[:16], method.queue.rows[16:32])
    assert twice is official
    list(table.steps(2))
    assert int(method.queue.pushed) == 3 * keys
