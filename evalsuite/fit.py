"""The old name of :mod:`evalsuite.training` and :mod:`evalsuite.signals`."""

from evalsuite.lazy import moved

__getattr__ = moved(__name__, "evalsuite.training", "evalsuite.signals")
