"""Run by the tests in a process of its own, in a folder with little room: what distillation writes there.

``python distill_disk.py KIND FOLDER [LIMIT]`` with a KIND of ``main``; LIMIT is the largest size of any file.
Prints the class of the error, whether the student is as before, and what is left.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from netopt.distillation import Cache, distill
from netopt.errors import NetoptError


def main(kind: str, folder: Path, limit: int | None) -> None:
    """Distills with an output of 2 MB in all, or waits in the midst of it."""
    tempfile.tempdir = str(folder)
    torch.manual_seed(0)
    student, teacher, x = nn.Linear(4, 1024), nn.Linear(4, 1024), torch.randn(512, 4)
    before = [one.clone() for one in student.parameters()]
    options = {
        "spilled": {"cache": Cache(limit=10)},
        "path": {"cache": Cache(path=folder / "kept")},
        "checkpoint": {"checkpoint": folder / "run.pt"},
        "grown": {"cache": Cache(limit=10), "data": list(x.repeat(4, 1).split(64))},
        "wait": {"cache": Cache(limit=10), "callbacks": [wait]},
    }[kind]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    error = None
    try:
        distill(student, teacher, **{"data": x, "epochs": 3, "progress": False, **options})
    except NetoptError as caught:
        error = caught
    same = all(torch.equal(one, other) for one, other in zip(before, student.parameters(), strict=True))
    left = sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file())
    sys.stdout.write(f"{type(error).__name__}|{same}|{left}|{error}\n")


def wait(_student: nn.Module, _epoch: object) -> None:
    """Says that the run has come so far, and waits to be ended."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    time.sleep(60)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
