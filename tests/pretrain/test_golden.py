"""Ten losses of each recipe, written down in tests/golden: no change moves them unnoticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# by its folder: "tests" is also the name of a package that some distributions install
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))

from recipes import RECIPES, first_losses, read

BEFORE = read()


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Drawing them is half of so short a run."""
    monkeypatch.setattr("pretrain.train.plot", lambda *_: None)


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_ten_losses_are_those_written_down(name):
    assert first_losses(name) == pytest.approx(BEFORE[name], rel=1e-4)


def test_every_line_has_its_recipe():
    assert list(BEFORE) == list(RECIPES)


def test_no_two_recipes_give_the_same_losses():
    assert len({tuple(losses) for losses in BEFORE.values()}) == len(BEFORE)
