"""PixPro: which pixels meet, what flows where, and the branches that may be switched on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evalsuite_adainf.modifier import AdaInf
from evalsuite_gsimclr.modifier import GSimCLR
from evalsuite_hallucinator.modifier import Hallucinator
from evalsuite_interclr.modifier import InterCLR
from evalsuite_pixpro.method import PixPro, consistency, nearby, pixel_contrast, propagated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evalsuite import Backbone, BackboneSpec, Features, UsageError, load_backbone
from evalsuite.backbone import build
from pretrain import Recipe, pixpro_pair
from pretrain.testing import check_method, check_modifier, tiny_backbone, tiny_corpus
from pretrain.train import Plan, prepare


def pixpro(**options):
    return PixPro(PixPro.Options(**{"size": 16, "width": 8, "hidden": 16, "warmup": 0.5} | options))


VARIANTS = [{}, {"task": "contrast"}, {"instance": 1.0, "transform": 2}, {"power": 0.5, "transform": 0}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_what_every_method_owes(options):
    check_method(lambda: pixpro(**options))


def test_it_composes_with_what_changes_data_views_and_batches(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
    inflated = lambda: AdaInf(AdaInf.Options(tmp_path / "a.npz", copies=1))  # noqa: E731
    check_modifier(lambda: GSimCLR(GSimCLR.Options(side=8, channels=(4,), epochs=1)), pixpro, inflated)


@pytest.mark.parametrize("modifier", [Hallucinator, InterCLR])
def test_it_has_no_pairs_of_images_and_refuses_who_needs_them(modifier):
    with pytest.raises(UsageError, match="wraps 'pairs', which PixPro does not offer"):
        Recipe(pixpro(), modifier())


def ready(tmp_path, **options):
    method = pixpro(**options)
    plan = Plan(out=tmp_path, epochs=1, batch_size=8, device="cpu", workers=0)
    state = prepare(Recipe(method), tiny_backbone(), tiny_corpus(), plan)
    return method, state, next(iter(state.draws(plan)))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_loss_of_a_batch_falls_when_it_is_learned_from_again_and_again(options, tmp_path):
    _, state, draw = ready(tmp_path, optimizer="sgd", lr=3.0, **options)
    optimizer = state.recipe.optimizer(state.run, state.objective)
    totals = []
    for _ in range(20):
        total = torch.stack(list(state.objective(draw).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        state.objective.take()
        totals.append(total.item())
    assert totals[-1] < totals[0] - 0.2


# Which pixels meet -------------------------------------------------------------------------------------------


def official_pairs(first, second, shape, reach):
    """``regression_loss`` written out pixel by pixel."""
    height, width = shape
    bins = [((b[2] - b[0]) / width, (b[3] - b[1]) / height) for b in (first, second)]
    limit = reach * max(math.hypot(*b) for b in bins)
    centres = [
        [((x + 0.5) * bw + box[0], (y + 0.5) * bh + box[1]) for y in range(height) for x in range(width)]
        for box, (bw, bh) in zip((first, second), bins, strict=True)
    ]
    return [[math.dist(a, b) - limit for b in centres[1]] for a in centres[0]]


corner = st.floats(0, 0.7)
side = st.floats(0.05, 0.3)
box = st.tuples(corner, corner, side, side, st.booleans()).map(
    lambda t: (t[0] + t[2] * t[4], t[1], t[0] + t[2] * (not t[4]), t[1] + t[3])
)


@settings(max_examples=60)
@given(first=box, second=box, shape=st.tuples(st.integers(1, 4), st.integers(1, 4)), reach=st.floats(0.1, 3))
def test_pixels_meet_where_their_centres_do(first, second, shape, reach):
    boxes = [torch.tensor([b], dtype=torch.float64) for b in (first, second)]
    near = nearby(*boxes, shape, reach)
    apart = torch.tensor(official_pairs(first, second, shape, reach))
    sure = apart.abs() > 1e-9
    assert torch.equal(near[0][sure], (apart < 0)[sure])


def test_a_mirrored_view_meets_its_mirror_image():
    plain = torch.tensor([[0.1, 0.2, 0.9, 0.8]])
    mirrored = plain[:, [2, 1, 0, 3]]
    near = nearby(plain, mirrored, (4, 4), 0.5)
    grid = torch.arange(16).view(4, 4)
    assert torch.equal(near[0].nonzero()[:, 1].view(4, 4), grid.flip(1))


def test_pixels_of_the_views_meet_where_they_show_the_same_place():
    """Through the real views: an image that says of every pixel where it lies."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image = torch.stack([x * 4, y * 4, torch.zeros_like(x)]).to(torch.uint8)
    rng = torch.Generator().manual_seed(3)
    looks = [type(look)(16, crop=(0.3, 1.0), jitter=None, gray=0.0) for look in pixpro_pair(16)]
    flipped = 0
    for _ in range(20):
        views = [look({"image": image}, rng) for look in looks]
        flipped += sum(bool(v.box[0] > v.box[2]) for v in views)
        near = nearby(views[0].box[None], views[1].box[None], (16, 16), 0.7)[0]
        places = [F.adaptive_avg_pool2d(v.data[:2].double(), 16).flatten(1).T for v in views]
        distance = torch.cdist(places[0], places[1]) / 252
        widest = max(float((v.box[2:] - v.box[:2]).norm()) for v in views) / 16
        assert distance[near].max() < 0.7 * widest + 0.03
        assert distance[~near].min() > 0.7 * widest - 0.03
    assert 5 < flipped < 35


