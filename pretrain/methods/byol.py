"""BYOL: one view predicts what a slow copy of the network makes of the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from evalsuite import Features, hookimpl
from pretrain import Batch, Look, Method, Pairs, Preset, Run, Training, pixpro_pair, solo_asymmetric
from pretrain.blocks import EmaTwin, mlp_head, neg_cosine

__all__ = ["BYOL"]


class BYOL(Method):
    """Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020 (arXiv 2006.07733), with the numbers of solo-learn's
    code as AdaInf uses it.

    Each view by itself goes through backbone, projector and predictor; the target is the slow copy's projection of
    the other view. The loss of a direction is 2 - 2 cos, summed over both. The copy's momentum rises from
    ``momentum_twin`` to 1 on a cosine and it follows after the optimiser's step. Projector and predictor have one
    hidden layer of ``hidden`` with batch normalisation.

    Recipe on CIFAR (code): 4096 hidden, 256 out, LARS (trust 0.02, clipped) 0.5 B / 256 at batch 512, weight decay
    1e-5, two unlike views, momentum 0.99 to 1, ten epochs of warm-up of 1000 from 3e-5; 92.46 on CIFAR-10 by the online
    linear classifier [AdaInf README]. ``imagenet`` is that at 224 pixels with PixPro's two views, ours.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Training):
        width: int = 256
        hidden: int = 4096
        momentum_twin: float = 0.99
        size: int = 32
        optimizer: Literal["sgd", "lars", "adamw"] = "lars"
        lr: float = 0.5
        weight_decay: float = 1e-5
        decay_vectors: bool = False
        trust: float = 0.02
        trust_ratio: Literal["decayed", "summed"] = "summed"
        trust_clip: bool = True
        warmup: float = 10.0
        start: float = 3e-5  # of 1.0, the rate at 512
        rise: Literal["next", "last", "ahead"] = "last"

    small: ClassVar[Mapping[str, Any]] = {"width": 16, "hidden": 32}
    presets: ClassVar[Mapping[str, Preset]] = {
        "cifar": Preset("PKU-ML/adainf (solo-learn)", 1000, 512),
        "imagenet": Preset("ours", 100, 4096, {"size": 224, "momentum_twin": 0.996}),
    }

    projector: nn.Module
    predictor: nn.Module
    slow_backbone: EmaTwin
    slow_projector: EmaTwin

    @hookimpl
    def views(self) -> tuple[Look, ...]:
        size = self.options.size
        return solo_asymmetric(size) if size <= 64 else pixpro_pair(size)

    @hookimpl
    def prepared(self, run: Run) -> None:
        o = self.options
        self.projector = mlp_head(run.dim, o.hidden, o.width, hidden_bias=True)
        self.predictor = mlp_head(o.width, o.hidden, o.width, hidden_bias=True)
        self.slow_backbone = EmaTwin(run.backbone, o.momentum_twin, total=run.steps)
        self.slow_projector = EmaTwin(self.projector, o.momentum_twin, total=run.steps)

    @hookimpl
    def features(self, run: Run, batch: Batch) -> list[Features]:
        """View by view, so that batch normalisation sees one at a time."""
        return [run.backbone(view.data) for view in batch.views]

    @hookimpl
    def pairs(self, batch: Batch, features: list[Features]) -> list[Pairs]:
        p: list[Any] = [self.predictor(self.projector(f.pooled)) for f in features]
        z = [self.slow_projector(self.slow_backbone(view.data).pooled) for view in batch.views]
        return [
            Pairs(p[0], z[1], batch.index, mate=p[1]),
            Pairs(p[1], z[0], batch.index, mate=p[0]),
        ]

    @hookimpl
    def losses(self, pairs: list[Pairs]) -> dict[str, Tensor]:
        terms = [2 + 2 * neg_cosine(p.query, p.key) for p in pairs]
        return {"byol": sum(terms[1:], terms[0])}

    @hookimpl
    def stepped(self, run: Run) -> None:
        self.slow_backbone.update(run.backbone)
        self.slow_projector.update(self.projector)
