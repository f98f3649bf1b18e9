"""Numbers that the official code of the four modifiers gave on fixed inputs.

Hallucinator c50c6dd, mmselfsup 0.x 6faad81 (InterCLR), G-SimCLR bd77e7f. The crop rule and the batch order were
evaluated from the formula, as was the loss around the executed generator.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from evalsuite_gsimclr.modifier import guided, ranked
from evalsuite_hallucinator.modifier import Imagination, placed
from evalsuite_interclr.modifier import class_means, with_margin

from pretrain import blocks


def close(value, expected, **tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value.detach(), expected, **{"rtol": 1e-6, "atol": 1e-8} | tolerance)


@pytest.fixture
def imagined(wave):
    """The official ``Generator(8, 8, 4)`` with its recorded weights: queries, keys, and what it adds to the
    queries.
    """
    generator = Imagination(4).double()
    for j, p in enumerate(generator.parameters()):
        p.data = 0.3 * wave(tuple(p.shape), 0.29 + 0.01 * j, 0.4)
    x, k = wave((3, 4), 0.37, 0.11), F.normalize(wave((3, 4), 0.53, 0.7))
    return x, k, generator(x, k, 0.05)


def test_hallucinators_generator(imagined):
    """``models/generator.py``, rows 3 to 5 of its output; rows 0 to 2 are its input."""
    close(
        imagined[2],
        [
            [0.8486258, -0.34064862, 0.48489727, 0.45318715],
            [0.97496236, -0.43116007, 0.51728483, 0.48690261],
            [0.80324471, -0.33760578, 0.52494232, 0.37991987],
        ],
    )


def test_hallucinated_moco(wave, imagined):
    """Six queries against a queue, the keys repeated; and the three real ones alone."""
    x, k, y = imagined
    queue = F.normalize(wave((4, 12), 0.71, 0.2), dim=0).T
    close(blocks.info_nce(torch.cat([x, y]), k.repeat(2, 1), queue, temperature=0.2), 4.1581989)
    close(blocks.info_nce(x, k, queue, temperature=0.2), 2.5750420)


@pytest.mark.parametrize(
    ("side", "crop", "box", "ends", "middle"),
    [
        (32, 16, 0.25, (0, 16), 8),
        (32, 20, 0.25, (0, 12), 6),
        (224, 100, 0.2, (0, 124), 62),
        (300, 260, 0.2, (0, 40), 20),
    ],
)
def test_contrastive_crops_places(side, crop, box, ends, middle):
    """The rule of ``ContrastiveCrop.get_params`` on one axis, Beta replaced by a constant."""
    assert tuple(placed(side, crop, box, share) for share in (0.0, 1.0)) == ends
    assert placed(side, crop, box, 0.5) == middle


@pytest.mark.parametrize(
    ("margin", "kind", "expected"),
    [
        (0.0, "cos", 4.8282697259),
        (-0.5, "cos", 2.8848742768),
        (0.3, "cos", 6.1426327873),
        (-0.5, "arc", 3.3687987133),
        (0.5, "arc", 6.2530575650),
    ],
)
def test_interclrs_margins(wave, margin, kind, expected):
    """``contrast_intra`` of ``interclr_moco.py``; ``contrast_inter`` has the same lines."""
    q, k = F.normalize(wave((4, 6), 0.37, 0.11)), F.normalize(wave((4, 6), 0.53, 0.7))
    queue = F.normalize(wave((6, 12), 0.71, 0.2), dim=0)
    close(blocks.contrast(with_margin((q * k).sum(1), margin, kind), q @ queue, 0.2), expected)


def test_interclrs_centroids(wave):
    """``InterCLRMemory._compute_centroids``: plain means; class 1 is empty and keeps its centroid."""
    rows = F.normalize(wave((10, 3), 0.37, 0.11))
    previous = wave((4, 3), 0.53, 0.7)
    centroids = class_means(rows, torch.tensor([0, 2, 2, 0, 3, 3, 3, 0, 2, 2]), previous)
    close(
        centroids[[0, 2, 3]],
        [
            [0.16864688, 0.18540411, 0.17706777],
            [0.45100658, 0.1598521, -0.15293761],
            [-0.38355346, -0.13573808, 0.13044881],
        ],
    )
    assert torch.equal(centroids[1], previous[1])


def test_gsimclrs_order():
    """Ranks in a cluster by index, then a stable sort by rank with ties in the order of clusters."""
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 0, 2, 1, 1])
    order = [1, 2, 0, 3, 6, 4, 7, 10, 5, 8, 11, 9]
    assert ranked(labels).tolist() == order
    assert [b.tolist() for b in guided(labels, 5)] == [order[:5], order[5:10]]
