"""An outside witness: the same losses, codes, heads and updates in lightly
(https://github.com/lightly-ai/lightly).

Where the two differ by convention, the test says how and compares what should be equal.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly import loss as lightly_loss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from lightly.models.modules import heads, memory_bank
from lightly.models.utils import update_momentum
from lightly.utils.lars import LARS as LightlyLARS
from lightly.utils.scheduler import cosine_schedule as lightly_cosine
from lightly.utils.scheduler import cosine_warmup_schedule
from torch import Tensor, nn

from pretrain import blocks

seeds = st.integers(0, 2**16)
quick = settings(max_examples=15, deadline=None)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(loss, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, [x for x in leaves], allow_unused=True)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@quick
@given(seeds, st.integers(2, 9), st.sampled_from([0.07, 0.2, 0.5]))
def test_simclrs_loss(seed, batch, temperature):
    """NT-Xent, value and gradients: both are the mean over the 2 N anchors."""
    a, b = rows(seed, batch, 8), rows(seed + 1, batch, 8)
    theirs = lightly_loss.NTXentLoss(temperature)
    same(gradients(lambda x, y: blocks.nt_xent(x, y, temperature=temperature), a, b), gradients(theirs, a, b))


@quick
@given(seeds, st.integers(1, 4))
def test_mocos_loss_and_queue(seed, batch):
    """CE against a bank of negatives, and the bank afterwards.

    Lightly's bank is pushed by the loss itself, and only when the query takes gradients; ours by the method
    after its step, so that the negatives of one step are the same in both. Its bank has to be told its
    width in float32; gradients reach the keys in both, and MoCo detaches them before. It drops what does
    not fit at the end of the bank where ours refuses such sizes, so the sizes here divide.
    """
    queue = blocks.Queue(12, 8, rng=torch.Generator().manual_seed(seed))
    theirs = lightly_loss.NTXentLoss(0.2, memory_bank_size=(12, 8))
    theirs.memory_bank.bank = queue.rows.clone()
    for step in range(12 // batch + 1):
        q, k = rows(seed + step, batch, 8).float(), rows(seed - step - 1, batch, 8).float()
        negatives = queue.rows.clone()
        ours = gradients(lambda q, n=negatives, k=k: blocks.info_nce(q, k, n, temperature=0.2), q)
        torch.testing.assert_close(ours, gradients(lambda q, k=k: theirs(q, k), q))
        queue.push(k)
        torch.testing.assert_close(queue.rows, theirs.memory_bank.bank)
        assert queue.pointer == int(theirs.memory_bank.bank_ptr)


def test_the_queue_takes_the_place_of_the_oldest_as_lightlys_bank():
    bank = memory_bank.MemoryBankModule((8, 4))
    queue = blocks.Queue(8, 4)
    queue.rows.copy_(bank.bank)
    for step in range(5):
        keys = nn.functional.normalize(rows(step, 2, 4).float())
        bank(keys, update=True)
        queue.push(keys)
        torch.testing.assert_close(queue.rows, bank.bank)


@quick
@given(seeds, st.integers(1, 9))
def test_simsiams_and_byols_loss(seed, batch):
    """Negative cosine similarity. Ours detaches the target itself; lightly leaves that to the caller.

    SimSiam is half the sum of the two directions in both. BYOL's 2 - 2 cos summed over both directions (the
    paper and solo-learn) is 4 + 4 x the mean of lightly's two directions, which its own examples minimise:
    the same gradient up to the factor 4.
    """
    p, z = rows(seed, batch, 8), rows(seed + 1, batch, 8)
    theirs = lightly_loss.NegativeCosineSimilarity()
    same(gradients(lambda p: blocks.neg_cosine(p, z), p), gradients(lambda p: theirs(p, z), p))
    byol = (p - nn.functional.normalize(p)).new_zeros(())
    for a, b in ((p, z), (z, p)):
        byol += (nn.functional.normalize(a) - nn.functional.normalize(b)).square().sum(1).mean()
    same(4 + 2 * (blocks.neg_cosine(p, z) + blocks.neg_cosine(z, p)), byol)


@quick
@given(seeds, st.integers(2, 20), st.integers(2, 7), st.sampled_from([0.03, 0.05, 0.2]), st.integers(1, 8))
def test_swavs_codes(seed, samples, prototypes, epsilon, iterations):
    """Sinkhorn: lightly exponentiates as the official code; cosines keep that in range in float64."""
    scores = rows(seed, samples, prototypes).tanh()
    ours = blocks.sinkhorn(scores, epsilon, iterations)
    torch.testing.assert_close(ours, lightly_sinkhorn(scores, iterations, epsilon), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (blocks.mlp_head(6, 10, 4, norm=False), heads.MoCoProjectionHead(6, 10, 4)),
        (blocks.mlp_head(6, 10, 4), heads.BYOLProjectionHead(6, 10, 4)),
        (blocks.mlp_head(6, 10, 4), heads.SimSiamPredictionHead(6, 10, 4)),
        (
            blocks.mlp_head(6, 10, 10, 4, last_norm="plain", last_bias=False),
            heads.SimSiamProjectionHead(6, 10, 4),
        ),
        (blocks.simclr_head(6, 4, "v1"), heads.SimCLRProjectionHead(6, 6, 4)),
        (blocks.simclr_head(6, 4, "v2"), heads.SimCLRProjectionHead(6, 6, 4, num_layers=3)),
    ],
    ids=["moco v2", "byol", "simsiam predictor", "simsiam projector", "simclr v1", "simclr v2"],
)
def test_heads_have_the_same_layers(ours, theirs):
    """Weights of lightly's head go into ours by position and give the same outputs.

    Lightly's last batch normalisation in SimCLR has a shift, at 0 when training starts; ours, as the
    official code, has none to train.
    """
    weights = {name.removeprefix("layers."): value for name, value in theirs.state_dict().items()}
    assert list(weights) == list(ours.state_dict())
    ours.load_state_dict(weights)
    x = rows(0, 5, 6).float()
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_twin_moves_as_lightlys():
    """Parameters only: neither touches the statistics of batch normalisation."""
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin, theirs = blocks.EmaTwin(online, 0.9), blocks.EmaTwin(online).net
    for step in range(3):
        with torch.no_grad():
            for p in online.parameters():
                p.add_(step + 1.0)
        online(rows(step, 5, 3).float())  # moves the statistics of the online module alone
        twin.update(online)
        update_momentum(online, theirs, 0.9)
    torch.testing.assert_close(twin.net.state_dict(), theirs.state_dict())
    assert not torch.equal(twin.state_dict()["net.1.running_mean"], online.state_dict()["1.running_mean"])


@quick
@given(seeds)
def test_lars_with_the_summed_ratio(seed):
    """Lightly excludes groups of weight decay 0 from the ratio; ours groups whose ``adapt`` is false."""
    start = [rows(seed, 3, 4), rows(seed + 1, 3)]
    results = []
    for make in (
        lambda ps: blocks.LARS(blocks.split_decay(ps, 1e-2), lr=0.3, ratio="summed"),
        lambda ps: LightlyLARS([{"params": ps[:1], "weight_decay": 1e-2}, {"params": ps[1:]}], lr=0.3, momentum=0.9),
    ):
        parameters = [nn.Parameter(p.clone()) for p in start]
        optimizer = make(parameters)
        for step in range(4):
            for p in parameters:
                p.grad = rows(seed + step, *p.shape)
            optimizer.step()
        results.append([p.detach() for p in parameters])
    same(*results)


def test_schedules():
    """Lightly reaches the end one step earlier (it divides by total - 1) and starts warm-up at step 1;
    shifted, equal.
    """
    for step in range(50):
        ours = blocks.ema_momentum(step, 49, 0.99, 1.0)
        assert ours == pytest.approx(lightly_cosine(step, 50, 0.99, 1.0), rel=1e-12)
    for step in range(50):
        theirs = cosine_warmup_schedule(step, 50, 4.8, 0.0048, 10, 0.3)
        ours = (
            blocks.cosine_schedule(step + 1, 50, 4.8, warmup=10, start=0.3)
            if step < 10
            else blocks.cosine_schedule(step, 49, 4.8, floor=0.0048, warmup=10)
        )
        assert ours == pytest.approx(theirs, rel=1e-12)
