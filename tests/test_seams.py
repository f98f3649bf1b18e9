"""What is not here yet fits without a change here: a video task, a regression and a text backbone of strangers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evalsuite.errors import BackboneError
from evalsuite.results import Result
from evalsuite.runner import run
from evalsuite.testing import plugin_registry

OUTSIDE = Path(__file__).resolve().parent / "fixtures" / "outside"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.syspath_prepend(str(OUTSIDE))
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))

    def ask(plugin: str, backbone: str, task: str) -> Result:
        (result,) = run(backbone, task, registry=plugin_registry(plugin), out=tmp_path / "out")
        assert result.error is None, result.error
        return result

    return ask


@pytest.mark.parametrize("path", sorted(OUTSIDE.glob("*.py")), ids=lambda path: path.stem)
def test_each_is_under_sixty_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def test_a_video_task_over_sequences_of_frames(ask: Callable[..., Result]) -> None:
    result = ask("evalsuite_walks", "random:timm:test_resnet", "walks")
    assert result.scores["accuracy"].value == 1.0


def test_a_regression_of_ones_own(ask: Callable[..., Result]) -> None:
    result = ask("evalsuite_brightness", "random:timm:test_resnet", "brightness")
    value = result.scores["spearman"].value
    assert value is not None
    assert value > 0.9


def test_a_backbone_that_takes_text(ask: Callable[..., Result]) -> None:
    result = ask("evalsuite_letters", "random:letters", "vowels")
    value = result.scores["spearman"].value
    assert value is not None
    assert value > 0.9
    with pytest.raises(BackboneError, match="vowels by ridge needs text, which timm:test_resnet does not take"):
        ask("evalsuite_letters", "random:timm:test_resnet", "vowels")
    with pytest.raises(BackboneError, match="needs image, which letters does not take"):
        ask("evalsuite_letters", "random:letters", "classify")
