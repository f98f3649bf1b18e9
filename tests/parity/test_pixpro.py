"""Numbers that the official PixPro (zdaxie/PixPro e390d6b) gave on fixed inputs, reproduced in float64.

``regression_loss`` and ``PixPro.featprop`` of ``contrast/models/PixPro.py`` were executed; the total combines them as
``forward`` does. Momentum and LARS are in ``test_official_values.py``.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from evalsuite_pixpro.method import PixPro, consistency, nearby, propagated

from pretrain.defaults import Defaults
from pretrain.hooks import Recipe
from pretrain.plugin import Run
from pretrain.testing import tiny_backbone, tiny_corpus
from pretrain.train import Plan, prepare


def close(value, expected, rtol=1e-6, atol=0.0):
    value = torch.as_tensor(value, dtype=torch.float64).detach()
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


@pytest.fixture
def boxes():
    """The second image's views: the first one mirrored."""
    first = torch.tensor([[0, 0, 0.6, 0.6], [0.9, 0.1, 0.3, 0.7]], dtype=torch.float64)
    return first, torch.tensor([[0.2, 0.2, 0.8, 0.8], [0.4, 0, 1, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize(("reach", "expected"), [(0.3, 0.0302162009), (0.5, 0.1457336902), (0.7, 0.1136412932)])
def test_the_loss_is_the_official_one_and_the_same_from_either_side(wave, boxes, reach, expected):
    q, k = wave((2, 4, 3, 3), 0.37, 0.11), wave((2, 4, 3, 3), 0.53, 0.7)
    close(consistency(q, k, nearby(*boxes, (3, 3), reach)), expected)
    close(consistency(k, q, nearby(*reversed(boxes), (3, 3), reach)), expected)


def test_the_pairs_are_the_official_ones(boxes):
    near = nearby(*boxes, (3, 3), 0.7)
    assert near[0].nonzero().tolist() == [[4, 0], [5, 1], [7, 3], [8, 4]]
    assert near.sum((1, 2)).tolist() == [4, 20]
    assert torch.equal(near.mT, nearby(*reversed(boxes), (3, 3), 0.7))


def test_crops_that_do_not_overlap_give_exactly_nothing(wave):
    q, k = wave((1, 4, 3, 3), 0.37, 0.11), wave((1, 4, 3, 3), 0.53, 0.7)
    first, second = (torch.tensor([[a, a, b, b]], dtype=torch.float64) for a, b in ((0, 0.2), (0.8, 1)))
    assert float(consistency(q, k, nearby(first, second, (3, 3), 0.7))) == 0


@pytest.mark.parametrize(
    ("power", "total", "first"),
    [
        (1.0, 0.6032804937, [1.08804678, 1.36755436, 1.47209287, 1.40683987]),
        (2.0, 0.5350371372, [0.81707414, 1.22371608, 1.40615367, 1.30476804]),
        (0.5, 0.6480113567, [1.28579038, 1.45174519, 1.50778884, 1.47047089]),
    ],
)
def test_propagation_is_the_official_one(wave, power, total, first):
    x = wave((1, 4, 2, 2), 0.37, 0.11)
    found = propagated(x, x, power=power)
    close(found.sum(), total)
    close(found.flatten()[:4], first, atol=1e-8)


def test_propagation_of_transformed_values_is_the_official_one(wave):
    x = wave((1, 4, 2, 2), 0.37, 0.11)
    values = F.conv2d(x, wave((4, 4), 0.61, 0.2)[:, :, None, None], wave((4,), 0.9, 0.3))
    found = F.normalize(propagated(x, values), dim=1)
    close(found[0, 0].flatten(), [-0.02581956, -0.0612361, -0.09211672, -0.12348856], atol=1e-8)
    close(found[0, 1].flatten(), [0.85463786, 0.86408427, 0.87141695, 0.87801173], atol=1e-8)


def test_the_total_is_the_official_one(wave, boxes):
    own = [wave((2, 4, 3, 3), a, b) for a, b in ((0.37, 0.11), (0.41, 0.5))]
    keys = [wave((2, 4, 3, 3), a, b) for a, b in ((0.53, 0.7), (0.67, 0.2))]
    y = [propagated(x, x) for x in own]
    near = nearby(*boxes, (3, 3), 0.7)
    close(consistency(y[0], keys[1], near) + consistency(y[1], keys[0], near.mT), -0.2123571571)


def test_the_momentum_of_each_step_is_that_of_the_official_one(tmp_path):
    """Officially the copy follows before the keys' pass, first when nothing has moved; here after each step."""
    method = PixPro(PixPro.Options(size=16, width=8, hidden=16))
    plan = Plan(out=tmp_path, epochs=250, batch_size=8, device="cpu", workers=0)
    state = prepare(Recipe(method), tiny_backbone(), tiny_corpus(), plan)
    assert state.run.steps == 1000
    assert all(
        torch.equal(a, b)
        for a, b in zip(state.run.backbone.parameters(), method.slow_backbone.net.parameters(), strict=True)
    )
    close(
        method.slow_backbone.momentum,
        1 - 0.01 * (torch.cos(torch.tensor(torch.pi / 1000, dtype=torch.float64)) + 1) / 2,
        rtol=1e-12,
    )
    for _ in range(249):
        state.recipe.stepped(state.run, None, [])
    close(method.slow_backbone.momentum, 0.9914644661, rtol=1e-9)
    assert method.slow_projector.momentum == method.slow_backbone.momentum


def test_the_rate_rises_from_a_hundredth_and_ends_at_a_millionth():
    """``GradualWarmupScheduler`` (multiplier 100) and ``CosineAnnealingLR`` (eta_min 1e-6), at batch 1024: 4.0."""
    o = PixPro.Options()
    run = Run(None, 0, torch.device("cpu"), None, 100, 1024, 1024, 1000, 10, training=o)
    rates = []
    for step in (0, 25, 50, 1000):
        run.step = step
        rates.append(o.lr * 1024 / 256 * Defaults().rate(run))
    assert rates == pytest.approx([0.04, 0.04 * (99 * 0.5 + 1), 4.0, 1e-6])
