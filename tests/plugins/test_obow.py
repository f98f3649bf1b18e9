"""OBoW: what its teacher, words and student do from step to step, and what it composes with."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evalsuite_adainf.modifier import AdaInf
from evalsuite_gsimclr.modifier import GSimCLR
from evalsuite_hallucinator.modifier import Hallucinator
from evalsuite_interclr.modifier import InterCLR
from evalsuite_obow.method import OBoW, Vocabulary, Whole, corners, cut_out, perplexity
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite import Features, UsageError
from evalsuite.training import mix_seed
from pretrain import Augment, Centre, Recipe
from pretrain.testing import check_method, check_modifier, losses, tiny_backbone, tiny_corpus, tiny_train
from pretrain.train import Plan, prepare

TINY = {
    "size": 16, "words": 32, "margin": 0, "crop": 12, "patch": 8, "source": 16, "shift": 2, "patches": 3, "warmup": 0.0,
}  # fmt: skip


def make(**options) -> OBoW:
    return OBoW(OBoW.Options(**TINY | options))


def state(method, out: Path, **plan):
    made = Plan(out=out, **{"epochs": 2, "batch_size": 8, "device": "cpu", "workers": 0} | plan)
    return prepare(Recipe(method), tiny_backbone(), tiny_corpus(), made), made


def steps(ready, plan, count, lr=0.1):
    """Make steps by plain gradient descent, giving the terms of each."""
    parameters = [p for p in ready.objective.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr)
    for _, draw in zip(range(count), ready.draws(plan), strict=False):
        terms = ready.objective(draw)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        ready.recipe.stepped(ready.run, *ready.objective.take())
        yield [term.item() for term in terms.values()]


def test_what_every_method_owes():
    check_method(make)


def test_presets_are_those_of_the_method(registry):
    method = registry.get("method", "obow")
    assert {"imagenet", "resnet18", "vanilla", "cifar"} == set(method.presets)
    for preset in method.presets.values():
        method(method.Options(**preset.options))
        assert preset.source


# Looking -----------------------------------------------------------------------------------------------------


def test_the_views_are_the_published_ones():
    whole, first, second, source = OBoW().views()
    assert whole == Whole(224, 0.875)
    assert first == second == Augment(160, crop=(0.08, 0.6), blur=0.5)
    assert source == Augment(256, crop=(0.6, 1.0))
    assert (first.jitter.brightness, first.jitter.hue, first.jitter.p, first.gray, first.flip) == (
        0.4,
        0.1,
        0.8,
        0.2,
        0.5,
    )
    vanilla = OBoW(OBoW.Options(**OBoW.preset("vanilla").options))
    assert vanilla.views() == (whole, first)


def test_the_whole_is_the_middle_and_every_other_time_its_mirror():
    image = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    middle = Centre(16, 0.9)({"image": image}).data
    rng = torch.Generator().manual_seed(0)
    found = [Whole(16, 0.9)({"image": image}, rng).data for _ in range(40)]
    mirrored = [torch.equal(data, middle.flip(2)) for data in found]
    assert all(m or torch.equal(data, middle) for m, data in zip(mirrored, found, strict=True))
    assert 10 < sum(mirrored) < 30


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999), patches=st.integers(1, 9),
    sizes=st.sampled_from([(256, 96, 24), (36, 16, 4), (16, 8, 2), (9, 3, 0)]),
)  # fmt: skip
def test_patches_lie_at_different_places_of_the_grid_and_inside(seed, patches, sizes):
    """``CropImagePatches``: 3 x 3 places (size - patch - jitter) // 2 apart, each moved by 0 to jitter pixels."""
    source, patch, shift = sizes
    found = corners(50, patches, source, patch, shift, torch.Generator().manual_seed(seed))
    assert found.shape == (50, patches, 2)
    assert found.min() >= 0
    assert found.max() + patch <= source
    step = (source - patch - shift) // 2
    assert {(256, 96, 24): 68}.get(sizes, step) == step
    if step > shift:
        places, moved = found // step, found % step
        assert moved.max() <= shift
        assert all(len({tuple(p) for p in image.tolist()}) == patches for image in places)
        if shift and patches > 2:
            assert {0, shift} <= set(moved.flatten().tolist())


def test_patches_are_cut_where_they_lie():
    images, where = torch.rand(2, 3, 9, 9), torch.tensor([[[0, 1], [4, 5]], [[5, 0], [2, 2]]])
    cut = cut_out(images, where, 4)
    for i in range(2):
        for p in range(2):
            top, left = where[i, p].tolist()
            assert torch.equal(cut[i, p], images[i, :, top : top + 4, left : left + 4])


# Words -------------------------------------------------------------------------------------------------------


def test_bags_sum_to_one_and_do_not_move_in_evaluation():
    vocabulary = Vocabulary(16, 4, 15.0).eval()
    cells = torch.rand(3, 4, 5, 5)
    bags = vocabulary(cells)
    assert torch.allclose(bags.sum(1), torch.ones(3))
    assert float(vocabulary.distance) == 0.5
    assert torch.equal(vocabulary(cells), bags)
    vocabulary.train()
    assert not torch.equal(vocabulary(cells), bags)


