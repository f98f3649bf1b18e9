"""The Hallucinator: what it adds to pairs, whose copies count, and where its crops lie."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from evalsuite_hallucinator.modifier import Hallucinator, RimCrop, beta
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evalsuite import UsageError
from pretrain import Augment, Pairs, Recipe, Run, blocks

quick = settings(max_examples=25, deadline=None)


def prepared(width=6, **options):
    modifier = Hallucinator(Hallucinator.Options(**options))
    modifier.prepared(run=Run(None, 0, None, None, 1, 1, 1, width=width))  # type: ignore[arg-type]
    return modifier


def some_pairs(rows=5, width=6, seed=0, mate=False):
    draw = torch.Generator().manual_seed(seed)
    query, key, other = (torch.randn(rows, width, generator=draw) for _ in range(3))
    return Pairs(query.requires_grad_(), key, torch.arange(rows) * 3, other if mate else None)


@quick
@given(st.integers(1, 9), st.booleans(), st.booleans(), st.booleans())
def test_it_doubles_the_rows_and_keeps_the_first_half(rows, mate, official, per_sample):
    pairs = some_pairs(rows, mate=mate)
    out = prepared(official_duplicates=official, per_sample=per_sample).extended(pairs, torch.Generator())
    assert torch.equal(out.query[:rows], pairs.query)
    assert torch.equal(out.key, torch.cat([pairs.key] * 2))
    assert torch.equal(out.source[:rows], pairs.source)
    assert torch.equal(blocks.sample_of(out.source), pairs.source.repeat(2))
    assert (out.mate is None) == (pairs.mate is None)
    assert len(out.query) == len(out.source) == 2 * rows


def test_what_it_imagines_is_the_generator_at_the_drawn_reach():
    pairs, modifier = some_pairs(mate=True), prepared(reach=0.1)
    out = modifier.extended(pairs, torch.Generator().manual_seed(3))
    r = 0.1 * torch.rand((1, 1), generator=torch.Generator().manual_seed(3)).item()
    assert 0 < r < 0.1
    x = pairs.query
    torch.testing.assert_close(out.query[5:], modifier.imagine.mlp(torch.cat([x, x + r * (x - pairs.mate)], 1)))


def test_a_reach_a_row_or_one_for_all():
    """With no reach every draw gives the same; one reach moves rows of equal features alike, one a row does not."""
    same = Pairs(torch.ones(4, 6), torch.zeros(4, 6), torch.arange(4))
    for per_sample, distinct in ((False, 1), (True, 4)):
        modifier = prepared(per_sample=per_sample, reach=5.0)
        imagined = modifier.extended(same, torch.Generator().manual_seed(0)).query[4:].detach()
        spread = torch.cdist(imagined, imagined)
        assert int((spread.triu(1) > 1e-4).sum()) == distinct * (distinct - 1) // 2


def test_the_sane_reading_queues_a_key_once_and_the_official_one_twice():
    for official, count in ((False, 5), (True, 10)):
        out = prepared(official_duplicates=official).extended(some_pairs(), torch.Generator())
        assert len(blocks.firsts(out.source)) == count


def official_nt_xent(query, key, temperature):
    """SupContrast's form on [queries, keys], every row but the anchor and its positive a negative."""
    z = F.normalize(torch.cat([query, key]))
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    mate = (torch.arange(len(z)) + len(query)) % len(z)
    return F.cross_entropy(logits, mate)


def test_own_copies_are_negatives_in_the_official_reading_alone():
    pairs = some_pairs()
    sane, official = (
        prepared(official_duplicates=official).extended(pairs, torch.Generator()) for official in (False, True)
    )
    sane = replace(sane, query=official.query)  # the same imagined rows
    theirs = official_nt_xent(official.query, official.key, 0.2)
    ours = blocks.nt_xent(official.query, official.key, official.source, temperature=0.2)
    torch.testing.assert_close(ours, theirs)
    z = F.normalize(torch.cat([official.query, official.key]))
    logits = z @ z.T / 0.2
    row = torch.arange(20)
    mate = (row + 10) % 20
    kin = (row[:, None] % 5 == row % 5) & (row != mate[:, None])
    expected = F.cross_entropy(logits.masked_fill(kin, -math.inf), mate)
    torch.testing.assert_close(blocks.nt_xent(sane.query, sane.key, sane.source, temperature=0.2), expected)
    assert theirs > expected + 0.1


@pytest.mark.parametrize("official", [False, True])
def test_it_trains_with_a_method_and_learns_itself(bench, twins, official):
    modifier = Hallucinator(Hallucinator.Options(official_duplicates=official))
    table = bench(twins(), modifier)
    before = [p.detach().clone() for p in modifier.parameters()]
    losses = [terms["twins"] for terms in table.steps(12)]
    assert all(math.isfinite(x) for x in losses)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(not torch.equal(a, b) for a, b in zip(before, modifier.parameters(), strict=True))


