"""The recipes whose first ten losses are written down: every method alone and with every set of modifiers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evalsuite_adainf import AdaInf
from evalsuite_gsimclr import GSimCLR
from evalsuite_hallucinator import Hallucinator
from evalsuite_interclr import InterCLR
from evalsuite_objects.discovery import SlotDiscovery
from evalsuite_objects.iodine import IODINE
from evalsuite_objects.mae import MAE
from evalsuite_objects.setprediction import SlotSet
from evalsuite_objects.slate_method import SlateMethod
from evalsuite_objects.vae import VAE
from evalsuite_objects.zoo import build
from evalsuite_obow import OBoW
from evalsuite_pixpro import PixPro
from evalsuite_rotnet import RotNet
from evalsuite_swav import SwAV

from evalsuite import Backbone, hooks
from pretrain import Method, Modifier
from pretrain.methods.byol import BYOL
from pretrain.methods.moco import MoCo, MoCo1
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam
from pretrain.testing import losses, small_backbone, small_corpus, small_options, tiny_corpus, tiny_train

FILE = Path(__file__).parent / "losses.txt"
STEPS = 10

Parts = tuple[Callable[[], Method], *tuple[Callable[[], Modifier], ...]]

SWAV: dict[str, Any] = {"size": 16, "small": 8, "width": 8, "hidden": 16, "prototypes": 12, "warmup": 0.5}
OBOW: dict[str, Any] = {"size": 16, "words": 32, "margin": 0, "warmup": 0.5}
METHODS: Mapping[str, Callable[[], Method]] = {
    "simclr": lambda: SimCLR(SimCLR.Options(size=16, width=8, warmup=0.5)),
    "moco": lambda: MoCo(MoCo.Options(size=16, width=8, queue=32, groups=2)),
    "simsiam": lambda: SimSiam(SimSiam.Options(size=16, width=16, bottleneck=4)),
    "byol": lambda: BYOL(BYOL.Options(size=16, width=8, hidden=16, warmup=0.5)),
}
UNPAIRED: Mapping[str, Callable[[], Method]] = {  # modifiers that need pairs do not compose with these
    "pixpro": lambda: PixPro(PixPro.Options(size=16, width=8, hidden=16, warmup=0.5)),
    "rotnet": lambda: RotNet(RotNet.Options(size=16, lr=0.1)),
    "swav": lambda: SwAV(SwAV.Options(**SWAV, crops=(2, 2), queue=16, queue_start=1)),
    "obow": lambda: OBoW(OBoW.Options(**OBOW, crop=12, patch=8, source=16, shift=2, patches=3)),
    "slate": lambda: SlateMethod(small_options(SlateMethod)),
    "vae": lambda: VAE(small_options(VAE)),
    "mae": lambda: MAE(replace(small_options(MAE), lr=0.1)),
    "iodine": lambda: IODINE(replace(small_options(IODINE), lr=3e-3)),
    "slot-attention": lambda: SlotDiscovery(replace(small_options(SlotDiscovery), lr=1e-2)),
}
VARIANTS: Mapping[str, Callable[[], Method]] = {
    "pixpro-instance": lambda: PixPro(PixPro.Options(size=16, width=8, hidden=16, transform=2, instance=1.0)),
    "pixpro-contrast": lambda: PixPro(PixPro.Options(size=16, width=8, hidden=16, task="contrast")),
    "rotnet-padded": lambda: RotNet(RotNet.Options(size=16, pad=2)),
    "swav-large": lambda: SwAV(SwAV.Options(**SWAV, crops=(2, 0), iterations=5, epsilon=0.03)),
    "obow-hard": lambda: OBoW(OBoW.Options(**OBOW, levels=1, crops=1, crop=12, patches=0, inv_delta=None)),
    "simclr-plain": lambda: SimCLR(SimCLR.Options(size=16, width=8, hidden=16, head="plain", loss="supervised")),
    "moco-v1": lambda: MoCo1(MoCo1.Options(size=16, width=8, queue=32, groups=2)),
    "slate-pixels": lambda: SlateMethod(small_options(SlateMethod)),
    "mae-pixels": lambda: MAE(replace(small_options(MAE), lr=0.1, normalise=False, crop=None, decay_vectors=True)),
}
TOLD: Mapping[str, Callable[[], Method]] = {  # learn from states of worlds, which modifiers do not bring
    "slot-set": lambda: SlotSet(replace(small_options(SlotSet), lr=1e-2)),
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def first_losses(name: str) -> list[float]:
    """The sum of the losses at each of ten steps, at seed 0 in float32 on the CPU."""
    make, *modifiers = RECIPES[name]
    encoder = ENCODERS.get(name) or partial(small_backbone, type(make()), _registry())
    corpus = small_corpus(type(make())) if name in TOLD else tiny_corpus()
    log = losses(tiny_train(make, *modifiers, steps=STEPS, epochs=3, backbone=encoder, corpus=corpus))
    assert [terms["step"] for terms in log] == list(range(1, STEPS + 1))
    return [sum(v for k, v in terms.items() if k != "step") for terms in log]


def read() -> dict[str, list[float]]:
    """What was written down, by recipe."""
    rows = (line.split() for line in FILE.read_text(encoding="utf-8").splitlines())
    return {name: [float(loss) for loss in found] for name, *found in rows}


def write() -> None:
    """Write down what they are now: a line a recipe."""
    lines = (" ".join([name, *(f"{loss:.7g}" for loss in first_losses(name))]) for name in RECIPES)
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
