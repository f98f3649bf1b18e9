"""What a loaded backbone does with images: a gate before hours are spent on it, and the facts that inspect prints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evalsuite.backbone import Backbone, Features, build
from evalsuite.checkpoints.loading import Loaded
from evalsuite.checkpoints.matching import heads_of, look_meta, weights
from evalsuite.seeding import seeded

if TYPE_CHECKING:
    from evalsuite.hooks import Registry

__all__ = ["SanityReport", "describe", "natural_images", "sanity"]

VARIATION = 1e-4  # images whose features differ by less than this, relative to their length, count as equal
RANK = 2.0  # the least effective rank of the features of a batch (RankMe, Garrido et al., 2023, equation 1)
DEAD = 0.5  # the fraction of channels that may be the same everywhere before there is a warning


@dataclass(frozen=True)
class SanityReport:
    """Faults make a backbone useless for any task; warnings point to a likely mistake; numbers are what was measured.

    ``variation`` is the mean distance of an image's features from the batch's mean, relative to their mean length.
    ``effective_rank`` is the exponential of the entropy of the normalised singular values of the centred features.
    ``dead`` is the fraction of channels, by output, with the same value for all images and positions.
    ``like_fresh`` is the fraction of parameters (by tensor) that are as an initialisation leaves them.
    """

    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        lines = [f"fault         {f}" for f in self.faults] + [f"warning       {w}" for w in self.warnings]
        numbers = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in self.numbers.items())
        return "\n".join([*lines, f"features      {numbers}"])


def natural_images(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Images in [0,1] (count,3,H,W) with the statistics of photographs: 1/f noise, shading, and a few flat shapes."""
    rng = torch.Generator().manual_seed(seed)
    height, width = size
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]).clamp_min(1 / max(size))
    spectrum = torch.fft.rfft2(torch.randn(count, 3, height, width, generator=rng)) / radius
    noise: Tensor = torch.fft.irfft2(spectrum, s=size)
    noise = noise / noise.std((2, 3), keepdim=True).clamp_min(1e-6)
    ys, xs = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None]
    slope = torch.randn(count, 3, 2, generator=rng)
    shading = slope[..., :1, None] * ys + slope[..., 1:, None] * xs
    images: Tensor = 0.5 + 0.15 * noise + 0.15 * shading
    for _ in range(3):
        cy, cx, side = (torch.rand(count, 1, 1, 1, generator=rng) * 2 - 1 for _ in range(3))
        colour = torch.rand(count, 3, 1, 1, generator=rng)
        half = 0.1 + 0.2 * side.abs()
        inside = ((ys - cy).abs() < half) & ((xs - cx).abs() < half)
        images = torch.where(inside, colour, images)
    return images.clamp_(0, 1)


def sanity(backbone: Backbone, registry: Registry | None = None, *, count: int = 32, seed: int = 0) -> SanityReport:
    """Look at ``count`` images and say whether the features can be of any use; of another input than images, there are
    none to look at.

    With ``registry`` the weights are also compared with a fresh network of the same architecture. The backbone
    comes back in the mode it was in.
    """
    seen = backbone.spec.takes == "image"
    gathered = _gather(backbone, natural_images(count, backbone.spec.image_size, seed)) if seen else {}
    faults: list[str] = []
    warnings: list[str] = []
    numbers: dict[str, float] = {}
    broken = [name for name, values in gathered.items() if not torch.isfinite(values).all()]
    if broken:
        faults.append(f"NaN or infinite values in {', '.join(broken)}")
    elif gathered:
        _spread(next(iter(gathered.values())), faults, numbers)
        _dead(gathered, faults, warnings, numbers)
    if registry is not None:
        numbers["like_fresh"] = like = _like_fresh(backbone, registry)
        if like > 0.95:
            warnings.append(
                f"it looks untrained: {like:.0%} of its parameters are as an initialisation leaves them, norms at "
                "constants and weights drawn independently"
            )
    return SanityReport(tuple(faults), tuple(warnings), numbers)


