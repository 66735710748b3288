"""Forwards that wait for one another: each goes on only when all have reached the same weight.

So a weight can be changed on what every batch brings to it, and everything behind it sees the change, in one forward of
each batch. A forward has a thread of its own that sleeps at every weight not settled yet; only one is ever awake.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from queue import SimpleQueue  # whose waiting can be interrupted
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from netopt import batches
from netopt.batches import Batch
from netopt.importance.contractions import Contraction, ContractionWatch
from netopt.model.kernels import Unfused
from netopt.model.parameters import Place
from netopt.model.signals import entered
from netopt.model.wrappers import TorchCalls

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Forward", "Lockstep", "twin"]


class _Cancelled(BaseException):
    """The forward is not wanted any more."""


class Forward:
    """One batch on its way through one model.

    Attributes:
        index: Which batch.
        dense: Whether through the model as it was.
        at: The contraction it waits at, or ``None``.
        result: What the model returned, at the end.
    """

    def __init__(
        self, lockstep: Lockstep, model: nn.Module, watched: Mapping[str, Place], batch: Batch, index: int, dense: bool
    ) -> None:
        self.index, self.dense = index, dense
        self.at: Contraction | None = None
        self.error: BaseException | None = None
        self.again = False
        self.result: Any = None
        self._lockstep, self._model, self._watched, self._batch = lockstep, model, watched, batch
        self._go = SimpleQueue[None]()
        # Modes that see torch's calls belong to one thread; a forward has its own.
        self._modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, TorchCalls)]
        self._thread = threading.Thread(target=self._run, name=f"netopt forward {index}", daemon=True)

    def __enter__(self) -> Self:
        """Starts its thread, which waits."""
        self._thread.start()
        return self

    def advance(self) -> None:
        """Lets it run to the next weight, or to its end; raises what it raised."""
        self.at = None
        self._go.put(None)
        self._lockstep.back.get()
        if self.error is not None:
            raise self.error

    def __exit__(self, *_: object) -> None:
        """Cancels all forwards of the lockstep, and waits for the end of this one's thread."""
        self._lockstep.cancelled = True
        self._go.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._go.get()
        try:
            if self._lockstep.cancelled:
                return
            with ExitStack() as stack:
                for mode in self._modes:
                    stack.enter_context(mode)
                stack.enter_context(Unfused(attention=False))
                stack.enter_context(torch.no_grad())
                stack.enter_context(ContractionWatch(self._watched, self._stop))
                self.result = batches.feed(twin(self._model), self._batch)
        except _Cancelled:
            pass
        except BaseException as error:  # handed to the thread that waits
            self.error = error
        finally:
            self._lockstep.back.put(None)

    def _stop(self, contraction: Contraction) -> bool:
        """Waits here if the weight is not settled; whether the contraction is to be run again then."""
        name = contraction.reading.name
        if name not in self._lockstep.open or contraction.is_sum != (name in self._lockstep.summed):
            return False
        self.at = contraction
        self._lockstep.back.put(None)
        self._go.get()
        if self._lockstep.cancelled or self._lockstep.is_done:
            raise _Cancelled
        return self.again


def twin(model: nn.Module) -> nn.Module:
    """The model with the same tensors in modules that no other forward keeps anything in meanwhile."""
    held = [*model.parameters(), *model.buffers()]
    held += [one for module in model.modules() for one in vars(module).values() if isinstance(one, Tensor)]
    return copy.deepcopy(model, {id(one): one for one in held})


class Lockstep:
    """Runs batches through two models, one weight at a time.

    Args:
        order: The weights to stop at, in the order in which they are settled where several wait.
        summed: Those that wait when their outputs are added to something, and not before.
        settle: Called with a weight's name and the forwards that wait at it.
        to_the_end: Whether forwards go on, and keep their results, when every weight is settled.
    """

    def __init__(
        self,
        order: Sequence[str],
        summed: Collection[str],
        settle: Callable[[str, list[Forward]], None],
        *,
        to_the_end: bool = True,
    ) -> None:
        self.open, self.summed, self._to_the_end = set(order), frozenset(summed), to_the_end
        self.back = SimpleQueue[None]()
        self.cancelled = False
        self._rank = {name: place for place, name in enumerate(order)}
        self._settle = settle

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to wait for."""
        return not self.open and not self._to_the_end

    def run(
        self, models: Mapping[bool, tuple[nn.Module, Mapping[str, Place]]], held: Sequence[Batch]
    ) -> dict[tuple[int, bool], Any]:
        """Brings every batch to the end of every model; ``True`` is the model as it was.

        Returns:
            What each model returned, by the batch's index and the model.

        Raises:
            ForwardError: A forward failed.
        """
        forwards = [
            Forward(self, model, watched, batch, index, dense)
            for index, batch in enumerate(held)
            for dense, (model, watched) in models.items()
        ]
        with entered(*forwards):
            for forward in forwards:
                forward.advance()
            self._run(forwards)
            return {(one.index, one.dense): one.result for one in forwards}

    def _run(self, forwards: Sequence[Forward]) -> None:
        def waiting(forward: Forward) -> str | None:
            return None if forward.at is None else forward.at.reading.name

        while True:
            names: set[str] = {name for one in forwards if (name := waiting(one)) is not None}
            if not names:
                return
            name = min(names, key=lambda one: self._rank[one])
            group = [one for one in forwards if waiting(one) == name]
            self._settle(name, group)
            self.open.discard(name)
            for one in group:
                one.again = not one.dense
                one.advance()
