"""Every weight of a smaller model refitted to what the model it was made from puts out, in the order of the forward.

Both models run on the same batches, in step (:mod:`~netopt.reconstruction.lockstep`). Where they reach a weight, what
the smaller model's outputs lack is known row by row, on inputs that everything cut and refitted before has produced; a
regression corrects the weight and the constant behind it, and both go on. A weight used several times in one forward (a
recurrent one, a shared layer) has no single such moment: it is folded before, from the inputs of the larger model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.batches import Batch
from netopt.importance.contractions import Contraction, ContractionWatch, Use, Uses
from netopt.importance.differentiation import padding, squares
from netopt.importance.inputs import Matrix, filled_like
from netopt.model.kernels import Unfused
from netopt.model.parameters import Place, places
from netopt.model.restore import restored
from netopt.model.signals import UndoLog, entered
from netopt.model.writes import CopyOnWrite, write
from netopt.progress import bar
from netopt.reconstruction.lockstep import Forward, Lockstep, twin
from netopt.reconstruction.regression import Sums, correction

__all__ = ["Refit", "change_when_refitted", "former_name", "refitted"]

ROWS_PER_COLUMN, ROWS_AT_LEAST = 16, 4000
"""How many rows of a contraction are looked at over all data: so many for each column, and so many more."""

COLUMNS_AT_MOST = 1300

LEAST = 1e-3
"""Rows this much smaller than they are on average count for no more."""

Cuts = Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True)
class Refit:
    """What became of one weight.

    Attributes:
        name: The weight's name.
        error: What its outputs lacked when it was reached, squared, as a share of what they should be.
        removed: The share of that which the refit takes away, on calibration data it was not fitted to.
        note: Why it stayed as it was, if it did; or what kind of fit it was.
    """

    name: str
    error: float = 0.0
    removed: float = 0.0
    note: str = ""


class Kept(NamedTuple):
    """What a smaller model has of the one it was made from.

    Attributes:
        tensors: The indices it keeps of tensors.
        former: The prefixes of names in the larger model by its own, where entries of lists were numbered anew.
    """

    tensors: Cuts
    former: Mapping[str, str]


def refitted(
    log: UndoLog,
    model: nn.Module,
    dense: nn.Module,
    kept: Kept,
    held: Sequence[Batch],
    *,
    progress: bool = False,
) -> list[Refit]:
    """Refits the weights of ``model``.

    Args:
        log: Puts them back if its block fails.
        model: The smaller model; run in eval mode.
        dense: The model it was made from, with parameters of its own; given back as it was.
        kept: What ``model`` has of ``dense``.
        held: Calibration batches.
        progress: Whether to show a progress bar.
    """
    fitting = _Fitting(model, dense, kept.tensors, held, kept.former)
    log.callback(fitting.undo, on=BaseException)
    with entered(torch.inference_mode(False), torch.no_grad()):
        fitting.run(progress)
    return fitting.done


def change_when_refitted(
    model: nn.Module,
    dense: nn.Module,
    tensors: Cuts,
    held: Sequence[Batch],
    outputs: Callable[[Any], list[Tensor]],
    uses: dict[str, Use],
) -> float:
    """How far the last batch's outputs are from what they were, once what lost inputs has been refitted; squared.

    It is refitted on the other batches, if there are any.

    Args:
        model: The smaller model; given back as it was.
        dense: The model it was made from.
        tensors: The indices ``model`` keeps of the tensors of ``dense``.
        held: The batches.
        outputs: From a forward's result to the outputs that count.
        uses: How the weights of ``dense`` are used; found if empty.
    """
    fitting = _Fitting(model, dense, tensors, held)
    fitting.uses, fitting.fitted = uses, max(len(held) - 1, 1)
    with UndoLog() as log:
        log.callback(fitting.undo)
        log.enter_context(torch.inference_mode(False), torch.no_grad())
        results = fitting.run(False, whole=False)
    uses.update(fitting.uses)
    last = len(held) - 1
    pairs = zip(outputs(results[last, False]), outputs(results[last, True]), strict=True)
    return squares([one - other for one, other in pairs], padding(held[last]))


class _Fitting:
    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        tensors: Cuts,
        held: Sequence[Batch],
        former: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.model, self.dense, self.tensors, self.held = model, dense, tensors, held
        self.fitted = len(held)
        self.small, self.large = _weights(model, former), _weights(dense)
        named = [*model.named_parameters(), *model.named_buffers()]
        self.vectors = {former_name(name, former): one for name, one in named}
        self.uses: dict[str, Use] = {}
        self.done: list[Refit] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def run(self, progress: bool, *, whole: bool = True) -> dict[tuple[int, bool], Any]:
        """Refits everything there is, or what lost inputs; what each batch gave in either model at the end."""
        with restored(self.model, self.dense, writes=False) as log:
            log.enter_context(Unfused(attention=False))
            batches.set_eval(self.model)
            batches.set_eval(self.dense)
            for tensor in self._look():
                log.callback(write, tensor, tensor.detach().clone())
            able = [name for name in self.uses if self._obstacle(name) is None]
            self._fold([name for name in able if self.uses[name].count > 1 and name in self.tensors])
            once = [name for name in able if self.uses[name].count == 1 and (whole or self._loses_inputs(name))]
            with bar(None, "repair", total=len(once), shown=progress, unit="weight") as shown:

                def settle(name: str, group: list[Forward]) -> None:
                    self._settle(name, group)
                    shown.update()

                models = {True: (self.dense, self.large), False: (self.model, self.small)}
                summed = [name for name in once if self.uses[name].is_summed]
                results = Lockstep(once, summed, settle, to_the_end=not whole).run(models, self.held)
            new = [(tensor, tensor.clone()) for tensor, _ in self.before]
        for tensor, value in new:  # what a forward changes was put back, and with it what is refitted
            tensor.copy_(value)
        known = {one.name for one in self.done}
        known |= {name for name, use in self.uses.items() if use.looked_up and not use.count}
        for name in self.large:
            if name in self.tensors and name not in known:
                self.done.append(Refit(name, note=self._obstacle(name) or "is not reached by these data"))
        return results

    def _loses_inputs(self, name: str) -> bool:
        kept = filled_like(self.large[name].parameter, 1, torch.bool)
        for dim, indices in self.tensors.get(name, {}).items():
            stays = torch.zeros(kept.shape[dim], dtype=torch.bool, device=kept.device)
            stays[indices.to(kept.device)] = True
            kept &= stays.view([-1 if index == dim else 1 for index in range(kept.dim())])
        return not bool(self.uses[name].matrices[0].rows(kept).any(1).all())

    def undo(self) -> None:
        """Puts every value back that was changed."""
        with torch.inference_mode(False), torch.no_grad():
            for tensor, value in reversed(self.before):
                tensor.copy_(value)

    def _look(self) -> list[Tensor]:
        """Runs the larger model for its uses of weights; the parameters of both that a forward writes into."""
        writes = CopyOnWrite(self.dense.parameters())
        with writes.watching():
            if self.uses:
                batches.feed(twin(self.dense), self.held[0])
            else:
                self.uses = self._survey()
        names = {name for name, one in self.dense.named_parameters() if id(one) in writes.written}
        return [*writes.written.values(), *(one for name, one in self.vectors.items() if name in names)]

    def _survey(self) -> dict[str, Use]:
        """How each weight is used, on as many batches as it takes to see them all."""
        found: dict[str, Use] = {}
        for batch in self.held:
            uses = Uses(self.dense)
            with ContractionWatch(self.large, uses.see, uses.after):
                batches.feed(twin(self.dense), batch)
            found = uses.found | found
            if found.keys() >= self.large.keys():
                break
        return found

    def _obstacle(self, name: str) -> str | None:
        """Why a weight cannot be refitted, if it cannot."""
        if name not in self.small:
            return "is masked, or computed from others"
        if name not in self.uses:
            return "is read by no matrix product or convolution"
        if len(self.uses[name].matrices) > 1:
            return "is read as several matrices"
        if self.uses[name].looked_up:
            return "is also looked up"
        if self.uses[name].matrices[0].count != self.large[name].parameter.numel():
            return "is read in part"
        return None

    # A weight used once in a forward, where both models have reached it.

    def _settle(self, name: str, group: list[Forward]) -> None:
        halves: dict[int, Sums] = {}
        matrix, kept = None, None
        for index in sorted({one.index for one in group if one.index < self.fitted}):
            found = {one.dense: one.at for one in group if one.index == index}
            dense, small = found.get(True), found.get(False)
            if dense is None or small is None or dense.count != small.count:
                continue  # not the same rows find their way here in both models
            if kept is None or matrix != small.reading.matrix:
                matrix = small.reading.matrix
                kept = self._positions(name, matrix, outputs=True)
            rows = self._rows(name, index, dense)
            inputs = _wide(small.inputs(rows))
            wanted = _wide(dense.outputs(rows)).mT.flatten(0, 1)[kept].mT
            lacking = wanted - _wide(small.outputs(rows))
            counts = _counts(wanted, alike=self.uses[name].is_normalised)
            for half, part in self._halves(index, len(rows)):
                sums = Sums.of(inputs[:, part], lacking[:, part], wanted[:, part], counts[part])
                halves[half] = halves[half] + sums if half in halves else sums
        if matrix is None or len(halves) < 2:
            self.done.append(Refit(name, note="too few calibration data reach it"))
            return
        self._correct(name, matrix, [halves[0], halves[1]])

    def _rows(self, name: str, index: int, dense: Contraction) -> Tensor:
        """Which rows of a contraction are looked at: some at random, without those of padding."""
        mask = padding(self.held[index])
        whole = torch.arange(dense.count)
        if dense.reading.convolution is None and mask is not None and mask.numel() == dense.count:
            whole = mask.flatten().cpu().nonzero().flatten()
        columns = min(dense.reading.matrix.columns, COLUMNS_AT_MOST)
        wanted = -(-(ROWS_PER_COLUMN * columns + ROWS_AT_LEAST) // self.fitted)
        if len(whole) > wanted:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {index}".encode()))
            whole = whole[torch.randperm(len(whole), generator=generator)[:wanted]].sort().values
        return whole.to(dense.output.device)

    def _halves(self, index: int, count: int) -> list[tuple[int, slice]]:
        """Which of these rows are of which half: batches take turns, a single one is cut in the middle."""
        if self.fitted > 1:
            return [(index % 2, slice(None))]
        return [(0, slice(0, count // 2)), (1, slice(count // 2, None))]

    def _correct(self, name: str, matrix: Matrix, halves: list[Sums], note: str = "") -> None:
        offset = self._offset(name, matrix)
        found = correction(halves, with_offset=offset is not None)
        if found.weight is not None:
            parameter = self.small[name].parameter.detach()
            self._note(parameter)
            matrix.write(parameter, (matrix.rows(parameter).double() + found.weight).to(parameter.dtype))
        if found.offset is not None and offset is not None:
            vector, places_, sign = offset
            self._note(vector)
            vector[places_] += sign * found.offset.flatten().to(vector.dtype)
        if found.weight is None and found.offset is None:
            note = "gains nothing on other data" if found.removed == 0 and found.error > 0 else note
        self.done.append(Refit(name, found.error, found.removed, note))

    def _note(self, tensor: Tensor) -> None:
        self.before.append((tensor, tensor.clone()))

    def _offset(self, name: str, matrix: Matrix) -> tuple[Tensor, Tensor, int] | None:
        """Where the smaller model takes a constant for these outputs: a vector, the indices, and the sign."""
        known = self.uses[name].offset
        vector = self.vectors.get(known.name) if known is not None else None
        if known is None or vector is None or not vector.is_floating_point():
            return None
        kept = self.tensors.get(known.name, {}).get(0, torch.arange(len(vector)))
        here = torch.nonzero((kept >= known.start) & (kept < known.stop)).flatten()
        if len(kept) != len(vector) or len(here) != matrix.size[0] * matrix.size[1]:
            return None
        return vector.detach(), here.to(vector.device), -1 if known.mean else 1

    def _positions(self, name: str, matrix: Matrix, *, outputs: bool) -> Tensor:
        """Which output, or input, of the larger model's matrix each one of the smaller model's is, all groups' in one.

        ``(groups, outputs)`` or ``(groups, inputs)``.
        """
        full = self.uses[name].matrices[0]
        groups, rows, columns = full.size[0], full.size[1], full.columns
        if name not in self.tensors:
            width = rows if outputs else columns
            return torch.arange(groups * width).view(groups, width)
        large, small = self.large[name].parameter.detach(), self.small[name].parameter.detach()
        entries = torch.arange(large.numel(), device=large.device).view(large.shape)
        owner = torch.empty(large.numel(), dtype=torch.int64, device=large.device)
        numbers = torch.arange(groups * (rows if outputs else columns), device=large.device)
        spread = numbers.view(groups, rows, 1) if outputs else numbers.view(groups, 1, columns)
        read = full.rows(filled_like(large, 0, torch.int64).copy_(entries))
        owner[read.flatten()] = spread.expand(groups, rows, columns).flatten()
        for dim, kept in self.tensors[name].items():
            entries = entries.index_select(dim, kept.to(entries.device))
        left = owner[matrix.rows(filled_like(small, 0, torch.int64).copy_(entries))]
        return left[:, :, 0] if outputs else left[:, 0]

    # A weight used several times in a forward.

    def _fold(self, names: Sequence[str]) -> None:
        """Lets the inputs that stay stand for those that go, as they do in the larger model."""
        if not names:
            return
        small = Uses(self.model)
        with ContractionWatch(self.small, small.see, small.after):
            batches.feed(twin(self.model), self.held[0])
        sums: dict[str, dict[int, Sums]] = {name: {} for name in names}
        watched = {name: self.large[name] for name in names}
        for index, batch in enumerate(self.held):

            def see(seen: Contraction, index: int = index) -> bool:
                rows = torch.arange(seen.count, device=seen.output.device)
                inputs, known = _wide(seen.inputs(rows)), sums[seen.reading.name]
                for half, part in self._halves(index, len(rows)):
                    x = inputs[:, part]
                    found = Sums.of(x, x[..., :0], x[..., :0], x.new_ones(x.shape[1]))
                    known[half] = known[half] + found if half in known else found
                return False

            with ContractionWatch(watched, lambda seen: not seen.is_sum and see(seen)):
                batches.feed(twin(self.dense), batch)
        for name in names:
            use = small.found.get(name)
            matrix = use.matrices[0] if use is not None and len(use.matrices) == 1 else None
            if matrix is None or len(sums[name]) < 2 or matrix.size[0] > 1 or self.uses[name].matrices[0].size[0] > 1:
                self.done.append(Refit(name, note="is used several times, in groups or too rarely"))
                continue
            halves = [self._gone(name, matrix, sums[name][half]) for half in (0, 1)]
            self._correct(name, matrix, halves, "used several times: folded as in the larger model")

    def _gone(self, name: str, matrix: Matrix, inputs: Sums) -> Sums:
        """What the outputs lack when some of the larger model's inputs are gone, as sums over the others."""
        rows = self._positions(name, matrix, outputs=True)[0]
        stay = self._positions(name, matrix, outputs=False)[0]
        gone = torch.ones(inputs.moment.shape[-1], dtype=torch.bool)
        gone[stay] = False
        weight = self.uses[name].matrices[0].rows(self.large[name].parameter.detach())[:, rows].double()
        moment, lost = inputs.moment, weight[:, :, gone]
        return Sums(
            inputs.count,
            inputs.inputs[:, stay],
            (lost @ inputs.inputs[:, gone, None])[:, :, 0],
            moment[:, stay][:, :, stay],
            lost @ moment[:, gone][:, :, stay],
            float((lost @ moment[:, gone][:, :, gone] * lost).sum()),
            float((weight @ moment * weight).sum()),
        )


def former_name(name: str, former: Mapping[str, str]) -> str:
    """The name that a tensor had before others left the lists it is in; see :func:`refitted`."""
    prefix = next((prefix for prefix in former if name.startswith(prefix)), "")
    return former.get(prefix, "") + name[len(prefix) :]


def _weights(model: nn.Module, former: Mapping[str, str] = MappingProxyType({})) -> dict[str, Place]:
    """The floating parameters that can be matrices and are what the model computes with, by the names they had."""
    return {
        former_name(name, former): replace(place, name=former_name(name, former))
        for name, place in places(model).items()
        if place.mask is None and place.parameter.is_floating_point() and place.parameter.dim() > 1
    }


def _counts(wanted: Tensor, *, alike: bool) -> Tensor:
    """How much each row counts: where rows are normalised next, all are ``alike``, however large they are."""
    squares_of_rows = wanted.square().sum((0, 2))
    if not alike:
        return torch.ones_like(squares_of_rows)
    return squares_of_rows.mean() / (squares_of_rows + LEAST * squares_of_rows.mean() + 1e-30)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
