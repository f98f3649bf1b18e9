"""InterCLR: whom it takes for friends and for negatives, and how its classes are kept."""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from evalsuite_interclr.modifier import UNSEEN, InterCLR, class_means, companions, mined, with_margin
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite import UsageError
from pretrain import Pairs, Recipe, Run

quick = settings(max_examples=40, deadline=None)
KINDS: list[Literal["semi-hard", "semi-easy", "hard", "random"]] = ["semi-hard", "semi-easy", "hard", "random"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def built(size=40, width=4, **options):
    """A modifier of its own, its bank known: half the rows near one axis, half near another."""
    modifier = InterCLR(InterCLR.Options(**options))
    modifier.prepared(run=Run(None, 0, None, None, 1, 1, 1, width=width), data=range(size))  # type: ignore[arg-type]
    axes = torch.eye(width)[torch.arange(size) % 2]
    modifier.bank.rows.copy_(F.normalize(axes + 0.05 * torch.randn(size, width, generator=generator())))
    return modifier


def ready(**options):
    modifier = built(**options)
    modifier.labels.zero_()
    modifier.epoch_ended()
    return modifier


# Friends -----------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=20), st.integers(0, 99), st.booleans())
def test_a_companion_has_the_same_label(labels, seed, may_be_self):
    labels, index = torch.tensor(labels), torch.arange(len(labels))
    found = companions(labels, index, generator(seed), may_be_self)
    assert torch.equal(labels[found], labels)
    if not may_be_self:
        alone = torch.bincount(labels + 1)[labels + 1] == 1
        assert torch.equal(found == index, alone)


@pytest.mark.parametrize("may_be_self", [True, False])
def test_companions_are_drawn_evenly(may_be_self):
    labels = torch.tensor([1, 0, 1, 1, 0, 1])
    index = torch.full((6000,), 2)
    found = Counter(companions(labels, index, generator(), may_be_self).tolist())
    expected = {0, 2, 3, 5} if may_be_self else {0, 3, 5}
    assert set(found) == expected
    assert all(abs(n - 6000 / len(expected)) < 5 * math.sqrt(6000 / len(expected)) for n in found.values())


# Negatives ---------------------------------------------------------------------------------------------------


@quick
@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_negatives_are_never_excluded_and_never_twice(kind, count, pool, seed):
    similarity = torch.randn(3, 10, generator=generator(seed))
    excluded = torch.rand(3, 10, generator=generator(seed + 1)) < 0.4
    chosen, real = mined(similarity, excluded, count, pool, kind, generator(seed))
    assert chosen.shape == real.shape == (3, min(count, 10))
    for row in range(3):
        rows = chosen[row][real[row]].tolist()
        assert len(set(rows)) == len(rows)
        assert not excluded[row, rows].any()


def test_where_negatives_come_from():
    """20 rows by similarity, 5 of the top excluded: what each way may take, over many draws."""
    similarity = torch.arange(20.0).flip(0).repeat(500, 1)
    excluded = torch.zeros(500, 20, dtype=torch.bool)
    excluded[:, [0, 2, 4, 15, 17]] = True
    taken = {}
    for kind in KINDS:
        chosen, real = mined(similarity, excluded, 3, 8, kind, generator())
        assert real.all()
        taken[kind] = Counter(chosen.flatten().tolist())
    assert set(taken["hard"]) == {1, 3, 5}
    assert set(taken["semi-hard"]) == {1, 3, 5, 6, 7}
    assert set(taken["semi-easy"]) == {12, 13, 14, 16, 18, 19}
    assert set(taken["random"]) == set(range(20)) - {0, 2, 4, 15, 17}
    for kind in ("semi-hard", "semi-easy", "random"):  # evenly
        share = 1500 / len(taken[kind])
        assert all(abs(n - share) < 5 * math.sqrt(share) for n in taken[kind].values())


def test_a_class_that_fills_the_pool_leaves_fewer_negatives_and_does_not_hang():
    similarity, excluded = torch.arange(10.0).repeat(1, 1), torch.zeros(1, 10, dtype=torch.bool)
    excluded[0, 5:] = True
    _, real = mined(similarity, excluded, 4, 5, "semi-hard", generator())
    assert not real.any()
    _, real = mined(similarity, excluded, 4, 6, "semi-hard", generator())
    assert real.sum() == 1


# The loss ----------------------------------------------------------------------------------------------------


@quick
@given(st.sampled_from(["cos", "arc"]), st.floats(-0.9, 0.9))
def test_margins_are_monotone_and_have_the_right_sign(kind, margin):
    cosine = torch.linspace(-0.999, 0.999, 801, dtype=torch.float64)
    out = with_margin(cosine, margin, kind)
    assert out.diff().min() > 0
    if kind == "cos" or margin == 0:
        torch.testing.assert_close(out, cosine - margin)
    if abs(margin) > 1e-6:
        assert ((out < cosine) == (margin > 0)).all()


def slow_inter(modifier, query, index, seed):
    """The loss with hard negatives and the image itself as its friend, one query at a time."""
    total = 0.0
    for q, i in zip(F.normalize(query), index.tolist(), strict=True):
        label = modifier.labels[i]
        cosine = modifier.bank.rows @ q
        own = [j for j in range(len(cosine)) if modifier.labels[j] == label]
        assert own == [i]
        others = sorted((float(c) for j, c in enumerate(cosine) if j != i), reverse=True)[: modifier.negatives]
        logits = torch.tensor([float(cosine[i]) - modifier.options.margin, *others]) / 0.2
        total -= logits.log_softmax(0)[0].item()
    return total / len(query)


@pytest.mark.parametrize("margin", [-0.5, 0.0])
def test_the_inter_image_loss(margin):
    modifier = ready(size=300, mining="hard", margin=margin)
    modifier.labels.copy_(torch.arange(300))
    assert modifier.negatives == 4
    query, index = torch.randn(5, 4, generator=generator()), torch.tensor([7, 0, 299, 3, 3])
    found = modifier.inter(query, index, generator())
    assert found.item() == pytest.approx(slow_inter(modifier, query, index, 0), rel=1e-5)


def test_it_pulls_a_query_to_its_class_and_from_the_others():
    modifier = ready(margin=0.0)
    query = torch.tensor([[1.0, 0.9, 0.3, 0.0]], requires_grad=True)
    for _ in range(100):
        loss = modifier.inter(query, torch.tensor([0]), generator())
        (gradient,) = torch.autograd.grad(loss, query)
        query = (query - gradient).detach().requires_grad_()
    cosine = F.normalize(query)[0].detach()
    assert cosine[0] > 0.9
    assert cosine[1] < 0.1


def test_images_that_have_no_class_yet_take_no_part():
    modifier = ready()
    modifier.labels[[0, 5]] = UNSEEN
    query = torch.randn(3, 4, generator=generator(), requires_grad=True)
    both = modifier.inter(query, torch.tensor([0, 1, 5]), generator(3))
    torch.testing.assert_close(both, modifier.inter(query[1:2], torch.tensor([1]), generator(3)))
    nothing = modifier.inter(query[:1], torch.tensor([0]), generator())
    assert nothing.item() == 0
    nothing.backward()  # every process has a gradient, were it nought
    for seed in range(20):
        cosine = query.detach() @ modifier.bank.rows.T
        excluded = modifier.labels == UNSEEN
        chosen, real = mined(cosine, excluded.expand(3, -1), 38, 40, "semi-hard", generator(seed))
        assert not set(chosen[real].tolist()) & {0, 5}


def test_half_precision_queries_are_widened():
    modifier, query = ready(), torch.randn(3, 4, generator=generator())
    index = torch.tensor([0, 1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = modifier.inter(query.bfloat16(), index, generator())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, modifier.inter(query.bfloat16().float(), index, generator()))


# The classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "numbers"),
    [
        (1_281_167, (10000, 16384, 128000, 20)),
        (50_000, (390, 640, 5000, 20)),
        (1000, (7, 13, 286, 20)),
        (64, (2, 1, 64, 5)),
    ],
)
def test_published_numbers_shrink_with_the_data(size, numbers):
    modifier = InterCLR()
    modifier.prepared(run=Run(None, 0, None, None, 1, 1, 1, width=1), data=range(size))  # type: ignore[arg-type]
    found = (len(modifier.centroids), modifier.negatives, modifier.pool, modifier.min_size)
    assert found == numbers


def test_the_bank_is_clustered_when_the_warm_up_ends():
    modifier = built(warmup=2)
    modifier.labels[:30] = 0
    modifier.epoch_ended()
    assert not modifier.started
    assert not modifier.labels[:30].any()
    modifier.epoch_ended()
    assert modifier.started
    labels = modifier.labels
    assert labels[0] != labels[1]
    assert torch.equal(labels[:30], labels[:2].repeat(15))
    assert labels[30:].eq(UNSEEN).all()
    expected = class_means(modifier.bank.rows[:30], labels[:30], modifier.centroids)
    torch.testing.assert_close(modifier.centroids, expected)


def stepped(modifier, index, keys):
    source = torch.tensor(index)
    modifier.stepped([Pairs(keys, keys, source)])


def test_a_step_renews_features_and_labels_of_its_images():
    modifier = ready()
    other = int(modifier.labels[1])
    key = torch.tensor([[0.1, 7.0, 0.0, 0.0]])
    assert modifier.labels[4] != other
    stepped(modifier, [4], key)
    torch.testing.assert_close(modifier.bank.rows[4], F.normalize(key)[0])
    assert modifier.labels[4] == other


def test_copies_of_a_sample_write_its_row_once():
    modifier = ready()
    keys = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).repeat(2, 1)
    modifier.stepped([Pairs(keys, keys, torch.tensor([8, 9, -9, -10]))])
    torch.testing.assert_close(modifier.bank.rows[[8, 9]], keys[:2])


