"""The ground truth as an encoder: what an agent could do that saw the objects themselves."""

from __future__ import annotations

from torch import Tensor, nn

from evalsuite import Backbone, BackboneSpec, Features

__all__ = ["GroundTruth", "ground_truth"]


class GroundTruth(Backbone):
    """Rows of a world's state (B, rows, 5) as tokens; it is shown no pixels, and has no weights.

    Rows are colour, shape and scale as indices into lists, x and y (Yoon et al., ICML 2023: "GT").
    """

    def forward(self, state: Tensor) -> Features:
        return Features(tokens=state.float())


def ground_truth() -> Backbone:
    """``objects:state``."""
    spec = BackboneSpec(
        arch="objects:state", dim=5, strides={}, gives=frozenset({"tokens"}), image_size=(64, 64), takes="state"
    )
    return GroundTruth(nn.Identity(), spec)
