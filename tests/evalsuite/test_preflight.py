"""Work that cannot fit is refused before it begins, by a step in a child that changes nothing here."""

from __future__ import annotations

import os
import time
from functools import partial
from multiprocessing import resource_sharer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evalsuite import preflight
from evalsuite.errors import ResourceError
from evalsuite.preflight import (
    HOPELESS,
    SLACK,
    Cost,
    Demand,
    Fits,
    TooLarge,
    afford,
    estimating,
    free_memory,
    killed_workers,
    measure,
    out_of_memory,
)
from evalsuite.progress import Progress
from evalsuite.training import Fit, fit, launched

QUIET = Progress(quiet=True)
MB = 2**20
DEMAND = Demand(what="training", pixels=224 * 224, batch=64, steps=1000)


def takes(megabytes: float, images: int):
    """A step that holds so much for each image until its end."""
    held = torch.ones(int(images * megabytes * MB / 4))
    yield 0.0
    yield 4.0 * MB
    del held
    yield 8.0 * MB


def works(seconds: float, images: int):
    until = time.process_time() + seconds * images
    while time.process_time() < until:
        pass
    yield from (0.0, 0.0, 0.0)


def fails(images: int):
    raise ZeroDivisionError
    yield


# --- a step in a child


def test_the_memory_of_a_step_is_that_of_its_images_and_of_the_optimizer():
    cost = measure(partial(takes, 40), 4, DEMAND, 8e9)
    assert cost.whole
    assert cost.fixed == 12 * MB
    assert cost.memory(64) == pytest.approx(SLACK * 64 * 40 * MB + 12 * MB, rel=0.1)


def test_the_time_of_a_run_is_that_of_all_its_images_on_all_threads():
    cost = measure(partial(works, 0.05), 2, DEMAND, 8e9)
    assert cost.time(DEMAND, threads=1) == pytest.approx(0.05 * 64 * 1000, rel=0.3)
    assert cost.time(DEMAND, threads=4) == pytest.approx(cost.time(DEMAND, 1) / 4)


def test_a_step_that_needs_more_than_there_is_is_stopped():
    began = torch.get_rng_state()
    cost = measure(partial(takes, 400), 2, DEMAND, 200 * MB)
    assert not cost.whole
    assert cost.memory(DEMAND.part) > 200 * MB
    assert torch.equal(began, torch.get_rng_state())


def test_a_step_that_shows_the_run_to_be_hopeless_is_cut_short(monkeypatch):
    monkeypatch.setattr(preflight, "PATIENCE", 0.1)
    began = time.monotonic()
    years = Demand(what="it", pixels=1, batch=64, steps=10**9)
    cost = measure(partial(works, 600), 1, years, 8e9)
    assert time.monotonic() - began < 60
    assert not cost.whole
    assert cost.time(years, 1) > 0.1 * 64 * 10**9


@pytest.mark.parametrize("how", [fails, lambda images: os._exit(3), lambda images: iter(())])
def test_a_step_that_fails_says_nothing(how, capfd):
    assert measure(how, 2, DEMAND, 8e9) is None
    assert capfd.readouterr() == ("", "")


def test_a_child_that_the_kernel_kills_had_too_little_memory():
    cost = measure(lambda images: os.kill(os.getpid(), 9), 2, DEMAND, 8e9)
    assert cost.memory(DEMAND.part) > 8e9


def test_a_child_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(preflight, "STUCK", 0.2)
    assert measure(lambda images: time.sleep(1000), 2, DEMAND, 8e9) is None


# --- what is refused


@pytest.fixture
def room(monkeypatch):
    monkeypatch.setattr(preflight, "free_memory", lambda: 1000.0 * MB)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def priced(monkeypatch, **changes):
    values = {"images": 2, "fixed": 100.0 * MB, "peak": 40.0 / SLACK * MB, "seconds": 2.0, "looking": 1.0} | changes
    monkeypatch.setattr(preflight, "measure", lambda *_: Cost(**values))


def test_a_batch_that_does_not_fit_is_refused_with_the_one_that_does(room, monkeypatch):
    priced(monkeypatch)
    with pytest.raises(TooLarge) as refusal:
        afford(DEMAND, fails, QUIET)
    assert isinstance(refusal.value, ResourceError)
    assert refusal.value.code == 7
    assert "a step of 64 images takes about 1.3 GiB, and 1.0 GiB are free" in refusal.value.cause
    assert refusal.value.fix == "--set batch_size=40"
    smaller = Demand(what="it", pixels=1, batch=64, steps=10**9, smaller=("--size {}", 224), less=("-b {}",))
    with pytest.raises(TooLarge, match=r"fix: -b 40, or --size 160$"):
        afford(smaller, fails, QUIET)


def test_a_run_of_days_takes_yes_and_is_told_what_would_fit(room, monkeypatch):
    priced(monkeypatch, peak=1.0)
    long = Demand(what="it", pixels=10**6, batch=10, steps=100_000, tests=1000, shorter=("--epochs {}", 500))
    with pytest.raises(TooLarge) as refusal:
        afford(long, fails, QUIET)
    assert refusal.value.problem == "it would take about 6 days on this CPU"
    assert "1,000,000 images" in refusal.value.cause
    assert refusal.value.fix == "--epochs 43, or --yes to begin all the same"
    seconds = (1e6 * 1.0 + 1000 * 0.5) / 2
    assert HOPELESS / seconds * 500 == pytest.approx(43, abs=1)
    afford(Demand(what="it", pixels=10**6, batch=10, steps=100_000, patient=True), fails, QUIET)


