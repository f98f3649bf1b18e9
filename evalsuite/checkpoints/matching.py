"""How much of an architecture a dict of tensors fills, and the report of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from evalsuite.backbone import Backbone, Features
from evalsuite.errors import printable

__all__ = ["NEEDED", "LoadReport", "Match", "heads_of", "look_meta", "match", "prefixes", "weights"]

NEEDED = 0.98  # of the parameters; what less than this gives is another network
TOKENS = ("reg_token", "register_tokens", "cls_token", "dist_token", "pos_embed")  # a ViT has them or it is another
HEAD_WORDS = ("fc", "head", "heads", "classifier", "last_linear")


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors.

    ``matched`` is the fraction of the backbone's parameters (those its Features depend on, so no classifier) that the
    file filled, ``buffers`` that of its running statistics. ``missing`` are names of the architecture; ``unexpected``
    names in the file that are not used, heads among them; ``leftover`` those of them that lie inside the backbone.
    ``others`` are networks in the file that fill the architecture as well and were not taken. ``guesses`` are sentences
    on options that features depend on, that no tensor shows and nobody's word gives. ``input`` is how pixels are
    normalised, by whose word.
    """

    source: str
    layout: str
    arch: str
    options: Mapping[str, Any] = field(default_factory=dict)
    container: str = ""
    prefix: str = ""
    naming: str = ""
    matched: float = 1.0
    buffers: float = 1.0
    parameters: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    leftover: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    input: Mapping[str, Any] = field(default_factory=dict)
    reason: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()
    sha256: str = ""
    trusted: bool = False
    identity: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def __str__(self) -> str:
        location = f"{self.container or 'top level'}, prefix {self.prefix!r}" if self.sha256 and self.naming else ""
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        rows = [
            ("source", self.source),
            ("layout", f"{self.layout}" + (f" ({self.naming} names; {location})" if location else "")),
            ("architecture", self.arch + (f" ({options})" if options else "")),
            (
                "matched",
                f"{self.matched:.1%} of {self.parameters:,} parameters, {self.buffers:.1%} of running statistics",
            ),
            ("input", ", ".join(f"{k} {v}" for k, v in self.input.items())),
            ("missing", _some(self.missing)),
            ("mismatched", _some(f"{n} {a} in the file, {b} wanted" for n, a, b in self.mismatched)),
            ("leftover", _some(self.leftover)),
            ("not used", _some(self.unexpected)),
            ("not used", _networks(self.others)),
            ("because", "; ".join(self.reason)),
            ("guessed", "; ".join(self.guesses)),
            ("sha256", self.sha256),
            ("identity", self.identity),
            ("trusted", "yes: the file was allowed to run code" if self.trusted else ""),
        ]
        return "\n".join(f"{name:<13} {printable(value)}" for name, value in rows if value)


def _networks(names: Iterable[str]) -> str:
    """Networks that could have been taken, and how to take one."""
    names = list(names)
    return f"network {'; '.join(names)}: fits as well, --network NAME takes it" if names else ""


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)}: {', '.join(names[:limit])}{rest}" if names else ""


@dataclass(frozen=True)
class Match:
    """A dict of tensors matched against a backbone. ``used`` are those to load, by the backbone's names."""

    used: Mapping[str, Tensor]
    matched: float
    buffers: float
    parameters: int
    missing: tuple[str, ...]
    leftover: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def whole(self) -> bool:
        """Whether this is the network and not merely something like it."""
        enough = self.matched >= NEEDED and self.buffers >= NEEDED
        return enough and not self.mismatched and not self.leftover


def match(backbone: Backbone, heads: frozenset[str], tensors: Mapping[str, Tensor]) -> Match:
    """Hold ``tensors`` against what ``backbone`` wants; ``heads`` are names of its parameters that do not matter."""
    parameters = weights(backbone, heads)
    every = backbone.net.state_dict()
    statistics = {k: v for k, v in every.items() if k not in parameters and k not in heads and v.is_floating_point()}
    wanted = parameters | statistics
    fits = {k: tensors[k] for k, v in wanted.items() if k in tensors and _fits(tensors[k], v)}
    odd = [(k, tuple(tensors[k].shape), tuple(v.shape)) for k, v in wanted.items() if k in tensors and k not in fits]
    counted = {k: tensors[k] for k in every if k.endswith("num_batches_tracked") and k in tensors}
    return Match(
        used=fits | {k: v for k, v in counted.items() if v.shape == every[k].shape},
        matched=_share(fits, parameters),
        buffers=_share(fits, statistics),
        parameters=sum(v.numel() for v in parameters.values()),
        missing=tuple(k for k in wanted if k not in tensors),
        leftover=_leftover(tensors, every, parameters),
        mismatched=tuple(odd),
    )


