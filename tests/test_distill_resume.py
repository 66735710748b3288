"""A run that is killed at random steps, and taken up again each time, ends bit for bit where it would have ended."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import distill_killed
import distill_killed_ranks
from conftest import unchanged
from netopt.distillation import distill
from netopt.distillation.loop import shards
from netopt.errors import InvalidArgumentError, PlanMismatchError

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


def models():
    student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 5))
    return student, nn.Linear(6, 5)


def test_killed_runs_end_where_the_whole_one_does(tmp_path):
    script = Path(distill_killed.__file__)
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("differing: []") == len(distill_killed.SCENARIOS)


def test_killed_processes_end_where_the_whole_ones_do(tmp_path):
    """Two processes: replicas, with Accelerate, with Fabric, with a sharded student, with data that comes divided."""
    script = Path(distill_killed_ranks.__file__)
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("differing: []") == len(distill_killed_ranks.KINDS)


def test_what_is_taken_apart_is_put_together():
    """Marks stand where sharded tensors were, at whatever depth, and plain values stay."""

    class Sharded(torch.Tensor):
        device_mesh = None

    tensor = torch.ones(2).as_subclass(Sharded)
    value = {"a": [1, {"b/c": tensor}], "d": (tensor, None), 3: "plain", "e": torch.zeros(2)}
    rest, parts = shards.take_apart(value)
    assert list(parts) == ["/a/1/b/c", "/d/0"] == shards.marks(rest)
    assert rest["a"][0] == 1
    assert rest[3] == "plain"
    assert rest["e"] is value["e"]
    again = shards.put_together(rest, parts)
    assert again["a"][1]["b/c"] is tensor
    assert again["d"][0] is tensor


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_run_is_taken_up_after_the_step_it_finished(tmp_path):
    student, teacher = models()
    whole, stopped = copy.deepcopy(student), copy.deepcopy(student)
    options = {"epochs": 3, "batch_size": 8, "seed": 1, "progress": False, "checkpoint": tmp_path / "run.pt"}
    distill(whole, teacher, X, **{**options, "checkpoint": None})
    seen = []

    def interrupt(module, _inputs):
        seen.append(module.training)
        if sum(seen) == 1 + 7:  # the dry run, and seven steps
            import signal

            signal.raise_signal(signal.SIGINT)

    handle = stopped.register_forward_pre_hook(interrupt)
    report = distill(stopped, teacher, X, **options)
    handle.remove()
    assert (report.stopped, report.steps) == ("interrupted", 7)
    fresh, _ = models()
    report = distill(fresh, teacher, X, resume=True, **options)
    assert (report.stopped, report.steps, len(report.history)) == ("finished", 15, 3)
    for one, other in zip(whole.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_no_file_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    student, teacher = models()
    distill(student, teacher, X, epochs=3, progress=False)
    assert list(tmp_path.iterdir()) == []
    distill(student, teacher, X, epochs=3, checkpoint="run.pt", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    student, teacher = models()
    distill(student, teacher, X, checkpoint=tmp_path / "run.pt", progress=False)
    other = nn.Linear(6, 5)
    with unchanged(other), pytest.raises(PlanMismatchError, match="written for another student"):
        distill(other, teacher, X, checkpoint=tmp_path / "run.pt", resume=True, progress=False)
    with pytest.raises(InvalidArgumentError, match="need checkpoint="):
        distill(other, teacher, X, resume=True, progress=False)
