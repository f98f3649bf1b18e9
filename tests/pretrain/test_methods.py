"""The bases: what each does with twins, queues and predictors, and the checks that hold for all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from evalsuite import UsageError
from evalsuite.hooks import Registry, load
from pretrain import Augment, Method, Pairs, moco_v1
from pretrain.blocks import nt_xent
from pretrain.hooks import Recipe
from pretrain.methods.byol import BYOL
from pretrain.methods.moco import MoCo, MoCo1, shuffle
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam
from pretrain.testing import check_method, tiny_backbone, tiny_corpus
from pretrain.train import Plan, State, prepare


def simclr(**options: Any) -> SimCLR:
    return SimCLR(SimCLR.Options(**{"size": 16, "width": 8, "warmup": 0.0} | options))


def moco(**options: Any) -> MoCo:
    return MoCo(MoCo.Options(**{"size": 16, "width": 8, "queue": 32, "groups": 2} | options))


def simsiam(**options: Any) -> SimSiam:
    return SimSiam(SimSiam.Options(**{"size": 16, "width": 16, "bottleneck": 4} | options))


def byol(**options: Any) -> BYOL:
    return BYOL(BYOL.Options(**{"size": 16, "width": 8, "hidden": 16, "warmup": 0.0} | options))


BASES: dict[str, Callable[..., Method]] = {"simclr": simclr, "moco": moco, "simsiam": simsiam, "byol": byol}


@pytest.fixture(scope="module")
def methods() -> Registry:
    return load(["pretrain.methods"], environ={"EVALSUITE_PLUGINS": ""}).registry


@pytest.mark.parametrize("name", BASES)
def test_what_every_method_owes(name):
    check_method(BASES[name])


def test_moco_as_first_published_too():
    check_method(lambda: MoCo1(MoCo1.Options(size=16, width=8, queue=32, groups=2)))


@pytest.mark.parametrize("name", BASES)
def test_the_loss_of_a_batch_falls_when_it_is_learned_from_again_and_again(name, tmp_path):
    ready = state(BASES[name](optimizer="sgd", lr=0.1, scaling="none"), tmp_path)
    optimizer = ready.recipe.optimizer(ready.run, ready.objective)
    draw = next(iter(ready.draws(Plan(out=tmp_path, epochs=1, batch_size=8, workers=0))))
    totals = []
    for _ in range(20):
        total = torch.stack(list(ready.objective(draw).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < totals[0] - 0.2 * abs(totals[0])


@pytest.mark.parametrize("name", ["simclr", "moco", "moco-v1", "simsiam", "byol"])
def test_all_are_registered_with_presets_of_their_options(methods, name):
    method = methods.get("method", name)
    assert {"imagenet", "cifar"} <= set(method.presets)
    for preset in method.presets.values():
        method(method.Options(**preset.options))
        assert preset.source
    assert "arXiv" in method.__doc__


def state(method: Method, out: Path, **plan: Any) -> State:
    made = Plan(out=out, **{"epochs": 1, "batch_size": 8, "device": "cpu", "workers": 0} | plan)
    return prepare(Recipe(method), tiny_backbone(), tiny_corpus(), made)


def step(ready: State) -> dict[str, torch.Tensor]:
    draw = next(iter(ready.draws(Plan(out=ready.run.out, epochs=1, batch_size=8, workers=0))))
    return ready.objective(draw)


# SimCLR


def test_simclr_names_the_convention_of_its_loss():
    query, key, source = torch.randn(4, 6), torch.randn(4, 6), torch.arange(4)
    terms = {
        loss: float(simclr(loss=loss, temperature=0.5).losses([Pairs(query, key, source)])["nt_xent"])
        for loss in ("mean", "sum", "supervised")
    }
    assert terms["mean"] == pytest.approx(float(nt_xent(query, key, temperature=0.5)))
    assert terms["sum"] == pytest.approx(2 * terms["mean"])
    assert terms["supervised"] == pytest.approx(terms["mean"])


def test_simclr_supervised_takes_rows_of_one_source_for_positives_and_else_ignores_them():
    pairs = [Pairs(torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 0, 1, 2]))]
    kin = float(simclr(loss="supervised").losses(pairs)["nt_xent"])
    ignored = float(simclr(loss="mean").losses(pairs)["nt_xent"])
    assert kin != pytest.approx(ignored)


@pytest.mark.parametrize(("head", "layers", "norms"), [("v1", 2, 2), ("v2", 3, 3), ("plain", 2, 0)])
def test_simclr_heads(tmp_path, head, layers, norms):
    method = simclr(head=head)
    state(method, tmp_path)
    kinds = [type(m).__name__ for m in method.head]
    assert (kinds.count("Linear"), kinds.count("BatchNorm1d")) == (layers, norms)


# MoCo


def test_moco_shuffles_and_finds_its_rows_again():
    order, back = shuffle(12, torch.Generator().manual_seed(1), torch.device("cpu"))
    rows = torch.randn(12, 3)
    assert not torch.equal(rows[order], rows)
    assert torch.equal(rows[order][back], rows)


def test_moco_normalises_keys_in_other_groups_than_queries(tmp_path):
    """With the parameters of both branches equal, a key is what its image gives among its new neighbours."""
    method = moco(groups=2)
    ready = state(method, tmp_path)
    images = torch.rand(8, 3, 16, 16)
    rng = torch.Generator().manual_seed(5)
    found = method._slow(images, rng).pooled
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    expected = torch.empty_like(found)
    for group in range(2):
        rows = order[group::2]
        expected[rows] = tiny_backbone()(images[rows]).pooled.detach()
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, ready.run.backbone(images).pooled, atol=1e-3)


def test_moco_remembers_each_key_once_after_the_step(tmp_path):
    method = moco()
    ready = state(method, tmp_path)
    before = method.queue.rows.clone()
    step(ready)
    assert torch.equal(method.queue.rows, before)
    batch, pairs = ready.objective.take()
    doubled = [Pairs(p.query.repeat(2, 1), p.key.repeat(2, 1), p.source.repeat(2)) for p in pairs]
    ready.recipe.stepped(ready.run, batch, doubled)
    assert torch.allclose(method.queue.rows[:8], F.normalize(pairs[0].key), atol=1e-6)
    assert torch.equal(method.queue.rows[8:], before[8:])


def test_moco_remembers_as_many_keys_where_an_image_stands_twice_in_a_batch(tmp_path):
    """A neighbour stands in for an image that cannot be read: the queue must move on as on every other process."""
    method = moco()
    ready = state(method, tmp_path)
    step(ready)
    batch, pairs = ready.objective.take()
    index = batch.index.clone()
    index[3] = index[2]
    doubled = [Pairs(p.query.repeat(2, 1), p.key.repeat(2, 1), index.repeat(2)) for p in pairs]
    ready.recipe.stepped(ready.run, replace(batch, index=index), doubled)
    assert int(method.queue.pushed) == 8
    assert torch.allclose(method.queue.rows[:8], F.normalize(pairs[0].key), atol=1e-6)


def test_mocos_keys_take_no_gradient_and_its_twin_follows(tmp_path):
    method = moco(momentum_twin=0.9)
    ready = state(method, tmp_path)
    torch.stack(list(step(ready).values())).sum().backward()
    assert all(p.grad is None for p in method.slow_backbone.parameters())
    with torch.no_grad():
        next(ready.run.backbone.parameters()).add_(1.0)
    before = next(method.slow_backbone.parameters()).clone()
    ready.recipe.stepped(ready.run, *ready.objective.take())
    assert torch.allclose(next(method.slow_backbone.parameters()), before + 0.1, atol=1e-6)


def test_a_queue_that_the_batch_does_not_divide_is_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match="queue of 30 cannot be filled 8 keys at a time"):
        state(moco(queue=30), tmp_path)


def test_groups_that_do_not_divide_the_batch_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be normalised in 3 groups"):
        state(moco(groups=3), tmp_path)


def test_the_first_moco_differs_where_the_paper_does():
    one = MoCo1(MoCo1.Options(size=16))
    assert one.views() == (moco_v1(16), moco_v1(16))
    assert (one.options.temperature, one.options.head, one.options.schedule) == (0.07, "linear", "step")
    assert MoCo1(MoCo1.Options(size=16, blur=0.3)).views()[1].blur == 0.3
    two = MoCo()
    assert (two.options.temperature, two.options.queue, two.options.momentum_twin) == (0.2, 65536, 0.999)
    assert isinstance(two.views()[0], Augment)


# SimSiam


def test_simsiams_loss_is_half_the_sum_of_both_directions(tmp_path):
    ready = state(simsiam(), tmp_path)
    (loss,) = step(ready).values()
    _, (one, other) = ready.objective.take()
    expected = -(F.cosine_similarity(one.query, one.key) + F.cosine_similarity(other.query, other.key)).mean() / 2
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert torch.equal(one.mate, other.query)


@pytest.mark.parametrize("fixed", [True, False])
def test_simsiam_keeps_the_predictors_rate_if_told_to(tmp_path, fixed):
    ready = state(simsiam(fixed_predictor_rate=fixed), tmp_path)
    optimizer = ready.recipe.optimizer(ready.run, ready.objective)
    constant = {id(p) for g in optimizer.param_groups if g["constant"] for p in g["params"]}
    predictor = {id(p) for p in ready.recipe.method.predictor.parameters()}
    assert constant == (predictor if fixed else set())
    assert all(g["lr"] == pytest.approx(0.05 * 8 / 256) for g in optimizer.param_groups)


# BYOL


def test_byols_momentum_rises_to_one_and_its_loss_is_of_both_directions(tmp_path):
    method = byol()
    ready = state(method, tmp_path)
    (loss,) = step(ready).values()
    batch, pairs = ready.objective.take()
    expected = sum((2 - 2 * F.cosine_similarity(p.query, p.key)).mean() for p in pairs)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    momenta = []
    for _ in range(5):
        momenta.append(method.slow_backbone.momentum)
        ready.recipe.stepped(ready.run, batch, pairs)
    cosine = [1 - 0.01 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)]
    assert momenta == pytest.approx(cosine)


def test_byols_target_is_the_slow_projection_of_the_other_view(tmp_path):
    method = byol()
    ready = state(method, tmp_path)
    step(ready)
    batch, (one, other) = ready.objective.take()
    slow = [method.slow_projector(method.slow_backbone(v.data).pooled) for v in batch.views]
    assert torch.allclose(one.key, slow[1], atol=1e-6)
    assert torch.allclose(other.key, slow[0], atol=1e-6)