def test_words_begin_as_features_do_and_are_kept_as_they_are():
    vocabulary = Vocabulary(16, 4, 15.0)
    assert vocabulary.words.rows.min() == 0
    assert 0.2 < (vocabulary.words.rows == 0).float().mean() < 0.8
    vocabulary.words.push(torch.full((4, 4), 7.0))
    assert torch.equal(vocabulary.words.rows[:4], torch.full((4, 4), 7.0))


def test_a_bag_tells_which_words_are_in_the_image():
    """The mirror and any shuffling of its cells leave it alone; a cell that is a word counts as that word."""
    vocabulary = Vocabulary(6, 4, 15.0).eval()
    vocabulary.words.rows.copy_(10 * torch.eye(6, 4))
    cells = vocabulary.words.rows[[1, 3, 1, 1]].T.reshape(1, 4, 2, 2)
    assert torch.allclose(vocabulary(cells), torch.tensor([[0, 0.5, 0, 0.5, 0, 0]]), atol=1e-6)
    assert torch.equal(vocabulary(cells.flip(3)), vocabulary(cells))
    assert float(perplexity(vocabulary(cells))) == pytest.approx(2, abs=1e-3)


def test_new_words_are_averaged_cells_of_each_image(tmp_path):
    method = make(window=3)
    state(method, tmp_path)
    cells = torch.rand(8, 5, 4, 4)
    places = F.avg_pool2d(cells, 3, 1).flatten(2)
    drawn = [method.drawn(cells, torch.Generator().manual_seed(seed)) for seed in range(30)]
    which = [(places == rows[:, :, None]).all(1) for rows in drawn]
    assert all((hits.sum(1) == 1).all() for hits in which)
    assert torch.stack(which).any(0).all()


def test_the_border_of_maps_is_cut_off(tmp_path):
    method = make(margin=1, window=2, levels=2)
    ready, _ = state(method, tmp_path)
    features = ready.run.backbone(torch.rand(2, 3, 16, 16))
    fine, coarse = method.maps(features)
    assert torch.equal(fine, features.maps[2][:, :, 1:-1, 1:-1])
    assert torch.equal(coarse, features.maps[4][:, :, 1:-1, 1:-1])


@pytest.mark.parametrize(
    ("options", "cause"),
    [({"margin": 1}, r"\[8, 4\]"), ({"levels": 3}, "3 maps"), ({"levels": 1, "window": 5}, "5 cells")],
)
def test_a_backbone_without_the_maps_is_refused_before_any_work(tmp_path, options, cause):
    with pytest.raises(UsageError, match="cannot read its words off tiny") as refused:
        state(make(**options), tmp_path)
    assert re.search(cause, refused.value.cause)


def test_a_vocabulary_that_the_batch_does_not_divide_is_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match="queue of 30 cannot be filled 8 keys at a time"):
        state(make(words=30), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patches": 10}, "nothing to predict from"),
        ({"patches": 0, "crops": 0}, "nothing to"),
        ({"shift": 9}, "do not fit"),
    ],
)
def test_crops_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# Steps -------------------------------------------------------------------------------------------------------


