from __future__ import annotations

import numpy as np
import pytest

from evalsuite.errors import ResourceError


@pytest.fixture(scope="session")
def pictures() -> None:
    """Skips where this machine has no OpenGL without a screen, which pictures in three dimensions need."""
    from evalsuite.worlds import ReachingWorld, rules

    place = ReachingWorld(rules("object-reaching"))
    place.reset(np.random.default_rng(0))
    try:
        place.image(np.zeros((64, 64, 3), np.uint8))
    except ResourceError as error:
        pytest.skip(f"{error.problem}: {error.cause}")
