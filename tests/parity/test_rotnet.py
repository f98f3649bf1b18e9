"""Rotations, networks, schedule and crops of the official RotNet (gidariss/FeatureLearningRotNet edafaba)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evalsuite_rotnet.method import RotNet, rotations

from pretrain.defaults import Defaults
from pretrain.plugin import Run


def turned(array):
    """Each of the four turns of a (H,W) array."""
    return [t[0, 0].tolist() for t in rotations(torch.as_tensor(array)[None, None])]


def test_turns_are_those_of_rotate_img_and_of_mmselfsup():
    """``rotate_img(arange(6).reshape(2,3,1), r)`` for 90, 180 and 270; mmselfsup's ``rotate`` of [[0,1],[2,3]]."""
    assert turned(np.arange(6).reshape(2, 3))[1:] == [
        [[2, 5], [1, 4], [0, 3]],
        [[5, 4, 3], [2, 1, 0]],
        [[3, 0], [4, 1], [5, 2]],
    ]
    assert turned(np.arange(4).reshape(2, 2))[1:] == [[[1, 3], [0, 2]], [[3, 2], [1, 0]], [[2, 0], [3, 1]]]


def test_turns_are_numpys(wave):
    image = wave((3, 7, 7), 0.37, 0.11)
    for k, found in enumerate(rotations(image[None])):
        assert np.array_equal(found[0].numpy(), np.rot90(image.numpy(), k, (1, 2)))


@pytest.mark.parametrize(
    ("preset", "table"),
    [
        ("cifar", [(60, 0.1), (120, 0.02), (160, 0.004), (200, 0.0008)]),
        ("imagenet", [(15, 0.01), (30, 0.001), (45, 1e-4), (50, 1e-5)]),
    ],
)
def test_the_rate_of_every_epoch_is_that_of_the_official_table(preset, table):
    """``Algorithm.adjust_learning_rates``: the first rate of the table whose epoch lies ahead."""
    chosen = RotNet.preset(preset)
    options = RotNet.Options(**chosen.options)
    run = Run(None, 0, torch.device("cpu"), None, chosen.epochs, 8, 8, 7 * chosen.epochs, 7, training=options)
    assert chosen.epochs == table[-1][0]
    for epoch in range(chosen.epochs):
        official = next(rate for end, rate in table if end > epoch)
        for run.step in (7 * epoch, 7 * epoch + 6):
            assert options.lr * Defaults().rate(run) == pytest.approx(official, rel=1e-12)