# What flows where --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clamp", "power"), [(0.0, 2.0), (0.0, 1.0), (0.2, 2.0), (0.1, 3.0), (0.0, 0.5)])
def test_propagation_and_its_gradient_are_those_of_the_formula(clamp, power):
    """The formula as one would write it, in float64, where every matrix is kept."""
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    unit = F.normalize(x, dim=1).flatten(2)
    similarity = torch.einsum("bci,bcj->bij", unit, unit).clamp(min=clamp)
    weight = (similarity + 1e-6 * (power < 1)) ** power
    expected = torch.einsum("bij,bcj->bci", weight, F.normalize(g, dim=1).flatten(2)).view_as(x)
    found = propagated(x, g, clamp, power)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(x)
    ours = torch.autograd.grad(found, (x, g), upstream)
    theirs = torch.autograd.grad(expected, (x, g), upstream)
    torch.testing.assert_close(ours, theirs)


def test_the_gradient_of_the_loss_is_that_of_the_formula_and_reaches_no_key():
    q = torch.randn(3, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(3, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    near = torch.rand(3, 4, 4) < 0.4
    near[1] = False
    cosine = torch.einsum("bci,bcj->bij", F.normalize(q, dim=1).flatten(2), F.normalize(k, dim=1).flatten(2))
    each = [c[n].mean() if n.any() else c.sum() * 0 for c, n in zip(cosine, near, strict=True)]
    expected = -2 * torch.stack(each).mean()
    found = consistency(q, k, near)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    (gradient,) = torch.autograd.grad(expected, q)
    found.backward()
    torch.testing.assert_close(q.grad, gradient, rtol=1e-5, atol=1e-8)
    assert not q.grad[1].any()
    assert k.grad is None


def test_pixel_contrast_is_the_formula_over_pixels_that_have_partners():
    q, k = (
        torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 5, 2, 2, dtype=torch.float64),
    )
    near = torch.zeros(2, 4, 4, dtype=torch.bool)
    near[0, 0, [1, 2]] = near[0, 3, 3] = True
    share = (torch.einsum("bci,bcj->bij", *(F.normalize(t, dim=1).flatten(2) for t in (q, k))) / 0.3).softmax(2)
    first = -(share[0, 0, [1, 2]].sum().log() + share[0, 3, 3].log()) / 2
    found = pixel_contrast(q, k, near, 0.3)
    torch.testing.assert_close(found, first / 2)  # the second image has no partners and counts as nothing
    found.backward()
    assert torch.isfinite(q.grad).all()
    assert q.grad[0].any()
    assert not q.grad[1].any()


def test_half_precision_is_widened():
    x = torch.randn(2, 8, 3, 3)
    near = torch.ones(2, 9, 9, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        found = propagated(x.bfloat16(), x.bfloat16())
        assert found.dtype == torch.float32
        assert consistency(x.bfloat16(), x.bfloat16(), near).dtype == torch.float32
    torch.testing.assert_close(found, propagated(x.bfloat16().float(), x.bfloat16().float()))


def test_the_target_is_the_slow_projection_without_propagation(tmp_path):
    method, state, draw = ready(tmp_path)
    nn.init.normal_(next(method.slow_projector.parameters()))
    (loss,) = state.objective(draw).values()
    ((batch, _),) = state.objective.seen
    first, second = batch.views
    with torch.no_grad():
        own = [method.projector(state.run.backbone(v.data).maps[4]) for v in batch.views]
        own = [propagated(x, method.transform(x)) for x in own]
        keys = [method.slow_projector.net(method.slow_backbone.net(v.data).maps[4]) for v in batch.views]
        near = nearby(first.box, second.box, (4, 4), 0.7)
        expected = consistency(own[0], keys[1], near) + consistency(own[1], keys[0], near.mT)
    torch.testing.assert_close(loss.detach(), expected)


def test_the_instance_branch_is_added_at_its_weight_and_has_its_own_copy(tmp_path):
    method, state, draw = ready(tmp_path, instance=0.5)
    terms = state.objective(draw)
    ((batch, _),) = state.objective.seen
    with torch.no_grad():
        maps = [state.run.backbone(v.data).maps[4] for v in batch.views]
        own = [method.instance_predictor(method.instance_projector(m)).mean((2, 3)) for m in maps]
        keys = [method.slow_instance.net(method.slow_backbone.net(v.data).maps[4]).mean((2, 3)) for v in batch.views]
    expected = -2 * (F.cosine_similarity(own[0], keys[1]) + F.cosine_similarity(own[1], keys[0])).mean()
    torch.testing.assert_close(terms["instances"].detach(), 0.5 * expected, rtol=1e-4, atol=1e-5)
    before = next(method.slow_instance.parameters()).clone()
    with torch.no_grad():
        next(method.instance_projector.parameters()).add_(1)
    state.recipe.stepped(state.run, *state.objective.take())
    assert not torch.equal(next(method.slow_instance.parameters()), before)


def test_views_are_the_published_ones_and_go_without_blur_on_request():
    assert PixPro().views() == pixpro_pair(224)
    assert [look.blur for look in pixpro(blur=False).views()] == [0, 0]
    assert pixpro(blur=False).views()[1].solarize == 0.2


# Refusals and presets ----------------------------------------------------------------------------------------


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, pixels):
        return Features(self.layer(pixels.mean((2, 3))))


def test_a_backbone_without_maps_is_refused_before_any_work(tmp_path):
    backbone = Backbone(Flat(), BackboneSpec("flat", 4, {}, frozenset({"pooled"}), image_size=(16, 16)))
    plan = Plan(out=tmp_path, epochs=1, batch_size=8, device="cpu", workers=0)
    with pytest.raises(UsageError, match="feature maps, which flat does not give"):
        prepare(Recipe(pixpro()), backbone, tiny_corpus(), plan)


@pytest.mark.parametrize("options", [{"transform": 3}, {"clamp": -1.0}, {"power": 0.0}, {"reach": 0.0}], ids=str)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="transform is 0, 1 or 2"):
        pixpro(**options)


