"""Regression tasks: an oracle at the top, a blind backbone at nothing, groups, damage, and what is kept."""

from __future__ import annotations

import numpy as np
import pytest

from evalsuite.errors import BackboneError, DataError, ImageError, UsageError
from evalsuite.features import Texts
from evalsuite.probing import Numbers, Regression, RegressionProtocol
from evalsuite.progress import Progress
from evalsuite.task import Setup, evaluate
from evalsuite.testing import OracleBackbone, RandomBackbone


class Greys:
    """Images of one grey each, as the cache reads them; ``broken`` does not decode."""

    split = "greys"
    labels = None

    def __init__(self, levels, broken=None):
        self.levels, self.broken = levels, broken
        self.ids = [f"im{i}" for i in range(len(levels))]
        self.fingerprint = f"greys{levels.tolist()}"

    def __getitem__(self, index):
        if index == self.broken:
            raise ImageError("im is broken", cause="it is", fix="mend it")
        return np.full((8, 8, 3), self.levels[index], np.uint8)


class Brightness(Regression):
    name = "brightness"

    def __init__(self, targets=1, groups=False):
        self.given = targets, groups

    def sets(self, setup):
        targets, groups = self.given

        def draw(seed, count):
            levels = np.random.default_rng(seed).integers(0, 256, count)
            values = np.stack([levels / 255 * (t + 1) for t in range(targets)], axis=1)
            names = np.array([f"g{i // 3}" for i in range(count)]) if groups else None
            return Numbers(Greys(levels), values[:, 0] if targets == 1 else values, names)

        return draw(0, 60), draw(1, 30)


@pytest.fixture
def ask(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path / "cache"))

    def ask(task, backbone, protocol=None, **flags):
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        return evaluate(
            task, backbone, Setup(protocol or task.protocol(), work, registry, Progress(quiet=True), **flags)
        )

    return ask


@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("groups", [False, True])
def test_an_oracle_knows_the_numbers_and_a_blind_backbone_none(ask, targets, groups):
    task = Brightness(targets, groups)
    best = ask(task, OracleBackbone())
    assert best.scores["spearman"] > 0.99
    assert best.scores["r2"] > 0.99
    assert best.scores["mae"] < 0.02
    blind = ask(task, RandomBackbone())
    assert abs(blind.scores["spearman"]) < 0.5
    assert all(best.replicates[name].shape == (1000,) for name in best.scores)
    assert best.samples["mae"].mean() == pytest.approx(best.scores["mae"])
    assert ("group" in best.samples) is groups
    with np.load(best.records["predictions"]) as kept:
        assert kept["predictions"].shape == kept["targets"].shape == ((30,) if targets == 1 else (30, 2))
    assert best.selected["validation_images"] == 60


def test_a_limit_and_another_criterion(ask):
    task = Brightness()
    protocol = task.protocol().override({"criterion": "mae", "alphas": "0.1,1000"})
    outcome = ask(task, OracleBackbone(), protocol, limit=20)
    assert (outcome.data["train_rows"], outcome.data["test_rows"]) == (20, 20)
    assert outcome.selected["alpha"] == 0.1


def test_images_that_do_not_decode_are_left_out_or_refused(ask):
    class Broken(Brightness):
        def sets(self, setup):
            train, test = super().sets(setup)
            return train, Numbers(Greys(test.images.levels, broken=4), test.values)

    outcome = ask(Broken(), OracleBackbone())
    assert (outcome.data["test_rows"], outcome.data["test_unreadable"]) == (29, 1)
    with pytest.raises(ImageError):
        ask(Broken(), OracleBackbone(), strict=True)


def test_what_does_not_fit_is_refused(ask):
    for values in (np.zeros(4), np.zeros((3, 1, 1)), np.array([0, 1, np.nan])):
        with pytest.raises(DataError, match="values of shape"):
            Numbers(Greys(np.arange(3)), values)
    with pytest.raises(UsageError, match="fits heads on vectors, and 'tokens/whole' is none"):
        RegressionProtocol(id="whole", version=1, outputs=("tokens/whole",))
    with pytest.raises(BackboneError, match="brightness by ridge needs pooled, which testing:oracle does not give"):
        ask(Brightness(), OracleBackbone(gives={"maps"}))
    numbers = Numbers(Texts(["a", "b", "c"]), np.arange(3.0)).take(np.array([2, 0]))
    assert (numbers.kind, numbers.ids, numbers[0], numbers.labels.tolist()) == ("text", ["002 c", "000 a"], "c", [2, 0])
    assert not hasattr(numbers, "__getitems__")