def test_yes_is_no_leave_to_take_more_memory_than_there_is(room, monkeypatch):
    priced(monkeypatch)
    with pytest.raises(TooLarge):
        afford(Demand(what="it", pixels=10**6, batch=64, steps=1, patient=True), fails, QUIET)


def test_small_work_is_not_estimated_at_all(room, monkeypatch):
    monkeypatch.setattr(preflight, "measure", lambda *_: pytest.fail("it was"))
    afford(Demand(what="it", pixels=32 * 32, batch=64, steps=100), fails, QUIET)


def test_images_come_in_whole_groups(room, monkeypatch):
    tried = []
    monkeypatch.setattr(preflight, "measure", lambda step, images, *_: tried.append(images))
    afford(Demand(what="it", pixels=224 * 224, batch=64, steps=9**9, groups=8), fails, QUIET)
    assert tried == [16, 64]
    priced(monkeypatch, seconds=0.0, looking=0.0)
    with pytest.raises(TooLarge, match=r"fix: --set batch_size=32$"):
        afford(Demand(what="it", pixels=224 * 224, batch=64, steps=9**9, groups=16), fails, QUIET)


def test_where_a_small_step_fails_a_whole_one_is_tried(room, monkeypatch):
    tried = []
    monkeypatch.setattr(preflight, "measure", lambda step, images, *_: tried.append(images))
    afford(DEMAND, fails, QUIET)
    assert tried == [4, 64]


def test_an_estimate_alone_begins_nothing(room, monkeypatch):
    priced(monkeypatch, peak=1.0)
    with estimating(), pytest.raises(Fits) as fits:
        afford(DEMAND, fails, QUIET)
    assert fits.value.seconds == pytest.approx(64 * 1000 / 2)


def test_a_full_device_says_which_batch_to_try():
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")):
        with pytest.raises(TooLarge, match=r"fix: --set batch_size=32"), out_of_memory(DEMAND):
            raise error
    with pytest.raises(RuntimeError, match="another"), out_of_memory(DEMAND):
        raise RuntimeError("another")


# --- a training run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(1))

    def forward(self, batch):
        return {"fit": self.net(torch.stack(batch)).square().mean()}


def sample(index: int, seed: int) -> torch.Tensor:
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) + index


def trained(folder: Path, demand: Demand | None, iterations: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Net()
    model([sample(0, 0), sample(1, 1)])
    run = Fit(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), 0.01), lr_factor=lambda step: 1.0,
        iterations=iterations, sample=sample, length=10, batch_size=4, seed=3, key="k", state=folder / "state.pt",
        demand=demand,
    )  # fmt: skip
    fit(run, launched(torch.device("cpu")), QUIET)
    assert len(model.net[1].running_mean) == 4
    return model.state_dict() | {"rng": torch.get_rng_state()}


def test_an_estimate_changes_not_a_bit_of_a_run(tmp_path, monkeypatch):
    seen = []
    real = measure
    monkeypatch.setattr(preflight, "measure", lambda *given: seen.append(real(*given)) or seen[-1])
    demand = Demand(what="it", pixels=10**7, batch=4, steps=4)
    plain, measured = trained(tmp_path / "a", None), trained(tmp_path / "b", demand)
    assert len(seen) == 1
    assert seen[0].fixed > 0
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    trained(tmp_path / "b", demand, iterations=6)  # which goes on from the state
    assert len(seen) == 1


def test_a_run_that_cannot_be_is_refused_before_its_first_step(tmp_path):
    with pytest.raises(TooLarge, match="would take"):
        trained(tmp_path, Demand(what="it", pixels=10**7, batch=4, steps=10**12))
    assert not (tmp_path / "state.pt").exists()


# --- the memory there is


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 4000 * 1024),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "max\n"}, 4000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/slurm/job\n", "sys/fs/cgroup/slurm/memory.max": "3000\n",
                "sys/fs/cgroup/slurm/memory.current": "2500\n",
                "sys/fs/cgroup/slurm/memory.stat": "anon 100\ninactive_file 700\n",
            },
            1200,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "900\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
            },
            0,
        ),
    ],
)  # fmt: skip
def test_free_memory_is_that_of_the_machine_and_of_every_group_above(tmp_path, files, free):
    assert free_memory(system(tmp_path, files)) == free


def test_where_the_system_does_not_say_nothing_is_refused(tmp_path, monkeypatch):
    assert free_memory(tmp_path) is None
    monkeypatch.setattr(preflight, "free_memory", lambda: None)
    afford(DEMAND, fails, QUIET)


def test_this_machine_says():
    assert 1e6 < free_memory() < 1e14
    assert np.isfinite(free_memory())


# --- workers


def handing_over():
    """Receive a tensor's memory from a process that is gone."""
    handle = resource_sharer.DupFd(1)
    handle._id = ("/nowhere/socket", 1)
    handle.detach()


def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_told(monkeypatch):
    answers = iter([None, RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")])

    def ask():
        if (answer := next(answers)) is not None:
            raise answer

    monkeypatch.setattr(preflight, "_error_if_any_worker_fails", ask)
    with pytest.raises(ResourceError, match="a process that reads images was killed") as refusal, killed_workers():
        handing_over()
    assert "DataLoader worker (pid 7)" in refusal.value.cause


def test_a_connection_that_breaks_while_all_workers_live_is_no_killed_worker():
    with pytest.raises(FileNotFoundError), killed_workers(patience=0.05):
        handing_over()


@pytest.mark.parametrize("error", [ConnectionResetError("of a server"), FileNotFoundError("x.jpg"), RuntimeError("x")])
def test_other_errors_are_no_killed_worker(error):
    with pytest.raises(type(error)) as raised, killed_workers():
        raise error
    assert raised.value is error
