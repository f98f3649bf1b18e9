"""The first losses of each recipe, written down in tests/golden: no change moves them unnoticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# by its folder: "tests" is also the name of a package that some distributions install
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))

from recipes import RECIPES, TOLERANCE, distance, first_losses, read

BEFORE = read()


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Drawing them is half of so short a run."""
    monkeypatch.setattr("pretrain.train.plot", lambda *_: None)


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_losses_are_those_written_down(name):
    assert distance(first_losses(name), BEFORE[name]) < TOLERANCE


# numbers of each method; those of the schedule alone are held step by step in tests/parity/test_schedules.py
NUMBERS = {
    "simclr": ("lr", "momentum", "weight_decay", "trust", "temperature"),
    "moco": ("lr", "momentum", "weight_decay", "temperature", "momentum_twin"),
    "simsiam": ("lr", "momentum", "weight_decay"),
    "byol": ("lr", "momentum", "weight_decay", "trust", "momentum_twin"),
    "pixpro": ("lr", "momentum", "weight_decay", "trust", "momentum_twin", "reach", "power"),
    "pixpro-instance": ("instance",),
    "pixpro-contrast": ("temperature",),
    "rotnet": ("lr", "momentum", "weight_decay"),
    "swav": ("lr", "momentum", "weight_decay", "trust", "temperature", "epsilon"),
    "obow": ("lr", "momentum", "weight_decay", "momentum_twin", "kappa", "inv_delta"),
    "slate": ("lr_decoder", "lr_vae", "temperature"),
    "vae": ("lr", "beta"),
    "mae": ("lr", "weight_decay"),
    "iodine": ("lr",),
    "slot-attention": ("lr", "half_life"),
    "slot-set": ("lr", "half_life"),
}


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, all_of in NUMBERS.items() for number in all_of])
def test_a_number_that_is_a_thousandth_off_is_noticed(name, number):
    wrong = 1.001 * getattr(RECIPES[name][0]().options, number)
    assert distance(first_losses(name, changes={number: wrong}), BEFORE[name]) > TOLERANCE


def test_every_line_has_its_recipe():
    assert list(BEFORE) == list(RECIPES)


def test_no_two_recipes_give_the_same_losses():
    assert len({tuple(losses) for losses in BEFORE.values()}) == len(BEFORE)
