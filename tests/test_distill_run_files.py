"""A run file is proven before anything is changed, and belongs to one run at a time."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from conftest import unchanged
from netopt.distillation import distill
from netopt.distillation.files import exclusive
from netopt.distillation.loop.checksums import checksums, difference
from netopt.errors import CheckpointError, NetoptError, PlanMismatchError

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


def models():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)), nn.Linear(6, 5)


def judge(student):
    return -float(student(X).square().mean())


OPTIONS = {
    "epochs": 2, "batch_size": 16, "seed": 1, "progress": False, "scheduler": "cosine", "validation": judge,
}  # fmt: skip


def run_file(folder) -> dict[str, Any]:
    """What a finished run has written."""
    student, teacher = models()
    distill(student, teacher, X, checkpoint=folder / "run.pt", **OPTIONS)
    return torch.load(folder / "run.pt", weights_only=True)


def entries(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all entries, at any depth; of long lists the first and the last."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, one in items if len(items) < 40 else (items[0], items[-1]):
        yield (*path, key)
        if isinstance(one, (dict, list, tuple)):
            yield from entries(one, (*path, key))


def held(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def exchanged(value: Any, path: tuple, new: Any) -> Any:
    """A copy of ``value`` with another entry at ``path``, or without it where that is ``...``."""
    if not path:
        return new
    if isinstance(value, dict):
        left = {key: one for key, one in value.items() if key != path[0] or len(path) > 1 or new is not ...}
        return {**left, path[0]: exchanged(value[path[0]], path[1:], new)} if path[0] in left else left
    parts = list(value)
    parts[path[0]] = exchanged(parts[path[0]], path[1:], new)
    return type(value)([one for one in parts if one is not ...])


def wrong_values(value: Any) -> list[Any]:
    """What an entry must not become: nothing, another type, another shape, another value."""
    others: list[Any] = [..., None, "text", [1, 2], {"a": 1}]
    if isinstance(value, torch.Tensor):
        others += [value.float().reshape(-1)[:1].repeat(3), value.to(torch.complex64), 3, value.float() + 1]
    elif isinstance(value, (int, float)):
        others += [value + 1, torch.zeros(2)]
    return [one for one in others if type(one) is not type(value) or isinstance(value, torch.Tensor) or one != value]


def attempt(path, content: bytes | None = None) -> str:
    """Resumes; returns what is wrong with how it ends: a raw error, a changed student, or none of the file's name."""
    if content is not None:
        path.write_bytes(content)
    student, teacher = models()
    before = copy.deepcopy(student.state_dict())
    try:
        distill(student, teacher, X, checkpoint=path, resume=True, **OPTIONS)
    except NetoptError as error:
        if path.name not in str(error):
            return f"does not name the file: {error}"
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    else:
        return "no error"
    changed = [name for name, one in student.state_dict().items() if not torch.equal(one, before[name])]
    return f"changed {changed}" if changed else ""


def test_every_entry_that_is_not_what_was_written_is_named_and_nothing_is_changed(tmp_path):
    found = run_file(tmp_path)
    tries, wrong = 0, []
    paths = list(entries(found))
    assert len(paths) > 100
    for number, path in enumerate(paths):
        for place, new in enumerate(wrong_values(held(found, path))):
            # One kind of damage an entry, each in its turn, and all kinds at the top.
            if len(path) > 1 and place != number % 5:
                continue
            torch.save(exchanged(found, path, new), tmp_path / "run.pt")
            tries += 1
            problem = attempt(tmp_path / "run.pt")
            if problem:
                wrong.append((path, type(new), problem))
    assert wrong == []
    assert tries > 150


