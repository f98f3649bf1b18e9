"""Numbers that the official implementations gave on fixed inputs, reproduced by the blocks in float64.

The values were made by executing the functions named in each test at these commits: zdaxie/PixPro e390d6b,
PKU-ML/adainf 233a6bd (its copy of solo-learn), facebookresearch/swav 06b1b7c, facebookresearch/simsiam
a7bc177, open-mmlab/mmselfsup 6faad81, and the Hallucinator repository c50c6dd; where a loop could not be
executed on its own the formula was typed off it, and the test says so. The tolerance is 1e-6 relative, or
the digits recorded.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain import blocks


@pytest.fixture
def views(wave):
    return wave((4, 6), 0.37, 0.11), wave((4, 6), 0.53, 0.7)


def close(value, expected, rtol=1e-6, atol=0.0):
    value = torch.as_tensor(value, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)


def test_the_inputs_are_the_recorded_ones(wave):
    close(wave((2, 4, 3, 3), 0.37, 0.11)[0, 0, 0], [0.1097783, 0.46177918, 0.75128041], atol=1e-8)
    close(wave((4, 6), 0.53, 0.7)[0, 3:], [0.75233058, 0.31607796, -0.20690197], atol=1e-8)


# Contrastive losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "expected"), [(0.2, 6.8528217372), (0.1, 12.9795118395), (0.5, 3.3874426833)])
def test_nt_xent_is_solo_learns_and_half_of_the_tensorflow_sum(views, temperature, expected):
    """solo-learn ``simclr_loss_func``. G-SimCLR's loss is the value at 0.1 by algebra.

    google-research/simclr adds the two directions' means: 13.7056434743, 25.9590236791 and 6.7748853666
    (typed off ``add_contrastive_loss``), twice the value here.
    """
    loss = blocks.nt_xent(*views, temperature=temperature)
    close(loss, expected)
    close(2 * loss, {0.2: 13.7056434743, 0.1: 25.9590236791, 0.5: 6.7748853666}[temperature])


def test_nt_xent_with_kin_as_positives_is_solo_learns(views):
    """solo-learn ``simclr_loss_func`` with index [0, 0, 2, 3]: rows of one image share the numerator."""
    index = torch.tensor([0, 0, 2, 3])
    close(blocks.nt_xent(views[0], views[1], index, temperature=0.2, kin="positive"), 6.4045614147)


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 18.316324), (0.1, 18.542160), (0.5, 24.196019)])
def test_nt_xent_rescaled_is_the_hallucinators(views, temperature, expected):
    """Hallucinator ``losses/NT_Xent.py``, executed in float32: it multiplies by temperature / 0.07."""
    close(blocks.nt_xent(*views, temperature=temperature) * temperature / 0.07, expected, rtol=2e-6)


def test_info_nce_is_mocos(views, wave):
    """mmselfsup ``contrast_intra`` without a margin; one direction of solo-learn ``mocov2plus_loss_func``.

    The official queue is (width, size) with normalised columns; ours is its transpose.
    """
    queue = F.normalize(wave((6, 12), 0.71, 0.2), dim=0)
    close(blocks.info_nce(views[0], views[1], queue.T, temperature=0.2), 4.8282697259)


def test_neg_cosine_is_simsiams_and_byols(views, wave):
    """SimSiam's loss line (typed off ``main_simsiam.py``) and solo-learn ``byol_loss_func`` (executed)."""
    p1, z2 = views
    p2, z1 = wave((4, 6), 0.41, 0.3), wave((4, 6), 0.67, 0.9)
    close((blocks.neg_cosine(p1, z2) + blocks.neg_cosine(p2, z1)) / 2, 0.1900964826)
    close(2 + 2 * blocks.neg_cosine(p1, z2), 2.7082224619)


# Codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "iterations", "row", "columns"),
    [
        (0.05, 1, [0.65343665, 0, 0.34656335, 0], [1.84734, 2.54141, 2.17465, 1.43659]),
        (0.05, 3, [0.69567212, 2.393e-12, 0.30432788, 1.323e-11], [2.00620, 2.00654, 2.01719, 1.97007]),
        (0.05, 10, [0.69696025, 0, 0.30303975, 0], None),
        (0.03, 3, [0.76840352, 0, 0.23159648, 0], None),
    ],
)
def test_sinkhorn_is_swavs(wave, epsilon, iterations, row, columns):
    """``distributed_sinkhorn`` of ``main_swav.py``, which exponentiates; ours stays in logarithms."""
    z, prototypes = F.normalize(wave((8, 6), 0.37, 0.11)), F.normalize(wave((4, 6), 0.53, 0.7))
    codes = blocks.sinkhorn(z @ prototypes.T, epsilon, iterations)
    close(codes[0], row, atol=1e-8)
    close(codes.sum(1), [1.0] * 8, rtol=1e-12)
    if columns:
        close(codes.sum(0), columns, atol=1e-5)
    if (epsilon, iterations) == (0.05, 3):
        close(codes[0, [1, 3]], [2.393e-12, 1.323e-11], rtol=1e-3)


# Twins, optimisers, schedules ------------------------------------------------------------------------------


def test_the_twins_momentum_is_pixpros():
    """PixPro's momentum at 0, 250, 500, 750 and 999 of 1000 updates (typed off ``PixPro.py``)."""
    expected = {0: 0.99, 250: 0.9914644661, 500: 0.995, 750: 0.9985355339, 999: 0.9999999753}
    online = nn.Linear(1, 1, bias=False)
    twin = blocks.EmaTwin(online, 0.99, total=1000)
    for step in range(1000):
        if step in expected:
            close(twin.momentum, expected[step], rtol=1e-9)
        twin.update(online)


PIXPRO = (
    [0.10262921, 0.45131979, 0.74038058, 0.93074975, 0.99630713, 0.9275067],
    [0.73285335, 0.43797315, 0.0823424, -0.28593617, -0.61663555, -0.86430733],
    [-0.12806708, -0.372643, -0.5459616],
)
SOLO = (
    [0.07409844, 0.40956582, 0.69685722, 0.8973945, 0.98226633, 0.9366267],
    [0.76262597, 0.48022468, 0.12547694, -0.25375458, -0.60423524, -0.8750869],
    [0.41867628, 0.54253162, 0.65039806],
)


@pytest.mark.parametrize(
    ("options", "decay", "expected"),
    [
        pytest.param({"lr": 4.0}, 1e-5, PIXPRO, id="pixpro"),
        pytest.param({"lr": 0.4, "trust": 0.02, "ratio": "summed", "clip": True}, 1e-4, SOLO, id="solo-learn"),
    ],
)
def test_lars_is_pixpros_and_solo_learns(wave, options, decay, expected):
    """Two steps of PixPro's ``contrast/lars.py`` and of solo-learn's ``utils/lars.py``."""
    w, b = nn.Parameter(wave((3, 4), 0.37, 0.11)), nn.Parameter(wave((3,), 0.2, 0.5))
    optimizer = blocks.LARS(blocks.split_decay([w, b], decay), momentum=0.9, **options)
    for step in (1, 2):
        w.grad, b.grad = 0.1 * step * wave((3, 4), 0.53, 0.7), 0.1 * step * wave((3,), 0.31, 0.4)
        optimizer.step()
    close(w.flatten(), [*expected[0], *expected[1]], atol=1e-8)
    close(b, expected[2], atol=1e-8)


@pytest.mark.parametrize(
    ("step", "total", "peak", "floor", "expected"),
    [
        (0, 100, 4.8, 0.0048, 4.8),  # SwAV, per iteration
        (50, 100, 4.8, 0.0048, 2.4024),
        (99, 100, 4.8, 0.0048, 0.0059830709),
        (0, 500, 0.5, 0.05, 0.5),  # Hallucinator's _get_lr: epoch 1 is step 0, the floor a tenth
        (1, 500, 0.5, 0.05, 0.4999955587),
        (249, 500, 0.5, 0.05, 0.2764137074),
        (499, 500, 0.5, 0.05, 0.0500044413),
        (49, 100, 0.03, 0.0, 0.0154711614),
        (99, 100, 0.03, 0.0, 7.4015945e-06),
    ],
)
def test_the_cosine_schedule_is_swavs_and_the_hallucinators(step, total, peak, floor, expected):
    close(blocks.cosine_schedule(step, total, peak, floor=floor), expected, rtol=1e-7)
