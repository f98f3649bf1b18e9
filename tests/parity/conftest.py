"""The inputs on which the official functions were executed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Wave = Callable[..., Tensor]


@pytest.fixture(scope="session")
def wave() -> Wave:
    """``wave(shape, a, b)``: sin(a i + b) over the row-major index i, in float64."""

    def made(shape: tuple[int, ...], a: float, b: float) -> Tensor:
        return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b).view(shape)

    return made
