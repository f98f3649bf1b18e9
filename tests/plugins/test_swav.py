"""SwAV: what its crops, prototypes and queue do from step to step, and what it composes with."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evalsuite_adainf.modifier import AdaInf
from evalsuite_gsimclr.modifier import GSimCLR
from evalsuite_hallucinator.modifier import Hallucinator
from evalsuite_interclr.modifier import InterCLR
from evalsuite_swav.method import SwAV, swapped

from evalsuite import UsageError
from pretrain import Recipe, swav
from pretrain.blocks import sinkhorn
from pretrain.testing import check_method, check_modifier, tiny_backbone, tiny_corpus
from pretrain.train import Plan, prepare

TINY = {"size": 16, "small": 8, "crops": (2, 2), "width": 8, "hidden": 16, "prototypes": 12, "warmup": 0.0}


def make(**options) -> SwAV:
    return SwAV(SwAV.Options(**TINY | options))


def state(method, out: Path, **plan):
    made = Plan(out=out, **{"epochs": 3, "batch_size": 8, "device": "cpu", "workers": 0} | plan)
    return prepare(Recipe(method), tiny_backbone(), tiny_corpus(), made), made


def steps(ready, plan, count, lr=0.1):
    """Make steps by plain gradient descent, giving the loss of each."""
    parameters = [p for p in ready.objective.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr)
    for _, draw in zip(range(count), ready.draws(plan), strict=False):
        (loss,) = ready.objective(draw).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ready.recipe.stepped(ready.run, *ready.objective.take())
        yield loss.item()


def test_what_every_method_owes():
    check_method(lambda: make(queue=16, queue_start=0, frozen=0.25))


def test_the_views_are_the_published_ones():
    assert SwAV().views() == swav()
    large, other = SwAV(SwAV.Options(**SwAV.preset("imagenet-2x224").options)).views()
    assert (large.size, large.crop, large) == (224, (0.08, 1.0), other)


def test_presets_are_those_of_the_method(registry):
    method = registry.get("method", "swav")
    assert {"imagenet", "imagenet-256", "imagenet-2x224", "cifar"} == set(method.presets)
    for preset in method.presets.values():
        method(method.Options(**preset.options))
        assert preset.source


def test_crops_of_a_size_share_a_forward_pass(tmp_path):
    ready, plan = state(make(crops=(2, 4)), tmp_path)
    seen = []
    ready.run.backbone.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    assert len(list(steps(ready, plan, 1))) == 1
    assert seen == [(16, 3, 16, 16), (32, 3, 8, 8)]


def official(ready, plan, count, o, lr=0.1):
    """The same steps, in the words and in the order of ``main_swav.py``: exponentials, a queue that is shifted."""
    backbone, head = copy.deepcopy(ready.run.backbone), copy.deepcopy(ready.recipe.method.head)
    weight = torch.nn.Parameter(ready.recipe.method.prototypes.detach().clone())
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters(), weight], lr)
    queue = torch.zeros(2, o.queue, o.width, dtype=weight.dtype) if o.queue else None
    for it, draw in zip(range(count), ready.draws(plan), strict=False):
        with torch.no_grad():
            weight.copy_(F.normalize(weight, dim=1))
        crops = [v.data.to(weight.dtype) / 255 for v in draw.batch.views]
        pooled = [backbone(torch.cat(crops[:2])).pooled, backbone(torch.cat(crops[2:])).pooled]
        embedding = F.normalize(head(torch.cat(pooled)))
        output, size = embedding @ weight.T, len(crops[0])
        loss = 0
        for i in (0, 1):
            out = output[size * i : size * (i + 1)].detach()
            if queue is not None:
                if not torch.all(queue[i, -1] == 0):
                    out = torch.cat((queue[i] @ weight.detach().T, out))
                queue[i, size:] = queue[i, :-size].clone()
                queue[i, :size] = embedding[size * i : size * (i + 1)].detach()
            q = torch.exp(out / o.epsilon).T
            q = q / q.sum()
            for _ in range(3):
                q = q / q.sum(1, keepdim=True) / q.shape[0]
                q = q / q.sum(0, keepdim=True) / q.shape[1]
            q = (q * q.shape[1]).T[-size:]
            said = [F.log_softmax(output[size * v : size * (v + 1)] / o.temperature, 1) for v in range(4) if v != i]
            loss = loss + sum(-(q * s).sum(1).mean() for s in said) / 3
        loss = loss / 2
        optimizer.zero_grad()
        loss.backward()
        if it < o.frozen * ready.run.epoch_steps:
            weight.grad = None
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize("queue", [0, 16])
def test_steps_are_those_of_the_official_loop(tmp_path, queue):
    """Prototypes that stand still for two steps and a queue that is full after two."""
    method = make(queue=queue, queue_start=0, frozen=0.5)
    ready, plan = state(method, tmp_path)
    ready.objective.double()
    theirs = list(official(ready, plan, 6, method.options))
    assert list(steps(ready, plan, 6)) == pytest.approx(theirs, rel=1e-6)
    assert len(set(theirs)) == 6


def test_prototypes_stand_still_and_then_move_on_the_sphere(tmp_path):
    method = make(frozen=0.5)
    ready, plan = state(method, tmp_path)
    start = method.prototypes.detach().clone()
    moved = []
    for _ in steps(ready, plan, 4):
        moved.append(not torch.allclose(method.prototypes, start, atol=1e-6))
        assert torch.allclose(method.prototypes.norm(dim=1), torch.ones(12), atol=1e-6)
        assert (method.prototypes.grad is None) == (len(moved) <= 2)
    assert moved == [False, False, True, True]


def test_frozen_prototypes_are_left_alone_by_the_methods_own_optimiser(tmp_path):
    method = make(frozen=1.0)
    ready, plan = state(method, tmp_path)
    optimizer = ready.recipe.optimizer(ready.run, ready.objective)
    start = method.prototypes.detach().clone()
    (loss,) = ready.objective(next(iter(ready.draws(plan)))).values()
    loss.backward()
    optimizer.step()
    assert torch.equal(method.prototypes, start)


def test_the_queue_begins_in_its_epoch_and_counts_from_when_it_is_full(tmp_path):
    """Four steps an epoch, two to fill it: the seventh step is the first that it balances."""
    method = make(queue=16, queue_start=1)
    ready, plan = state(method, tmp_path)
    balanced = []
    codes = method.codes

    def watched(which, scores):
        balanced.append(method.queues[which].filled)
        return codes(which, scores)

    method.codes = watched
    pushed = [int(method.queues[0].pushed) for _ in steps(ready, plan, 8)]
    assert pushed == [0, 0, 0, 0, 8, 16, 24, 32]
    assert balanced == [False] * 12 + [True] * 4


def test_a_queue_holds_the_embeddings_of_its_crop(tmp_path):
    method = make(queue=8, queue_start=0)
    ready, plan = state(method, tmp_path)
    seen = []
    method.head.register_forward_hook(lambda *given: seen.append(F.normalize(given[2].detach()).chunk(4)))
    next(steps(ready, plan, 1))
    for place in (0, 1):
        assert torch.allclose(method.queues[place].rows, seen[0][place], atol=1e-6)


def test_codes_are_balanced_together_with_a_full_queue(tmp_path):
    method = make(queue=8, queue_start=0)
    state(method, tmp_path)
    scores = torch.randn(8, 12)
    alone = method.codes(0, scores)
    assert torch.equal(alone, sinkhorn(scores))
    method.queues[0].push(torch.randn(8, 8))
    together = sinkhorn(torch.cat([method.queues[0].rows @ method.prototypes.T, scores]).detach())
    assert torch.equal(method.codes(0, scores), together[8:])
    assert not torch.allclose(alone, together[8:], atol=1e-3)


def test_small_crops_learn_and_give_no_codes():
    scores = [torch.randn(4, 6, requires_grad=True) for _ in range(3)]
    codes = {0: torch.full((4, 6), 1 / 6)}
    found = torch.autograd.grad(swapped(scores, codes), scores, allow_unused=True)
    assert not found[0].any()
    assert all(gradient.abs().sum() > 0 for gradient in found[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assign": (0, 2)}, "small crops are never assigned"),
        ({"assign": (4,)}, "cannot be assigned"),
        ({"assign": ()}, "cannot be assigned"),
        ({"crops": (1, 0), "assign": (0,)}, "two are needed"),
    ],
)
def test_crops_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_queue_that_the_batch_does_not_divide_is_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match="queue of 20 cannot be filled 8 images at a time") as refused:
        state(make(queue=20), tmp_path)
    assert "swav.queue=16" in refused.value.fix


@pytest.mark.parametrize(("slip", "red"), [(False, 0.229), (True, 0.228)])
def test_the_official_slip_is_a_matter_of_choice(tmp_path, slip, red):
    ready, _ = state(make(official_std=slip), tmp_path)
    assert ready.run.backbone.spec.std == pytest.approx((red, 0.224, 0.225))
    assert ready.run.backbone.std.flatten().tolist() == pytest.approx([red, 0.224, 0.225])


# Modifiers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def generated(tmp_path):
    path = tmp_path / "generated.npz"
    np.savez(path, image=np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
    return path


def test_it_composes_with_generated_data(generated):
    check_modifier(lambda: AdaInf(AdaInf.Options(generated, copies=1)), make)
    weaker = Recipe(make(), AdaInf(AdaInf.Options(generated, copies=1))).views(None)
    assert [look.crop for look in weaker] == [(0.2, 1.0)] * 2 + [(0.2, 0.2)] * 2
    assert all(look.jitter.p == 0.4 for look in weaker)


def test_it_composes_with_guided_batches():
    check_modifier(lambda: GSimCLR(GSimCLR.Options(side=8, channels=(4,), epochs=1)), make)


@pytest.mark.parametrize("modifier", [Hallucinator, InterCLR])
def test_modifiers_of_positives_are_refused(modifier):
    with pytest.raises(UsageError, match=f"{modifier.__name__} wraps 'pairs', which SwAV does not offer"):
        Recipe(make(), modifier())