class Official:
    """The same training, in the words and in the order of ``OBoW.forward``: the words are read, the student looks, the
    teacher follows and looks, and the words move on; all in one pass."""

    def __init__(self, ready, total):
        method = ready.recipe.method
        self.run, self.o, self.total, self.strides = ready.run, method.options, total, method.strides
        self.student = copy.deepcopy(ready.run.backbone)
        self.teacher = copy.deepcopy(ready.run.backbone)
        self.generators = copy.deepcopy(method.generators)
        self.words = [v.words.rows.clone() for v in method.vocabularies]
        self.pointer, self.mean = 0, [0.5, 0.5]
        self.optimizer = torch.optim.SGD([*self.student.parameters(), *self.generators.parameters()], 0.1)

    def crops(self, draw, rng):
        views = [v.data.double() / 255 for v in draw.batch.views]
        where = corners(len(views[0]), self.o.patches, self.o.source, self.o.patch, self.o.shift, rng)
        side = self.o.patch
        cut = [
            image[:, top : top + side, left : left + side]
            for image, places in zip(views[3], where.tolist(), strict=True)
            for top, left in places
        ]
        return views[0], torch.stack(views[1:3], 1).flatten(0, 1), torch.stack(cut)

    def step(self, it, draw):
        rng = torch.Generator().manual_seed(mix_seed(self.run.seed, it, 0, 1))
        whole, crops, patches = self.crops(draw, rng)
        dictionary = [w.clone() for w in self.words]
        rows = [self.student(x).pooled for x in (crops, patches)]
        weights = [F.normalize(g(F.normalize(w))).T for g, w in zip(self.generators, dictionary, strict=True)]
        with torch.no_grad():
            alpha = 1 - 0.01 * 0.5 * (1 + math.cos(math.pi * it / self.total))
            for p, q in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                q.mul_(alpha).add_(p, alpha=1 - alpha)
            features = self.teacher(whole)
            bags = [self.bag(level, features, rng) for level in range(2)]
            self.pointer = (self.pointer + len(whole)) % self.o.words
        found = [self.loss([self.o.kappa * f @ w for w in weights], bags) for f in rows]
        self.optimizer.zero_grad()
        sum(found).backward()
        self.optimizer.step()
        return [loss.item() for loss in found]

    def bag(self, level, features: Features, rng):
        cells, words = features.maps[self.strides[level]], self.words[level]
        distance = (cells[:, None] - words[None, :, :, None, None]).square().sum(2)
        self.mean[level] = 0.99 * self.mean[level] + 0.01 * distance.min(1).values.mean()
        candidates = F.avg_pool2d(cells, self.o.window, 1).flatten(2)
        chosen = torch.randint(candidates.shape[2], (len(cells),), generator=rng)
        words[self.pointer : self.pointer + len(cells)] = candidates[range(len(cells)), :, chosen]
        codes = torch.softmax(-self.o.inv_delta / self.mean[level] * distance, 1)
        return F.normalize(codes.flatten(2).max(2).values, p=1, dim=1)

    def loss(self, logits, bags):
        terms = []
        for said, bag in zip(logits, bags, strict=True):
            target = bag.repeat_interleave(len(said) // len(bag), 0)
            terms.append((target * (target.log() - said.log_softmax(1))).nansum(1).mean())
        return sum(terms) / len(terms)


def test_steps_are_those_of_the_official_pass(tmp_path):
    """Six steps, over which the words are all replaced."""
    method = make()
    ready, plan = state(method, tmp_path)
    ready.objective.double()
    official = Official(ready, ready.run.steps)
    theirs = [official.step(it, draw) for it, draw in zip(range(6), ready.draws(plan), strict=False)]
    ours = list(steps(ready, plan, 6))
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6)
    assert theirs[5] != theirs[0]
    for level in range(2):
        assert float(method.vocabularies[level].distance) == pytest.approx(float(official.mean[level]), rel=1e-6)
        assert torch.allclose(method.vocabularies[level].words.rows, official.words[level], rtol=1e-6)


def test_the_teacher_takes_no_gradient_and_its_momentum_rises_to_one(tmp_path):
    method = make()
    ready, plan = state(method, tmp_path)
    momenta = []
    for _ in steps(ready, plan, 8):
        momenta.append(method.teacher.momentum)
    assert all(p.grad is None for p in method.teacher.parameters())
    expected = [1 - 0.01 * (1 + math.cos(math.pi * min(t, 8) / 8)) / 2 for t in range(2, 10)]
    assert momenta == pytest.approx(expected)


def test_without_patches_or_crops_there_is_one_term():
    assert set(losses(tiny_train(lambda: make(patches=0), steps=1))[0]) == {"step", "crops"}
    assert set(losses(tiny_train(lambda: make(crops=0), steps=1))[0]) == {"step", "patches"}


def test_a_student_may_be_normalised(tmp_path):
    rows = torch.randn(4, 16)
    plain, unit = make(), make(normalise_student=True)
    for method in (plain, unit):
        state(method, tmp_path)
    weights = [plain.weights(level).detach() for level in range(2)]
    for a, b in zip(unit.logits(rows, weights), plain.logits(F.normalize(rows), weights), strict=True):
        assert torch.equal(a, b)
    assert unit.logits(rows, weights)[0].abs().max() <= 8 + 1e-4


def test_the_log_tells_how_many_words_there_are_in_an_image_and_in_all():
    trained = tiny_train(make, steps=4, knn_every=1)
    (told,) = [entry for entry in trained.log if "knn" in entry]
    for stride in (2, 4):
        assert 1 <= told[f"words_image_{stride}"] <= told[f"words_all_{stride}"] <= 32


# Modifiers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def inflated(tmp_path) -> Callable[[], AdaInf]:
    path = tmp_path / "generated.npz"
    np.savez(path, image=np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
    return lambda: AdaInf(AdaInf.Options(path, copies=1))


def test_it_composes_with_generated_data(inflated):
    """The student's views are weakened; what the teacher sees is no augmentation."""
    check_modifier(inflated, make)
    whole, *others = Recipe(make(), inflated()).views(None)
    assert whole == Whole(16, 0.875)
    assert [look.crop for look in others] == [(0.2, 0.6)] * 2 + [(0.6, 1.0)]
    assert all(look.jitter.p == 0.4 for look in others)


def test_it_composes_with_guided_batches():
    check_modifier(lambda: GSimCLR(GSimCLR.Options(side=8, channels=(4,), epochs=1)), make)


@pytest.mark.parametrize("modifier", [Hallucinator, InterCLR])
def test_modifiers_of_positives_are_refused(modifier):
    with pytest.raises(UsageError, match=f"{modifier.__name__} wraps 'pairs', which OBoW does not offer"):
        Recipe(make(), modifier())
