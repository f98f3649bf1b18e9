"""What torch does not have: the optimizer LARS, and a cosine schedule by its formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["LARS", "cosine"]


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    """The factor on the learning rate at a step counted from 0: half a cosine from 1 to 0 over ``steps``, times a
    linear rise over the first ``warmup`` of them (Loshchilov and Hutter, 2017, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / max(1, warmup))


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to the norm of the weights (You et al., 2017).

    With g' = g + weight_decay w, groups whose ``adapt`` is true take g' times a trust ratio, in one of the
    two ways in which the published code differs:

    - ``ratio="decayed"``: trust |w| / (|g'| + eps), as in PixPro (trust 0.001) and google-research/simclr;
    - ``ratio="summed"``: trust |w| / (|g| + weight_decay |w| + eps), as in apex's LARC (SwAV, SimSiam's
      probe) and solo-learn (AdaInf, trust 0.02).

    ``clip`` bounds the ratio by the learning rate: min(ratio / lr, 1) (solo-learn). Weights that are all zero
    have the ratio 1. Weights without any gradient stand still under "summed" and have the ratio 1 under
    "decayed". Then v <- momentum v + ratio g' and w <- w - lr v. Groups whose ``adapt`` is false are left to SGD.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        eps: float = 1e-8,
        ratio: Literal["decayed", "summed"] = "decayed",
        clip: bool = False,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or trust <= 0:
            raise ValueError(f"no LARS with {lr=}, {momentum=}, {weight_decay=}, {trust=}")
        if ratio not in ("decayed", "summed"):
            raise ValueError(f"the ratio is 'decayed' or 'summed', not {ratio!r}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        super().__init__(params, defaults | {"ratio": ratio, "clip": clip, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients: list[Tensor] = [p.grad for p in weights]
            decayed = gradients
            if group["weight_decay"]:
                decayed = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            if group["adapt"]:
                decayed = list(torch._foreach_mul(decayed, _trust(group, weights, gradients, decayed)))
            velocity = []
            for p, g in zip(weights, decayed, strict=True):
                state = self.state[p]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(g)
                velocity.append(state["velocity"])
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, decayed)
            torch._foreach_add_(weights, velocity, alpha=-group["lr"])
        return loss


def _trust(
    group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], decayed: list[Tensor]
) -> list[Tensor]:
    """The trust ratio of each weight, on its device: nothing is waited for."""
    size = torch.stack(torch._foreach_norm(weights))
    if group["ratio"] == "summed":
        pull = torch.stack(torch._foreach_norm(gradients))
        ratio = group["trust"] * size / (pull + group["weight_decay"] * size + group["eps"])
        idle = torch.zeros_like(ratio)  # LARC lets alone what has no gradient, decay included
    else:
        pull = torch.stack(torch._foreach_norm(decayed))
        ratio = group["trust"] * size / (pull + group["eps"])
        idle = torch.ones_like(ratio)
    if group["clip"]:
        ratio = (ratio / group["lr"]).clamp(max=1.0)
    ratio = torch.where(pull > 0, ratio, idle)
    return list(torch.where(size > 0, ratio, torch.ones_like(ratio)).unbind())
