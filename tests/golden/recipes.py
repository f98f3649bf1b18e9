"""The recipes whose first losses are written down: every method alone and with every set of modifiers.

They hold on any processor: pictures are the same bytes everywhere, and all else is in double precision, from the first
draws of weights on, so that what differs between two processors is of the order of 1e-16. A disturbance of 1e-7 of the
backbone's weights (``python tests/golden --growth``) grows to less than 1e-5 of the losses, and to 2e-3 in two recipes
of SLATE with G-SimCLR, whose draws it turns over. At that rate 1e-16 grows to some 1e-12, and TOLERANCE is 1e-7.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evalsuite_adainf.modifier import AdaInf
from evalsuite_gsimclr.modifier import GSimCLR
from evalsuite_hallucinator.modifier import Hallucinator
from evalsuite_interclr.modifier import InterCLR
from evalsuite_objects.discovery import SlotDiscovery
from evalsuite_objects.iodine import IODINE
from evalsuite_objects.mae import MAE
from evalsuite_objects.setprediction import SlotSet
from evalsuite_objects.slate_method import SlateMethod
from evalsuite_objects.vae import VAE
from evalsuite_objects.zoo import build
from evalsuite_obow.method import OBoW
from evalsuite_pixpro.method import PixPro
from evalsuite_rotnet.method import RotNet
from evalsuite_swav.method import SwAV

from evalsuite import Backbone, hookimpl, hooks
from evalsuite.seeding import seeded
from pretrain import Method, Modifier, Run
from pretrain.methods.byol import BYOL
from pretrain.methods.moco import MoCo, MoCo1
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam
from pretrain.testing import losses, small_backbone, small_corpus, small_options, tiny_corpus, tiny_train

FILE = Path(__file__).parent / "losses.txt"
STEPS = 8
TOLERANCE = 1e-7  # of the root mean square of a recipe's losses

Parts = tuple[Callable[[], Method], *tuple[Callable[[], Modifier], ...]]

# Rates at which a disturbance does not grow much, and a decay that a few steps can show.
SLOW: dict[str, Any] = {"size": 16, "warmup": 0.5, "weight_decay": 0.1}
TWIN: dict[str, Any] = SLOW | {"width": 8, "momentum_twin": 0.9}
SIMCLR: dict[str, Any] = SLOW | {"width": 8, "lr": 0.1, "trust": 0.1, "weight_decay": 5.0}
MOCO: dict[str, Any] = {
    "size": 16,
    "weight_decay": 0.1,
    "width": 8,
    "momentum_twin": 0.9,
    "lr": 1.0,
    "queue": 32,
    "groups": 2,
}
PIXPRO: dict[str, Any] = TWIN | {"hidden": 16, "lr": 0.3, "trust": 0.1}
ROTNET: dict[str, Any] = {"size": 16, "weight_decay": 0.1, "lr": 0.5}
SWAV: dict[str, Any] = SLOW | {
    "small": 8, "width": 8, "hidden": 16, "prototypes": 12, "lr": 1.0, "trust": 0.05, "frozen": 0.5
}  # fmt: skip
OBOW: dict[str, Any] = SLOW | {"words": 32, "margin": 0, "momentum_twin": 0.9, "lr": 0.1, "crop": 12}
METHODS: Mapping[str, Callable[[], Method]] = {
    "simclr": lambda: SimCLR(SimCLR.Options(**SIMCLR)),
    "moco": lambda: MoCo(MoCo.Options(**MOCO)),
    "simsiam": lambda: SimSiam(
        SimSiam.Options(size=16, weight_decay=0.5, width=16, bottleneck=4, lr=0.002, scaling="none")
    ),
    "byol": lambda: BYOL(BYOL.Options(**TWIN, hidden=16, trust=0.002)),
}
UNPAIRED: Mapping[str, Callable[[], Method]] = {  # modifiers that need pairs do not compose with these
    "pixpro": lambda: PixPro(PixPro.Options(**PIXPRO)),
    "rotnet": lambda: RotNet(RotNet.Options(**ROTNET)),
    "swav": lambda: SwAV(SwAV.Options(**SWAV, crops=(2, 2), queue=8, queue_start=1)),
    "obow": lambda: OBoW(OBoW.Options(**OBOW, patch=8, source=16, shift=2, patches=3)),
    "slate": lambda: SlateMethod(replace(small_options(SlateMethod), lr=1e-2, lr_decoder=1e-2, lr_vae=1e-3)),
    "vae": lambda: VAE(replace(small_options(VAE), lr=1e-3)),
    "mae": lambda: MAE(replace(small_options(MAE), lr=1e-2, scaling="none", weight_decay=1.0)),
    "iodine": lambda: IODINE(replace(small_options(IODINE), lr=3e-3)),
    "slot-attention": lambda: SlotDiscovery(replace(small_options(SlotDiscovery), lr=1e-3)),
}
VARIANTS: Mapping[str, Callable[[], Method]] = {
    "pixpro-instance": lambda: PixPro(PixPro.Options(**PIXPRO, transform=2, instance=1.0)),
    "pixpro-contrast": lambda: PixPro(PixPro.Options(**PIXPRO | {"lr": 3.0}, task="contrast")),
    "rotnet-padded": lambda: RotNet(RotNet.Options(**ROTNET, pad=2)),
    "swav-large": lambda: SwAV(SwAV.Options(**SWAV, crops=(2, 0), iterations=5, epsilon=0.03)),
    "obow-hard": lambda: OBoW(OBoW.Options(**OBOW, levels=1, crops=1, patches=0, inv_delta=None)),
    "simclr-plain": lambda: SimCLR(SimCLR.Options(**SIMCLR, hidden=16, head="plain", loss="supervised")),
    "moco-v1": lambda: MoCo1(MoCo1.Options(**MOCO)),
    "slate-pixels": lambda: SlateMethod(replace(small_options(SlateMethod), lr=1e-2, lr_decoder=1e-2)),
    "mae-pixels": lambda: MAE(
        replace(
            small_options(MAE),
            lr=1e-2,
            scaling="none",
            weight_decay=1.0,
            normalise=False,
            crop=None,
            decay_vectors=True,
        )
    ),
}
TOLD: Mapping[str, Callable[[], Method]] = {  # learn from states of worlds, which modifiers do not bring
    "slot-set": lambda: SlotSet(replace(small_options(SlotSet), lr=2e-3)),
}
ENCODERS: Mapping[str, Callable[[], Backbone]] = {  # of recipes that are not tried on their method's small one
    "slate-pixels": lambda: _seeded(lambda: build("slate-pixels", channels=4, **(SlateMethod.small_arch or {}))),
}
MODIFIERS: Mapping[str, Callable[[], Modifier]] = {
    "hallucinator": lambda: Hallucinator(),
    "adainf": lambda: AdaInf(AdaInf.Options(Path(_generated().name) / "generated.npz", copies=1)),
    "gsimclr": lambda: GSimCLR(GSimCLR.Options(side=8, channels=(4,), epochs=1)),
    "interclr": lambda: InterCLR(),
}
NEED_PAIRS = {"hallucinator", "interclr"}
SETS = [chosen for count in range(len(MODIFIERS) + 1) for chosen in combinations(MODIFIERS, count)]
RECIPES: Mapping[str, Parts] = {
    "+".join((name, *chosen)): (make, *(MODIFIERS[m] for m in chosen))
    for name, make in {**METHODS, **UNPAIRED}.items()
    for chosen in SETS
    if name in METHODS or not NEED_PAIRS.intersection(chosen)
} | {name: (make,) for name, make in {**VARIANTS, **TOLD}.items()}


@cache
def _generated() -> tempfile.TemporaryDirectory[str]:
    """A folder with what stands for a generative model's images, until the process ends."""
    folder = tempfile.TemporaryDirectory()
    images = np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    np.savez(Path(folder.name) / "generated.npz", image=images)
    return folder


