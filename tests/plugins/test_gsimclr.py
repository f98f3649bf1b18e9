"""G-SimCLR: batches across pseudo-classes, and classes that are made once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from evalsuite_gsimclr.modifier import Autoencoder, GSimCLR, guided, ranked, restoration_error, shrunk
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite import DataError, UsageError
from pretrain import Arrays, Rows

SMALL = GSimCLR.Options(clusters=4, side=8, channels=(4, 8), epochs=4, batch=16)
quick = settings(max_examples=40, deadline=None)
classes = st.lists(st.integers(0, 5), min_size=1, max_size=40).map(torch.tensor)
rngs = st.one_of(st.none(), st.integers(0, 99).map(lambda s: torch.Generator().manual_seed(s)))


# Which images go together ------------------------------------------------------------------------------------


@quick
@given(classes, rngs)
def test_ranks_go_through_the_classes_in_turn(labels, rng):
    order = ranked(labels, rng)
    assert sorted(order.tolist()) == list(range(len(labels)))
    taken: Counter[int] = Counter()
    ranks = []
    for label in labels[order].tolist():
        taken[label] += 1
        ranks.append(taken[label])
    assert ranks == sorted(ranks)


@quick
@given(classes, rngs, st.integers(1, 8))
def test_an_epoch_shows_no_image_twice_and_drops_less_than_a_batch(labels, rng, size):
    batches = [b.tolist() for b in guided(labels, size, rng)]
    rows = [row for b in batches for row in b]
    assert len(set(rows)) == len(rows) > len(labels) - size
    assert all(len(b) == size for b in batches)


@quick
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_classes_of_one_size_give_one_image_of_each_to_every_batch(count, size, seed):
    labels = torch.arange(count).repeat(size)[torch.randperm(count * size)]
    for rng in (None, torch.Generator().manual_seed(seed)):
        batches = list(guided(labels, count, rng))
        assert len(batches) == size
        assert all(sorted(labels[b].tolist()) == list(range(count)) for b in batches)


@quick
@given(classes, rngs, st.integers(1, 6))
def test_strict_batches_hold_no_class_twice(labels, rng, size):
    if size > len(labels.unique()):
        with pytest.raises(UsageError, match=f"fill a batch of {size} from {len(labels.unique())}"):
            list(guided(labels, size, rng, strict=True))
        return
    batches = list(guided(labels, size, rng, strict=True))
    assert len(batches) == len(labels) // size
    assert all(len(labels[b].unique()) == size == len(b) for b in batches)
    seen = Counter(row for b in batches for row in b.tolist())
    for label in labels.unique():  # a class is gone through before it begins again
        times = [seen[row] for row in (labels == label).nonzero()[:, 0].tolist()]
        assert max(times) - min(times) <= 1


@pytest.mark.parametrize("seed", [None, 0])
def test_strict_classes_that_are_left_out_of_a_round_go_on_where_they_were(seed):
    """Three classes of two, two at a time; in the published order everybody gets a turn."""
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for _ in range(20):
        seen = Counter(row for b in guided(labels, 2, rng, strict=True) for row in b.tolist())
        assert all(abs(seen[row] - seen[row + 1]) <= 1 for row in (0, 2, 4))
        assert rng is not None or set(seen) == set(range(6))


def test_without_reshuffling_every_epoch_is_the_same_and_with_it_none(bench, twins):
    for reshuffle in (False, True):
        modifier = GSimCLR(GSimCLR.Options(**vars(SMALL) | {"reshuffle": reshuffle}))
        table = bench(twins(), modifier)
        epochs = [torch.stack(list(table.recipe.batches(table.run, table.data, e))) for e in (0, 0, 1)]
        assert torch.equal(epochs[0], epochs[1])
        assert torch.equal(epochs[0], epochs[2]) is not reshuffle


# The classes -------------------------------------------------------------------------------------------------


def test_pseudo_classes_are_of_what_looks_alike(bench, twins, colours):
    modifier = GSimCLR(SMALL)
    table = bench(twins(), modifier)
    for colour in range(4):
        assert len(modifier.labels[torch.from_numpy(colours.labels) == colour].unique()) == 1
    assert len(modifier.labels.unique()) == 4
    for batch in table.recipe.batches(table.run, table.data, 0):
        assert Counter(colours.labels[batch.numpy()].tolist()) == {0: 4, 1: 4, 2: 4, 3: 4}


def test_there_are_as_many_classes_as_a_batch_has_images(bench, twins):
    modifier = GSimCLR(GSimCLR.Options(side=8, channels=(4,), epochs=1))
    table = bench(twins(), modifier)
    assert len(modifier.labels.unique()) == table.run.batch_size == 16
    assert len(list(table.steps(5))) == 5


class Unreadable(Arrays):
    def __getitem__(self, row):
        raise AssertionError("it was read again")


def test_a_resumed_run_does_not_cluster_again(bench, twins, colours):
    first, again, other = GSimCLR(SMALL), GSimCLR(SMALL), GSimCLR(GSimCLR.Options(**vars(SMALL) | {"noise": 0.5}))
    bench(twins(), first)
    closed = Unreadable(colours.pixels, colours.labels)
    bench(twins(), again, data=closed)
    assert torch.equal(first.labels, again.labels)
    with pytest.raises(AssertionError, match="read again"):
        bench(twins(), other, data=closed)  # other settings are other classes


def test_the_same_seed_makes_the_same_classes(colours):
    first, again = (GSimCLR(SMALL).clustered(colours, 4, 3, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, again)


def test_clustering_leaves_the_random_numbers_of_others_alone(colours):
    torch.manual_seed(5)
    GSimCLR(SMALL).clustered(colours, 4, 3, torch.device("cpu"))
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))


def test_too_few_images_and_odd_sides_are_refused(bench, twins, colours):
    with pytest.raises(UsageError, match="cannot make 99 pseudo-classes of 64 images"):
        bench(twins(), GSimCLR(GSimCLR.Options(clusters=99)))
    with pytest.raises(ValueError, match="side 20 cannot be halved 3 times"):
        GSimCLR.Options(side=20)
    with pytest.raises(ValueError, match="cannot be halved"):
        GSimCLR.Options(channels=())
    few = GSimCLR(GSimCLR.Options(**vars(SMALL) | {"strict": True}))
    table = bench(twins(), few)
    with pytest.raises(UsageError, match="cannot fill a batch of 16 from 4"):
        list(table.recipe.batches(table.run, table.data, 0))


# The autoencoder ---------------------------------------------------------------------------------------------


def test_the_autoencoder_is_the_notebooks():
    """32-64-128 channels, an embedding of 4 x 4 x 128, averaged; pixels back in [0,1]."""
    model = Autoencoder((32, 64, 128), 3)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert model.encoder(images.float() / 255).shape == (5, 128, 4, 4)
    restored = model(images.float() / 255)
    assert restored.shape == (5, 3, 32, 32)
    assert 0 < restored.min() < restored.max() < 1
    assert model.codes(images).shape == (5, 128)


def test_training_it_restores_images_better(colours):
    from evalsuite_gsimclr.modifier import denoiser

    images = shrunk(colours, 8)
    torch.manual_seed(0)
    untrained = restoration_error(Autoencoder((4, 8), 3), images, torch.device("cpu"))
    options = GSimCLR.Options(**vars(SMALL) | {"epochs": 20, "lr": 0.01})
    trained = restoration_error(denoiser(images, options, 0, torch.device("cpu")), images, torch.device("cpu"))
    assert trained < untrained / 3


def test_it_stops_when_nothing_gets_better(colours, monkeypatch):
    from evalsuite_gsimclr import modifier

    errors = iter([3.0, 2.0, 2.5, 2.5, 2.5, 1.0])
    monkeypatch.setattr(modifier, "restoration_error", lambda *_: next(errors))
    options = GSimCLR.Options(**vars(SMALL) | {"epochs": 100, "patience": 2})
    modifier.denoiser(shrunk(colours, 8), options, 0, torch.device("cpu"))
    assert next(errors) == 1.0


class Torn(Rows):
    def __getitem__(self, row):
        if row == 2:
            raise DataError("row 2 does not decode", cause="torn", fix="copy it again")
        return super().__getitem__(row)


def test_images_are_shrunk_and_one_that_does_not_decode_is_grey(colours):
    images = shrunk(Torn(colours, np.arange(4)), 8)
    assert images.shape == (4, 3, 8, 8)
    assert images[2].eq(128).all()
    for row, colour in ((0, (230, 20, 20)), (1, (20, 230, 20)), (3, (230, 230, 20))):
        torch.testing.assert_close(
            images[row].float().mean((1, 2)), torch.tensor(colour, dtype=torch.float32), atol=6, rtol=0
        )
