"""The recipes whose first ten losses are written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pretrain import Method, Modifier
from pretrain.methods.byol import BYOL
from pretrain.methods.moco import MoCo, MoCo1
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam
from pretrain.testing import losses, tiny_train

FOLDER = Path(__file__).parent
STEPS = 10

Parts = tuple[Callable[[], Method], *tuple[Callable[[], Modifier], ...]]

RECIPES: Mapping[str, Parts] = {
    "simclr": (lambda: SimCLR(SimCLR.Options(size=16, width=8, warmup=0.5)),),
    "simclr-plain": (lambda: SimCLR(SimCLR.Options(size=16, width=8, hidden=16, head="plain", loss="supervised")),),
    "moco": (lambda: MoCo(MoCo.Options(size=16, width=8, queue=32, groups=2)),),
    "moco-v1": (lambda: MoCo1(MoCo1.Options(size=16, width=8, queue=32, groups=2)),),
    "simsiam": (lambda: SimSiam(SimSiam.Options(size=16, width=16, bottleneck=4)),),
    "byol": (lambda: BYOL(BYOL.Options(size=16, width=8, hidden=16, warmup=0.5)),),
}


def lines(name: str) -> list[tuple[int, float]]:
    """(step, sum of the losses) of ten steps at seed 0 in float32 on the CPU."""
    log = losses(tiny_train(*RECIPES[name], steps=STEPS, epochs=3))
    return [(int(terms["step"]), sum(v for k, v in terms.items() if k != "step")) for terms in log]


def read(name: str) -> list[tuple[int, float]]:
    """What was written down."""
    rows = (line.split() for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines())
    return [(int(step), float(loss)) for step, loss in rows]
