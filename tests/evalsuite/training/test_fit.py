from __future__ import annotations

import io
import math
import multiprocessing
import os
import resource
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from evalsuite.errors import DataError, ResourceError, TrainingError
from evalsuite.progress import Progress
from evalsuite.training import Fit, Steps, cosine, fit, full_precision, full_precision_outputs, launched, mix_seed


class Model(nn.Module):
    """Dropout, so that the random state matters; batch norm, so that buffers do; momentum in the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, batch):
        x = torch.stack(batch)
        return {"fit": self.net(x).square().mean(), "size": self.net[0].weight.square().mean()}


def sample(index: int, seed: int) -> torch.Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(seed)) + index


def plan(folder: Path, iterations: int = 12, **changes) -> Fit:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    values = dict(
        model=model, optimizer=optimizer, lr_factor=lambda step: 1 / (1 + step), iterations=iterations, sample=sample,
        length=10, batch_size=4, seed=3, key="k", state=folder / "state.pt",
    )  # fmt: skip
    return Fit(**{**values, **changes})


def train(run: Fit) -> dict[str, torch.Tensor]:
    fit(run, launched(torch.device("cpu")), Progress(quiet=True))
    return run.model.state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[k], other[k]) for k in one)


def stop_at(step: int, index: int, seed: int) -> torch.Tensor:
    """Kill this process, as the kernel would, when the batch of ``step`` is asked for."""
    if seed == mix_seed(3, step * 4, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return sample(index, seed)


def train_until_killed(folder: Path) -> None:
    train(plan(folder, sample=partial(stop_at, 7), saves=0.0))


def test_a_run_that_was_killed_ends_in_the_same_bits(tmp_path):
    whole = train(plan(tmp_path / "whole"))
    process = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(tmp_path / "cut",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"] == 7
    (tmp_path / "cut" / ".state.pt.abc.partial").write_bytes(b"half a sta")  # as if it was killed while it saved
    resumed = plan(tmp_path / "cut")
    assert equal(whole, train(resumed))
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["state.pt"]
    assert resumed.log == plan_log(tmp_path)


def plan_log(folder: Path) -> list[dict[str, float]]:
    return torch.load(folder / "whole" / "state.pt", weights_only=True)["log"]


def test_workers_change_nothing(tmp_path):
    assert equal(train(plan(tmp_path / "none")), train(plan(tmp_path / "two", workers=2)))


def test_another_seed_is_another_run(tmp_path):
    assert not equal(train(plan(tmp_path / "3")), train(plan(tmp_path / "4", seed=4)))


def heard(run: Fit) -> tuple[dict[str, torch.Tensor], str]:
    stream = io.StringIO()
    fit(run, launched(torch.device("cpu")), Progress(stream=stream))
    return run.model.state_dict(), stream.getvalue()


def test_the_state_of_another_key_is_set_aside_and_said(tmp_path):
    whole = train(plan(tmp_path / "whole"))
    train(plan(tmp_path / "cut", iterations=5, key="other"))
    other = (tmp_path / "cut" / "state.pt").read_bytes()
    model, said = heard(plan(tmp_path / "cut"))
    assert equal(whole, model)
    assert f"warning: {tmp_path / 'cut' / 'state.pt'} was saved by a run of other settings or data" in said
    assert (tmp_path / "cut" / "state.pt.aside-1").read_bytes() == other


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b"", lambda b: b"PK\3\4" + b]
)
def test_a_state_that_cannot_be_read_is_set_aside_and_said_once(tmp_path, damage):
    path = tmp_path / "state.pt"
    train(plan(tmp_path, iterations=5))
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    whole = train(plan(tmp_path / "whole"))
    model, said = heard(plan(tmp_path))
    assert equal(whole, model)
    assert f"warning: {path} cannot be read (" in said
    assert "is set aside as state.pt.aside-1" in said
    assert path.with_name("state.pt.aside-1").read_bytes() == damaged
    assert "warning" not in heard(plan(tmp_path))[1]


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, torch.zeros(2), {"key": torch.zeros(2)}])
def test_neither_is_one_that_is_something_else(tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    assert "is set aside as state.pt.aside-1" in heard(plan(tmp_path))[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 99}, {"step": -1}, {"step": "x"}, {"log": 3}, {"log": [3]}, {"model": {}}, {"model": None},
        {"optimizer": {}}, {"optimizer": {"state": {}, "param_groups": []}}, {"apart": 7},
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_once_and_set_aside(tmp_path, changes):
    path = tmp_path / "state.pt"
    train(plan(tmp_path, iterations=5))
    torch.save(torch.load(path, weights_only=True) | changes, path)
    with pytest.raises(DataError, match="cannot be gone on from") as refusal:
        train(plan(tmp_path))
    assert "state.pt.aside-1" in refusal.value.fix
    assert equal(train(plan(tmp_path)), train(plan(tmp_path / "whole")))


def test_a_state_that_the_system_does_not_let_be_read_stays_where_it_is(tmp_path):
    (tmp_path / "state.pt").mkdir()
    with pytest.raises(ResourceError, match=r"state\.pt cannot be read"):
        train(plan(tmp_path))
    assert (tmp_path / "state.pt").is_dir()


def killed_in_a_worker(trainer: int, index: int, seed: int) -> torch.Tensor:
    if os.getpid() != trainer and seed == mix_seed(3, 4 * 4, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return sample(index, seed)


def test_a_killed_data_worker_is_told_and_the_state_before_it_kept(tmp_path):
    with pytest.raises(ResourceError, match="a process that reads images was killed") as refusal:
        train(plan(tmp_path, sample=partial(killed_in_a_worker, os.getpid()), workers=1, saves=0.0))
    assert "DataLoader worker" in refusal.value.cause
    assert refusal.value.code == 7
    assert equal(train(plan(tmp_path)), train(plan(tmp_path / "whole")))


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140), (signal.SIGHUP, 129)],
)
def test_a_signal_saves_and_leaves_with_its_code(tmp_path, number, code, request):
    given = signal.signal(number, signal.SIG_DFL)  # under nohup a closed terminal would be ignored
    request.addfinalizer(lambda: signal.signal(number, given))
    whole = train(plan(tmp_path / "whole"))

    def told(index: int, seed: int) -> torch.Tensor:
        if seed == mix_seed(3, 4 * 4, 1):
            os.kill(os.getpid(), number)
        return sample(index, seed)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as leave:
        train(plan(tmp_path / "cut", sample=told))
    assert leave.value.code == code
    assert signal.getsignal(number) == before
    assert equal(whole, train(plan(tmp_path / "cut")))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path):
    def poisoned(index: int, seed: int) -> torch.Tensor:
        bad = seed == mix_seed(3, 6 * 4, 1)
        return sample(index, seed) * (float("nan") if bad else 1.0)

    with pytest.raises(TrainingError, match="not finite at step 7 of 12"):
        train(plan(tmp_path, sample=poisoned, saves=0.0))
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    assert content["step"] == 6
    assert all(torch.isfinite(v).all() for v in content["model"].values())


def train_where_files_are_small(folder: Path) -> None:
    """The kernel refuses what goes beyond half of the state that is there, as a full disk would."""
    half = (folder / "state.pt").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
    with pytest.raises(ResourceError, match=r"state\.pt cannot be written") as refusal:
        train(plan(folder, iterations=6))
    os._exit(refusal.value.code)


def test_a_full_disk_leaves_the_previous_state(tmp_path):
    train(plan(tmp_path, iterations=3))
    process = multiprocessing.get_context("fork").Process(target=train_where_files_are_small, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.pt"]


def test_every_epoch_sees_every_example_once_and_ranks_share_a_batch():
    whole = Steps(lambda index, seed: (index, seed), 6, 4, seed=1)
    seen = [index for step in range(3) for index, _ in whole[step]]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    halves = [Steps(lambda index, seed: (index, seed), 6, 4, seed=1, rank=r, world=2)[1] for r in (0, 1)]
    assert [halves[0][0], halves[1][0], halves[0][1], halves[1][1]] == whole[1]


def test_seeds_are_far_apart():
    seeds = {mix_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.free, self.kept = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, batch):
        x = torch.stack(batch)
        return {"fit": (self.free(x) + self.kept(x)).square().mean()}


def bare(folder: Path, **changes) -> Fit:
    torch.manual_seed(0)
    model = Bare()
    groups = [{"params": model.free.parameters()}, {"params": model.kept.parameters(), "constant": True}]
    return plan(folder, model=model, optimizer=torch.optim.SGD(groups, 0.05), iterations=4, logs=1, **changes)


def test_parts_of_a_step_add_up_to_the_mean_over_all(tmp_path):
    examples = [sample(0, i) for i in range(16)]
    whole = bare(tmp_path / "whole", batches=lambda first: [examples[4 * i : 4 * i + 4] for i in range(first, 4)])
    parts = bare(
        tmp_path / "parts", accumulate=2, batches=lambda first: [examples[2 * i : 2 * i + 2] for i in range(first, 8)]
    )
    one, other = train(whole), train(parts)
    assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)
    assert [e["fit"] for e in whole.log] == pytest.approx([e["fit"] for e in parts.log], abs=1e-4)


def test_a_constant_group_keeps_its_rate(tmp_path):
    rates = []
    run = bare(tmp_path, lr_factor=lambda step: 1 / (1 + step))
    run.stepped = lambda info: rates.append([g["lr"] for g in run.optimizer.param_groups]) or {}
    train(run)
    assert rates == [pytest.approx([0.05 / (1 + step), 0.05]) for step in range(4)]


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_gradients_are_clipped_by_the_norm_of_an_order(tmp_path, order):
    """The largest norm that is left is the one asked for, and the direction is the same."""
    steps = {}
    for clip in (None, 0.01):
        run = bare(tmp_path / str(clip), clip_gradient=clip, clip_norm=order)
        before = torch.cat([p.detach().clone().flatten() for p in run.model.parameters()])
        run.iterations, run.optimizer = 1, torch.optim.SGD(run.model.parameters(), 1.0)
        run.lr_factor = lambda step: 1.0
        train(run)
        steps[clip] = before - torch.cat([p.detach().flatten() for p in run.model.parameters()])
    assert float(torch.linalg.vector_norm(steps[0.01], order)) == pytest.approx(0.01, rel=1e-3)
    assert float(torch.cosine_similarity(steps[None], steps[0.01], dim=0)) == pytest.approx(1.0, abs=1e-5)


class Targets(NamedTuple):
    boxes: torch.Tensor


@dataclass(frozen=True)
class Target:
    boxes: torch.Tensor


class Notes(nn.Module):
    """What kinds of numbers come in, and what a layer computes in."""

    def __init__(self, unpack) -> None:
        super().__init__()
        self.layer, self.unpack, self.seen = nn.Linear(4, 4), unpack, []

    def forward(self, batch):
        boxes = self.unpack(batch)
        found = self.layer(boxes)
        self.seen.append((boxes.dtype, found.dtype, boxes))
        return {"loss": full_precision(found).square().mean()}


PACKED = {
    "tensor": (lambda x: x, lambda b: b),
    "list": (lambda x: [x, "name"], lambda b: b[0]),
    "dictionary": (lambda x: {"target": {"boxes": x}}, lambda b: b["target"]["boxes"]),
    "named tuple": (Targets, lambda b: b.boxes),
    "dataclass": (Target, lambda b: b.boxes),
    "list of dataclasses": (lambda x: [Target(x)], lambda b: b[0].boxes),
}


@pytest.mark.parametrize(("pack", "unpack"), PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("make", [launched, lambda device, precision: Fabric(accelerator="cpu", precision=precision)])
def test_in_mixed_precision_nothing_of_a_batch_is_cast(make, pack, unpack, tmp_path, recwarn):
    boxes = torch.tensor([[0.0, 1.0, 801.0, 1333.0]])  # which bfloat16 knows as 800 and 1336
    model = Notes(unpack)
    run = plan(
        tmp_path, 2, model=model, optimizer=torch.optim.SGD(model.parameters(), 1e-9), sample=None,
        batches=lambda first: iter([pack(boxes)] * 2),
    )  # fmt: skip
    fit(run, make(torch.device("cpu"), precision="bf16-mixed"), Progress(quiet=True))
    assert [seen[:2] for seen in model.seen] == [(torch.float32, torch.bfloat16)] * 2
    assert all(torch.equal(seen[2], boxes) for seen in model.seen)
    assert list(torch.load(tmp_path / "state.pt", weights_only=True)["model"]) == ["layer.weight", "layer.bias"]


def test_modules_of_others_answer_in_full_precision(capfd):
    class Head(nn.Module):
        def forward(self, x):
            return {"scores": [x.bfloat16()], "places": (x.half(), x.long())}, x.double()

    head = Head()
    full_precision_outputs(head)
    (named, doubled) = head(torch.ones(2))
    assert [t.dtype for t in (named["scores"][0], *named["places"], doubled)] == [
        torch.float32, torch.float32, torch.int64, torch.float64,
    ]  # fmt: skip
    launched(torch.device("cpu"), precision="bf16-mixed")
    assert capfd.readouterr() == ("", "")


def test_who_hears_of_a_step_adds_to_the_log_and_knows_where_a_run_goes_on(tmp_path):
    def stepped(info) -> dict[str, float]:
        told.append((info.step, info.logged))
        assert 0 <= info.waited <= info.passed
        return {"double": 2 * info.step}

    told, begun = [], []
    first = plan(tmp_path, iterations=5, logs=2, stepped=stepped, resumed=begun.append)
    train(first)
    assert told == [(1, False), (2, True), (3, False), (4, True), (5, True)]
    assert [e["double"] for e in first.log] == [4, 8, 10]
    train(plan(tmp_path, iterations=7, stepped=stepped, resumed=begun.append))
    assert begun == [0, 5]


def test_a_cosine_falls_from_one_to_zero_after_its_warmup():
    assert [cosine(step, 4) for step in range(5)] == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])
    assert [cosine(step, 4, warmup=2) for step in range(3)] == pytest.approx([0.5, 0.8535534, 0.5])
