"""The old name of :mod:`evalsuite.probing.heads` and :mod:`evalsuite.probing.published`."""

from evalsuite.lazy import moved

__getattr__ = moved(__name__, "evalsuite.probing.heads", "evalsuite.probing.published")
