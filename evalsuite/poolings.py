"""The old name of :mod:`evalsuite.features.poolings`."""

from evalsuite.lazy import moved

__getattr__ = moved(__name__, "evalsuite.features.poolings")
