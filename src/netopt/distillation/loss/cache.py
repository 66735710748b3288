"""A teacher returns the same for the same sample, so it need run but once on each.

Outputs are kept by the sample's identity, its index in the dataset or else a hash of its content, and never by its
position in the epoch, which a shuffling loader changes. What is kept is what is used from the first time on, so that a
run does not depend on what happened to be kept already. A sample that comes back with another content has been
augmented at random: then nothing may be kept, and the cache is dropped with a note in the report.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from netopt.distillation.data.fingerprints import data_fingerprints, sample_fingerprints, signature
from netopt.distillation.data.sources import Source
from netopt.distillation.files import SharedFolder
from netopt.distillation.loss.banks import Bank, Form, Home
from netopt.distillation.loss.divergence import TopK, condense
from netopt.distillation.loss.objective import Kept, Objective, Record
from netopt.errors import CheckpointError, InvalidArgumentError

__all__ = ["Cache", "TeacherCache"]

SMALL = 1024
EXACT = 2**24
UNKNOWN = 2**13
CHOICES = (64, 256)
LOST = 0.01
FAINT = 1e-3
AUGMENTED = "a sample came back with other content, as random augmentation makes it"


@dataclass(frozen=True)
class Cache:
    """How the teacher's outputs are kept.

    Args:
        dtype: Of what is kept. By default outputs are kept exactly where that takes no more than 1024 numbers a sample
            and 16 MiB in all, and in float16 beyond, or exactly even so where float16 cannot hold them: where values
            exceed its range, or vary less than it can tell apart.
        topk: Keep only that many of the largest logits of each position, and how much probability the others share;
            ``None`` keeps all. By default 64 of a vocabulary of more than 1024, where the loss needs no more (``"kl"``)
            and they hold all but a hundredth of the information in the teacher's output, or else 256, or else all.
        limit: Bytes to keep in memory; what would need more is kept in a memory-mapped file.
        path: A folder to keep the outputs in and to find them again, as far as they prove to be this teacher's for
            these samples; the rest is computed anew. By default nothing outlives the call.

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
        source: Where the samples come from: the size of the dataset whose indices are the identities, 0 where hashes
            are; and whether samples cannot change, so that none needs to be compared with its first time.
        objective: At which temperature the probabilities that ``topk`` drops keep their sum, and whether the losses
            need no more than the largest logits and that sum.
        about: Identifies the teachers and their outputs; a file found in a folder must have the same.
        folder: Where processes that share it keep everything.
    """

    def __init__(
        self,
        settings: Cache,
        source: Source,
        objective: Objective,
        *,
        about: Mapping[str, Any],
        folder: SharedFolder | None = None,
    ) -> None:
        self.settings, self.samples, self.fixed = settings, source.samples, source.fixed
        self.temperature, self.condensable = objective.temperature, objective.condensable
        self.hits = self.misses = 0
        self.reason: str | None = None
        self._banks: dict[tuple[Any, ...], Bank] = {}
        self._layouts: dict[tuple[Any, ...], _Layout] = {}
        self._full: tuple[Bank, _Layout] | None = None
        self.shared = folder
        self._folder = Path(settings.path) if settings.path is not None else folder and folder.path
        self._same_run = False
        self._prints: Tensor | None = None
        if settings.path is not None and self.fixed:
            self._prints = data_fingerprints(source.whole)
        self._about = {
            **about,
            "samples": self.samples,
            "topk": settings.topk,
            "condensable": self.condensable,
            "dtype": str(settings.dtype),
            "temperature": self.temperature if settings.topk else None,
        }

    @property
    def active(self) -> bool:
        """Whether anything is kept, or may be."""
        return self.reason is None

    def records(
        self, identities: Tensor | None, batch: Any, run: Callable[[], list[Record]]
    ) -> Sequence[Record | Kept]:
        """Returns the teachers' outputs for ``batch``, by ``run`` if any sample of it is new."""
        if self._full is not None and identities is not None:
            self.hits += len(identities)
            return self._unpack(self._full[1], self._full[0].read(identities))
        kind = signature(batch)
        if kind is None:
            self.drop("a batch is not one row of each input a sample")
            return run()
        if self.samples and identities is None:
            return run()
        identities = identities if self.samples else None
        prints = self._fingerprints(identities, batch)
        bank = self._banks.get(kind)
        if bank is not None and bank.proven:
            rows, known = bank.find(identities, prints)
            earlier, now = bank.changed(rows, known, prints)
            if now:
                self.drop(AUGMENTED)
                return run()
            if bool(known.numpy().all()) and not earlier:
                self.hits += len(rows)
                return self._unpack(self._layouts[kind], bank.read(rows))
        records = run()
        count = len(prints) if prints is not None else len(identities) if identities is not None else 0
        if any(len(one) != count for record in records for one in (record.output, *record.features.values())):
            self.drop("the teacher's output is not one row a sample")
            return records
        self.misses += count
        return self._kept(kind, identities, prints, records)

    def _fingerprints(self, identities: Tensor | None, batch: Any) -> Tensor | None:
        if identities is None or not self.fixed:
            return sample_fingerprints(batch)
        return None if self._prints is None else self._prints[identities]

    def _kept(
        self, kind: tuple[Any, ...], identities: Tensor | None, prints: Tensor | None, records: list[Record]
    ) -> Sequence[Record | Kept]:
        """Keeps what is new of ``records``, and returns them as they are kept."""
        bank = self._banks.get(kind)
        if bank is None:
            bank = self._open(kind, records)
        exact = self._packed(records, bank.form.tops)
        if [tuple(one.shape[1:]) for one in exact] != [shape for shape, _ in bank.form.specs]:
            if not bank.proven:
                return self._replaced(kind, identities, prints, records)
            self.drop("the teacher's output has another shape for inputs of the same shape")
            return records
        values = [self._narrow(one, to is torch.float16) for one, to in zip(exact, bank.form.dtypes, strict=True)]
        rows, known = bank.find(identities, prints)
        earlier, now = bank.changed(rows, known, prints)
        if now:
            self.drop(AUGMENTED)
            return records
        unproven = not bank.proven and bool(known.any())
        if earlier or (unproven and not bank.agrees(rows[known], [one[known] for one in values])):
            return self._replaced(kind, identities, prints, records)
        bank = self._roomy(kind, bank, prints, known, values)
        if bank is None:
            return records
        bank.write(rows, ~known, prints, values)
        rows, known = bank.find(identities, prints)
        return self._unpack(self._layouts[kind], bank.read(rows)) if bool(known.numpy().all()) else records

    def _replaced(
        self, kind: tuple[Any, ...], identities: Tensor | None, prints: Tensor | None, records: list[Record]
    ) -> Sequence[Record | Kept]:
        """Keeps ``records`` in a file of their own, since the one found is for other samples or other teachers."""
        home = self._banks.pop(kind).home
        assert home is not None, "what was found has a name"
        home.path.unlink(missing_ok=True)
        return self._kept(kind, identities, prints, records)

    def _roomy(
        self, kind: tuple[Any, ...], bank: Bank, prints: Tensor | None, known: Tensor, values: Sequence[Tensor]
    ) -> Bank | None:
        """Returns the bank, or a larger one, in which there is room for what is new; ``None`` if there is none."""
        dtypes = [torch.promote_types(old, one.dtype) for old, one in zip(bank.form.dtypes, values, strict=True)]
        wider = dtypes != bank.form.dtypes
        if wider and bank.mapped:
            # In files, which others may read, the form stays.
            return None
        lacking = bank.room(prints, ~known)
        if lacking <= 0 and not wider:
            return bank
        rows = max(2 * bank.rows, bank.rows + lacking) if lacking > 0 else bank.rows
        names = [str(one).removeprefix("torch.") for one in dtypes]
        form = Form(bank.form.tops, tuple((shape, one) for (shape, _), one in zip(bank.form.specs, names, strict=True)))
        try:
            self._banks[kind] = bank.moved_to(self._empty(form, rows, bank.home, anew=True))
        except CheckpointError:
            # Where there is no room the teachers run each time.
            return None
        return self._banks[kind]

    def state(self) -> tuple[str | None, int, int]:
        """Returns what a run that is taken up again has to know."""
        return self.reason, self.hits, self.misses

    def restore(self, state: tuple[str | None, int, int]) -> None:
        """Goes on from an earlier :meth:`state`."""
        self.reason, self.hits, self.misses = state
        self._same_run = True

    def close_epoch(self, epoch: int) -> None:
        """Looks whether all is kept by now; goes if hashes identify samples and none came back in a later epoch."""
        if self.fixed and self.samples and len(self._banks) == 1:
            ((kind, bank),) = self._banks.items()
            self._full = (bank, self._layouts[kind]) if bank.complete else None
        if self.active and epoch >= 2 and not self.samples and not self.hits:
            self.drop("no sample came back with the same content, as random augmentation makes it")

    def drop(self, reason: str) -> None:
        """Forgets everything, for the reason given."""
        self.reason = reason
        self._forget()

    def facts(self) -> dict[str, Any]:
        """Returns the facts that the report shows."""
        held = sum(bank.bytes for bank in self._banks.values())
        where = "file" if any(bank.mapped for bank in self._banks.values()) else "memory"
        where = where if self.active else "nowhere"
        return {"cache hits": self.hits, "misses": self.misses, "bytes": held, "kept in": where}

    def detach(self) -> None:
        """Takes the files that processes share, and all have opened, out of their folder, so that none is left."""
        if self.shared is not None:
            self.shared.remove()
            self.shared = self._folder = None

    def close(self) -> None:
        """Removes what the caller did not ask to keep."""
        self._forget()
        self.detach()

    def _forget(self) -> None:
        self._full = None
        self._banks.clear()

    def _open(self, kind: tuple[Any, ...], records: Sequence[Record]) -> Bank:
        """Opens the bank for samples of one kind, in the form that suits these first outputs."""
        tops = tuple(self._top(record.output) for record in records)
        exact = self._packed(records, tops)
        flat = [self._narrow(one, half) for one, half in zip(exact, self._halves(exact), strict=True)]
        form = Form(tops, tuple((tuple(one.shape[1:]), str(one.dtype).removeprefix("torch.")) for one in flat))
        rows, home = self.samples or 1024, None
        if self._folder is not None:
            about = {**self._about, "kind": repr(kind), "features": [list(record.features) for record in records]}
            home = Home(self._folder / f"{hash_of(about)}.bank", about)
        bank = self._empty(form, rows, home)
        if self._same_run or self.shared is not None:
            bank.adopt()
        self._banks[kind], self._layouts[kind] = bank, _layout(records, bank.form.tops)
        return bank

    def _empty(self, form: Form, rows: int, home: Home | None, *, anew: bool = False) -> Bank:
        """Returns a bank in the folder if there is one, in memory where it fits, or in a file without a name."""
        by_index = self.samples > 0
        if home is not None:
            found = Bank.at(home, form, rows, by_index, anew=anew)
            if found is not None:
                return found
        size = rows * sum(
            math.prod(shape) * to.itemsize for (shape, _), to in zip(form.specs, form.dtypes, strict=True)
        )
        spilled = size + sum(bank.bytes for bank in self._banks.values()) > self.settings.limit
        return (Bank.in_file if spilled else Bank.in_memory)(form, rows, by_index)

    def _halves(self, exact: Sequence[Tensor]) -> list[bool]:
        """Returns which tensors are to be kept in float16."""
        size = (self.samples or UNKNOWN) * sum(math.prod(one.shape[1:]) * one.element_size() for one in exact)
        return [
            one.is_floating_point() and (size > EXACT or math.prod(one.shape[1:]) > SMALL) and not _blurred(one)
            for one in exact
        ]

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
        information = (chances * (whole + math.log(classes))).sum()
        for few in CHOICES:
            kept = condense(whole * self.temperature, few, self.temperature).dense()
            lost = (chances * (whole - (kept / self.temperature).log_softmax(-1))).sum()
            if bool(lost <= LOST * information):
                return few
        return None

    def _packed(self, records: Sequence[Record], tops: Sequence[int | None]) -> list[Tensor]:
        return [one for record, top in zip(records, tops, strict=True) for one in self._pack(record, top)]

    def _pack(self, record: Record, top: int | None) -> list[Tensor]:
        """Returns the tensors to keep for one teacher, samples first."""
        features = [one.detach().cpu() for one in record.features.values()]
        if top is None:
            return [record.output.detach().cpu(), *features]
        largest, which, rest, _ = condense(record.output.detach(), top, self.temperature)
        return [largest.cpu(), which.cpu(), rest.cpu(), *features]

    def _unpack(self, layout: _Layout, tensors: list[Tensor]) -> list[Kept]:
        records, left = [], iter(tensors)
        for shape, dtype, home, topped, names in layout:
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


def hash_of(about: Mapping[str, Any]) -> str:
    """Returns a hash of a bank's identity, the same in every process."""
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12).hexdigest()


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
