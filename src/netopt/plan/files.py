"""Files that appear whole or not at all, and nowhere but where they were meant to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar

from netopt.errors import CheckpointError, InvalidArgumentError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["JSONFile", "checksum", "inside", "load_json", "partial", "replace", "save_json"]

Read = TypeVar("Read")
BLOCK = 1 << 20


@contextmanager
def partial(target: Path) -> Iterator[IO[bytes]]:
    """A new file beside ``target`` that takes its place once the block is done, and is gone otherwise.

    What an interrupted run left under the name goes; a link that someone put there goes, and not what it points to.
    """
    path = target.with_name(f"{target.name}.partial")
    path.unlink(missing_ok=True)
    try:
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        path.replace(target)
    finally:
        path.unlink(missing_ok=True)


def replace(target: Path, content: bytes) -> None:
    """Writes ``content`` as the file ``target``, which is replaced whole or not at all."""
    with partial(target) as file:
        file.write(content)


def save_json(path: str | os.PathLike[str], data: Any) -> None:
    """Writes ``data`` as JSON; an existing file is replaced whole or not at all.

    Raises:
        CheckpointError: The file cannot be written.
    """
    try:
        replace(Path(path), (json.dumps(data, separators=(",", ":")) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error


def load_json(path: str | os.PathLike[str], read: Callable[[Any], Read]) -> Read:
    """What ``read`` makes of the JSON of a file.

    Raises:
        CheckpointError: The file cannot be read.
        InvalidArgumentError: It holds no plan; the message names the field that is broken.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path} holds no plan: it is not JSON ({error})") from error
    try:
        return read(data)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{path} holds no plan: {error}") from error


class JSONFile:
    """What becomes a mapping for JSON by ``to_dict``, and is made of one by ``from_dict``, as a file."""

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """What :meth:`to_dict` gave."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON; an existing file is replaced whole or not at all.

        Raises:
            CheckpointError: The file cannot be written.
        """
        save_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a plan that :meth:`save` wrote.

        Raises:
            CheckpointError: The file cannot be read.
            InvalidArgumentError: The file holds no such plan; the message names the field that is broken.
        """
        return load_json(path, cls.from_dict)


def inside(name: str, where: Path) -> PurePosixPath:
    """A file's name, as an index lists it, that leads to a place below its folder.

    Raises:
        CheckpointError: It leads elsewhere.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise CheckpointError(f"{where} lists the file {name!r}, which is no place below its folder")
    return path


def checksum(path: Path) -> str:
    """A hash of what is in a file."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()
