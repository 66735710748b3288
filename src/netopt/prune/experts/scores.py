"""What an expert is worth: what the mixture's output loses without it, how often it is chosen, or how large it is.

An expert's part of the output is its gate times its output. It is found as the difference it makes when the expert
gives zeros, whatever way the experts are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netopt import batches
from netopt.errors import ArgumentTypeError, InvalidArgumentError, NonFiniteError, UnknownNameError
from netopt.importance.registry import name_of
from netopt.model.hooks import put_hook, take_hook
from netopt.model.precision import autocast_now
from netopt.model.restore import restored
from netopt.model.signals import UndoLog
from netopt.model.view import ModelView
from netopt.prune.experts.mixtures import Mixture
from netopt.prune.experts.watch import Step, Watch
from netopt.surgery import Operation

__all__ = ["ExpertImportance", "check_importance", "score"]

ExpertImportance: TypeAlias = "str | Callable[[str, int], float] | Mapping[str, Sequence[float]]"
"""``"reap"``, ``"frequency"``, ``"magnitude"``, a function of a mixture's name and an expert's index, or the scores by
mixture; higher means keep."""
NAMES = ("reap", "frequency", "magnitude")

Batches = Callable[[], Iterable[Any]]


def check_importance(importance: Any) -> str:
    """The name of a criterion, for the report.

    Raises:
        UnknownNameError: There is none of this name.
        ArgumentTypeError: It is none.
    """
    others = "a function of a mixture's name and an expert's index, or scores by mixture"
    return name_of(importance, "importance of experts", NAMES, others)


def score(
    view: ModelView, mixtures: Sequence[Mixture], importance: ExpertImportance, data: Batches
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """The scores of all experts by mixture, and those that met no token where that was looked at."""
    if importance in ("reap", "frequency"):
        return _observed(view, mixtures, data, parts=importance == "reap")
    found: dict[str, list[float]] = {}
    for mixture in mixtures:
        places = range(mixture.size)
        if importance == "magnitude":
            values: Any = [_magnitude(view, mixture, place) for place in places]
        elif isinstance(importance, Mapping):
            values = _given(importance, mixture)
        else:
            assert callable(importance), "checked before"
            values = [importance(mixture.name, place) for place in places]
        found[mixture.name] = [_number(one, mixture.name) for one in values]
    return found, {}


def _observed(
    view: ModelView, mixtures: Sequence[Mixture], data: Batches, *, parts: bool
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    counts = {one.scores.router: torch.zeros(one.size, dtype=torch.float64) for one in mixtures}
    sums = {one.scores.router: torch.zeros(one.size, dtype=torch.float64) for one in mixtures}
    with restored(view) as log:
        log.enter_context(torch.no_grad())
        batches.set_eval(view.model)
        for batch in data():
            before = {router: count.clone() for router, count in counts.items()}
            for mixture, call in _run(view, mixtures, batch, counts, keep=parts):
                router = mixture.scores.router
                met = (counts[router] > before[router]).nonzero().flatten().tolist()
                sums[router] += _parts(view, mixture, call, met)
    values = {}
    for one in mixtures:
        count = counts[one.scores.router]
        found = sums[one.scores.router] / count.clamp(min=1) if parts else count
        values[one.name] = [_number(value, one.name) for value in found.tolist()]
    idle = {one.name: (counts[one.scores.router] == 0).nonzero().flatten().tolist() for one in mixtures}
    return values, {name: places for name, places in idle.items() if places}


def _run(
    view: ModelView, mixtures: Sequence[Mixture], batch: Any, counts: dict[str, Tensor], *, keep: bool
) -> list[tuple[Mixture, Callable[[], Any]]]:
    """Runs one batch; gives each call of a mixture, to be made again."""
    calls: list[tuple[Mixture, Callable[[], Any]]] = []

    def hook(mixture: Mixture) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            precision = autocast_now((args, kwargs))

            def again() -> Any:
                with precision:
                    return module(*args, **kwargs)

            calls.append((mixture, again))

        return note

    with UndoLog() as log:
        for one in mixtures if keep else ():
            put_hook(log, view.modules[one.name], hook(one), before=True)
        log.enter_context(Watch(view, partial(_count, counts)))
        batches.feed(view.model, batch)
    return calls


def _count(counts: dict[str, Tensor], step: Step) -> None:
    """Counts how often each expert is chosen, where is chosen among all."""
    choice = step.choice
    if choice is not None and choice.groups == 1 and choice.scores.router in counts:
        chosen = step.result if isinstance(step.result, Tensor) else step.result[1]
        counts[choice.scores.router] += torch.bincount(chosen.flatten().cpu(), minlength=choice.scores.size)


def _parts(view: ModelView, mixture: Mixture, call: Callable[[], Any], met: Sequence[int]) -> Tensor:
    """By expert, the summed norm of its part of the output of one call."""
    found = torch.zeros(mixture.size, dtype=torch.float64)
    whole = _output(call(), mixture)
    for place in met:
        silent = Operation(view.model, _silenced(view, mixture, place), view)
        rest = silent.dry_run(lambda: _output(call(), mixture))
        found[place] = float((whole - rest).norm(dim=-1).sum())
    return found


def _silenced(view: ModelView, mixture: Mixture, place: int) -> Iterator[_Silent | _Zeros]:
    for name, dim in mixture.stacked.items():
        yield _Silent(view.tensors[name], dim, place, mixture.size)
    for name in mixture.lists:
        yield _Zeros(_entry(view, name, place))


class _Silent:
    """The entries of one expert in a stacked tensor are zero for the time being."""

    def __init__(self, tensor: Tensor, dim: int, place: int, size: int) -> None:
        each = tensor.shape[dim] // size
        # What is written through it counts as no change to the tensor, which is put back anyway.
        self._part = tensor.data.narrow(dim, place * each, each)
        self._before = self._part.clone()

    def do(self) -> None:
        """Writes zeros."""
        self._part.zero_()

    def undo(self) -> None:
        """Writes what was there."""
        self._part.copy_(self._before)


class _Zeros:
    """A module returns zeros for the time being."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._hook: Any = lambda _module, _args, result: _zeros(result)

    def do(self) -> None:
        """Hooks the module."""
        self._module.register_forward_hook(self._hook)

    def undo(self) -> None:
        """Takes the hook away."""
        take_hook(self._module, self._hook)


