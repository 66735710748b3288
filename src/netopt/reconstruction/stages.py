"""Layer after layer: each is solved on the inputs that the layers pruned before it produce.

The order is found by running the model. Layers that read the same inputs are solved together; the forward stops as
soon as they have been seen, and only second moments are kept of what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.errors import InvalidArgumentError
from netopt.importance.inputs import InputWatch, Reading
from netopt.parameters import Place
from netopt.reconstruction.replay import Chain, Runner, noting

__all__ = ["Stage", "moments", "stages", "watched_forward"]


@dataclass
class Stage:
    """Weights that are solved together.

    Attributes:
        readings: How often each is read in one forward.
        block: The block of the chain that alone reads them, or ``None``.
    """

    readings: dict[str, int] = field(default_factory=dict)
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
    model: nn.Module, batch: Any, wanted: Mapping[str, Place], container: nn.Module | None = None
) -> tuple[list[Stage], Chain]:
    """Orders the weights by when they are first read, those that read the same inputs together.

    Returns:
        The stages, and the chain of blocks that some of them are in.

    Args:
        model: Run once.
        batch: On this.
        wanted: The weights.
        container: Whose children are the blocks.

    Raises:
        InvalidArgumentError: a weight is read in no way whose inputs have a second moment.
    """
    order: list[Stage] = []
    found: dict[str, Stage] = {}
    blocks: dict[str, list[nn.Module | None]] = {}
    latest: Tensor | None = None

    def see(reading: Reading) -> bool:
        nonlocal latest
        blocks.setdefault(reading.name, []).append(notes.active)
        if reading.name in found:
            found[reading.name].readings[reading.name] += 1
            return False
        if reading.matrices() is None:
            raise InvalidArgumentError(
                f"{reading.name!r} is not the weight of a linear layer or a convolution, so its inputs have no second "
                "moment to reconstruct from; exclude it, or choose another importance."
            )
        if latest is None or not _same(latest, reading.inputs):
            order.append(Stage())
        order[-1].readings[reading.name] = 1
        found[reading.name] = order[-1]
        latest = reading.inputs
        return False

    with noting(container) as notes:
        watched_forward(lambda: batches.feed(model, batch), wanted, see)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InvalidArgumentError(
            f"{missing[0]!r} met no inputs in a matrix product or convolution on this data, so nothing can be "
            "reconstructed; exclude it, or choose another importance."
        )
    chain = notes.chain()
    for stage in order:
        inside = [block for name in stage.readings for block in blocks[name]]
        alone = all(block is inside[0] for block in inside) and chain.index(inside[0]) is not None
        stage.block = inside[0] if alone else None
    return order, chain


@dataclass
class Moments:
    """Second moments of what a weight reads, each ``(groups, columns, columns)``.

    Attributes:
        own: Of its inputs in the model as it is pruned so far, with themselves.
        cross: Of its inputs in the unpruned model with those.
    """

    own: Tensor
    cross: Tensor


def moments(runner: Runner, stage: Stage, wanted: Mapping[str, Place]) -> dict[str, Moments]:
    """Returns the second moments of what the weights of ``stage`` read."""
    tally = _Tally(stage)
    watched = {name: wanted[name] for name in stage.readings}
    for runs in runner.runs(stage.block):
        for dense, run in runs.items():
            tally.begin(dense)
            with runner.unpruned() if dense else nullcontext():
                watched_forward(run, watched, tally.see)
    return {name: tally.sums[tally.shared.get(name, name)] for name in stage.readings}


class _Tally:
    """Adds up second moments over forwards, once for weights that read the same inputs."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.sums: dict[str, Moments] = {}
        self.shared: dict[str, str] = {}

    def begin(self, dense: bool) -> None:
        """Awaits the readings of a forward, first of the unpruned model and then, on the same batch, of this one."""
        self.dense = dense
        self.left = dict(self.stage.readings)
        self.latest: tuple[Tensor, str] | None = None
        if dense:
            self.seen: dict[str, list[Tensor]] = {}

    def see(self, reading: Reading) -> bool:
        """Adds a reading; returns whether it was the last."""
        name = reading.name
        self.left[name] -= 1
        if self.latest and _same(self.latest[0], reading.inputs) and self.stage.readings[name] == 1:
            self.shared[name] = self.latest[1]
        else:
            inputs = reading.matrices()
            assert inputs is not None, "stages() refuses weights whose inputs are no matrix"
            self._add(name, inputs.to(torch.promote_types(inputs.dtype, torch.float32)))
            self.latest = (reading.inputs, name)
        return not any(self.left.values())

    def _add(self, name: str, inputs: Tensor) -> None:
        if self.dense:
            self.seen.setdefault(name, []).append(inputs)
            return
        if name not in self.sums:
            groups, _, columns = inputs.shape
            self.sums[name] = Moments(*inputs.new_zeros(2, groups, columns, columns))
        self.sums[name].own.baddbmm_(inputs.mT, inputs)
        self.sums[name].cross.baddbmm_(self.seen[name].pop(0).mT, inputs)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
