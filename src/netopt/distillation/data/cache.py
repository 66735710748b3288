"""A teacher says the same of the same sample, so it need be asked but once.

Outputs are kept by the sample's identity, its index in the dataset or else a hash of its content, and never by its
position in the epoch, which a shuffling loader changes. What is kept is what is used from the first time on, so that a
run does not depend on what happened to be kept already. A sample that comes back with another content has been
augmented at random: then nothing may be kept, and the cache says so and goes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from netopt.distillation.data.fingerprints import sample_fingerprints, signature
from netopt.distillation.loss.divergence import TopK, condense
from netopt.distillation.loss.objective import Kept, Record
from netopt.errors import InvalidArgumentError

__all__ = ["Cache", "TeacherCache"]

SMALL = 1024
EXACT = 2**24
UNTOLD = 2**13
CHOICES = (64, 256)
LOST = 0.01
FAINT = 1e-3


@dataclass(frozen=True)
class Cache:
    """How the teacher's outputs are kept.

    Args:
        dtype: Of what is kept. By default outputs are kept exactly where that takes no more than 1024 numbers a sample
            and 16 MiB in all, and in float16 beyond, or exactly even so where float16 cannot hold them: where values
            exceed its range, or vary less than it can tell apart.
        topk: Keep only that many of the largest logits of each position, and how much probability the others share;
            ``None`` keeps all. By default 64 of a vocabulary of more than 1024, where the loss needs no more (``"kl"``)
            and they hold all but a hundredth of what the teacher says, or else 256, or else all.
        limit: Bytes to keep in memory; what would need more is kept in a memory-mapped file.
        path: A folder to keep the outputs in and to find them again; by default nothing outlives the call.

    Example:
        >>> Cache(topk=64).topk
        64
    """

    dtype: torch.dtype | None = None
    topk: int | Literal["auto"] | None = "auto"
    limit: int = 2**30
    path: str | Path | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.topk, int) and not isinstance(self.topk, bool) and self.topk >= 1
        if not (number or self.topk in (None, "auto")):
            raise InvalidArgumentError(f"topk must be at least 1, None or 'auto', not {self.topk!r}.")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise InvalidArgumentError(f"the cache's dtype must be a floating-point one, not {self.dtype}.")


class TeacherCache:
    """Outputs of all teachers, and hints' activations, by sample.

    Args:
        settings: How they are kept.
        teachers: A hash of the teachers' weights: outputs found in a folder must be theirs.
        samples: Size of the dataset whose indices are the identities; 0 where identities are hashes.
        fixed: Whether samples cannot change, so that none needs to be compared with its first time.
        temperature: At which the probabilities that ``topk`` drops keep their sum.
        condensable: Whether the losses need no more than the largest logits and that sum.
        folder: Where processes that share it keep everything; their own affair to remove.
    """

    def __init__(
        self,
        settings: Cache,
        *,
        teachers: str,
        samples: int,
        fixed: bool,
        temperature: float,
        condensable: bool,
        folder: Path | None = None,
    ) -> None:
        self.settings, self.samples, self.fixed = settings, samples, fixed
        self.temperature, self.condensable = temperature, condensable
        self.hits = self.misses = 0
        self.reason: str | None = None
        self._banks: dict[tuple[Any, ...], _Bank] = {}
        self._full: _Bank | None = None
        self._temporary: Path | None = None
        self._folder = Path(settings.path) if settings.path is not None else folder
        if settings.path is not None and self._folder is not None:
            self._adopt(self._folder, teachers)

    @property
    def active(self) -> bool:
        """Whether anything is kept, or may be."""
        return self.reason is None

    def records(
        self, identities: Tensor | None, batch: Any, ask: Callable[[], list[Record]]
    ) -> Sequence[Record | Kept]:
        """Returns what the teachers say of ``batch``, by ``ask`` if any sample of it is new."""
        if self._full is not None and identities is not None:
            self.hits += len(identities)
            return self._unpack(self._full, self._full.read(identities))
        kind = signature(batch)
        if kind is None:
            self.drop("a batch is not one row of each input a sample")
            return ask()
        if self.samples and identities is None:
            return ask()
        identities = identities if self.samples else None
        hashed = identities is None or not self.fixed
        prints = sample_fingerprints(batch) if hashed else None
        bank = self._banks.get(kind)
        if bank is not None:
            rows, known = bank.find(identities, prints)
            if bank.changed(rows, known, prints):
                self.drop("a sample came back with other content, as random augmentation makes it")
                return ask()
            if bool(known.numpy().all()):
                self.hits += len(rows)
                return self._unpack(bank, bank.read(rows))
        records = ask()
        count = len(prints) if prints is not None else len(identities) if identities is not None else 0
        if any(len(one) != count for record in records for one in (record.output, *record.features.values())):
            self.drop("the teacher's output is not one row a sample")
            return records
        self.misses += count
        return self._kept(kind, identities, prints, records)

    def _kept(
        self, kind: tuple[Any, ...], identities: Tensor | None, prints: Tensor | None, records: list[Record]
    ) -> Sequence[Record | Kept]:
        """Keeps what is new of ``records``, and returns them as they are kept."""
        bank = self._banks.get(kind)
        if bank is None:
            bank = self._banks[kind] = self._open(kind, records)
        exact = [one for record, top in zip(records, bank.form.tops, strict=True) for one in self._pack(record, top)]
        if [one.shape[1:] for one in exact] != [shape for shape, _ in bank.specs]:
            self.drop("the teacher's output has another shape for inputs of the same shape")
            return records
        values = [self._narrow(one, dtype == "float16") for one, dtype in zip(exact, bank.form.dtypes, strict=True)]
        rows, known = bank.find(identities, prints)
        if bank.changed(rows, known, prints):
            self.drop("a sample came back with other content, as random augmentation makes it")
            return records
        if not bank.write(rows, ~known, prints, values):
            return records
        rows, known = bank.find(identities, prints)
        return self._unpack(bank, bank.read(rows)) if bool(known.numpy().all()) else records

    def state(self) -> tuple[str | None, int, int]:
        """Returns what a run that is taken up again has to know."""
        return self.reason, self.hits, self.misses

    def restore(self, state: tuple[str | None, int, int]) -> None:
        """Goes on from an earlier :meth:`state`."""
        self.reason, self.hits, self.misses = state

    def close_epoch(self, epoch: int) -> None:
        """Looks whether all is kept by now; goes if hashes identify samples and none came back in a later epoch."""
        if self.fixed and self.samples and len(self._banks) == 1:
            (bank,) = self._banks.values()
            self._full = bank if bool(bank.valid.all()) else None
        if self.active and epoch >= 2 and not self.samples and not self.hits:
            self.drop("no sample came back with the same content, as random augmentation makes it")

    def drop(self, reason: str) -> None:
        """Forgets everything, for the reason given."""
        self.reason = reason
        self._forget()

    def facts(self) -> dict[str, Any]:
        """Returns what the report says of the cache."""
        held = sum(bank.bytes for bank in self._banks.values())
        where = "file" if any(bank.folder is not None for bank in self._banks.values()) else "memory"
        where = where if self.active else "nowhere"
        return {"cache hits": self.hits, "misses": self.misses, "bytes": held, "kept in": where}

    def close(self, owner: bool) -> None:
        """Removes what the caller did not ask to keep; a folder that processes share is its ``owner``'s to remove."""
        self._forget()
        if owner and self._folder is not None and self.settings.path is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _forget(self) -> None:
        self._full = None
        self._banks.clear()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def _adopt(self, folder: Path, teachers: str) -> None:
        """Makes ``folder`` ours; outputs of other teachers, or kept in another way, are removed."""
        settings = self.settings
        ours = {
            "teachers": teachers,
            "samples": self.samples,
            "topk": settings.topk,
            "condensable": self.condensable,
            "dtype": str(settings.dtype),
            "temperature": self.temperature if settings.topk else None,
        }
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "cache.json"
        if about.exists() and json.loads(about.read_text()) != ours:
            for old in folder.glob("*.bank"):
                old.unlink()
        about.write_text(json.dumps(ours))

    def _open(self, kind: tuple[Any, ...], records: Sequence[Record]) -> _Bank:
        tops = tuple(self._top(record.output) for record in records)
        exact = [one for record, top in zip(records, tops, strict=True) for one in self._pack(record, top)]
        rows = self.samples or 1024
        flat = [self._narrow(one, half) for one, half in zip(exact, self._halves(exact), strict=True)]
        size = rows * sum(math.prod(one.shape[1:]) * one.element_size() for one in flat)
        folder = self._folder
        if folder is None and size + sum(bank.bytes for bank in self._banks.values()) > self.settings.limit:
            folder = self._spill()
        form = Form(tops, tuple(str(one.dtype).removeprefix("torch.") for one in flat))
        name = f"{hash_of(kind):016x}"
        if folder is not None:
            form = form.settled(folder / f"{name}.form.bank")
            flat = [one for record, top in zip(records, form.tops, strict=True) for one in self._pack(record, top)]
        return _Bank(
            [(one.shape[1:], getattr(torch, dtype)) for one, dtype in zip(flat, form.dtypes, strict=True)],
            rows,
            folder=folder,
            name=name,
            owner=self,
            form=form,
            layout=_layout(records, form.tops),
        )

    def _halves(self, exact: Sequence[Tensor]) -> list[bool]:
        """Returns which tensors are to be kept in float16."""
        size = (self.samples or UNTOLD) * sum(math.prod(one.shape[1:]) * one.element_size() for one in exact)
        return [
            one.is_floating_point() and (size > EXACT or math.prod(one.shape[1:]) > SMALL) and not _blurred(one)
            for one in exact
        ]

    def _spill(self) -> Path:
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="netopt-cache-"))
        return self._temporary

    def _top(self, output: Tensor) -> int | None:
        """Returns how many logits of each position are kept, or ``None`` for all."""
        wanted, classes = self.settings.topk, output.shape[-1]
        if wanted is None or output.dim() > 3:
            return None
        if wanted != "auto":
            return wanted if wanted < classes else None
        if not self.condensable or classes <= SMALL:
            return None
        whole = (output.reshape(-1, classes)[:256].float() / self.temperature).log_softmax(-1)
        chances = whole.exp()
        said = (chances * (whole + math.log(classes))).sum()
        for few in CHOICES:
            kept = condense(whole * self.temperature, few, self.temperature).dense()
            lost = (chances * (whole - (kept / self.temperature).log_softmax(-1))).sum()
            if bool(lost <= LOST * said):
                return few
        return None

    def _pack(self, record: Record, top: int | None) -> list[Tensor]:
        """Returns the tensors to keep for one teacher, samples first."""
        features = [one.detach().cpu() for one in record.features.values()]
        if top is None:
            return [record.output.detach().cpu(), *features]
        largest, which, rest, _ = condense(record.output.detach(), top, self.temperature)
        return [largest.cpu(), which.cpu(), rest.cpu(), *features]

    def _unpack(self, bank: _Bank, tensors: list[Tensor]) -> list[Kept]:
        records, left = [], iter(tensors)
        for shape, dtype, home, topped, names in bank.layout:
            output: Tensor | TopK
            if topped:
                top, which, rest = (next(left).to(home, non_blocking=True) for _ in range(3))
                output = TopK(top.to(dtype), which, rest, shape[-1])
            else:
                output = next(left).to(home, non_blocking=True).to(dtype)
            records.append(Kept(output, {name: next(left).to(home).to(one) for name, one in names}))
        return records

    def _narrow(self, value: Tensor, half: bool) -> Tensor:
        wanted = self.settings.dtype or (torch.float16 if half and value.element_size() > 2 else value.dtype)
        if not value.is_floating_point() or wanted is not torch.float16 or value.dtype is torch.float16:
            return value.to(wanted) if value.is_floating_point() else value
        narrow = value.to(torch.float16)
        return value if bool((narrow.isinf() != value.isinf()).any()) else narrow


