"""SwAV against the official code (06b1b7c) and lightly: the loss, with a queue too, and the learning rate.

The golden loss and rates were typed off ``main_swav.py``, whose Sinkhorn was executed; see
``test_official_values.py`` for that alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evalsuite_swav.method import SwAV, swapped
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import SwaVLoss

from pretrain import Recipe, Run
from pretrain.blocks import sinkhorn
from pretrain.testing import tiny_backbone

quick = settings(max_examples=15, deadline=None)


def unit(seed, *shape):
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=rng, dtype=torch.float64), dim=-1)


def test_the_loss_is_the_recorded_one(wave):
    """Two crops with codes and a third without, eight images and four prototypes."""
    prototypes = F.normalize(wave((4, 6), 0.53, 0.7))
    crops = [F.normalize(wave((8, 6), a, b)) for a, b in ((0.37, 0.11), (0.41, 0.9), (0.67, 0.2))]
    scores = [z @ prototypes.T for z in crops]
    loss = swapped(scores, {place: sinkhorn(scores[place]) for place in (0, 1)}, 0.1)
    assert float(loss) == pytest.approx(5.1527164715, rel=1e-9)


@quick
@given(
    seed=st.integers(0, 2**16), images=st.integers(2, 9), prototypes=st.integers(2, 7), large=st.integers(2, 3),
    small=st.integers(0, 4), queued=st.sampled_from([0, 6, 11]), epsilon=st.sampled_from([0.03, 0.05]),
    temperature=st.sampled_from([0.1, 0.3]),
)  # fmt: skip
def test_the_loss_and_its_gradients_are_lightlys(seed, images, prototypes, large, small, queued, epsilon, temperature):
    """Lightly puts the rows of the queue behind those of the batch, where the order does not matter; its codes come
    from exponentials, ours from logarithms."""
    z, weight = unit(seed, large + small, images, 5), unit(seed + 1, prototypes, 5)
    queues = unit(seed + 2, large, queued, 5) if queued else None
    found = []
    for whose in ("ours", "lightly"):
        leaves = [z.clone().requires_grad_(), weight.clone().requires_grad_()]
        scores = list((leaves[0] @ leaves[1].T).unbind())
        earlier = [q @ weight.T for q in queues] if queues is not None else None
        if whose == "lightly":
            loss = SwaVLoss(temperature, sinkhorn_epsilon=epsilon)(scores[:large], scores[large:], earlier)[0]
        else:
            codes = {
                i: sinkhorn(torch.cat([earlier[i], s.detach()] if earlier else [s.detach()]), epsilon)[-images:]
                for i, s in enumerate(scores[:large])
            }
            loss = swapped(scores, codes, temperature)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-11)


def rates(method, batch_size, epochs, epoch_steps, steps):
    recipe = Recipe(method)
    run = Run(
        tiny_backbone(), 0, torch.device("cpu"), Path(), epochs, batch_size, batch_size,
        steps=epochs * epoch_steps, epoch_steps=epoch_steps, training=method.options,
    )  # fmt: skip
    peak = recipe.optimizer(run, torch.nn.Linear(2, 2)).param_groups[0]["lr"]
    found = []
    for run.step in steps:
        found.append(peak * recipe.rate(run))
    return found


def test_the_learning_rate_is_the_official_one_at_the_published_batches():
    """4.8 down to 0.0048 on a cosine over 100 iterations (recorded), from 0.3 in ten epochs of warm-up; and 0.6."""
    cosine = rates(SwAV(SwAV.Options(warmup=0.0)), 4096, 10, 10, [0, 50, 99])
    assert cosine == pytest.approx([4.8, 2.4024, 0.0059830709], rel=1e-8)
    whole = rates(SwAV(), 4096, 110, 10, [0, 50, 99, 100, 600, 1100])
    assert whole == pytest.approx([0.3, np.linspace(0.3, 4.8, 100)[50], 4.8, 4.8, 2.4024, 0.0048])
    small = SwAV.preset("imagenet-256")
    assert rates(SwAV(SwAV.Options(**small.options)), small.batch_size, 4, 10, [0, 40]) == pytest.approx([0.6, 0.0006])