def _gather(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """What the backbone gives, by output, as (N,D) per image; maps as their means and spreads over positions."""
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    was_training = backbone.training
    backbone.eval()
    parts: dict[str, list[Tensor]] = {}
    try:
        with torch.no_grad():
            for chunk in images.split(8):
                for name, values in _outputs(backbone(chunk.to(device))):
                    parts.setdefault(name, []).append(values.float().cpu())
    finally:
        backbone.train(was_training)
    return {name: torch.cat(values) for name, values in parts.items()}


def _outputs(features: Features) -> Iterator[tuple[str, Tensor]]:
    if features.pooled is not None:
        yield "pooled", features.pooled
    if features.tokens is not None:
        yield "tokens", torch.cat([features.tokens.mean(1), features.tokens.std(1, correction=0)], 1)
    for stride, level in sorted(features.maps.items(), reverse=True):
        yield f"map of stride {stride}", torch.cat([level.mean((2, 3)), level.std((2, 3), correction=0)], 1)


def _spread(features: Tensor, faults: list[str], numbers: dict[str, float]) -> None:
    features = features.double()
    centred = features - features.mean(0)
    length = features.norm(dim=1).mean()
    variation = float(centred.norm(dim=1).mean() / length) if length > 0 else 0.0
    rank = _effective_rank(centred)
    numbers |= {"variation": variation, "effective_rank": rank, "std": float(centred.pow(2).mean().sqrt())}
    if variation == 0:
        faults.append("constant features: all images give the very same vector")
    elif variation < VARIATION:
        faults.append(f"insensitive to the input: features vary by {variation:.1e} of their length between images")
    elif rank < RANK:
        faults.append(f"collapsed features: their effective rank over {len(features)} images is {rank:.2f}")


def _effective_rank(centred: Tensor) -> float:
    values = torch.linalg.svdvals(centred)
    total = values.sum()
    if total == 0:
        return 0.0
    p = values / total
    return math.exp(float(torch.special.entr(p).sum()))


def _dead(gathered: Mapping[str, Tensor], faults: list[str], warnings: list[str], numbers: dict[str, float]) -> None:
    for name, values in gathered.items():
        same = (values - values[0]).abs().amax(0) <= 1e-7 * values.abs().amax().clamp_min(1e-30)
        if name != "pooled":  # means and spreads: a channel is dead where it never varies, over images or positions
            mean, spread = same.chunk(2)
            flat = values.chunk(2, 1)[1].amax(0) <= 1e-7 * values.abs().amax().clamp_min(1e-30)
            same = mean & spread & flat
        share = float(same.float().mean())
        numbers[f"dead_{name.replace(' ', '_')}"] = share
        if share == 1 and name != "pooled":
            faults.append(f"dead output: the {name} is the same everywhere for every image")
        elif DEAD < share < 1:
            warnings.append(f"{share:.0%} of the channels of {name} are dead")


def _like_fresh(backbone: Backbone, registry: Registry) -> float:
    """The fraction of parameters (by tensor) that are as an initialisation leaves them, the architecture's or another.

    What a fresh network has constant (scales and shifts of norms, biases) must be a constant, whichever: some start the
    last norm of a block at 0. What is drawn must still look drawn, by whichever distribution. The first steps of
    training move nearly all constants, so that even they are far from 1. Running statistics say nothing: they
    are moved without training, and frozen norms have 0 and 1 after it.
    """
    with seeded(20_26):
        fresh = build(backbone.spec.arch, registry, **backbone.spec.options)
    ours, theirs = weights(backbone, heads_of(backbone)), dict(fresh.net.named_parameters())
    judged = [
        _drawn(ours[k].detach().float().cpu(), theirs[k].detach().float())
        for k in ours.keys() & theirs.keys()
        if ours[k].numel() > 1
    ]
    verdicts = [v for v in judged if v is not None]
    return sum(verdicts) / len(verdicts) if verdicts else 0.0


def _drawn(ours: Tensor, fresh: Tensor) -> bool | None:
    """Whether a tensor is still as it was drawn; None where it has too few numbers to decide."""
    if bool((fresh == fresh.flatten()[0]).all()):
        return bool((ours == ours.flatten()[0]).all())
    if ours.numel() < 512:
        return None
    spread = float(ours.std(correction=0))
    if spread == 0 or abs(float(ours.mean())) > 10 * spread / math.sqrt(ours.numel()):
        return False
    bound = float(fresh.abs().max())
    if bound < 1.8 * float(fresh.std()) and float(ours.abs().max()) > bound * (1 + 20 / ours.numel()):
        same = abs(spread / float(fresh.std()) - 1) < 10 / math.sqrt(ours.numel())
        if same:
            return False  # drawn uniformly, and then moved beyond the bound
    matrix = ours.flatten(1) if ours.ndim > 1 else None
    return matrix is None or all(map(_alike_in_size, (matrix, matrix.T)))


def _alike_in_size(rows: Tensor) -> bool:
    """Whether the mean squares of rows differ no more than those of independent draws from one distribution do.

    Their variance is then (k - 1) / m of their squared mean, with m numbers in a row and the kurtosis k.
    """
    count, length = rows.shape
    if count < 16 or length < 9:
        return True
    squares = rows.double().square()
    mean = squares.mean()
    excess = squares.square().mean() / mean.square() - 1
    ratio = squares.mean(1).var() / (mean.square() * excess / length)
    return bool(ratio < 1 + 8 * math.sqrt(2 / count))


def describe(loaded: Loaded, registry: Registry, *, check: bool = True) -> dict[str, Any]:
    """Everything ``evalsuite inspect`` reports, as plain JSON values.

    ``flops`` counts one image of the spec's size, a multiplication and an addition as two. ``parameters`` counts those
    that features depend on; ``heads`` those of classifiers. ``sanity`` is None where ``check`` is off.
    """
    backbone = loaded.backbone
    features = Features()
    with FlopCounterMode(display=False) as counter, contextlib.suppress(LookupError):  # no example of such an input
        features, _ = look_meta(backbone)
    heads = heads_of(backbone)
    counts = {k: p.numel() for k, p in weights(backbone).items()}
    shapes: dict[str, Any] = {"maps": {str(s): list(m.shape[1:]) for s, m in sorted(features.maps.items())}}
    shapes["pooled"] = None if features.pooled is None else list(features.pooled.shape[1:])
    shapes["tokens"] = None if features.tokens is None else list(features.tokens.shape[1:])
    report = sanity(backbone, registry) if check else None
    return {
        "name": loaded.name,
        "report": loaded.report.to_json(),
        "spec": backbone.spec.to_json(),
        "parameters": sum(n for k, n in counts.items() if k not in heads),
        "heads": sum(n for k, n in counts.items() if k in heads),
        "flops": int(counter.get_total_flops()),
        "shapes": shapes,
        "sanity": None
        if report is None
        else {
            "ok": report.ok,
            "faults": list(report.faults),
            "warnings": list(report.warnings),
            "numbers": dict(report.numbers),
        },
        "provenance": dict(loaded.provenance),
    }