def _blurred(value: Tensor) -> bool:
    """Whether float16 rounds away a thousandth or more of what sets one sample, or position, apart from another."""
    rows = value.flatten(0, -2) if value.dim() in (2, 3) else value.reshape(len(value), -1)
    rows = torch.where(rows.isfinite(), rows, 0).double()
    error = rows.half().double() - rows
    return not bool(error.square().mean().sqrt() <= FAINT * rows.var(0, correction=0).mean().sqrt())


class Form(NamedTuple):
    """In which form a bank keeps outputs.

    Args:
        tops: How many logits of each teacher, ``None`` for all.
        dtypes: The dtype of each tensor kept.
    """

    tops: tuple[int | None, ...]
    dtypes: tuple[str, ...]

    def settled(self, path: Path) -> Form:
        """Returns the form written at ``path``, this one if there is none: the first process to come decides."""
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self))
        try:
            path.hardlink_to(beside)
        except OSError:
            # It is there already, or this file system has no links.
            if not path.exists():
                beside.replace(path)
        beside.unlink(missing_ok=True)
        tops, dtypes = json.loads(path.read_text())
        return Form(tuple(tops), tuple(dtypes))


def hash_of(kind: tuple[Any, ...]) -> int:
    """Returns a number for a signature that is the same in every process."""
    total = 0
    for byte in repr(kind).encode():
        total = (total * 1099511628211 + byte) % 2**63
    return total


