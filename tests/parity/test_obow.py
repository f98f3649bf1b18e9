"""OBoW: numbers that the official code (valeoai/obow 3758504) gave on fixed inputs, reproduced in float64.

They were made by executing ``BoWExtractor``, ``BoWPredictor``, ``OBoW._bow_loss``, ``compute_bow_perplexity`` and
``solver.compute_cosine_learning_rate``; the plain cross-entropy was typed off the code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evalsuite_obow.method import OBoW, Vocabulary, divergence, perplexity

from evalsuite import Features
from pretrain import Recipe, Run
from pretrain.blocks import mlp_head
from pretrain.testing import tiny_backbone

BAGS = [
    [0.09239398, 0.26379611, 0.11199163, 0.01344268, 0.09224218, 0.27290203, 0.00199434, 0.15123706],
    [0.00207037, 0.2657837, 0.16306365, 0.00666935, 0.06170711, 0.29731788, 0.04801131, 0.15537663],
]
TRAINED = [0.09251156, 0.26362992, 0.11213039, 0.01355213, 0.09236574, 0.27279234, 0.00202423, 0.15099371]
HARD = [0, 1 / 3, 0, 0, 0, 1 / 3, 0, 1 / 3]
LOGITS = [7.0297398, 6.56195778, 5.59174081, 7.01637106, 6.56195778, 5.59174081, 7.03661316, 6.56195778]


def close(value, expected, rtol=1e-6, atol=1e-8):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value.detach(), expected, rtol=rtol, atol=atol)


def vocabulary(wave, inv_delta: float | None = 15.0) -> Vocabulary:
    made = Vocabulary(8, 4, inv_delta).double()
    made.words.rows.copy_(wave((8, 4), 0.53, 0.7).clamp(min=0))
    return made.eval()


@pytest.fixture
def method(wave) -> OBoW:
    """One level of 8 words, the generator ``BoWPredictor(6, [4], 12, kappa=8)``, border cells cut off."""
    made = OBoW(OBoW.Options(levels=1, words=8))
    made.strides = [1]
    made.vocabularies = torch.nn.ModuleList([vocabulary(wave)])
    generator = mlp_head(4, 12, 6).double()
    with torch.no_grad():
        generator[0].weight.copy_(wave((12, 4), 0.29, 0.4))
        generator[3].weight.copy_(wave((6, 12), 0.31, 0.4))
        generator[3].bias.copy_(wave((6,), 0.33, 0.4))
    made.generators = torch.nn.ModuleList([generator])
    return made


@pytest.fixture
def cells(wave, method) -> torch.Tensor:
    """The recorded features less their border (2, 4, 3, 3)."""
    (found,) = method.maps(Features(maps={1: wave((2, 4, 5, 5), 0.37, 0.11).clamp(min=0)}))
    assert found.shape == (2, 4, 3, 3)
    return found


def test_the_bags_of_words(wave, cells):
    close(vocabulary(wave)(cells), BAGS)
    close(vocabulary(wave, None)(cells)[0], HARD)


def test_in_training_the_running_distance_follows_before_it_is_used(wave, cells):
    learning = vocabulary(wave).train()
    bags = learning(cells)
    close(learning.distance, 0.5017796139, rtol=1e-9)
    close(bags[0], TRAINED)
    learning.words.push(F.avg_pool2d(cells, 3).flatten(1))
    assert learning.words.pointer == 2


def test_the_weights_that_are_made_of_words_and_the_students_logits(wave, method):
    rows = wave((4, 6, 1, 1), 0.41, 0.3).flatten(1)
    (logits,) = method.logits(rows, [method.weights(0)])
    close(logits[0], LOGITS)


def test_the_loss(wave, method, cells):
    """Two crops an image, then five; with the two crops the plain cross-entropy, which is more by the bags' entropy."""
    bags = method.vocabularies[0](cells)
    for count, a, b, expected in ((2, 0.41, 0.3, 0.5161750997), (5, 0.61, 0.3, 0.3984334370)):
        rows = wave((2 * count, 6, 1, 1), a, b).flatten(1)
        close(divergence(method.logits(rows, [method.weights(0)]), [bags]), expected, rtol=1e-9)
    rows = wave((4, 6, 1, 1), 0.41, 0.3).flatten(1)
    (logits,) = method.logits(rows, [method.weights(0)])
    entropy = -(bags * bags.log()).sum(1).mean()
    close(divergence([logits], [bags]) + entropy, 2.2205389714, rtol=1e-9)


def test_the_crops_of_an_image_stand_together():
    """``expand_target([0, 1], 2 crops)`` is [0, 0, 1, 1]: right predictions cost nothing, swapped ones do."""
    bags = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    right = torch.tensor([[50.0, 0.0], [50.0, 0.0], [0.0, 50.0], [0.0, 50.0]])
    assert float(divergence([right], [bags])) == pytest.approx(0, abs=1e-6)
    assert float(divergence([right[[0, 2, 1, 3]]], [bags])) > 20


def test_perplexity(method, cells):
    bags = method.vocabularies[0](cells)
    close(perplexity(bags.sum(0)), 5.7543299549, rtol=1e-9)
    close(perplexity(bags).mean(), 5.5024491873, rtol=1e-9)


def test_the_learning_rate():
    """By iteration to 0.03 in ten epochs, then by epoch to 3e-5 at 200: epochs 0, 5, 10, 100 and 199, and the last
    iterations of some of them."""
    method = OBoW()
    recipe = Recipe(method)
    run = Run(
        tiny_backbone(), 0, torch.device("cpu"), Path(), 200, 256, 256,
        steps=200 * 10, epoch_steps=10, training=method.options,
    )  # fmt: skip
    peak = recipe.optimizer(run, torch.nn.Linear(2, 2)).param_groups[0]["lr"]

    def rate(step):
        run.step = step
        return peak * recipe.rate(run)

    for epoch, expected in {0: 0.0, 5: 0.015, 10: 0.03, 100: 0.016252, 199: 3.2048e-5}.items():
        assert rate(10 * epoch) == pytest.approx(expected, rel=5e-5)
    assert rate(55) == pytest.approx(0.0165)
    assert rate(1009) == rate(1000)
