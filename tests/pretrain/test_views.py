"""Augmentations as values: what they draw, what they do to pixels, and which box they tell."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from pretrain import Augment, Centre, Jitter, moco_v1, moco_v2, multi_crop, pixpro_pair, simclr, solo_asymmetric, swav
from pretrain.views import solo_symmetric

PLAIN = Augment(8, crop=None, flip=0.0, jitter=None, gray=0.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 20, width: int = 24) -> dict[str, torch.Tensor]:
    return {"image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=rng(9))}


def coordinates(height: int, width: int) -> dict[str, torch.Tensor]:
    """An image whose red and green are the x and y of a pixel, over [0,240]."""
    y, x = torch.meshgrid(torch.linspace(0, 240, height), torch.linspace(0, 240, width), indexing="ij")
    return {"image": torch.stack([x, y, 0 * x]).round().to(torch.uint8)}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(30, 90), width=st.integers(30, 90))
def test_a_box_maps_back_onto_the_pixels_flipped_or_not(seed, height, width):
    augment = replace(PLAIN, size=16, crop=(0.2, 1.0), flip=0.5)
    view = augment(coordinates(height, width), rng(seed))
    assert view.box is not None
    x0, y0, x1, y1 = (240 * view.box).tolist()
    middle = view.data[:, 7:9, 7:9].float().mean((1, 2))
    assert float(middle[0]) == pytest.approx((x0 + x1) / 2, abs=6)
    assert float(middle[1]) == pytest.approx((y0 + y1) / 2, abs=6)
    rising = float(view.data[0, 8, -1]) > float(view.data[0, 8, 0])
    assert rising == (x0 < x1)


def test_a_box_is_that_of_pixpro():
    """(j/(W-1), i/(H-1), (j+w-1)/(W-1), (i+h-1)/(H-1)), and x swapped by a flip (contrast/data/transform.py)."""
    view = replace(PLAIN, flip=1.0)(picture(5, 9), rng())
    assert view.box.tolist() == [1, 0, 0, 1]
    augment = replace(PLAIN, crop=(0.25, 0.25), ratio=(1.0, 1.0), size=10)
    seen = set()
    for seed in range(60):
        x0, y0, x1, y1 = augment(picture(20, 20), rng(seed)).box.tolist()
        assert x1 - x0 == pytest.approx(9 / 19)
        assert (y1 - y0) * 19 == pytest.approx(9)
        seen |= {round(x0 * 19), round(y0 * 19)}
    assert seen == set(range(11))


def test_the_same_seed_gives_the_same_view_and_another_another():
    augment = simclr(16)
    one, same, other = (augment(picture(), rng(s)) for s in (1, 1, 2))
    assert torch.equal(one.data, same.data)
    assert not torch.equal(one.data, other.data)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    simclr(16)(picture(), rng())
    assert torch.equal(before, torch.get_rng_state())


def test_the_sample_is_left_alone():
    sample = picture()
    before = sample["image"].clone()
    for seed in range(20):
        replace(simclr(16), solarize=1.0, gray=1.0)(sample, rng(seed))
    assert torch.equal(sample["image"], before)


def test_turning_one_effect_off_leaves_the_draws_of_the_others():
    """Neither solarising nor greying moves a crop or a flip."""
    full = replace(moco_v2(16, blur=1.0), solarize=0.5)
    for seed in range(10):
        bare = replace(full, gray=0.0, jitter=None, solarize=0.0)
        assert torch.equal(full(picture(), rng(seed)).box, bare(picture(), rng(seed)).box)


def test_without_effects_pixels_are_those_of_torchvision():
    sample = picture()
    view = replace(PLAIN, size=12)(sample, rng())
    assert torch.equal(view.data, v2.functional.resize(sample["image"], [12, 12], antialias=True))
    bicubic = replace(PLAIN, size=12, interpolation="bicubic")(sample, rng())
    expected = v2.functional.resize(sample["image"], [12, 12], v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(bicubic.data, expected)


def test_blur_is_torchvisions_gaussian():
    sample = picture(24, 24)
    view = replace(PLAIN, size=24, blur=1.0, sigma=(1.3, 1.3), kernel=0.3)(sample, rng())
    expected = v2.functional.gaussian_blur(sample["image"].float() / 255, [7, 7], [1.3, 1.3])
    assert (view.data.float() / 255 - expected).abs().max() <= 0.5 / 255 + 1e-6


def test_a_blur_with_a_free_kernel_reaches_three_deviations():
    dot = {"image": torch.zeros(3, 31, 31, dtype=torch.uint8)}
    dot["image"][:, 15, 15] = 255
    spread = replace(PLAIN, size=31, blur=1.0, sigma=(1.0, 1.0))(dot, rng()).data[0] > 0
    assert spread.any(0).nonzero().flatten().tolist() == list(range(13, 18))  # beyond two, less than half a value


def test_solarisation_inverts_from_128_on():
    steps = {"image": torch.tensor([0, 127, 128, 255], dtype=torch.uint8).repeat(3, 2, 1)}
    view = replace(PLAIN, solarize=1.0, size=2)
    values = replace(view, size=4)({"image": steps["image"].repeat(1, 2, 1)}, rng()).data
    assert values[0, 0].tolist() == [0, 127, 127, 0]


def test_grey_has_three_equal_channels_and_comes_before_or_after_the_jitter():
    after = replace(PLAIN, gray=1.0, jitter=Jitter(0, 0, 0, 0.5, p=1.0))(picture(), rng())
    assert torch.equal(after.data[0], after.data[2])
    tint = Jitter(0, 0, 0, 0.5, p=1.0)
    first = replace(PLAIN, gray=1.0, gray_first=True, jitter=tint)(picture(), rng())
    grey = replace(PLAIN, gray=1.0)(picture(), rng())  # it has no hue to turn
    assert (first.data.int() - grey.data.int()).abs().max() <= 1
    late = replace(PLAIN, gray=1.0, jitter=tint)(picture(), rng())
    assert (late.data.int() - grey.data.int()).abs().max() > 5


def test_jitter_is_torchvisions_and_its_order_matters_only_when_drawn():
    sample, jitter = picture(8, 8), Jitter(0.8, 0.8, 0.8, 0.2, p=1.0, fixed=True)
    view = replace(PLAIN, jitter=jitter)(sample, rng(4))
    draws = torch.rand(34, generator=rng(4), dtype=torch.float64).tolist()[27:31]
    f = v2.functional
    x = sample["image"].float() / 255
    x = f.adjust_brightness(x, 0.2 + draws[0] * 1.6)
    x = f.adjust_contrast(x, 0.2 + draws[1] * 1.6)
    x = f.adjust_saturation(x, 0.2 + draws[2] * 1.6)
    x = f.adjust_hue(x, (2 * draws[3] - 1) * 0.2)
    assert (view.data.float() - 255 * x).abs().max() <= 0.501
    drawn = replace(PLAIN, jitter=replace(jitter, fixed=False))(sample, rng(4))
    assert not torch.equal(drawn.data, view.data)


def test_strengths_are_scaled_and_the_rest_kept():
    assert Jitter(0.8, 0.8, 0.4, 0.2, p=0.7) / 2 == Jitter(0.4, 0.4, 0.2, 0.1, p=0.7)
    assert replace(simclr(32), jitter=simclr(32).jitter * 0.5) == simclr(32, strength=0.5)


def test_crops_have_the_areas_and_ratios_of_random_resized_crop():
    """The share of the area is uniform, its ratio log-uniform: compared by moments with torchvision's own."""
    augment = Augment(1, crop=(0.08, 1.0))
    draws = torch.rand(4000, 22, generator=rng(), dtype=torch.float64).tolist()
    ours = torch.tensor([augment._crop(torch.empty(3, 200, 200), d) for d in draws], dtype=torch.float64)
    theirs = torch.tensor(
        [list(v2.RandomResizedCrop(1).make_params([torch.empty(3, 200, 200)]).values())[:4] for _ in range(4000)],
        dtype=torch.float64,
    )
    for one, other in zip(ours.mean(0), theirs.mean(0), strict=True):
        assert float(one) == pytest.approx(float(other), abs=4)
    for one, other in zip(ours.std(0), theirs.std(0), strict=True):
        assert float(one) == pytest.approx(float(other), abs=4)