def test_files_cut_or_with_flipped_bytes_are_refused(tmp_path):
    run_file(tmp_path)
    path, dice, wrong = tmp_path / "run.pt", random.Random(0), []
    content = path.read_bytes()
    for number in range(60):
        if number % 3 == 0:
            damaged = content[: dice.randrange(len(content))]
        else:
            flipped = bytearray(content)
            flipped[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            damaged = bytes(flipped)
        problem = attempt(path, damaged)
        # Between the records of the archive there is padding, which is nobody's.
        if problem and not (problem == "no error" and same_content(path, content, tmp_path)):
            wrong.append((number, problem))
    assert wrong == []
    assert "cannot be read" in refusal(path, b"")


def same_content(path, content: bytes, folder) -> bool:
    """Whether a file still holds, entry by entry, what another does; the run has gone on and written it anew."""
    (folder / "whole.pt").write_bytes(content)
    ours, theirs = (torch.load(one, weights_only=True) for one in (path, folder / "whole.pt"))
    return difference(ours["weights"], checksums(theirs["weights"])) == ""


def refusal(path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        distill(*models(), X, checkpoint=path, resume=True, **OPTIONS)
    return str(caught.value)


def test_a_message_names_file_field_and_what_to_do(tmp_path):
    found = run_file(tmp_path)
    path = tmp_path / "run.pt"
    found["optimizers"][0]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(found, path)
    with pytest.raises(CheckpointError, match=r"run.pt is damaged: 'optimizers/0/state/0/exp_avg' is not what was"):
        distill(*models(), X, checkpoint=path, resume=True, **OPTIONS)
    torch.save({**found, "version": 2}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of version 3: 'version' is 2; start without resume"):
        distill(*models(), X, checkpoint=path, resume=True, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": lambda p: torch.optim.SGD(p, 0.1)}, "optimizers of"),
        ({"scheduler": None}, "1 schedulers, and here it is 0"),
        ({"data": lambda: torch.utils.data.DataLoader(X, 16, generator=torch.Generator())}, "draws from 0 generators"),
    ],
)
def test_a_run_of_other_arguments_is_refused_and_undone(options, message, tmp_path):
    run_file(tmp_path)
    student, teacher = models()
    data = options.get("data", lambda: X)()
    options = {**OPTIONS, **{name: one for name, one in options.items() if name != "data"}}
    with unchanged(student, teacher), pytest.raises(NetoptError, match=message):
        distill(student, teacher, data, checkpoint=tmp_path / "run.pt", resume=True, **options)


def test_a_scheduler_that_cannot_load_is_an_error_that_undoes(tmp_path):
    class Picky(torch.optim.lr_scheduler.ConstantLR):
        def load_state_dict(self, _state):
            raise KeyError("factor")

    student, teacher = models()
    options = {**OPTIONS, "scheduler": Picky, "checkpoint": tmp_path / "run.pt"}
    distill(student, teacher, X, **options)
    student, teacher = models()
    with unchanged(student, teacher), pytest.raises(CheckpointError, match=r"'schedulers' of .*run.pt does not fit"):
        distill(student, teacher, X, resume=True, **options)


def test_of_two_processes_the_second_says_so(tmp_path):
    path = tmp_path / "run.pt"
    script = (
        "import sys, torch; from torch import nn; from netopt.distillation import distill\n"
        "def wait(*_):\n    print('ready', flush=True); sys.stdin.readline()\n"
        f"distill(nn.Linear(6, 5), nn.Linear(6, 5), torch.randn(8, 6), checkpoint={str(path)!r}, callbacks=[wait], "
        "progress=False)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        student, teacher = models()
        with unchanged(student, teacher), pytest.raises(CheckpointError, match="belongs to another run that is still"):
            distill(student, teacher, X, checkpoint=path, **OPTIONS)
        other.kill()
        other.wait()
    # Its end, by whatever way, frees the file.
    distill(student, teacher, X, checkpoint=path, **OPTIONS)
    assert [one.name for one in tmp_path.iterdir()] == ["run.pt"]


def test_of_two_threads_one_has_the_file(tmp_path):
    path, seen = tmp_path / "run.pt", []

    def enter() -> None:
        try:
            with exclusive(path):
                seen.append("entered")
        except CheckpointError:
            seen.append("refused")

    with exclusive(path):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    enter()
    assert seen == ["refused", "entered"]
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    student, teacher = models()
    with unchanged(student, teacher), pytest.raises(CheckpointError, match="cannot be written"):
        distill(student, teacher, X, checkpoint=tmp_path / "file" / "run.pt", progress=False)


def test_a_file_of_another_student_is_refused_by_name(tmp_path):
    run_file(tmp_path)
    student, teacher = nn.Linear(6, 5), nn.Linear(6, 5)
    with unchanged(student, teacher), pytest.raises(PlanMismatchError, match="has shape"):
        distill(student, teacher, X, checkpoint=tmp_path / "run.pt", resume=True, progress=False)