_Layout = list[tuple[torch.Size, torch.dtype, torch.device, bool, list[tuple[str, torch.dtype]]]]


def _layout(records: Sequence[Record], tops: Sequence[int | None]) -> _Layout:
    return [
        (
            record.output.shape[1:],
            record.output.dtype,
            record.output.device,
            top is not None,
            [(name, one.dtype) for name, one in record.features.items()],
        )
        for record, top in zip(records, tops, strict=True)
    ]


class _Bank:
    """Rows of a fixed shape, in memory or in memory-mapped files, and which row is whose."""

    def __init__(
        self,
        specs: list[tuple[torch.Size, torch.dtype]],
        rows: int,
        *,
        folder: Path | None,
        name: str,
        owner: TeacherCache,
        form: Form,
        layout: _Layout,
    ) -> None:
        self.specs, self.rows, self.folder, self.name, self.owner = specs, rows, folder, name, owner
        self.form, self.layout = form, layout
        self.by_index = owner.samples > 0
        if folder is not None and not self.by_index:
            found = folder / f"{name}.valid.bank"
            self.rows = max(rows, found.stat().st_size) if found.exists() else rows
        self._map()
        self.where: dict[tuple[int, int], int] = {}
        if not self.by_index:
            used = self.valid.nonzero().squeeze(1).tolist()
            self.where = {tuple(self.prints[row].tolist()): row for row in used}

    @property
    def bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in self.stores)

    def find(self, identities: Tensor | None, prints: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns each sample's row, and whether it is filled."""
        if identities is not None:
            rows = identities.long()
            return rows, self.valid[rows] > 0
        assert prints is not None, "without an index a sample is known by its content"
        rows = torch.tensor([self.where.get((a, b), -1) for a, b in prints.tolist()])
        return rows, rows >= 0

    def changed(self, rows: Tensor, known: Tensor, prints: Tensor | None) -> bool:
        """Whether a sample kept before has other content now."""
        if prints is None or not self.by_index:
            return False
        return not torch.equal(self.prints[rows[known]], prints[known])

    def read(self, rows: Tensor) -> list[Tensor]:
        return [one.index_select(0, rows) for one in self.stores]

    def write(self, rows: Tensor, fresh: Tensor, prints: Tensor | None, values: Sequence[Tensor]) -> bool:
        """Fills the rows of the samples that are new; False if there is no room for them."""
        if not self._widen([one.dtype for one in values]):
            return False
        chosen = fresh.nonzero().squeeze(1)
        if not self.by_index:
            assert prints is not None, "without an index a sample is known by its content"
            first = len(self.where)
            for place, (a, b) in enumerate(prints.tolist()):
                if fresh[place]:
                    self.where.setdefault((a, b), len(self.where))
            if len(self.where) > self.rows and not self._grow():
                self.where = {key: row for key, row in self.where.items() if row < first}
                return False
            rows = torch.tensor([self.where[a, b] for a, b in prints.tolist()])
        rows = rows[chosen]
        for store, value in zip(self.stores, values, strict=True):
            store[rows] = value[chosen].to(store.dtype)
        if prints is not None:
            self.prints[rows] = prints[chosen]
        # Last, so that a row another process sees as filled is.
        self.valid[rows] = 1
        return True

    def _map(self) -> None:
        self.stores = [self._tensor(f"{place}", shape, dtype) for place, (shape, dtype) in enumerate(self.specs)]
        self.prints = self._tensor("prints", torch.Size((2,)), torch.int64)
        self.valid = self._tensor("valid", torch.Size(()), torch.uint8)

    def _tensor(self, part: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = (self.rows, *shape)
        if self.folder is None:
            return torch.zeros(size, dtype=dtype) if part == "valid" else torch.empty(size, dtype=dtype)
        path = self.folder / f"{self.name}.{part}.bank"
        # A new file reads as zeros and takes up room only where it has been written.
        return torch.from_file(str(path), shared=True, size=math.prod(size), dtype=dtype).reshape(size)

    def _grow(self) -> bool:
        needed = self.bytes * 2
        if self.folder is None and needed > self.owner.settings.limit:
            self._move(self.owner._spill())
        if self.folder is not None and shutil.disk_usage(self.folder).free < self.bytes * 1.2:
            return False
        old, rows = (self.stores, self.prints, self.valid), self.rows
        self.rows *= 2
        self._map()
        if self.folder is None:
            for store, value in zip(self.stores, old[0], strict=True):
                store[:rows] = value
            self.prints[:rows], self.valid[:rows] = old[1], old[2]
        return True

    def _move(self, folder: Path) -> None:
        old = self.stores, self.prints, self.valid
        self.folder = folder
        self._map()
        for store, value in zip(self.stores, old[0], strict=True):
            store.copy_(value)
        self.prints.copy_(old[1])
        self.valid.copy_(old[2])

    def _widen(self, dtypes: Sequence[torch.dtype]) -> bool:
        """Keeps everything in the wider of the dtypes from now on; in files, which others may read, it cannot."""
        wide = [torch.promote_types(store.dtype, dtype) for store, dtype in zip(self.stores, dtypes, strict=True)]
        if all(dtype == store.dtype for store, dtype in zip(self.stores, wide, strict=True)):
            return True
        if self.folder is not None:
            return False
        self.stores = [store.to(dtype) for store, dtype in zip(self.stores, wide, strict=True)]
        self.specs = [(shape, dtype) for (shape, _), dtype in zip(self.specs, wide, strict=True)]
        return True


def cache_for(cache: Any, folder: Path | None) -> Cache | None:
    """Returns the settings meant by ``cache=``, by default in ``folder``; ``None`` for no cache.

    Raises:
        InvalidArgumentError: not ``"auto"``, a bool, or a `Cache`.
    """
    if cache is False or cache is None:
        return None
    if cache is True or cache == "auto":
        return Cache(path=folder)
    if isinstance(cache, Cache):
        return cache if cache.path is not None else replace(cache, path=folder)
    if isinstance(cache, (str, Path)):
        return Cache(path=cache)
    raise InvalidArgumentError(f"cache must be 'auto', True, False, a folder or a Cache, not {cache!r}.")
