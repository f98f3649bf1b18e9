"""Seeding is torch's, for what there is."""

from __future__ import annotations

import pytest
import torch

from evalsuite.seeding import manual_seed, seeded


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_what_is_drawn_is_what_torch_draws(seed):
    torch.manual_seed(seed)
    expected = torch.randn(4)
    manual_seed(seed)
    assert torch.equal(torch.randn(4), expected)


def test_what_is_drawn_inside_moves_nothing_outside():
    manual_seed(1)
    expected = torch.randn(4)
    manual_seed(1)
    with seeded(2):
        inside = torch.randn(4)
    assert torch.equal(torch.randn(4), expected)
    manual_seed(2)
    assert torch.equal(inside, torch.randn(4))


@pytest.mark.gpu
def test_the_generators_of_a_gpu_are_seeded_too():
    torch.manual_seed(3)
    expected = torch.randn(4, device="cuda")
    manual_seed(3)
    assert torch.equal(torch.randn(4, device="cuda"), expected)