def test_defaults_are_those_of_the_published_scripts():
    o = PixPro.Options()
    assert (o.power, o.clamp, o.transform, o.reach, o.instance, o.momentum_twin) == (2, 0, 1, 0.7, 0, 0.99)
    assert (o.optimizer, o.lr, o.weight_decay, o.decay_vectors, o.trust, o.warmup) == (
        "lars",
        1.0,
        1e-5,
        False,
        0.001,
        5,
    )
    assert {"imagenet", "imagenet-400", "cifar", "quick"} == set(PixPro.presets)
    for preset in PixPro.presets.values():
        PixPro(PixPro.Options(**preset.options))


def test_a_published_checkpoint_is_read_as_the_backbone_of_the_online_branch(tmp_path, registry):
    """``publish_model.py`` keeps ``model`` alone; heads and the slow copy are passed over."""
    net = build("torchvision:resnet18", registry).net
    slow = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    tensors = {f"module.encoder.{k}": v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    tensors |= {f"module.encoder_k.{k}": v for k, v in slow.items() if not k.startswith("fc.")}
    head = {"linear1.weight": torch.zeros(16, 512, 1, 1), "linear2.weight": torch.zeros(8, 16, 1, 1)}
    tensors |= {f"module.{name}.{k}": v for name in ("projector", "projector_k") for k, v in head.items()}
    tensors |= {"module.value_transform.weight": torch.zeros(8, 8, 1, 1), "module.value_transform.bias": torch.zeros(8)}
    torch.save({"model": tensors}, tmp_path / "pixpro_base_r18.pth")
    loaded = load_backbone(tmp_path / "pixpro_base_r18.pth", registry)
    assert (loaded.report.layout, loaded.report.arch, loaded.report.matched) == ("pixpro", "torchvision:resnet18", 1.0)
    assert loaded.report.prefix == "module.encoder."
    assert torch.equal(loaded.backbone.net.conv1.weight, net.conv1.weight)