@cache
def _registry() -> hooks.Registry:
    return hooks.load(environ={"EVALSUITE_PLUGINS": ""}).registry


def _seeded(make: Callable[[], Backbone]) -> Backbone:
    with seeded(0):
        return make()


@contextmanager
def _doubles() -> Iterator[None]:
    """All numbers in double precision, from the first draws of weights on."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Disturb(Modifier):
    """Multiplies each of the backbone's weights by a number near one, as rounding might."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    @hookimpl(trylast=True)
    def prepared(self, run: Run) -> None:
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in run.backbone.parameters():
                if weight.is_floating_point():
                    weight.mul_(1 + self.by * torch.randn(weight.shape, generator=rng))


def first_losses(
    name: str, steps: int = STEPS, part: int = 0, changes: Mapping[str, Any] | None = None, disturbed: float = 0.0
) -> list[float]:
    """The sum of the losses at each of the first steps, at seed 0 in float64 on the CPU.

    ``changes`` are to options of one part of the recipe, the method being the first. ``disturbed`` is the relative
    deviation of what the backbone's weights are multiplied by.
    """
    parts = [_changed(make, changes or {}) if place == part else make for place, make in enumerate(RECIPES[name])]
    kind = type(parts[0]())
    encoder = ENCODERS.get(name) or partial(small_backbone, kind, _registry())
    parts += [lambda: _Disturb(disturbed)] if disturbed else []
    with _doubles():
        corpus = small_corpus(kind) if name in TOLD else tiny_corpus()
        trained = tiny_train(*parts, steps=steps, epochs=3, backbone=encoder, corpus=corpus, precision="64-true")
    log = losses(trained)
    assert [terms["step"] for terms in log] == list(range(1, steps + 1))
    return [sum(v for k, v in terms.items() if k != "step") for terms in log]


def _changed(make: Callable[[], Any], changes: Mapping[str, Any]) -> Callable[[], Any]:
    def changed() -> Any:
        plugin = make()
        return type(plugin)(replace(plugin.options, **changes))

    return changed if changes else make


def distance(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference of two recipes' losses, relative to the root mean square of the second's: a loss may
    pass through 0."""
    scale = float(np.sqrt(np.square(others).mean()))
    return float(np.abs(np.subtract(losses, others)).max()) / scale


def read() -> dict[str, list[float]]:
    """What was written down, by recipe."""
    rows = (line.split() for line in FILE.read_text(encoding="utf-8").splitlines())
    return {name: [float(loss) for loss in found] for name, *found in rows}


def write() -> None:
    """Write down what they are now: a line a recipe."""
    lines = (" ".join([name, *(f"{loss:.9g}" for loss in first_losses(name))]) for name in RECIPES)
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