def test_centroids_are_computed_anew_every_so_many_steps():
    modifier = ready(refresh=3)
    before = modifier.centroids.clone()
    for step in range(1, 4):
        stepped(modifier, [0, 1], torch.eye(4)[:2] + 0.3 * step)
        assert torch.equal(modifier.centroids, before) is (step < 3)


def test_centroids_may_be_normalised():
    for normalised in (False, True):
        norms = ready(centroid_normalised=normalised).centroids.norm(dim=1)
        assert (norms > 1 - 1e-6).all() == normalised


def test_small_classes_are_dissolved_and_the_largest_is_split():
    modifier = ready(size=400, clusters=3)
    assert len(modifier.centroids) == 3
    modifier.min_size = 20
    axis = torch.arange(400) % 2
    modifier.labels.copy_(axis)
    modifier.labels[[0, 2, 5]] = 2  # two of the first and one of the second
    modifier.recentre()
    modifier.tend()
    counts = modifier.labels.bincount(minlength=3)
    assert counts.sum() == 400
    assert counts.min() >= 20
    for label in range(3):  # what was split is one axis still
        assert len(axis[modifier.labels == label].unique()) == 1
        members = modifier.bank.rows[modifier.labels == label]
        if counts[label] < 150:
            torch.testing.assert_close(modifier.centroids[label], members.mean(0))