def test_it_changes_the_loss_of_its_method(bench, twins):
    (alone,), (imagined,) = (list(bench(twins(), *m).steps(1)) for m in ((), (Hallucinator(),)))
    assert alone["twins"] != imagined["twins"]


def test_a_method_without_positives_is_refused(alone):
    with pytest.raises(UsageError, match="Hallucinator wraps 'pairs', which Alone does not offer"):
        Recipe(alone(), Hallucinator())


@pytest.mark.parametrize("options", [{"reach": -0.1}, {"box": 0.5}, {"box": -0.1}, {"alpha": 0.0}])
def test_settings_without_a_meaning_are_refused(options):
    with pytest.raises(ValueError, match="reach is at least 0"):
        Hallucinator.Options(**options)


# Crops -------------------------------------------------------------------------------------------------------


def test_views_stay_as_they_are_without_a_box(bench, twins):
    table = bench(twins(), Hallucinator())
    assert table.looks == bench(twins()).looks


def test_a_box_moves_the_crops_of_the_first_view_alone(bench, twins):
    plain, boxed = bench(twins()), bench(twins(), Hallucinator(Hallucinator.Options(box=0.25)))
    first, second = boxed.looks
    assert isinstance(first, RimCrop)
    assert (first.box, first.alpha) == (0.25, 0.1)
    assert second == plain.looks[1]
    assert Augment(**{k: v for k, v in vars(first).items() if k not in ("box", "alpha")}) == plain.looks[0]
    assert replace(first, crop=(0.5, 1.0)).box == 0.25  # other modifiers may turn its knobs


def test_a_box_without_crops_is_refused():
    modifier = Hallucinator(Hallucinator.Options(box=0.25))
    wrapped = modifier.views()
    next(wrapped)
    with pytest.raises(UsageError, match="has no crop to move"):
        wrapped.send((Augment(crop=None), Augment()))


def still(**changes):
    return RimCrop(size=24, crop=(0.2, 0.5), jitter=None, gray=0.0, **changes)


@quick
@given(st.integers(0, 999), st.integers(40, 90), st.integers(40, 90), st.sampled_from([0.1, 0.25, 0.4]))
def test_crops_are_centred_in_the_box(seed, height, width, box):
    look = still(box=box)
    top, left, h, w = look.rectangle(height, width, torch.Generator().manual_seed(seed))
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w
    for start, crop, side in ((top, h, height), (left, w, width)):
        centre = start + crop // 2
        inside = int(side * box) <= centre <= int(side * (1 - box))
        assert inside or start in (0, side - crop)  # the image's edge comes before the box


@quick
@given(st.integers(0, 999), st.sampled_from([(48, 64), (64, 48), (50, 50)]))
def test_the_box_of_a_view_tells_where_its_pixels_came_from(seed, size):
    """Red grows from left to right and green from top to bottom, so that pixels tell their own place."""
    height, width = size
    y, x = torch.meshgrid(torch.linspace(0, 255, height), torch.linspace(0, 255, width), indexing="ij")
    image = torch.stack([x, y, torch.zeros_like(x)]).round().to(torch.uint8)
    view = still()({"image": image}, torch.Generator().manual_seed(seed))
    assert view.data.shape == (3, 24, 24)
    assert view.box is not None
    x0, y0, x1, y1 = view.box.tolist()
    red, green = view.data[0].float() / 255, view.data[1].float() / 255
    step = 2.5 / 24  # half an output pixel at either end, and antialiasing
    assert abs(red[:, 0].mean().item() - x0) < step
    assert abs(red[:, -1].mean().item() - x1) < step
    assert abs(green[0].mean().item() - y0) < step
    assert abs(green[-1].mean().item() - y1) < step


def test_an_image_of_no_such_ratio_is_cropped_in_the_middle():
    look = still()
    assert look.rectangle(10, 100, torch.Generator()) == (0, 43, 10, 13)


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
def test_draws_of_beta(alpha):
    rng = torch.Generator().manual_seed(0)
    draws = [beta(alpha, rng) for _ in range(2000)]
    assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert all(0 <= d <= 1 for d in draws)


def test_a_small_alpha_drives_crops_to_the_rim():
    spread = []
    for alpha in (5.0, 0.6, 0.1):
        rng = torch.Generator().manual_seed(0)
        spread.append(sum(abs(beta(alpha, rng) - 0.5) for _ in range(500)) / 500)
    assert all(a < b for a, b in pairwise(spread))
