"""What the blocks promise beyond parity: properties, state, refusals, and several processes."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from evalsuite import UsageError
from pretrain import blocks

seeds = st.integers(0, 2**16)
quick = settings(max_examples=25, deadline=None)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Losses ----------------------------------------------------------------------------------------------------


def slow_nt_xent(query, key, source, temperature):
    """NT-Xent one anchor and one pair at a time."""
    z = [v / v.norm() for v in [*query, *key]]
    source, count = [*source.tolist()] * 2, len(query)
    total = 0.0
    for i, anchor in enumerate(z):
        mate = (i + count) % (2 * count)
        rest = [j for j in range(2 * count) if j == mate or source[j] != source[i]]
        mass = sum(math.exp(float(anchor @ z[j]) / temperature) for j in rest)
        total -= math.log(math.exp(float(anchor @ z[mate]) / temperature) / mass)
    return total / (2 * count)


@quick
@given(seeds, st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_nt_xent_leaves_out_rows_of_one_source(seed, source):
    source = torch.tensor(source)
    query, key = rows(seed, len(source), 5), rows(seed + 1, len(source), 5)
    loss = blocks.nt_xent(query, key, source, temperature=0.3)
    assert loss.item() == pytest.approx(slow_nt_xent(query, key, source, 0.3), rel=1e-9, abs=1e-12)


@quick
@given(seeds, st.permutations(range(6)))
def test_contrastive_losses_do_not_care_for_the_order_of_rows(seed, order):
    query, key, source = rows(seed, 6, 4), rows(seed + 1, 6, 4), torch.tensor([0, 1, 2, 2, 3, 4])
    for loss in (
        lambda q, k, s: blocks.nt_xent(q, k, s),
        lambda q, k, s: blocks.nt_xent(q, k, s, kin="positive"),
        lambda q, k, s: blocks.info_nce(q, k, source=s),
        lambda q, k, s: blocks.neg_cosine(q, k),
    ):
        torch.testing.assert_close(
            loss(query, key, source), loss(query[list(order)], key[list(order)], source[list(order)])
        )


def test_kin_counts_only_where_sources_repeat():
    query, key = rows(0, 6, 4), rows(1, 6, 4)
    different = torch.tensor([5, 3, 8, 1, 0, 9])
    plain = blocks.nt_xent(query, key)
    torch.testing.assert_close(blocks.nt_xent(query, key, different), plain)
    torch.testing.assert_close(blocks.nt_xent(query, key, different, kin="positive"), plain)
    assert not torch.isclose(blocks.nt_xent(query, key, torch.tensor([0, 0, 1, 2, 3, 4])), plain)


def test_info_nce_within_the_batch_is_cross_entropy_at_the_diagonal():
    query, key = rows(0, 6, 4), rows(1, 6, 4)
    logits = F.normalize(query) @ F.normalize(key).T / 0.2
    torch.testing.assert_close(blocks.info_nce(query, key, temperature=0.2), F.cross_entropy(logits, torch.arange(6)))


def test_a_negative_of_minus_infinity_does_not_count():
    positive, negative = torch.tensor([0.3]), torch.tensor([[0.1, -math.inf, 0.2]])
    with_it, without = (blocks.contrast(positive, n, 0.1) for n in (negative, negative[:, [0, 2]]))
    torch.testing.assert_close(with_it, without)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_features_are_computed_in_float32(dtype):
    query, key = (rows(s, 8, 16).to(dtype) for s in (0, 1))
    bank = F.normalize(rows(2, 32, 16)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (
            lambda q, k: blocks.nt_xent(q, k, temperature=0.07),
            lambda q, k: blocks.info_nce(q, k, bank, temperature=0.07),
            blocks.neg_cosine,
        ):
            found = loss(query, key)
            assert found.dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                torch.testing.assert_close(found, loss(query.float(), key.float()))
        assert blocks.sinkhorn(query).dtype == torch.float32


def test_neg_cosine_sends_no_gradient_to_the_target():
    prediction, target = rows(0, 4, 3).requires_grad_(), rows(1, 4, 3).requires_grad_()
    blocks.neg_cosine(prediction, target).backward()
    assert target.grad is None
    assert prediction.grad is not None
    assert prediction.grad.abs().sum() > 0


# Codes and clusters ----------------------------------------------------------------------------------------


@quick
@given(seeds, st.integers(2, 30), st.integers(2, 6))
def test_codes_sum_to_one_a_sample_and_tend_to_balance(seed, samples, prototypes):
    codes = blocks.sinkhorn(rows(seed, samples, prototypes).tanh(), 0.5, 200)
    torch.testing.assert_close(codes.sum(1), torch.ones(samples, dtype=torch.float64))
    balanced = torch.full((prototypes,), samples / prototypes, dtype=torch.float64)
    torch.testing.assert_close(codes.sum(0), balanced, rtol=1e-3, atol=0)


def test_codes_of_scores_whose_exponentials_overflow_are_finite():
    scores = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert scores.div(0.05).exp().isinf().any()
    torch.testing.assert_close(blocks.sinkhorn(scores), torch.eye(2))


@pytest.mark.parametrize("batch", [None, 16])
def test_kmeans_finds_what_is_apart(batch):
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    truth = torch.arange(60) % 3
    points = centres[truth] + 0.1 * rows(0, 60, 2).float()
    labels, found = blocks.kmeans(points, 3, seed=1, batch=batch)
    assert labels.dtype == torch.long
    assert found.dtype == points.dtype
    for cluster in range(3):
        (name,) = labels[truth == cluster].unique()
        assert (found[name] - centres[cluster]).norm() < 0.5
    assert torch.equal(labels, blocks.kmeans(points, 3, seed=1, batch=batch)[0])


def test_kmeans_refuses_more_clusters_than_samples():
    with pytest.raises(UsageError, match=r"3 samples cannot be put into 4 clusters"):
        blocks.kmeans(torch.eye(3), 4)


def test_noise_is_an_images_own():
    def noise(count: int) -> blocks.Noise:
        return blocks.Noise(torch.Generator().manual_seed(3), count, torch.device("cpu"))

    two, four = (noise(n).normal(torch.zeros(n, 500, 2)) for n in (2, 4))
    assert torch.equal(two, four[:2])
    assert float(four.mean()) == pytest.approx(0, abs=0.1)
    assert float(four.std()) == pytest.approx(1, abs=0.1)
    assert len({float(row[0, 0]) for row in four}) == 4
    drawn = noise(2)
    first, second = (drawn.exponential(torch.zeros(2, 2000, dtype=torch.float64)) for _ in range(2))
    assert first.dtype == torch.float64
    assert float(first.mean()) == pytest.approx(1, abs=0.1)
    assert float(first.min()) > 0
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="noise for 2 images, not for 3"):
        drawn.normal(torch.zeros(3, 2))


@pytest.mark.parametrize("world", [2, 4])
def test_noise_does_not_depend_on_how_many_processes_share_the_batch(monkeypatch, world):
    def drawn(count: int) -> Tensor:
        noise = blocks.Noise(torch.Generator().manual_seed(5), count, torch.device("cpu"))
        return noise.normal(torch.zeros(count, 3))

    whole = drawn(8)
    monkeypatch.setattr(blocks, "world_size", lambda: world)
    for place in range(world):
        monkeypatch.setattr(blocks, "rank", lambda place=place: place)
        assert torch.equal(drawn(8 // world), whole[place::world])


@quick
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_firsts_are_the_first_of_each_value(values):
    expected = [i for i, v in enumerate(values) if v not in values[:i]]
    assert blocks.firsts(torch.tensor(values)).tolist() == expected


@quick
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.booleans())
def test_firsts_of_a_batch_take_each_image_as_often_as_it_is_there(index, official):
    """Copies behind the originals: left out where they share a source, and all taken where they stand apart."""
    rows = torch.tensor(index)
    copies = blocks.apart(rows) if official else rows
    found = blocks.firsts(torch.cat([rows, copies]), rows)
    assert found.tolist() == list(range(len(rows) * (1 + official)))
    assert torch.equal(blocks.sample_of(torch.cat([rows, copies])), rows.repeat(2))


# What is remembered ----------------------------------------------------------------------------------------


def test_a_twin_averages_parameters_and_keeps_its_own_statistics():
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin = blocks.EmaTwin(online, 0.9)
    before = copy.deepcopy(twin.net.state_dict())
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1)
    online(torch.randn(8, 3))
    twin.update(online)
    now = twin.net.state_dict()
    torch.testing.assert_close(now["0.weight"], before["0.weight"] + 0.1)
    assert torch.equal(now["1.running_mean"], before["1.running_mean"])
    out = twin(torch.randn(8, 3, requires_grad=True))
    assert not out.requires_grad
    assert not torch.equal(now["1.running_mean"], before["1.running_mean"])
    assert not any(p.requires_grad for p in twin.parameters())


def test_a_resumed_twin_goes_on_along_its_schedule():
    online = nn.Linear(2, 2)
    twin = blocks.EmaTwin(online, 0.99, total=10)
    for _ in range(4):
        twin.update(online)
    resumed = blocks.EmaTwin(nn.Linear(2, 2), 0.99, total=10)
    assert resumed.momentum == 0.99
    nn.ModuleDict({"twin": resumed}).load_state_dict(nn.ModuleDict({"twin": twin}).state_dict())
    assert resumed.momentum == twin.momentum == blocks.ema_momentum(4, 10, 0.99) > 0.99
    assert copy.deepcopy(twin).momentum == twin.momentum


def test_a_momentum_rises_to_its_end_and_stays():
    assert blocks.ema_momentum(0, 10, 0.99, 0.999) == pytest.approx(0.99)
    assert blocks.ema_momentum(10, 10, 0.99, 0.999) == blocks.ema_momentum(25, 10, 0.99, 0.999) == 0.999
    assert blocks.EmaTwin(nn.Linear(1, 1), 0.5).momentum == 0.5


def test_a_twin_of_something_else_is_refused():
    with pytest.raises(ValueError, match="2 parameters and the online module 1"):
        blocks.EmaTwin(nn.Linear(2, 2)).update(nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        blocks.EmaTwin(nn.Linear(2, 2), 1.5)


@quick
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9))
def test_a_queue_holds_the_last_keys(batch, pushes):
    queue, keys = blocks.Queue(12, 3), F.normalize(rows(batch, pushes * batch, 3).float())
    start = queue.rows.clone()
    for chunk in keys.split(batch) if pushes else ():
        queue.push(chunk * 7)  # of any length: rows are normalised
    expected = start
    for i, key in enumerate(keys):
        expected[i % 12] = key
    torch.testing.assert_close(queue.rows, expected)
    assert queue.pointer == pushes * batch % 12
    assert queue.filled == (pushes * batch >= 12)


def test_pushes_of_unlike_sizes_go_round_the_end():
    queue, keys = blocks.Queue(8, 3), F.normalize(rows(0, 14, 3).float())
    for chunk in keys.split([2, 4, 4, 4]):
        queue.push(chunk)
    torch.testing.assert_close(queue.rows, keys[[8, 9, 10, 11, 12, 13, 6, 7]])
    assert queue.pointer == 6


def test_a_queue_starts_with_unit_vectors_of_its_seed_or_empty():
    first, again = (blocks.Queue(8, 3, rng=torch.Generator().manual_seed(5)).rows for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(8))
    assert not blocks.Queue(8, 3, empty=True).rows.any()


def test_a_queue_keeps_keys_as_they_are_where_they_are_no_directions():
    queue, keys = blocks.Queue(4, 3, unit=False), rows(0, 2, 3).float()
    queue.push(keys)
    assert torch.equal(queue.rows[:2], keys)


def test_a_queue_that_the_batch_does_not_divide_is_refused_with_a_size_that_fits():
    queue = blocks.Queue(65536, 2)
    with pytest.raises(UsageError, match="queue of 65536 cannot be filled 504") as refused:
        queue.fits(504)
    assert "a queue of 65520," in refused.value.fix
    for rows_ in (504, 0):
        with pytest.raises(UsageError, match=f"filled {rows_} keys"):
            queue.push(torch.ones(rows_, 2))
    with pytest.raises(UsageError) as refused:
        blocks.Queue(4, 2).fits(6)
    assert "a queue of 6," in refused.value.fix


def test_a_queue_goes_on_after_loading():
    queue, keys = blocks.Queue(6, 2), rows(0, 12, 2).float()
    queue.push(keys[:4:2])
    resumed = blocks.Queue(6, 2)
    resumed.load_state_dict(queue.state_dict())
    for q in (queue, resumed):
        q.push(keys[4:6])
    assert torch.equal(queue.rows, resumed.rows)
    assert queue.pointer == resumed.pointer == 4


def test_a_bank_is_written_by_index():
    bank = blocks.Bank(5, 3)
    before, new = bank.rows.clone(), rows(0, 3, 3).float()
    written = bank.write(torch.tensor([4, 1, 4]), new)
    assert sorted(written.tolist()) == [1, 4]
    torch.testing.assert_close(bank.rows[[4, 1]], F.normalize(new[:2]))  # of two for one row, the first
    assert torch.equal(bank.rows[[0, 2, 3]], before[[0, 2, 3]])


def test_a_bank_with_a_rate_moves_on_the_sphere():
    bank = blocks.Bank(2, 3, rate=0.5)
    before, new = bank.rows.clone(), rows(0, 1, 3).float()
    bank.write(torch.tensor([1]), new)
    torch.testing.assert_close(bank.rows[1], F.normalize(0.5 * before[1] + 0.5 * F.normalize(new[0], dim=0), dim=0))
    with pytest.raises(ValueError, match="rate"):
        blocks.Bank(2, 3, rate=0.0)


# Heads and optimisers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "linears"), [("v1", 2), ("v2", 3)])
def test_simclr_heads(version, linears):
    head = blocks.simclr_head(32, 8, version)
    assert [type(m).__name__ for m in head] == ["Linear", "BatchNorm1d", "ReLU"] * (linears - 1) + [
        "Linear",
        "BatchNorm1d",
    ]
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))
    parameters = dict(head.named_parameters())
    last = len(head) - 1
    assert parameters["0.weight"].std().item() == pytest.approx(0.01, rel=0.15)
    assert parameters[f"{last}.weight"].requires_grad
    assert not parameters[f"{last}.bias"].requires_grad
    assert not parameters[f"{last}.bias"].any()
    assert head(torch.randn(4, 32)).shape == (4, 8)


def test_a_head_needs_two_widths():
    with pytest.raises(ValueError, match="width"):
        blocks.mlp_head(4)


def test_vectors_neither_decay_nor_adapt():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    net[3].weight.requires_grad_(False)
    decayed, kept = blocks.split_decay(net.parameters(), 0.1)
    assert [p is net[0].weight for p in decayed["params"]] == [True]
    assert len(kept["params"]) == 4
    assert (decayed["weight_decay"], decayed["adapt"]) == (0.1, True)
    assert (kept["weight_decay"], kept["adapt"]) == (0.0, False)
    assert len(blocks.split_decay(net[3].parameters(), 0.1)) == 1


@pytest.mark.parametrize("ratio", ["decayed", "summed"])
def test_lars_without_adaptation_is_sgd(ratio):
    ours, theirs = (nn.Parameter(rows(0, 3, 4)) for _ in range(2))
    a = blocks.LARS([{"params": [ours], "adapt": False}], lr=0.1, weight_decay=0.01, ratio=ratio)
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(4):
        ours.grad, theirs.grad = rows(step, 3, 4), rows(step, 3, 4)
        for optimizer in (a, b):
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_lars_steps_by_the_norm_of_the_weights_whatever_the_gradients_scale():
    moved = []
    for scale in (1e-3, 1.0, 1e3):
        w = nn.Parameter(rows(0, 3, 4))
        w.grad = scale * rows(1, 3, 4)
        optimizer = blocks.LARS([w], lr=2.0, trust=0.01)
        optimizer.step()
        moved.append((w.detach() - rows(0, 3, 4)).norm() / rows(0, 3, 4).norm())
    torch.testing.assert_close(torch.stack(moved), torch.full((3,), 0.02, dtype=torch.float64))


@pytest.mark.parametrize("ratio", ["decayed", "summed"])
def test_lars_at_the_edges(ratio):
    """Weights of zero can leave zero; without a gradient only what decays first is moved, and never by
    1/decay.
    """
    zero, idle, unused = (
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(2)),
    )
    zero.grad, idle.grad = torch.ones(2), torch.zeros(2)
    optimizer = blocks.LARS([zero, idle, unused], lr=0.1, weight_decay=1e-4, ratio=ratio)
    assert optimizer.step(lambda: 3.0) == 3.0
    torch.testing.assert_close(zero.detach(), torch.full((2,), -0.1))
    assert 0.999 < idle[0].item() <= 1.0
    assert unused.eq(1).all()
    with pytest.raises(ValueError, match="ratio"):
        blocks.LARS([zero], lr=0.1, ratio="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr=-1"):
        blocks.LARS([zero], lr=-1)


def test_lars_resumes():
    def run(steps, state=None):
        w = nn.Parameter(rows(0, 3, 4))
        optimizer = blocks.LARS([w], lr=0.5)
        first = 0
        if state is not None:
            first = 2
            w.data, saved = state[0].clone(), state[1]
            optimizer.load_state_dict(saved)
        for step in range(first, steps):
            w.grad = rows(step, 3, 4)
            optimizer.step()
        return w.detach(), optimizer.state_dict()

    assert torch.equal(run(4)[0], run(4, copy.deepcopy(run(2)))[0])


def test_schedules():
    line = [blocks.cosine_schedule(t, 20, 1.0, warmup=4, start=0.2) for t in range(21)]
    assert line[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert line[12] == pytest.approx(0.5)
    assert line[20] == pytest.approx(0.0)
    assert all(a > b for a, b in pairwise(line[4:]))
    assert blocks.cosine_schedule(30, 20, 1.0, floor=0.1) == pytest.approx(0.1)
    steps = [blocks.step_schedule(e, 0.03, (120, 160)) for e in (0, 119, 120, 159, 160)]
    assert steps == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003])


# Several processes -----------------------------------------------------------------------------------------

PROCESS = """
import sys, torch, torch.distributed as dist
from pretrain import blocks
from torch import Tensor, nn

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
if rank >= 0:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mine = slice(None) if rank < 0 else slice(4 * rank, 4 * rank + 4)
rng = torch.Generator().manual_seed(3)
draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
x, y, w = draw(8, 6), draw(8, 6), draw(6, 5)
source = torch.tensor([0, 1, 2, 3, 3, 4, 1, 5])
queue = blocks.Queue(16, 5, rng=rng)
own = blocks.Queue(16, 5, rng=rng, shared=False)
bank = blocks.Bank(9, 5, rng=rng)
found = {"world": blocks.world_size(), "rank": blocks.rank()}
for name, loss in {
    "nt_xent": lambda a, b: blocks.nt_xent(a, b, source[mine]),
    "nt_xent, kin": lambda a, b: blocks.nt_xent(a, b, source[mine], kin="positive"),
    "nt_xent, no source": lambda a, b: blocks.nt_xent(a, b),
    "info_nce": lambda a, b: blocks.info_nce(a, b, source=source[mine]),
}.items():
    weight = w.clone().requires_grad_()
    value = loss(x[mine] @ weight, y[mine] @ weight)
    value.backward()
    value, gradient = value.detach(), weight.grad
    if rank >= 0:  # as DistributedDataParallel does
        dist.all_reduce(gradient)
        dist.all_reduce(value)
        value, gradient = value / 2, gradient / 2
    found[name] = (value, gradient)