def test_classes_large_enough_stay():
    modifier = ready()
    before = modifier.labels.clone(), modifier.centroids.clone()
    modifier.tend()
    assert torch.equal(modifier.labels, before[0])
    assert torch.equal(modifier.centroids, before[1])


# In a recipe -------------------------------------------------------------------------------------------------


def test_the_methods_loss_stands_alone_first_and_then_has_its_share(bench, twins):
    modifier = InterCLR()
    table = bench(twins(), modifier)
    plain = list(bench(twins()).steps(4))
    assert list(table.steps(4)) == plain
    batch = table.batch(torch.arange(16))
    terms, (pairs,) = table.forward(batch)
    assert set(terms) == {"twins", "inter"}
    alone = table.recipe.method.losses([pairs])["twins"]
    torch.testing.assert_close(terms["twins"], 0.75 * alone)
    inter = modifier.inter(pairs.query, batch.index, generator(table.run.step))
    torch.testing.assert_close(terms["inter"], 0.25 * inter)
    assert len(list(table.steps(8))) == 8


def test_without_weight_it_leaves_the_methods_numbers(bench, twins):
    plain = [terms["twins"] for terms in bench(twins()).steps(12)]
    weighed = [terms["twins"] for terms in bench(twins(), InterCLR(InterCLR.Options(weight=0.0))).steps(12)]
    assert weighed == plain


def test_it_goes_on_where_its_state_was_saved(bench, twins, tmp_path):
    first = bench(twins(), InterCLR())
    list(first.steps(6))
    again = bench(twins(), InterCLR())
    again.modules.load_state_dict(first.modules.state_dict())
    again.run.step = 6
    assert list(again.steps(6)) == list(first.steps(6))


def test_a_method_without_positives_is_refused(alone):
    with pytest.raises(UsageError, match="InterCLR wraps 'pairs', which Alone does not offer"):
        Recipe(alone(), InterCLR())


def test_a_bank_needs_an_epoch_to_be_filled(bench, twins):
    with pytest.raises(UsageError, match="warmup is 0"):
        bench(twins(), InterCLR(InterCLR.Options(warmup=0)))
