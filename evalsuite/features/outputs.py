"""Tensors read off a forward pass, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from evalsuite.backbone import Backbone, Features
from evalsuite.errors import BackboneError, UsageError

__all__ = ["Output", "Taps"]

# a vector | tokens, how pooled | a map or a layer, how pooled, the grid, or how kept
NAMES = r"(pooled|joint)|(tokens)/(avg|max|whole)|(map[1-9]\d*|layer:[\w.]+)(?:/(?:(avg|max)([1-9]\d*)?|(full|whole)))?"


@dataclass(frozen=True)
class Output:
    """One tensor read off a forward pass, named ``source`` or ``source/pool`` or ``source/pool+grid``.

    ``pooled`` is the backbone's own vector, ``joint`` the one in a space shared with text. ``map16`` is its map of
    stride 16 and ``layer:NAME`` the output of that submodule of the network, both pooled over space; ``tokens`` are
    pooled over the set. ``pool`` is ``avg`` or ``max``; ``max6`` pools a map adaptively to 6 x 6 and flattens it,
    channel first; ``full`` is all of a map, flattened likewise. A map or a layer without a pool is averaged; tokens
    without one are refused, for their mean is not they. All these are vectors (B, D). ``whole`` keeps the shape: tokens
    (B, N, D), a map (B, C, H, W), a layer what it gives.
    """

    name: str
    source: str
    pool: str
    grid: int

    @classmethod
    def parse(cls, name: str) -> Output:
        """Read a name. Raises :class:`UsageError` for one that says nothing."""
        if name == "tokens":
            raise UsageError(
                "'tokens' does not say whether they are pooled",
                cause="their mean is one vector an image, and they are many",
                fix="tokens/avg or tokens/max for a vector, tokens/whole for all of them",
            )
        match = re.fullmatch(NAMES, name)
        if match is None:
            raise UsageError(
                f"{name!r} names no output of a backbone",
                cause="outputs are pooled, joint, tokens, map16 or layer:NAME, the last three with /avg, /max or "
                "/whole, maps and layers with a grid or /full",
                fix="for example pooled, tokens/max, tokens/whole, map32/avg2, map16/full or layer:layer3/max6",
            )
        vector, tokens, token_pool, spatial, pool, grid, kept = match.groups()
        return cls(name, vector or tokens or spatial, token_pool or pool or kept or "avg", int(grid or 1))

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`BackboneError` where the backbone does not give the source."""
        spec = backbone.spec
        if self.source.startswith("layer:"):
            has, gives = self.module in dict(backbone.net.named_modules()), "the names of its submodules"
        elif self.source.startswith("map"):
            has, gives = int(self.source[3:]) in spec.strides, f"maps of stride {sorted(spec.strides)}"
        else:
            has, gives = self.source in spec.gives, ", ".join(sorted(spec.gives))
        if not has:
            raise BackboneError(
                f"{spec.arch} has no output {self.name!r}",
                cause=f"it gives {gives}",
                fix="name one that it gives",
            )

    @property
    def vector(self) -> bool:
        """Whether it is one vector an image; what is read ``whole`` is not."""
        return self.pool != "whole"

    @property
    def needs(self) -> frozenset[str]:
        """What a backbone must give for it: ``pooled``, ``joint``, ``maps`` or ``tokens``; of a layer nothing."""
        if self.source.startswith("layer:"):
            return frozenset()
        return frozenset({"maps" if self.source.startswith("map") else self.source})

    @property
    def module(self) -> str:
        """The submodule of a ``layer:`` source."""
        return self.source.removeprefix("layer:")

    def read(self, features: Features, layers: Mapping[str, Tensor]) -> Tensor:
        """The tensor, in float32."""
        return self._pool(self.whole(features, layers))

    def whole(self, features: Features, layers: Mapping[str, Tensor]) -> Tensor:
        """What is pooled: (B, D), (B, N, D) or (B, C, H, W), in float32."""
        if self.source.startswith("layer:"):
            values = layers.get(self.source)
        elif self.source.startswith("map"):
            values = features.maps.get(int(self.source[3:]))
        else:
            values = getattr(features, self.source)
        if values is None or values.ndim not in (2, 3, 4):
            raise BackboneError(
                f"the backbone gave no output {self.name!r}",
                cause="it is None, or no tensor of 2, 3 or 4 dimensions",
                fix="correct what the backbone's spec says that it gives",
            )
        return values.float()

    def _pool(self, values: Tensor) -> Tensor:
        if self.pool == "whole":
            return values
        if self.pool == "full":
            return values.flatten(1)
        if values.ndim == 4:
            pooling = nn.functional.adaptive_avg_pool2d if self.pool == "avg" else nn.functional.adaptive_max_pool2d
            return pooling(values, self.grid).flatten(1)
        if values.ndim == 3:
            return values.mean(1) if self.pool == "avg" else values.amax(1)
        return values


class Taps:
    """Reads outputs off the forward pass of a backbone, or of its tower for inputs of ``kind``; hooks sit on the layers
    asked for while the block lasts."""

    def __init__(
        self, backbone: Backbone, outputs: Sequence[Output], whole: bool = False, kind: str | None = None
    ) -> None:
        self.backbone, self.outputs, self.whole = backbone, outputs, whole
        self.kind = backbone.spec.takes if kind is None else kind
        self.layers: dict[str, Tensor] = {}

    def __enter__(self) -> Taps:
        modules = dict(self.backbone.net.named_modules())
        sources = {output.source: output.module for output in self.outputs if output.source.startswith("layer:")}
        self.hooks = [modules[name].register_forward_hook(self._keep(source)) for source, name in sources.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def __call__(self, batch: Any) -> list[Tensor]:
        """Input (B, ...), pixels in [0,1], to one tensor an output, or what it is pooled from, where ``whole``."""
        try:
            features = self.backbone.encode(self.kind, batch)
            return [(o.whole if self.whole else o.read)(features, self.layers) for o in self.outputs]
        finally:
            self.layers.clear()

    def _keep(self, source: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.layers[source] = output

        return hook