def weights(backbone: Backbone, heads: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """The parameters that are no ``heads`` and are numbers: the masks that some networks keep among them are not."""
    named = backbone.net.named_parameters()
    return {k: v for k, v in named if k not in heads and v.is_floating_point()}


def _fits(given: Tensor, wanted: Tensor) -> bool:
    return given.shape == wanted.shape and given.is_floating_point()


def _share(fits: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    total = sum(v.numel() for v in wanted.values())
    return sum(v.numel() for k, v in wanted.items() if k in fits) / total if total else 1.0


def _leftover(tensors: Mapping[str, Tensor], every: Mapping[str, Tensor], parameters: Iterable[str]) -> tuple[str, ...]:
    """Floating tensors that lie in a part the backbone owns but that it does not know.

    Blocks of a deeper network and relative positions in attention are such; without them features would be wrong.
    """
    owned = {_part(k) for k in parameters} - {None, *HEAD_WORDS}
    unknown = [k for k, v in tensors.items() if k not in every and v.is_floating_point()]
    return tuple(k for k in unknown if k in TOKENS or _part(k) in owned)


def _part(name: str) -> str | None:
    """The first component, numbers masked: layer1 and layer5 are the same kind of part. A bare tensor has none."""
    first, dot, _ = name.partition(".")
    return re.sub(r"\d+", "#", first) if dot else None


def prefixes(backbone: Backbone, heads: frozenset[str], names: Iterable[str]) -> list[str]:
    """Prefixes behind which the parameters of ``backbone`` may lie among ``names``, the likeliest first."""
    parameters = [k for k, _ in backbone.net.named_parameters() if k not in heads]
    anchors = parameters[:: max(1, len(parameters) // 16)]
    votes: dict[str, int] = {}
    for name in names:
        for anchor in anchors:
            if name == anchor or name.endswith("." + anchor):
                prefix = name[: len(name) - len(anchor)]
                votes[prefix] = votes.get(prefix, 0) + 1
    return sorted(votes, key=lambda p: (-votes[p], p))[:8]


class _Encoding(nn.Module):
    """``encode`` of a backbone as a forward pass, for ``functional_call``."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, kind: str, batch: Any) -> Features:
        return self.backbone.encode(kind, batch)


def look_meta(backbone: Backbone, batch: int = 1, kind: str | None = None) -> tuple[Features, dict[str, Tensor]]:
    """Features of shape only, computed without data or arithmetic, and the parameters they came from.

    Of an input of ``kind`` (None: the one of the backbone's spec). Falls back on a real forward pass for networks that
    look at values. Raises :class:`LookupError` for a kind of which no example is known.
    """
    kind = kind or backbone.spec.takes
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    was_training = backbone.training
    backbone.eval()
    try:
        for target in (torch.device("meta"), device):
            moved = {
                k: v.detach().to(target).requires_grad_(v.is_floating_point()) for k, v in backbone.named_parameters()
            }
            buffers = {k: v.to(target) for k, v in backbone.named_buffers()}
            try:
                named = {f"backbone.{name}": tensor for name, tensor in {**moved, **buffers}.items()}
                example = _example(kind, batch, backbone.spec.image_size, target)
                return functional_call(_Encoding(backbone), named, (kind, example)), moved
            except (RuntimeError, NotImplementedError):
                if target == device:
                    raise
    finally:
        backbone.train(was_training)
    raise AssertionError("unreachable: the last device returns or raises")


def _example(kind: str, batch: int, size: tuple[int, int], device: torch.device) -> Any:
    if kind == "image":
        return torch.zeros(batch, 3, *size, device=device)
    if kind == "clip":
        return torch.zeros(batch, 2, 3, *size, device=device)
    if kind == "text":
        return ["a photo"] * batch
    raise LookupError(f"there is no example of the kind {kind!r}")


def heads_of(backbone: Backbone) -> frozenset[str]:
    """Names in ``backbone.net`` of the parameters on which no output depends, of the network or of a tower.

    Such are a classifier and a projection head; their values do not matter. What a text tower or a generator's decoder
    uses is none. Where a tower cannot be tried, for there is no example of its input or no gradient passes through it,
    all that others do not use may be its own: then there are no heads.
    """
    if backbone.heads is not None:
        return backbone.heads
    unused: frozenset[str] | None = None
    for kind in (backbone.spec.takes, *backbone.towers):
        idle = _unused(backbone, kind)
        if idle is None:
            return frozenset()
        unused = idle if unused is None else unused & idle
    assert unused is not None
    return unused


def _unused(backbone: Backbone, kind: str) -> frozenset[str] | None:
    """The parameters on which no feature of an input of that kind depends; None where that is unknown."""
    try:
        features, parameters = look_meta(backbone, kind=kind)
    except Exception:  # of an example that is not what a stranger's tower expects
        if kind == backbone.spec.takes == "image":
            raise
        return None
    every = (features.pooled, features.tokens, features.masks, features.joint, *features.maps.values())
    outputs = [tensor for tensor in every if tensor is not None and tensor.requires_grad]
    if not outputs:
        return None
    used = _leaves(outputs)
    return frozenset(k.removeprefix("net.") for k, v in parameters.items() if v.requires_grad and v not in used)


def _leaves(outputs: Iterable[Tensor]) -> set[Tensor]:
    """The tensors that outputs are computed from, by the graph that a backward pass would go through."""
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen, leaves = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):  # it accumulates the gradient of a leaf
            leaves.add(node.variable)
        following = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= following
        nodes += following
    return leaves
