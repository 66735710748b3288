"""Two processes give the weights that one gives with the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distill_processes
from netopt.distillation import distill
from netopt.errors import ArgumentTypeError, InvalidArgumentError


@pytest.fixture(name="results", scope="module")
def both_processes(tmp_path_factory):
    """What each of two processes got, by engine and case."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(distill_processes.__file__)
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": f"{rank}",
            "LOCAL_RANK": f"{rank}",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": f"{port}",
            "TORCHELASTIC_RUN_ID": "test",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        command = [sys.executable, str(script), str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


ENGINES = [(engine, case) for engine in ("plain", "accelerate", "fabric") for case in distill_processes.CASES]
SHARDED = [(kind, case) for kind in ("sharded student", "both sharded") for case in ("loader", "accumulated", "hints")]


@pytest.mark.parametrize(("engine", "case"), ENGINES + SHARDED)
def test_two_processes_equal_one(results, engine, case):
    weights, report = distill_processes.run(case)
    for theirs, told in (one[engine, case] for one in results):
        for name, value in weights.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-11)
        assert told["steps"] == report["steps"]
        assert told["loss"] == pytest.approx(report["loss"], rel=1e-9)
        assert told["best"] == report["best"]


def test_a_token_weighs_the_same_in_every_process(results):
    """Of a step with 3 and 17 tokens that count, one process has the 3: a mean of means would weigh them 5.7 times."""
    student, teacher = distill_processes.token_models()
    steps = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    together = distill_processes.tokens()
    for _ in range(3):
        for first in range(0, 8, 2):
            ids, labels = (together[name][first : first + 2] for name in ("input_ids", "labels"))
            counts = labels != -100
            ours, theirs = student(ids)["logits"][counts], teacher(ids)["logits"][counts]
            assert counts.sum(1).tolist() == [3, 17]
            steps.zero_grad()
            soft = torch.nn.functional.kl_div((ours / 4).log_softmax(1), (theirs / 4).softmax(1), reduction="batchmean")
            (0.5 * 16 * soft + 0.5 * torch.nn.functional.cross_entropy(ours, labels[counts])).backward()
            steps.step()
    for engine in ("plain", "accelerate", "fabric"):
        for theirs, _ in (one[engine, "tokens"] for one in results):
            for name, value in student.state_dict().items():
                torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ["plain", "accelerate", "fabric"])
def test_two_processes_take_up_where_they_stopped(results, engine):
    weights, report = distill_processes.run("hints")
    for theirs, told in (one[engine, "resumed"] for one in results):
        for name, value in weights.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-11)
        assert (told["steps"], len(told["history"])) == (report["steps"], 3)


def test_processes_share_the_cache(results):
    reports = [one["plain", "cached"][1]["cache"] for one in results]
    assert sum(one["misses"] for one in reports) <= 43 + 8
    assert sum(one["cache hits"] for one in reports) >= 2 * 43 - 8


def test_data_that_comes_divided_and_uneven_is_taken_as_it_is(results):
    (ours, report), (theirs, _) = (one["plain", "divided"] for one in results)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name])
    # 21 samples in batches of 3 and of 4: seven steps, in the last of which one process has nothing left.
    assert report["steps"] == 3 * 7


@pytest.mark.parametrize("name", ["accelerate", "fabric"])
def test_an_engine_in_one_process_changes_nothing_and_is_left_as_it_was(name):
    if name == "accelerate":
        from accelerate import Accelerator

        engine = Accelerator(cpu=True)
    else:
        from lightning_fabric import Fabric

        engine = Fabric(accelerator="cpu", devices=1)
    weights, report = distill_processes.run("loader")
    theirs, told = distill_processes.run("loader", engine=engine)
    for key, value in weights.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-12, atol=1e-14)
    assert told["loss"] == pytest.approx(report["loss"])
    assert not getattr(engine, "_models", [])
    assert not getattr(engine, "_models_setup", 0)


def test_wrong_engines_are_told():
    student, teacher = distill_processes.models()
    with pytest.raises(ArgumentTypeError, match="engine must be a Hugging Face Accelerator or a Lightning Fabric"):
        distill(student, teacher, distill_processes.X, engine="ddp", progress=False)
    from accelerate import Accelerator

    with pytest.raises(InvalidArgumentError, match="set the engine's own precision"):
        distill(student, teacher, distill_processes.X, engine=Accelerator(cpu=True), amp="bf16", progress=False)
