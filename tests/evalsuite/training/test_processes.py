"""Where one process fails, all stop, with its exit code."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from evalsuite.errors import DataError
from evalsuite.training import processes
from evalsuite.training.processes import together

WORLD = 3


def _enter(body: Callable[[int], None], rank: int, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    processes.GRACE = 1.0
    dist.init_process_group("gloo")
    fabric: Any = SimpleNamespace(world_size=WORLD, global_rank=rank, barrier=dist.barrier, broadcast=_broadcast)
    try:
        with together(fabric):
            body(rank)
    except Exception as error:
        print(f"process {rank}: {error!r}", file=sys.stderr, flush=True)
        os._exit(getattr(error, "code", 1))
    os._exit(0)


def _broadcast(value: int) -> int:
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def codes(body: Callable[[int], None]) -> list[int | None]:
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [context.Process(target=_enter, args=(body, rank, port)) for rank in range(WORLD)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        process.kill()
    return [process.exitcode for process in started]


def ends_well(rank: int) -> None:
    dist.all_reduce(torch.ones(1))


def refused(rank: int, who: int) -> None:
    if rank == who:
        raise DataError("a disk is gone", cause="it was pulled", fix="put it back")
    dist.all_reduce(torch.ones(1))


def late(rank: int) -> None:
    """The others are through and wait for all to leave."""
    if rank == 2:
        time.sleep(0.3)
        raise KeyError("late")


def busy(rank: int) -> None:
    """The others are where nothing can wake them."""
    if rank == 1:
        raise KeyError("oops")
    time.sleep(60)


def test_nothing_is_done_where_all_ends_well(capfd):
    assert codes(ends_well) == [0] * WORLD
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("who", [0, 2])
def test_a_refusal_of_one_ends_all_with_its_code(capfd, who):
    assert codes(lambda rank: refused(rank, who)) == [3] * WORLD
    told = capfd.readouterr().err
    assert f"process {who}: DataError('a disk is gone'" in told
    assert told.count(f"process {who} has failed, and this one stops with it") == WORLD - 1


@pytest.mark.parametrize("body", [late, busy])
def test_an_error_of_one_ends_those_who_wait(capfd, body):
    began = time.monotonic()
    assert codes(body) == [1] * WORLD
    assert time.monotonic() - began < 50
    assert "KeyError" in capfd.readouterr().err


def test_one_process_is_left_alone():
    with pytest.raises(KeyError), together(SimpleNamespace(world_size=1)):
        raise KeyError("its own")
