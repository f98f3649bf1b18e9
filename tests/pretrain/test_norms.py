"""Batch normalisation over a stated number of images."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from evalsuite import UsageError
from pretrain.norms import group_norms


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5))


def test_groups_are_normalised_as_if_each_were_a_batch():
    plain, grouped = network(), network()
    group_norms(grouped, 4, 16)
    x = torch.randn(16, 3, 4, 4)
    out = grouped(x)
    for group in range(4):
        assert torch.allclose(out[group::4], network()(x[group::4]), atol=1e-5)
    out.square().sum().backward()
    sum(plain(x[g::4]).square().sum() for g in range(4)).backward()
    for one, other in zip(grouped.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-4)


def test_running_statistics_are_the_mean_over_groups():
    grouped = network()
    group_norms(grouped, 2, 8)
    x = torch.randn(8, 3, 4, 4)
    grouped(x)
    parts = []
    for group in range(2):
        part = network()
        part(x[group::2])
        parts.append(part.state_dict())
    state = grouped.state_dict()
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        assert torch.allclose(state[name], (parts[0][name] + parts[1][name]) / 2, atol=1e-6), name
    assert int(state["1.num_batches_tracked"]) == 1


def test_names_and_tensors_stay_and_eval_is_plain():
    plain, grouped = network(), network()
    before = {name: p.data_ptr() for name, p in grouped.named_parameters()}
    group_norms(grouped, 2, 8)
    assert {name: p.data_ptr() for name, p in grouped.named_parameters()} == before
    assert list(grouped.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 3, 4, 4)
    assert torch.equal(grouped.eval()(x), plain.eval()(x))


def test_one_group_in_one_process_is_what_it_was():
    module = network()
    group_norms(module, 1, 8)
    assert type(module[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(("groups", "size"), [(3, 8), (8, 8), (16, 8)])
def test_groups_that_do_not_divide_the_batch_are_refused(groups, size):
    with pytest.raises(UsageError, match=f"normalised in {groups} groups"):
        group_norms(network(), groups, size)


def test_what_timm_fused_into_a_norm_stays():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4))
    plain = copy.deepcopy(module)
    group_norms(module, 2, 8)
    x = torch.randn(8, 3, 4, 4)
    found = module(x)
    assert torch.allclose(found[::2], plain(x[::2]), atol=1e-5)
    assert float(found.detach().min()) == 0.0
    assert float(module.eval()(x).detach().min()) == 0.0


def test_a_norm_of_another_kind_is_refused():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UsageError, match="Own cannot take its statistics"):
        group_norms(nn.Sequential(Own(3)), 2, 8)


def test_a_batch_of_another_size_is_told_apart():
    module = network()
    group_norms(module, 4, 8)
    with pytest.raises(ValueError, match="does not fall into 4 groups"):
        module(torch.randn(6, 3, 4, 4))
