"""A full disk is an error like any other, and no way to end a process leaves a file behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import distill_disk
from conftest import unchanged
from netopt.distillation import Cache, distill, files
from netopt.errors import CheckpointError, NetoptError

SCRIPT = Path(distill_disk.__file__)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
KINDS = ("spilled", "path", "checkpoint")
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


def run(*command: object) -> list[str]:
    done = subprocess.run(
        [str(one) for one in command], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    return done.stdout.strip().split("|")


def small_file_system(size: str, folder: Path, *command: object) -> list[str]:
    """Runs a command while ``folder`` is a file system of so many bytes, which only that command sees."""
    mount = f"mount -t tmpfs -o size={size} tmpfs '{folder}' && exec \"$@\""
    return run("unshare", "-rm", "sh", "-c", mount, "sh", *command)


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_may_not_grow_is_an_error_that_undoes_everything(kind, tmp_path):
    error, same, left, text = run(sys.executable, "-W", "ignore", SCRIPT, kind, tmp_path, 20_000)
    assert (error, same, left) == ("CheckpointError", "True", "[]"), text


@pytest.mark.skipif(not can_mount(), reason="needs a small file system")
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_an_error_that_undoes_everything(kind, tmp_path):
    error, same, left, text = small_file_system(
        "256k", tmp_path, sys.executable, "-W", "ignore", SCRIPT, kind, tmp_path
    )
    assert (error, same, left) == ("CheckpointError", "True", "[]"), text
    assert "room" in text


@pytest.mark.skipif(not can_mount(), reason="needs a small file system")
def test_where_there_is_room_for_some_answers_the_others_are_asked_for_each_time(tmp_path):
    error, same, left, _ = small_file_system("6m", tmp_path, sys.executable, "-W", "ignore", SCRIPT, "grown", tmp_path)
    assert (error, same, left) == ("NoneType", "False", "[]")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_reserved_is_an_error(kind, number, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "_allocate", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    student, teacher = nn.Linear(4, 8), nn.Linear(4, 8)
    options = {
        "spilled": {"cache": Cache(limit=10)},
        "path": {"cache": Cache(path=tmp_path / "kept")},
        "checkpoint": {"checkpoint": tmp_path / "run.pt"},
    }[kind]
    with unchanged(student, teacher), pytest.raises(CheckpointError, match=r"there is no room for \d+ bytes") as caught:
        distill(student, teacher, X, epochs=2, progress=False, **options)
    assert isinstance(caught.value, NetoptError)
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []


def test_room_is_reserved_by_writing_where_it_cannot_be_allocated(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    with (tmp_path / "file").open("w+b") as file:
        files.reserve(file, 3_000_000, tmp_path / "file")
        assert os.fstat(file.fileno()).st_size == 3_000_000
        files.reserve(file, 100, tmp_path / "file")
        assert os.fstat(file.fileno()).st_size == 3_000_000


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_leaves_no_file(number, tmp_path):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "wait", str(tmp_path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(60) == -number
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []


OWNER = """
import sys
from netopt.distillation.files import SharedFolder
folder = SharedFolder()
(folder.path / "rows.bank").write_bytes(bytes(9))
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_folders_of_killed_processes_go_when_the_next_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command, environment = [sys.executable, "-c", OWNER], {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    with (
        subprocess.Popen(command, env=environment, **pipes) as killed,
        subprocess.Popen(command, env=environment, **pipes) as alive,
    ):
        dead, kept = (Path(one.stdout.readline().strip()) for one in (killed, alive))
        killed.kill()
        killed.wait(60)
        assert dead.exists()
        own = files.SharedFolder()
        assert not dead.exists()
        assert {one.name for one in tmp_path.iterdir()} == {kept.name, own.path.name}
        files.SharedFolder().remove()
        assert own.path.exists(), "another of this process is not one that was left"
        own.remove()
        alive.communicate()
    assert [one.name for one in tmp_path.iterdir()] == [kept.name]
