"""The rules every test lives by are in force: no network, one thread, the same seeds."""

from __future__ import annotations

import os
import random
import socket

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.invalid", 443)])
@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_a_connection_to_elsewhere_is_refused(address, method):
    with socket.socket() as ours, pytest.raises(RuntimeError, match="tests have no network"):
        getattr(ours, method)(address)


def test_this_machine_may_be_connected_to():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.create_connection(server.getsockname()) as ours:
            assert ours.getpeername() == server.getsockname()


def test_data_workers_may_talk_to_us():
    loader = DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=2, num_workers=1)
    assert sum(float(batch.sum()) for (batch,) in loader) == 8


def test_torch_has_one_thread_here_and_in_child_processes():
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_every_test_starts_from_the_same_seeds():
    assert random.random() == random.Random(0).random()
    assert np.random.random() == np.random.RandomState(0).random()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
