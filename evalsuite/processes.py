"""The old name of :mod:`evalsuite.training.processes`."""

from evalsuite.lazy import moved

__getattr__ = moved(__name__, "evalsuite.training.processes")
