"""Modules that have another name now are importable by their old one, with a warning that says the new one."""

from __future__ import annotations

import importlib

import pytest

from evalsuite import features, signals, training
from evalsuite.features import poolings
from evalsuite.probing import heads, published
from evalsuite.training import processes


@pytest.mark.parametrize(
    ("old", "name", "value"),
    [
        ("evalsuite.cache", "Cache", features.Cache),
        ("evalsuite.fit", "LARS", training.LARS),
        ("evalsuite.fit", "fit", training.fit),
        ("evalsuite.fit", "signals", signals.signals),
        ("evalsuite.heads", "HeadProtocol", heads.HeadProtocol),
        ("evalsuite.heads", "recipes", published.recipes),
        ("evalsuite.poolings", "pooling", poolings.pooling),
        ("evalsuite.features.poolings", "Encoder", poolings.ObservationEncoder),
        ("evalsuite.processes", "together", processes.together),
        ("evalsuite.training", "Moment", training.StepInfo),
    ],
)
def test_an_old_name_gives_the_new_one_and_warns(old, name, value):
    with pytest.warns(DeprecationWarning, match=f"{name} is evalsuite"):
        assert getattr(importlib.import_module(old), name) is value


def test_a_name_that_never_was_is_refused():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        importlib.import_module("evalsuite.cache").Nothing  # noqa: B018
