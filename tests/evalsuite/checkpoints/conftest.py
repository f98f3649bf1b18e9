from __future__ import annotations

import pytest

import evalsuite.backbones
import evalsuite.checkpoints
from evalsuite.hooks import Registry


@pytest.fixture(scope="package")
def registry() -> Registry:
    """Our own architectures and layouts, through the same hook as everybody's."""
    registry = Registry()
    evalsuite.backbones.evalsuite_register(registry)
    evalsuite.checkpoints.evalsuite_register(registry)
    return registry
