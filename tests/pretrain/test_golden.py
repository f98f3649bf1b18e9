"""Ten losses of each recipe, written down in tests/golden: no change moves them unnoticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.golden.recipes import FOLDER, RECIPES, lines, read


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_ten_losses_are_those_written_down(name):
    found, expected = lines(name), read(name)
    assert [step for step, _ in found] == [step for step, _ in expected] == list(range(1, 11))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-4)


def test_every_file_has_its_recipe():
    assert {p.stem for p in FOLDER.glob("*.txt")} == set(RECIPES)
