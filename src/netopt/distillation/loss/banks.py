"""Rows of one shape, one a sample: in memory, in a file without a name, or in a file that is found again.

A file that is found again is used as far as it is verified. Its header has a checksum and identifies the teachers;
every row has a checksum of its bytes and the fingerprint of its sample. A row that fails is computed anew. A file for
other samples is replaced, never written into: another run may be reading it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from netopt.distillation.data.fingerprints import row_checksums
from netopt.distillation.files import lock, nameless, reserve
from netopt.errors import CheckpointError

__all__ = ["Bank", "Form", "Home"]

MAGIC = b"netopt-bank-1\n\0\0"
HEADER = 4096
ALIGNED = 64
AT_ONCE = 2**24
ALIKE = 0.01
"""Largest relative difference between a teacher's output and the one found: float16, other kernels, another batch."""


class Form(NamedTuple):
    """What a row looks like.

    Args:
        tops: How many logits of each teacher are kept, ``None`` for all.
        specs: Shape and dtype of each tensor kept of a sample.
    """

    tops: tuple[int | None, ...]
    specs: tuple[tuple[tuple[int, ...], str], ...]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtype of each tensor."""
        return [getattr(torch, dtype) for _, dtype in self.specs]

    def parts(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """The tensors kept of a sample, its fingerprint, the checksum of these, and whether they are there."""
        kept = [(shape, getattr(torch, dtype)) for shape, dtype in self.specs]
        return [*kept, ((2,), torch.int64), ((), torch.int64), ((), torch.uint8)]

    def places(self, rows: int, start: int) -> tuple[list[int], int]:
        """Where in a file each part of ``rows`` rows begins, and where the file ends."""
        offsets = []
        for shape, dtype in self.parts():
            offsets.append(start)
            start += -(-rows * math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
        return offsets, start


class Home(NamedTuple):
    """The file a bank is found in again.

    Args:
        path: Where it is.
        about: The identity its header must hold.
    """

    path: Path
    about: Mapping[str, Any]


class Bank:
    """Rows, and which of them is whose.

    Args:
        form: What a row looks like.
        by_index: Whether a sample's row is its index; otherwise it is looked up by the sample's fingerprint.
        tensors: The parts of all rows, see :meth:`Form.parts`.
        home: The file they are in, if it has a name.
        found: Whether the file was there before.
        mapped: Whether they are in a file at all.
    """

    def __init__(
        self,
        form: Form,
        by_index: bool,
        tensors: Sequence[Tensor],
        *,
        home: Home | None = None,
        found: bool = False,
        mapped: bool = True,
    ) -> None:
        self.form, self.by_index, self.home, self.mapped = form, by_index, home, mapped
        *self.stores, self.prints, self.sums, self.valid = tensors
        self.rows = rows = len(self.valid)
        self.proven = not found
        """Whether the teachers have been run again on a sample found, with the same result."""
        self.old = self.valid > 0 if found else torch.zeros(rows, dtype=torch.bool)
        """Rows from an earlier run, whose samples have not come in this one."""
        self.broken = self._damaged() if found else torch.zeros(rows, dtype=torch.bool)
        self.where: dict[tuple[int, int], int] = {}
        if not by_index:
            sound = (self.valid > 0) & ~self.broken
            self.where = {tuple(self.prints[row].tolist()): row for row in sound.nonzero().squeeze(1).tolist()}
        used = self.valid.nonzero()
        self.used = int(used.max()) + 1 if len(used) else 0

    @classmethod
    def in_memory(cls, form: Form, rows: int, by_index: bool) -> Bank:
        """Makes an empty bank in memory."""
        tensors = [torch.empty((rows, *shape), dtype=dtype) for shape, dtype in form.parts()]
        tensors[-1].zero_()
        return cls(form, by_index, tensors, mapped=False)

    @classmethod
    def in_file(cls, form: Form, rows: int, by_index: bool) -> Bank:
        """Makes an empty bank in a temporary file without a name.

        Raises:
            CheckpointError: there is no room for it.
        """
        tensors = _views(nameless(form.places(rows, 0)[1]), form, rows, 0)
        return cls(form, by_index, tensors)

    @classmethod
    def at(cls, home: Home, form: Form, rows: int, by_index: bool, *, anew: bool = False) -> Bank | None:
        """Opens the bank at ``home``, which has the form it was made in, or makes one there, in any case if ``anew``.

        ``None`` if another process fills it in an order of its own.

        Raises:
            CheckpointError: there is no room for it, or the folder cannot be written.
        """
        try:
            home.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                made = _create(home, form, rows, anew)
                with home.path.open("r+b") as file:
                    if not by_index and not lock(file):
                        return None
                    found = _header(file, home.about, len(form.tops))
                    if found is not None:
                        form, rows = found
                        # The mapping has the file open, and locked, for as long as it is used.
                        tensors = _views(mmap.mmap(file.fileno(), 0), form, rows, HEADER)
                        return cls(form, by_index, tensors, home=home, found=not made)
                home.path.unlink(missing_ok=True)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"the cache {home.path} cannot be opened ({error}); choose another folder with Cache(path=...)."
            ) from error

    @property
    def bytes(self) -> int:
        """How many bytes the outputs take."""
        return sum(one.numel() * one.element_size() for one in self.stores)

    @property
    def complete(self) -> bool:
        """Whether every sample has a verified output."""
        return self.proven and bool(self.valid.all()) and not bool(self.old.any() or self.broken.any())

    def find(self, identities: Tensor | None, prints: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns each sample's row, and whether it is filled."""
        if identities is not None:
            rows = identities.long()
            return rows, (self.valid[rows] > 0) & ~self.broken[rows]
        assert prints is not None, "without an index a sample is known by its content"
        rows = torch.tensor([self.where.get((a, b), -1) for a, b in prints.tolist()])
        return rows, rows >= 0

    def changed(self, rows: Tensor, known: Tensor, prints: Tensor | None) -> tuple[bool, bool]:
        """Returns whether a sample has other content than in an earlier run, and whether than before in this one."""
        if prints is None or not self.by_index:
            return False, False
        rows, prints = rows[known], prints[known]
        if torch.equal(self.prints[rows], prints):
            self.old[rows] = False
            return False, False
        differ, before = (self.prints[rows] != prints).any(1).numpy(), self.old[rows].numpy()
        return bool((differ & before).any()), bool((differ & ~before).any())

    def adopt(self) -> None:
        """Marks what was found as this run's own: written before it was resumed, or by its other processes."""
        self.proven = True
        self.old.zero_()

    def agrees(self, rows: Tensor, values: Sequence[Tensor]) -> bool:
        """Whether the rows hold ``values``, which the teachers have just returned, to within ``ALIKE``."""
        for store, value in zip(self.stores, values, strict=True):
            if not value.is_floating_point():
                continue
            now, then = value.double(), store[rows].double()
            finite = now.isfinite()
            if not torch.equal(finite, then.isfinite()):
                return False
            now, then = now.where(finite, 0), then.where(finite, 0)
            if bool((now - then).norm() > ALIKE * now.norm()):
                return False
        self.proven = True
        return True

    def read(self, rows: Tensor) -> list[Tensor]:
        """Returns the outputs in ``rows``."""
        return [one.index_select(0, rows) for one in self.stores]

    def write(self, rows: Tensor, fresh: Tensor, prints: Tensor | None, values: Sequence[Tensor]) -> None:
        """Fills the rows of the samples that are new; there is :meth:`room`."""
        chosen = fresh.nonzero().squeeze(1)
        if not len(chosen):
            return
        if not self.by_index:
            assert prints is not None, "without an index a sample is known by its content"
            for place in chosen.tolist():
                row = self.where.setdefault(tuple(prints[place].tolist()), self.used)
                self.used = max(self.used, row + 1)
            rows = torch.tensor([self.where[a, b] for a, b in prints.tolist()])
        rows = rows[chosen]
        for store, value in zip(self.stores, values, strict=True):
            store[rows] = value[chosen].to(store.dtype)
        if prints is not None:
            self.prints[rows] = prints[chosen]
        if self.home is not None:
            self.sums[rows] = self._checksums(rows)
        # Last, so that a row another process sees as filled is.
        self.valid[rows] = 1
        self.old[rows] = self.broken[rows] = False

    def room(self, prints: Tensor | None, fresh: Tensor) -> int:
        """How many rows are lacking for the samples that are new; 0 or fewer if there is room."""
        if self.by_index:
            return 0
        assert prints is not None, "without an index a sample is known by its content"
        new = {(a, b) for (a, b), one in zip(prints.tolist(), fresh.tolist(), strict=True) if one}
        return self.used + len(new) - self.rows

    def moved_to(self, larger: Bank) -> Bank:
        """Copies everything into ``larger``, and returns that."""
        for ours, theirs in zip(self._tensors(), larger._tensors(), strict=True):
            theirs[: self.rows].copy_(ours)
        for ours, theirs in ((self.old, larger.old), (self.broken, larger.broken)):
            theirs[: self.rows] = ours
        larger.where, larger.used, larger.proven = self.where, self.used, self.proven
        return larger

    def _tensors(self) -> list[Tensor]:
        return [*self.stores, self.prints, self.sums, self.valid]

    def _damaged(self) -> Tensor:
        """Returns which rows do not have the checksum they were written with."""
        damaged = torch.zeros(self.rows, dtype=torch.bool)
        filled = self.valid.nonzero().squeeze(1)
        size = max(1, AT_ONCE * self.rows // max(1, self.bytes))
        for rows in filled.split(size):
            damaged[rows] = self._checksums(rows) != self.sums[rows]
        return damaged

    def _checksums(self, rows: Tensor) -> Tensor:
        return row_checksums([one[rows] for one in (*self.stores, self.prints)])


def _views(mapped: mmap.mmap, form: Form, rows: int, start: int) -> list[Tensor]:
    """Returns the parts of all rows as tensors over mapped memory."""
    views = []
    for (shape, dtype), offset in zip(form.parts(), form.places(rows, start)[0], strict=True):
        count = rows * math.prod(shape)
        flat = (
            torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
        )
        views.append(flat.reshape(rows, *shape))
    return views


def _create(home: Home, form: Form, rows: int, anew: bool) -> bool:
    """Makes an empty file at ``home`` unless there is one or it has to be new; whether it did. It appears complete."""
    if not anew and home.path.exists():
        return False
    beside = home.path.with_name(f"{home.path.name}.{uuid.uuid4().hex}.new")
    try:
        with beside.open("xb") as file:
            reserve(file, form.places(rows, HEADER)[1], home.path)
            file.seek(0)
            file.write(_encoded({"about": dict(home.about), "rows": rows, "tops": form.tops, "specs": form.specs}))
        if not anew:
            # Of two processes the first one's file is taken, where the file system has links.
            with suppress(PermissionError, NotImplementedError, AttributeError):
                os.link(beside, home.path)
                return True
        beside.replace(home.path)
        return True
    except FileExistsError:
        return False
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _encoded(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    head = MAGIC + hashlib.blake2b(text, digest_size=16).digest() + len(text).to_bytes(8, "little")
    if len(head) + len(text) > HEADER:
        raise CheckpointError("so many hints and teachers cannot be kept in one cache; set cache=False.")
    return head + text


def _header(file: Any, about: Mapping[str, Any], teachers: int) -> tuple[Form, int] | None:
    """Returns form and number of rows of a file that is whole and ``about`` what is wanted; ``None`` of any other."""
    head = file.read(len(MAGIC) + 24)
    if len(head) < len(MAGIC) + 24 or not head.startswith(MAGIC):
        return None
    text = file.read(min(HEADER, int.from_bytes(head[-8:], "little")))
    if hashlib.blake2b(text, digest_size=16).digest() != head[len(MAGIC) : -8]:
        return None
    # The checksum fits, so it is as we have written it.
    header = json.loads(text)
    form = Form(tuple(header["tops"]), tuple((tuple(shape), dtype) for shape, dtype in header["specs"]))
    if header["about"] != json.loads(json.dumps(dict(about))) or len(form.tops) != teachers:
        return None
    if os.fstat(file.fileno()).st_size != form.places(header["rows"], HEADER)[1]:
        return None
    return form, header["rows"]