def test_an_image_too_narrow_for_any_crop_gives_its_middle():
    view = Augment(4, crop=(1.0, 1.0), flip=0.0, jitter=None)(coordinates(10, 100), rng())
    x0, _, x1, _ = view.box.tolist()
    assert x1 - x0 == pytest.approx(12 / 99)
    assert (x0 + x1) / 2 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "bad", [{"crop": (0.0, 1.0)}, {"crop": (0.5, 0.2)}, {"size": 0}, {"flip": 1.5}, {"gray": -0.1}]
)
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match=r"crop|probabilities"):
        Augment(**bad)


def test_strengths_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="strengths"):
        Jitter(hue=0.6)


def test_augmentations_are_values():
    assert moco_v2(32) == moco_v2(32) != moco_v1(32)
    assert hash(swav()[0]) == hash(swav()[1])
    assert pickle.loads(pickle.dumps(swav())) == swav()


def test_presets_are_those_of_the_papers():
    one = moco_v1()
    assert (one.crop, one.gray_first, one.jitter, one.blur) == ((0.2, 1.0), True, Jitter(0.4, 0.4, 0.4, 0.4, p=1.0), 0)
    two = moco_v2()
    assert (two.jitter, two.gray, two.blur, two.sigma) == (Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), 0.2, 0.5, (0.1, 2.0))
    strong = simclr()
    assert (strong.crop, strong.jitter, strong.kernel) == ((0.08, 1.0), Jitter(0.8, 0.8, 0.8, 0.2, p=0.8), 0.1)
    assert simclr(32, 0.5, 0.0).jitter == Jitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    crops = swav()
    assert [(c.size, c.crop) for c in crops] == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6
    crops = swav(32, 16, (1, 2), areas=(0.3, 1.0, 0.1, 0.4), strength=0.5, blur=0.0)
    assert [(c.size, c.crop) for c in crops] == [(32, (0.3, 1.0))] + [(16, (0.1, 0.4))] * 2
    assert {(c.jitter, c.blur) for c in crops} == {(Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), 0.0)}
    first, second = pixpro_pair()
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert first.jitter == second.jitter == Jitter(0.4, 0.4, 0.2, 0.1, p=0.8)
    assert [a.solarize for a in solo_asymmetric()] == [0.0, 0.2]
    assert solo_symmetric().interpolation == "bicubic"


def test_several_kinds_of_crops_come_in_order():
    assert multi_crop((1, moco_v1(8)), (2, moco_v2(4))) == (moco_v1(8), moco_v2(4), moco_v2(4))


def test_the_centre_is_resized_by_its_shorter_side():
    view = Centre(8, share=0.5)(coordinates(32, 64))
    assert view.data.shape == (3, 8, 8)
    assert float(view.data[0].float().mean()) == pytest.approx(120, abs=2)
    assert float(view.data[1].float().mean()) == pytest.approx(120, abs=2)
    assert float(view.data[1, -1, 0]) - float(view.data[1, 0, 0]) == pytest.approx(240 * 7 / 16, abs=6)
