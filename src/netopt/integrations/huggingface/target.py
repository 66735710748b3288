"""A folder that appears whole or not at all, with what lay beside the weights of the model it was made from."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from netopt.errors import CheckpointError
from netopt.plan.checkpoint import is_dense

__all__ = ["appearing", "copy_others"]


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its name once the block is done, and is gone otherwise.

    Raises:
        CheckpointError: The target exists, or something could not be written.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists, and nothing is overwritten; choose another folder")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is no folder; make it first, or choose another place than {target}")
    path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        path.mkdir()
        yield path
        _sync(path)
        if target.exists():
            raise CheckpointError(f"{target} has appeared meanwhile, and nothing is overwritten")
        path.rename(target)
    except OSError as error:
        cause = error.__cause__
        if isinstance(error, CheckpointError) and not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"{target} could not be written: {cause or error}; nothing was left there") from error
    finally:
        shutil.rmtree(path, ignore_errors=True)


def copy_others(source: Path, target: Path, weights: Collection[str]) -> list[str]:
    """Copies all that ``target`` lacks, but for ``weights`` and those in other formats, whose names are returned."""
    left_out = []
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if not file.is_file() or str(name) in weights:
            continue
        if is_dense(name):
            left_out.append(str(name))
        elif not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
    return left_out


def _sync(folder: Path) -> None:
    """Has the disk hold all files of a folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
