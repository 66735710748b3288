"""Layer after layer: each is solved on the inputs that the layers pruned before it produce.

The order is found by running the model. Layers that read the same inputs are solved together; the forward stops as
soon as they have been seen, and only second moments are kept of what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.errors import InvalidArgumentError, quoted
from netopt.importance.inputs import InputWatch, Matrix, Reading, filled_like
from netopt.model.parameters import Place
from netopt.reconstruction.replay import Chain, Runner, noting
from netopt.reconstruction.target import Moments

__all__ = ["Stage", "by_block", "moments", "stages", "watched_forward"]


@dataclass
class Stage:
    """Weights that are solved together.

    Attributes:
        readings: How often each is read in one forward.
        matrices: As which matrices each is read.
        block: The block of the chain that alone reads them, or ``None``.
    """

    readings: dict[str, int] = field(default_factory=dict)
    matrices: dict[str, list[Matrix]] = field(default_factory=dict)
    block: nn.Module | None = None


class _Seen(BaseException):
    """All that was wanted of this forward has been seen."""


def watched_forward(run: Callable[[], Any], wanted: Mapping[str, Place], see: Callable[[Reading], bool]) -> bool:
    """Runs until ``see`` returns ``True`` for a reading, or to the end; returns whether it was stopped."""

    def look(reading: Reading) -> None:
        if see(reading):
            raise _Seen

    try:
        with torch.no_grad(), InputWatch(wanted, look):
            run()
    except _Seen:
        return True
    return False


def stages(
    model: nn.Module, held: Iterable[Any], wanted: Mapping[str, Place], container: nn.Module | None = None
) -> tuple[list[Stage], Chain]:
    """Orders the weights by when they are first read, those that read the same inputs together.

    Returns:
        The stages, and the chain of blocks that some of them are in.

    Args:
        model: Run on one batch after the other until every weight has been seen, which is on the first one mostly.
        held: The batches.
        wanted: The weights.
        container: Whose children are the blocks.

    Raises:
        InvalidArgumentError: a weight is read in no way whose inputs have a second moment.
    """
    survey, chain = _Survey(), None
    for batch in held:
        with noting(container) as notes:
            survey.begin(lambda notes=notes: notes.active)
            watched_forward(lambda batch=batch: batches.feed(model, batch), wanted, survey.see)
        chain = notes.chain() if chain is None else chain
        if all(survey.lacks(place) is None for place in wanted.values()):
            break
    unmet = [name for name in wanted if name not in survey.found]
    if unmet:
        raise InvalidArgumentError(
            f"{quoted(unmet)} met no inputs in a matrix product or convolution on this data, so nothing can be "
            f"reconstructed; pass exclude=[{quoted(unmet)}], or choose another importance."
        )
    lacks = {name: lack for name, place in wanted.items() if (lack := survey.lacks(place)) is not None}
    if lacks:
        first, *others = lacks
        more = f" Neither can {', '.join(map(repr, others))}." if others else ""
        raise InvalidArgumentError(f"{lacks[first]}; exclude it, or choose another importance.{more}")
    assert chain is not None, "there is a batch"
    for stage in survey.order:
        inside = [block for name in stage.readings for block in survey.blocks[name]]
        alone = all(block is inside[0] for block in inside) and chain.index(inside[0]) is not None
        stage.block = inside[0] if alone else None
    return survey.order, chain


def by_block(order: Iterable[Stage]) -> list[Stage]:
    """Puts stages of the same block together, so that none of its weights waits for another."""
    found: list[Stage] = []
    for stage in order:
        if not (found and stage.block is not None and found[-1].block is stage.block):
            found.append(Stage(block=stage.block))
        found[-1].readings |= stage.readings
        found[-1].matrices |= stage.matrices
    return found


class _Survey:
    """Which weights are read together, in what order, as which matrices, and in which blocks."""

    def __init__(self) -> None:
        self.order: list[Stage] = []
        self.found: dict[str, Stage] = {}
        self.blocks: dict[str, list[nn.Module | None]] = {}

    def begin(self, active: Callable[[], nn.Module | None]) -> None:
        """Awaits the readings of a forward; ``active`` says which block runs."""
        self.active = active
        self.latest: _Seal | None = None
        self.before = set(self.found)

    def see(self, reading: Reading) -> bool:
        """Notes a reading, and never wants the forward to stop."""
        name = reading.name
        self.blocks.setdefault(name, []).append(self.active())
        if reading.counts:
            raise InvalidArgumentError(
                f"{name!r} is not the weight of a linear layer or a convolution but is looked up, so its inputs have "
                "no second moment to reconstruct from; exclude it, or choose another importance."
            )
        if name not in self.found:
            if self.latest is None or not self.latest.fits(reading.inputs):
                self.order.append(Stage())
            self.found[name] = self.order[-1]
            self.latest = _Seal(reading.inputs)
        stage = self.found[name]
        if name not in self.before:
            stage.readings[name] = stage.readings.get(name, 0) + 1
        known = stage.matrices.setdefault(name, [])
        if reading.matrix not in known:
            known.append(reading.matrix)
        return False

    def lacks(self, place: Place) -> str | None:
        """Says why a weight cannot be reconstructed from what has been seen, or ``None`` if it can."""
        name, parameter = place.name, place.parameter.detach()
        if name not in self.found:
            return f"{name!r} met no inputs on this data"
        matrices = self.found[name].matrices[name]
        covered = filled_like(parameter, 0, torch.bool)
        for matrix in matrices:
            matrix.write(covered, torch.ones((), dtype=torch.bool).expand(matrix.size))
        count = int(torch.count_nonzero(covered))
        if count < sum(matrix.count for matrix in matrices):
            return (
                f"{name!r} is multiplied with inputs in several ways that share entries (as it is and transposed, "
                "perhaps), so that no layer's outputs alone say what its entries should be"
            )
        if count < parameter.numel():
            return f"only {count} of the {parameter.numel()} entries of {name!r} met inputs on this data"
        return None


def moments(runner: Runner, stage: Stage, wanted: Mapping[str, Place]) -> dict[str, list[Moments]]:
    """Returns the second moments of what the weights of ``stage`` are multiplied with, matrix by matrix.

    Every other batch is of the same half of the data; a single batch is cut in the middle. Where the unpruned model is
    not run, nothing is told from halves, and all data are together.
    """
    aims = True in runner.models
    tally = _Tally(stage, aims)
    watched = {name: wanted[name] for name in stage.readings}
    for index, runs in enumerate(runner.runs(stage.block)):
        for dense, run in runs.items():
            tally.begin(dense, half=(None if len(runner.held) == 1 else index % 2) if aims else 0)
            with runner.being(dense):
                watched_forward(run, watched, tally.see)
    return {name: tally.of(name) for name in stage.readings}


class _Seal:
    """Recognises a tensor that is read again, by its memory, while that has not been written to."""

    def __init__(self, tensor: Tensor) -> None:
        # Held, so that its memory is not used for another.
        self.tensor, self.version = tensor, _version(tensor)

    def fits(self, other: Tensor) -> bool:
        """Whether ``other`` is the same tensor, or a view of all of it, with the same values."""
        one = self.tensor
        same = one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
        return same and self.version == _version(other)


class _Tally:
    """Adds up second moments over forwards, once for weights that read the same inputs."""

    def __init__(self, stage: Stage, aims: bool) -> None:
        self.stage, self.aims = stage, aims
        self.sums: dict[str, dict[Matrix, Moments]] = {name: {} for name in stage.readings}
        self.shared: dict[str, str] = {}
        self.seen: dict[tuple[str, Matrix], list[Reading]] = {}

    def begin(self, dense: bool, half: int | None) -> None:
        """Awaits the readings of a forward, first of the unpruned model and then, on the same batch, of this one.

        The batch is of the first or second ``half`` of the data, or of both.
        """
        self.dense, self.half = dense, half
        self.left = dict(self.stage.readings)
        self.latest: tuple[_Seal, Reading] | None = None
        if dense:
            self.seen = {}

    def of(self, name: str) -> list[Moments]:
        """Returns what has been added up for a weight, matrix by matrix."""
        if name in self.shared:
            return list(self.sums[self.shared[name]].values())
        return [self.sums[name][matrix] for matrix in self.stage.matrices[name]]

    def see(self, reading: Reading) -> bool:
        """Adds a reading; returns whether it was the last."""
        name = reading.name
        if reading.matrix not in self.stage.matrices[name]:
            raise InvalidArgumentError(
                f"{name!r} is multiplied with its inputs in other ways on some batches than on others, so that nothing "
                "can be reconstructed; exclude it, or choose another importance."
            )
        self.left[name] -= 1
        other = self._same_inputs(reading)
        if other is not None:
            self.shared[name] = other
        else:
            self._add(reading)
            self.latest = (_Seal(reading.inputs), reading)
        return all(count <= 0 for count in self.left.values())

    def _same_inputs(self, reading: Reading) -> str | None:
        """Returns the name of the weight read just before, if its moments are those of this one too."""
        if self.latest is None:
            return None
        seal, latest = self.latest
        once = all(self.stage.readings[one.name] == 1 for one in (reading, latest))
        forms = [(one.convolution, one.matrix.size[0], one.matrix.size[2:]) for one in (reading, latest)]
        return latest.name if once and forms[0] == forms[1] and seal.fits(reading.inputs) else None

    def _add(self, reading: Reading) -> None:
        key = reading.name, reading.matrix
        if self.dense:
            # What the forward goes on with may be written to before it is used.
            ends = all(count <= 0 for count in self.left.values())
            kept = reading if ends else replace(reading, inputs=reading.inputs.clone())
            self.seen.setdefault(key, []).append(kept)
            return
        before = self.seen[key].pop(0) if self.seen.get(key) else reading
        if not reading.pairs_with(before):
            # Another number of inputs found its way here than in the unpruned model: to an expert, for example.
            before = reading
        sums = self.sums[reading.name]
        for ours, theirs in zip(reading.samples(), before.samples(), strict=True):
            inputs = ours.to(torch.promote_types(ours.dtype, torch.float32))
            groups, count, columns = inputs.shape
            if reading.matrix not in sums:
                found = inputs.new_zeros(1 + self.aims, 1 + self.aims, groups, columns, columns)
                sums[reading.matrix] = Moments(found[-1], found[0])
            own, cross = sums[reading.matrix].own, sums[reading.matrix].cross
            cuts = (count // 2, count - count // 2) if self.half is None else (count,)
            parts = zip(inputs.split(cuts, 1), theirs.to(inputs.dtype).split(cuts, 1), strict=True)
            for half, (one, other) in enumerate(parts, self.half or 0):
                own[half].baddbmm_(one.mT, one)
                if self.aims:
                    cross[half].baddbmm_(other.mT, one)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
