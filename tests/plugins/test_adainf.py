"""AdaInf: what the inflated set is made of, and how far its views are weakened."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from evalsuite_adainf.modifier import AdaInf
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite import DataError, UsageError
from pretrain import Arrays, Augment, Jitter, moco_v2, pixpro_pair, simclr, solo_asymmetric, solo_symmetric


def pictures(count, seed, size=16):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture
def generated(tmp_path):
    path = tmp_path / "generated.npz"
    np.savez(path, image=pictures(7, 1), label=np.arange(7))
    return path


def joined(real, path, **options):
    wrapped = AdaInf(AdaInf.Options(generated=path, **options)).dataset()
    next(wrapped)
    with pytest.raises(StopIteration) as done:
        wrapped.send(real)
    return done.value.value


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), g=st.integers(1, 9), copies=st.integers(1, 12))
def test_the_set_is_copies_of_the_real_and_then_the_generated(tmp_path_factory, n, g, copies):
    path = tmp_path_factory.mktemp("generated") / "a.npz"
    real, made = Arrays(pictures(n, 0), np.arange(n)), pictures(g, 1)
    np.savez(path, image=made)
    data = joined(real, path, copies=copies)
    assert len(data) == copies * n + g
    for row in range(len(data)):
        pixels = real.pixels[row % n] if row < copies * n else made[row - copies * n]
        assert np.array_equal(data[row]["image"].numpy(), pixels.transpose(2, 0, 1))
    assert data.labels.tolist() == [*range(n)] * copies + [-1] * g


def test_published_proportions(generated):
    """Ten copies, so that a million generated images and 50 000 real ones are one real row in three."""
    assert AdaInf.Options(generated).copies == 10
    assert pytest.approx(1 / 3) == 10 * 50_000 / (10 * 50_000 + 1_000_000)


def test_labels_of_generated_images_are_not_used(generated):
    assert joined(Arrays(pictures(2, 0), [3, 4]), generated, copies=1).labels.tolist() == [3, 4] + [-1] * 7


def test_the_fingerprint_tells_inflated_sets_apart(generated):
    real = Arrays(pictures(2, 0))
    prints = {joined(real, generated, copies=copies).fingerprint for copies in (1, 2)}
    assert len(prints | {real.fingerprint}) == 3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 8, 8, 3), dtype=np.float32), "float32"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), r"\(2, 3, 8, 8\)"),
        (np.zeros((2, 8, 8, 4), dtype=np.uint8), r"\(2, 8, 8, 4\)"),
    ],
)
def test_anything_but_eight_bit_rgb_is_refused(tmp_path, image, message):
    np.savez(tmp_path / "bad.npz", image=image)
    with pytest.raises(DataError, match=message):
        joined(Arrays(pictures(2, 0)), tmp_path / "bad.npz")


def test_no_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="adainf has no generated images") as refused:
        joined(Arrays(pictures(2, 0)), None)
    assert "--set adainf.generated=" in refused.value.fix
    with pytest.raises(DataError, match="is missing"):
        joined(Arrays(pictures(2, 0)), tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match="at least once, not 0"):
        AdaInf.Options(copies=0)


# Views -------------------------------------------------------------------------------------------------------


def weaker(look, **options):
    return AdaInf(AdaInf.Options(**options)).weaker(look)


def test_the_baselines_views_become_the_published_ones():
    """``symmetric_adainf.yaml`` and ``asymmetric_adainf.yaml``: nothing but crop and jitter differs."""
    plain = solo_symmetric()
    assert plain.jitter == Jitter(0.8, 0.8, 0.8, 0.2, p=0.8)
    assert weaker(plain) == replace(plain, crop=(0.2, 1.0), jitter=Jitter(0.4, 0.4, 0.4, 0.1, p=0.4))
    for look in solo_asymmetric():
        jitter = Jitter(0.4, 0.4, 0.2, 0.1, p=0.4)
        assert weaker(look) == replace(look, crop=(0.2, 1.0), jitter=jitter)


@pytest.mark.parametrize("look", [simclr(), simclr(32, 0.5, 0.0), moco_v2(), *pixpro_pair(), Augment(jitter=None)])
def test_no_view_becomes_stronger(look):
    found = weaker(look)
    assert found.crop[0] >= look.crop[0]
    assert found.crop[0] >= 0.2
    if look.jitter is None:
        assert found.jitter is None
    else:
        for name in ("brightness", "contrast", "saturation", "hue", "p"):
            assert getattr(found.jitter, name) <= getattr(look.jitter, name)
    assert weaker(found) == found
    assert replace(found, crop=look.crop, jitter=look.jitter) == look


def test_small_crops_and_no_crop_are_left_to_make_sense():
    assert weaker(Augment(crop=(0.05, 0.14))).crop == (0.2, 0.2)
    assert weaker(Augment(crop=None)).crop is None


def test_looks_that_are_no_augment_are_left_alone(generated):
    def other(sample, rng):
        raise NotImplementedError

    wrapped = AdaInf(AdaInf.Options(generated)).views()
    next(wrapped)
    with pytest.raises(StopIteration) as done:
        wrapped.send((other, moco_v2()))
    looks = done.value.value
    assert looks[0] is other
    assert looks[1] == weaker(moco_v2())


# In a recipe -------------------------------------------------------------------------------------------------


def test_it_trains_with_any_method(bench, twins, alone, generated):
    for method in (twins, alone):
        table = bench(method(), AdaInf(AdaInf.Options(generated, copies=2)))
        assert len(table.data) == 2 * 64 + 7
        assert all(look == weaker(moco_v2(16)) for look in table.looks)
        assert len(list(table.steps(9))) == 9


def test_two_copies_of_an_image_are_samples_of_their_own(bench, twins, generated):
    table = bench(twins(), AdaInf(AdaInf.Options(generated, copies=2)))
    batch = table.batch(torch.tensor([3, 3 + 64, 130]))
    assert batch.index.tolist() == [3, 67, 130]
    _, (pairs,) = table.forward(batch)
    assert len(pairs.source.unique()) == 3


def test_switched_off_it_still_joins_but_leaves_the_views(bench, twins, generated):
    table = bench(twins(), AdaInf(AdaInf.Options(generated, copies=1, weaken=False)))
    assert len(table.data) == 64 + 7
    assert table.looks == bench(twins()).looks
