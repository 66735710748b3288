"""Pruning in several processes: scores are those of all data together, and every process decides the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prune_processes


@pytest.fixture(name="results", scope="module")
def both_processes(tmp_path_factory):
    """What each of two processes got."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(Path(prune_processes.__file__)), str(folder)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": f"{rank}"}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_end_as_one_with_all_the_data(results):
    one = prune_processes.run()
    for theirs in results:
        assert list(theirs["found"]) == list(one)
        for case, tensors in one.items():
            assert list(theirs["found"][case]) == list(tensors), case
            for name, value in tensors.items():
                assert torch.equal(theirs["found"][case][name], value), (case, name)


def test_processes_that_would_decide_differently_are_refused(results):
    for theirs in results:
        different, fitted, repair = theirs["refused"]
        assert "2 processes would prune different weights" in different
        assert "one process's data" in fitted
        assert "repair=True" in repair