def _zeros(result: Any) -> Any:
    if isinstance(result, Tensor):
        return torch.zeros_like(result)
    return type(result)(map(_zeros, result)) if type(result) in (tuple, list) else result


def _output(result: Any, mixture: Mixture) -> Tensor:
    found = next((one for one in tree_leaves(result) if isinstance(one, Tensor) and one.is_floating_point()), None)
    if found is None:
        raise InvalidArgumentError(
            f"`{mixture.name}` returns no tensor of fractions, so that reap cannot be told; use another importance."
        )
    return found.to(torch.promote_types(found.dtype, torch.float32))


def _magnitude(view: ModelView, mixture: Mixture, place: int) -> float:
    squares = 0.0
    for name, dim in mixture.stacked.items():
        each = view.tensors[name].shape[dim] // mixture.size
        squares += float(view.tensors[name].detach().narrow(dim, place * each, each).double().square().sum())
    for name in mixture.lists:
        own = _entry(view, name, place).parameters()
        squares += sum(float(one.detach().double().square().sum()) for one in own)
    return math.sqrt(squares)


def _entry(view: ModelView, name: str, place: int) -> nn.Module:
    """An entry of a list, which may be there twice."""
    entry = list(view.modules[name]._modules.values())[place]
    assert entry is not None, "every expert of a list is run"
    return entry


def _given(scores: Mapping[str, Any], mixture: Mixture) -> list[Any]:
    if mixture.name not in scores:
        raise UnknownNameError.of("scores of the mixture", mixture.name, scores)
    values = list(scores[mixture.name])
    if len(values) != mixture.size:
        raise InvalidArgumentError(f"`{mixture.name}` has {mixture.size} experts, and {len(values)} scores are given.")
    return values


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"a score in `{name}` must be a number, not {type(value).__name__}.") from error
    if math.isnan(number):
        raise NonFiniteError(f"a score in `{name}` is not a number; check the model's activations and the data.")
    return number
