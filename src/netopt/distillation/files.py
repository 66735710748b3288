"""Files whose room is reserved before it is used, and that one process at a time has to itself.

Memory mapped over a file without room behind it kills the process that writes there; so every byte is allocated first,
and a full disk is an error like any other. A file without a name is gone with its process, however that ends.
"""

from __future__ import annotations

import errno
import importlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from netopt.errors import CheckpointError
from netopt.plan.files import partial

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["SharedFolder", "exclusive", "lock", "nameless", "reserve", "written"]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
BLOCK = 2**20


def reserve(file: Any, size: int, where: Path) -> None:
    """Allocates ``size`` bytes for an open file, which is named ``where`` in messages.

    Raises:
        CheckpointError: there is no room for them; the file is as long as it was.
    """
    before = os.fstat(file.fileno()).st_size
    try:
        _allocate(file.fileno(), before, size)
    except OSError as error:
        os.ftruncate(file.fileno(), before)
        raise _no_room(where, error, size) from error


def _allocate(file: int, before: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            # A file system may not know how to allocate without writing.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    os.lseek(file, before, os.SEEK_SET)
    for start in range(before, size, BLOCK):
        _write_all(file, bytes(min(BLOCK, size - start)))


def _write_all(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]


def nameless(size: int) -> mmap.mmap:
    """Maps ``size`` bytes of a temporary file without a name, which the process takes with it however it ends.

    Raises:
        CheckpointError: there is no room for them.
    """
    folder = Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(prefix="netopt-", dir=folder) as file:
            reserve(file, size, folder)
            return mmap.mmap(file.fileno(), size)
    except CheckpointError:
        raise
    except OSError as error:
        raise _no_room(folder, error, size) from error


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of ``path`` once it is complete and on disk.

    Raises:
        CheckpointError: it could not be written; what was there before still is, and nothing else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial(path) as file:
            yield file
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:  # torch's own writer reports a failed write as a RuntimeError
        raise CheckpointError(
            f"{path} cannot be written ({error}); free room on the disk, or choose another place."
        ) from error


def _no_room(where: Path, error: OSError, size: int) -> CheckpointError:
    what = f"{where} cannot be written"
    if error.errno in FULL:
        what = f"there is no room for {size} bytes at {where}"
        with suppress(OSError):
            what += f", where {shutil.disk_usage(where if where.is_dir() else where.parent).free} are free"
    return CheckpointError(f"{what} ({error}); free some, choose another folder, Cache(path=...), or set cache=False.")


def lock(file: Any, *, inherited: bool = True) -> bool:
    """Locks an open file until it, and every mapping of it, is closed; False if another process has it.

    A lock that is ``inherited`` belongs to worker processes too, and outlives a run that is killed until they end.
    A file system without locks grants every one.
    """
    try:
        if fcntl is None:
            windows: Any = importlib.import_module("msvcrt")
            windows.locking(file.fileno(), windows.LK_NBLCK, 1)
        else:
            (fcntl.flock if inherited else fcntl.lockf)(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in BUSY
    return True


class SharedFolder:
    """A temporary folder that processes share, and the one that made it removes.

    Those of processes that were killed before they could are removed when the next one is made.

    Args:
        path: One that another process has made; by default a new one.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._file: Any = None
        if path is None:
            _remove_left()
            path = Path(tempfile.mkdtemp(prefix=_SHARED))
            self._file = (path / _OWNED).open("a")
            lock(self._file)  # which ends with the process, however that does
        self.path = path

    def remove(self) -> None:
        """Removes it, if this process made it; what others have open stays theirs. Once more does nothing."""
        if self._file is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self._file.close()
            self._file = None


def _remove_left() -> None:
    for left in Path(tempfile.gettempdir()).glob(f"{_SHARED}*"):
        with suppress(OSError), (left / _OWNED).open("r+") as file:
            if lock(file):
                shutil.rmtree(left, ignore_errors=True)


_SHARED, _OWNED = "netopt-cache-", "owner.lock"
_HELD: dict[str, object] = {}
"""What runs of this process have to themselves; locks that workers do not inherit do not keep threads apart."""


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keeps other runs from ``path`` by a locked file beside it, which is removed on leaving.

    Raises:
        CheckpointError: another run has it.
    """
    beside = path.with_name(f"{path.name}.lock")
    key, own, file = str(beside.absolute()), object(), None
    if _HELD.setdefault(key, own) is own:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _locked(beside)
        except OSError as error:
            raise CheckpointError(f"{beside} cannot be written ({error}); choose another place for {path}.") from error
        finally:
            if file is None:
                del _HELD[key]
    if file is None:
        raise CheckpointError(
            f"{path} belongs to another run that is still going on; wait for its end, or choose another file."
        )
    try:
        yield
    finally:
        with suppress(OSError):
            beside.unlink()
        file.close()
        del _HELD[key]


def _locked(path: Path) -> Any:
    """Returns the file at ``path``, locked; ``None`` if another process has it."""
    while True:
        file = path.open("a")
        if not lock(file, inherited=False):
            file.close()
            return None
        # Whoever had it before may have removed it between our opening and our locking.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