for q in (queue, own):
    q.push((x @ w)[mine])
found["queue"], found["pointer"], found["own"] = queue.rows, queue.pointer, own.pointer
found["written"] = bank.write(source[mine], (x @ w)[mine]).sort().values
found["bank"] = bank.rows
codes = blocks.sinkhorn((x @ w)[mine].tanh())
found["codes"] = blocks.gather(codes)
try:
    queue.fits(3)
except Exception as refusal:
    found["refused"] = str(refusal)
torch.save(found, f"{folder}/{rank}.pt")
if rank >= 0:
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The same computation by one process on 8 rows, and by two on 4 rows each."""
    folder = tmp_path_factory.mktemp("processes")
    root = Path(blocks.__file__).parent.parent
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(root)}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROCESS, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", "-1", str(folder)])
        exec(PROCESS, {})
    for process in started:
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
    return [torch.load(folder / f"{rank}.pt") for rank in (-1, 0, 1)]


def test_two_processes_know_of_each_other(processes):
    assert [(p["world"], p["rank"]) for p in processes] == [(1, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize("name", ["nt_xent", "nt_xent, kin", "info_nce"])
def test_two_processes_have_the_loss_and_gradient_of_one(processes, name):
    alone, *both = processes
    for process in both:
        torch.testing.assert_close(process[name], alone[name], rtol=1e-10, atol=1e-12)


def test_rows_without_a_source_differ_across_processes_too(processes):
    alone, *both = processes
    for process in both:
        torch.testing.assert_close(process["nt_xent, no source"], alone["nt_xent, no source"])


@pytest.mark.parametrize("name", ["queue", "bank", "written", "codes"])
def test_two_processes_remember_what_one_does_in_rank_order(processes, name):
    alone, *both = processes
    for process in both:
        torch.testing.assert_close(process[name], alone[name])


def test_a_queue_counts_the_keys_of_all_processes_or_of_its_own(processes):
    assert [(p["pointer"], p["own"]) for p in processes] == [(8, 8), (8, 4), (8, 4)]
    assert "filled 3 keys" in processes[0]["refused"]
    assert "filled 6 keys" in processes[1]["refused"]
