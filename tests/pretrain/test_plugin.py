"""Options read from text, and what a run remembers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from evalsuite import UsageError
from pretrain import Method, Preset, Training
from pretrain.defaults import Defaults
from pretrain.plugin import Run, read_options
from pretrain.testing import tiny_backbone, tiny_corpus


class Typed(Method):
    @dataclass(frozen=True)
    class Options:
        reach: float = 0.1
        copies: int = 10
        strict: bool = False
        kind: Literal["a", "b"] = "a"
        file: Path | None = None
        scales: tuple[float, ...] = (1.0,)

        def __post_init__(self) -> None:
            if self.copies < 1:
                raise ValueError("every image is there once at least")

    presets: ClassVar = {"small": Preset("ours", 5, 8, {"copies": 3})}


def read(preset=None, **texts):
    return read_options(Typed, "typed", texts, preset)


def test_text_is_read_as_each_fields_type():
    found = read(reach="2e-1", copies="3", strict="true", kind="b", file="a/b.npz", scales="0.5, 2")
    assert found == Typed.Options(0.2, 3, True, "b", Path("a/b.npz"), (0.5, 2.0))
    assert read(file="none").file is None


def test_settings_outdo_a_preset_and_a_preset_the_defaults():
    preset = Typed.preset("small").options
    assert read(preset).copies == 3
    assert read(preset, copies="4").copies == 4
    assert read().copies == 10


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="typed has no setting 'reech'") as refusal:
        read(reech="1")
    assert "reach, copies, strict" in refusal.value.cause
    assert refusal.value.fix == "did you mean 'reach'?"


@pytest.mark.parametrize(
    ("key", "text"), [("reach", "far"), ("copies", "1.5"), ("kind", "c"), ("scales", "1,x"), ("strict", "perhaps")]
)
def test_a_value_of_another_type_is_refused(key, text):
    with pytest.raises(UsageError, match=f"--set typed.{key}={text} cannot be read"):
        read(**{key: text})


def test_options_that_check_themselves_are_refused_in_the_users_words():
    with pytest.raises(UsageError, match="settings of typed do not fit") as refusal:
        read(copies="0")
    assert "once at least" in refusal.value.cause


def test_an_unknown_preset_is_refused():
    with pytest.raises(UsageError, match="Typed has no preset 'smal'"):
        Typed.preset("smal")


def make_run(out: Path, seed: int = 0) -> Run:
    return Run(
        tiny_backbone(), seed, torch.device("cpu"), out, 2, 8, 8, steps=8, epoch_steps=4, data=tiny_corpus().train
    )


def test_what_is_costly_is_made_once_for_each_key_seed_and_data(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"labels": torch.arange(3)}

    for _ in range(2):
        assert torch.equal(make_run(tmp_path).cached("clusters=3", make)["labels"], torch.arange(3))
    assert len(calls) == 1
    make_run(tmp_path).cached("clusters=4", make)
    make_run(tmp_path, seed=1).cached("clusters=3", make)
    assert len(calls) == 3


def test_what_a_killed_process_was_making_is_removed_by_the_next(tmp_path):
    labels = {"labels": torch.arange(3)}
    make_run(tmp_path / "one").cached("clusters=3", lambda: labels)
    (made,) = (tmp_path / "one" / "cache").iterdir()
    left = tmp_path / "two" / "cache" / f".{made.name}.a1b2.partial"
    left.parent.mkdir(parents=True)
    left.touch()
    make_run(tmp_path / "two").cached("clusters=3", lambda: labels)
    assert [path.name for path in left.parent.iterdir()] == [made.name]


def test_a_run_knows_its_epoch_and_progress(tmp_path):
    run = make_run(tmp_path)
    run.step = 6
    assert (run.epoch, run.progress, run.dim) == (1, 0.75, 16)


def rates(training, epochs=4, epoch_steps=10):
    run = Run(tiny_backbone(), 0, torch.device("cpu"), Path(), epochs, 8, 8, epochs * epoch_steps, epoch_steps)
    run.training = training
    found = []
    for step in range(run.steps):
        run.step = step
        found.append(Defaults().rate(run))
    return found


def test_a_rate_rises_by_step_and_may_then_fall_by_epoch():
    """Half an epoch of warm-up: what is left of that epoch has the highest rate."""
    by_epoch, by_step = (rates(Training(warmup=0.5, start=0.1, floor=0.2, by_epoch=b)) for b in (True, False))
    assert by_epoch[:5] == by_step[:5] == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82])
    assert by_epoch[5:10] == [1.0] * 5
    assert [by_epoch[10 * e] for e in (1, 2, 3)] == pytest.approx([by_step[10 * e] for e in (1, 2, 3)])
    assert all(len(set(by_epoch[10 * e : 10 * e + 10])) == 1 for e in (1, 2, 3))
    assert 0.2 < by_step[-1] < 0.21
