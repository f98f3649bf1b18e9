"""Retrieval against scikit-learn, and against all orders of tied candidates written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from evalsuite.errors import UsageError
from evalsuite.metrics.retrieval import rank, relevance, retrieve, score_similarities


def draw(seed, queries=5, candidates=12, levels=0):
    rng = np.random.default_rng(seed)
    size = (queries, candidates)
    similarity = rng.normal(size=size) if not levels else rng.integers(0, levels, size).astype(float)
    return similarity, rng.random(size) < 0.4, rng.random(size) < 0.25


def slow(similarity, relevant, excluded, k):
    """Precision, recall and hit at k of one query, the mean over all orders that respect the similarities."""
    left = [i for i in range(len(similarity)) if not excluded[i]]
    groups = [
        list(g) for _, g in itertools.groupby(sorted(left, key=lambda i: -similarity[i]), lambda i: similarity[i])
    ]
    found = []
    for orders in itertools.product(*(itertools.permutations(g) for g in groups)):
        top = list(itertools.chain(*orders))[:k]
        hits = sum(relevant[i] for i in top)
        found.append((hits / k, hits, hits > 0))
    precision, hits, hit = np.mean(found, axis=0)
    total = sum(relevant[i] for i in left)
    return precision, hits / total if total else np.nan, hit


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_precision_recall_and_hit_are_means_over_the_orders_of_ties(seed, k, levels):
    similarity, relevant, excluded = draw(seed, 3, 6, levels)
    found = score_similarities(similarity, relevant, [k], excluded)
    for i in range(3):
        precision, recall, hit = slow(similarity[i], relevant[i], excluded[i], k)
        assert found.precision[k][i] == pytest.approx(precision, abs=1e-9)
        assert found.recall[k][i] == pytest.approx(recall, abs=1e-9, nan_ok=True)
        assert found.hit[k][i] == pytest.approx(hit, abs=1e-9)


@pytest.mark.parametrize("levels", [0, 3])
def test_average_precision_equals_scikit_learn(levels):
    similarity, relevant, excluded = draw(1, 20, 40, levels)
    found = score_similarities(similarity, relevant, [5], excluded)
    for i in range(20):
        left = ~excluded[i]
        assert found.ap[i] == pytest.approx(average_precision_score(relevant[i][left], similarity[i][left]))
    assert (found.left_out == excluded.sum(1)).all()
    assert (found.relevant == (relevant & ~excluded).sum(1)).all()


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_the_order_of_candidates_does_not_matter(seed):
    similarity, relevant, excluded = draw(seed, levels=3)
    order = np.random.default_rng(seed).permutation(similarity.shape[1])
    one = score_similarities(similarity, relevant, [1, 4], excluded).means()
    other = score_similarities(similarity[:, order], relevant[:, order], [1, 4], excluded[:, order]).means()
    assert one == pytest.approx(other, nan_ok=True)


def test_a_collapsed_backbone_scores_what_chance_does():
    labels = np.repeat(np.arange(8), 200)  # in the order of the files, as the CheXpert 8x200 list has them
    found = retrieve(np.ones((8, 4)), np.ones((1600, 4)), np.arange(8), labels, ks=[5, 10]).means()
    assert found["precision@5"] == pytest.approx(0.125)
    assert found["precision@10"] == pytest.approx(0.125)
    assert found["map"] == pytest.approx(0.125)


def test_a_perfect_ranking_scores_one():
    features = np.eye(4)[np.repeat(np.arange(4), 10)]
    found = retrieve(np.eye(4), features, np.arange(4), np.repeat(np.arange(4), 10), ks=[10, 20]).means()
    assert found["precision@10"] == found["recall@10"] == found["map"] == found["hit@10"] == 1
    assert found["precision@20"] == 0.5


def test_a_query_finds_neither_itself_nor_its_patient():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 8)), rng.integers(0, 3, 30)
    patients = np.array([f"p{i // 2}" for i in range(30)])
    found = retrieve(
        features, features, labels, labels, ks=[1, 5], query_groups=patients, candidate_groups=patients, chunk=7
    )
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit @ unit.T
    for i in range(30):
        left = patients != patients[i]
        order = np.argsort(-similarity[i][left])
        good = labels[left] == labels[i]
        assert found.precision[5][i] == pytest.approx(good[order[:5]].mean())
        assert found.ap[i] == pytest.approx(average_precision_score(good, similarity[i][left]))
    assert (found.left_out == 2).all()
    itself = retrieve(features, features, labels, labels, ks=[1])
    assert itself.precision[1].mean() == 1  # without groups everyone finds itself


def test_chunks_do_not_matter():
    rng = np.random.default_rng(1)
    queries, candidates = torch.from_numpy(rng.normal(size=(9, 5))), torch.from_numpy(rng.normal(size=(20, 5)))
    labels = rng.integers(0, 3, 20)
    one = retrieve(queries, candidates, rng.integers(0, 3, 9), labels, ks=[3], chunk=2)
    rng = np.random.default_rng(1)
    rng.normal(size=(9, 5)), rng.normal(size=(20, 5)), rng.integers(0, 3, 20)
    two = retrieve(queries, candidates, rng.integers(0, 3, 9), labels, ks=[3], chunk=100)
    np.testing.assert_allclose(one.ap, two.ap)


def test_relevance_of_several_labels_a_candidate():
    shown = np.array([[1, 0, 1], [0, 1, -1]])
    assert relevance([0, 1, 2], shown).tolist() == [[True, False], [False, True], [True, False]]
    assert relevance([0, 1], [1, 0, 1]).tolist() == [[False, True, False], [True, False, True]]


def test_queries_without_an_answer_are_left_out_of_means_and_fewer_candidates_than_k_are_misses():
    found = score_similarities([[0.9, 0.1], [0.3, 0.2]], [[True, True], [False, False]], [4])
    assert found.precision[4].tolist() == [0.5, 0.0]
    assert found.hit[4].tolist() == [1.0, 0.0]
    assert np.isnan(found.recall[4][1])
    assert found.means() == {"precision@4": 0.25, "recall@4": 1.0, "hit@4": 0.5, "map": 1.0}
    everything = np.ones((1, 2), dtype=bool)
    nothing = score_similarities([[0.9, 0.1]], everything, [1], everything)
    assert nothing.precision[1][0] == nothing.hit[1][0] == 0
    assert np.isnan(nothing.means()["map"])


def test_nonsense_is_refused():
    with pytest.raises(UsageError, match="groups of one side"):
        retrieve(np.ones((1, 2)), np.ones((2, 2)), [0], [0, 1], query_groups=["a"])
    with pytest.raises(UsageError):
        score_similarities([[0.1]], [[True, False]])
    with pytest.raises(UsageError):
        score_similarities([[np.nan]], [[True]])


def test_any_relevance_is_ranked_as_labels_are():
    rng = np.random.default_rng(3)
    queries, bank = rng.normal(size=(7, 5)), rng.normal(size=(20, 5))
    wanted, shown, groups = rng.integers(0, 3, 7), rng.integers(0, 3, 20), rng.integers(0, 4, 27)
    by_label = retrieve(
        queries, bank, wanted, shown, (1, 4), query_groups=groups[:7], candidate_groups=groups[7:], chunk=3
    )
    by_matrix = rank(queries, bank, wanted[:, None] == shown, (1, 4), excluded=groups[:7, None] == groups[7:], chunk=3)
    for name, values in by_label.table().items():
        np.testing.assert_array_equal(by_matrix.table()[name], values)
    for relevant, excluded in ((np.ones((7, 19)), None), (np.ones((7, 20)), np.zeros((20, 7)))):
        with pytest.raises(UsageError, match=r"for \(7, 20\)"):
            rank(queries, bank, relevant, excluded=excluded)
