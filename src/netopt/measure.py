"""What a model costs: parameters, multiplications, bytes, seconds.

Multiplications are counted while the model runs, so they are those of the operations executed, not of the layers
listed. A model is run in eval mode and given back as it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_map_only

from netopt import batches
from netopt.batches import Inputs
from netopt.errors import InvalidArgumentError
from netopt.flops import formula
from netopt.model.checks import check_values
from netopt.model.dispatch import ThreadDispatchMode
from netopt.model.parameters import count_nonzero
from netopt.model.restore import restored
from netopt.model.signals import UndoLog
from netopt.model.view import ModelView
from netopt.model.wrappers import TorchCalls

__all__ = [
    "Cost",
    "Latency",
    "batch_size",
    "cost",
    "cost_of",
    "count_macs",
    "count_parameters",
    "latencies",
    "latency",
    "nonzero_of",
    "nonzero_parameters",
    "size_bytes",
]


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward call.

    Attributes:
        median: The median over the repeats.
        spread: The distance between the quartiles of the repeats.
    """

    median: float
    spread: float

    def __repr__(self) -> str:
        return f"{self.median * 1e3:.3f} ms (± {self.spread * 1e3 / 2:.3f})"


@dataclass(frozen=True)
class Cost:
    """What a model costs at one moment.

    Attributes:
        params: Entries of all parameters, a shared one counted once.
        nonzero: Those of them that are not zero, masks taken into account.
        bytes: Memory of parameters and buffers.
        macs: Multiply-accumulate operations of one forward call, or ``None`` where no inputs were at hand.
    """

    params: int
    nonzero: int
    bytes: int
    macs: int | None = None


def batch_size(inputs: Inputs) -> int | None:
    """Returns the length of the first dimension of all tensors among ``inputs``; ``None`` where they differ.

    Example:
        >>> batch_size(torch.zeros(8, 3)), batch_size((torch.zeros(8, 3), torch.zeros(2)))
        (8, None)
    """
    lengths = {tensor.shape[0] if tensor.dim() else None for _, tensor in batches.tensors(inputs)}
    return lengths.pop() if len(lengths) == 1 else None


def cost(model: nn.Module | ModelView, inputs: Inputs | None = None) -> Cost:
    """Returns what ``model`` costs now; without ``inputs`` it is not run and its operations are not counted.

    Example:
        >>> cost(nn.Linear(3, 4), torch.randn(1, 3))
        Cost(params=16, nonzero=16, bytes=64, macs=12)
    """
    view = ModelView.of(model)
    return cost_of(view, None if inputs is None else count_macs(view, inputs))


def cost_of(view: ModelView, macs: int | None = None, nonzero: Mapping[str, int] | None = None) -> Cost:
    """As :func:`cost`, of a model that is listed and whose operations, or entries by parameter, are counted already."""
    nonzero = nonzero_of(view) if nonzero is None else nonzero
    parameters = [view.parameters[name] for name in nonzero]
    buffers = {id(buffer): buffer for buffer in view.buffers.values()}
    return Cost(
        params=sum([one.numel() for one in parameters]),
        nonzero=sum(nonzero.values()),
        bytes=sum([one.nbytes for one in parameters]) + sum([one.nbytes for one in buffers.values()]),
        macs=macs,
    )


def count_parameters(model: nn.Module) -> int:
    """Counts the entries of all parameters, a shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def nonzero_parameters(model: nn.Module) -> int:
    """Counts the entries of all parameters that are not zero; an entry masked by ``torch.nn.utils.prune`` is zero.

    Example:
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(4, 4, bias=False), "weight", amount=6)
        >>> nonzero_parameters(layer)
        10
    """
    return sum(nonzero_of(ModelView(model)).values())


def nonzero_of(view: ModelView, full: Collection[str] = ()) -> dict[str, int]:
    """As :func:`nonzero_parameters`, of each parameter by itself, a shared one under the first of its names.

    Args:
        view: What the model holds.
        full: Names of parameters that are known to have no zero; they are not read.
    """
    counts: dict[str, int] = {}
    for name, parameter in view.own_parameters.items():
        if parameter.is_meta or name in full:
            counts[name] = parameter.numel()
        else:
            counts[name] = count_nonzero(parameter.detach(), view.mask_of(name))
    return counts


def size_bytes(model: nn.Module) -> int:
    """Returns the memory of parameters and buffers, in bytes; a shared tensor counts once."""
    check_values(model)
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def count_macs(model: nn.Module | ModelView, inputs: Inputs) -> int:
    """Counts the multiply-accumulate operations of one forward call, for the whole batch given.

    Counted are matrix products, convolutions, attention and recurrent layers, by torch's own formulas and a few of
    ours (two floating-point operations are one multiply-accumulate); additions, norms and activations are not.

    Args:
        model: Any module; run once, in eval mode and without gradients.
        inputs: Example inputs of one forward call.

    Raises:
        ForwardError: the forward failed on ``inputs``.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 6, 6))
        6912
    """
    counter = _Counter()
    view = ModelView.of(model)
    check_values(view.model)
    with restored(view) as log:
        log.enter_context(torch.no_grad(), TorchCalls())  # no fast path of attention
        batches.set_eval(view.model)
        with UndoLog() as counting:
            counting.enter_context(counter)
            batches.call(view.model, inputs)
    return counter.flops // 2


class _Counter(ThreadDispatchMode):
    """Counts the floating-point operations of what is run in this thread."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(function, HigherOrderOperator):
            return self._branch(*args) if function is torch.ops.higher_order.cond else NotImplemented
        with self:  # in inference mode an operation comes whole; formulas are of what it consists of
            made = function.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        made = function(*args, **kwargs)
        cost = formula(function._overloadpacket)
        if cost is not None:
            shapes: Any = tree_map_only(Tensor, attrgetter("shape"), (args, kwargs, made))
            self.flops += int(cost(*shapes[0], **shapes[1], out_val=shapes[2]))
        return made

    def _branch(self, chosen: Any, yes: Callable[..., Any], no: Callable[..., Any], operands: Sequence[Any]) -> Any:
        with self:
            return (yes if chosen else no)(*operands)


def latency(model: nn.Module, inputs: Inputs, repeats: int = 30, warmup: int = 5) -> Latency:
    """Measures the seconds of one forward call, in eval mode and without gradients.

    Args:
        model: Any module.
        inputs: Example inputs of one forward call, on the model's device.
        repeats: Number of timed calls; the median is reported.
        warmup: Number of calls before, not timed.

    Raises:
        ForwardError: the forward failed on ``inputs``.
        InvalidArgumentError: ``repeats`` is less than 1.

    Example:
        >>> latency(nn.Linear(3, 4), torch.randn(1, 3), repeats=3).median > 0
        True
    """
    return latencies([model], inputs, repeats, warmup)[0]


def latencies(models: Sequence[nn.Module], inputs: Inputs, repeats: int = 30, warmup: int = 5) -> list[Latency]:
    """Measures several models on the same inputs, taking turns, so that a busy moment of the machine hits all alike.

    Raises:
        ForwardError: a forward failed on ``inputs``.
        InvalidArgumentError: ``repeats`` is less than 1.
    """
    if repeats < 1:
        raise InvalidArgumentError(f"repeats must be at least 1, not {repeats}.")
    seconds: list[list[float]] = [[] for _ in models]
    views = [ModelView(model) for model in models]
    for view in views:
        count_macs(view, inputs)  # so that no run that is timed is watched for what it writes
    with restored(*views) as log:
        log.enter_context(torch.no_grad())
        for model in models:
            batches.set_eval(model)
            for _ in range(warmup):
                batches.call(model, inputs)
        for _ in range(repeats):
            for model, times in zip(models, seconds, strict=True):
                times.append(_seconds(model, inputs))
    return [_summary(times) for times in seconds]


def _seconds(model: nn.Module, inputs: Inputs) -> float:
    _wait(model)
    start = time.perf_counter()
    batches.call(model, inputs)
    _wait(model)
    return time.perf_counter() - start


def _wait(model: nn.Module) -> None:
    """Lets an accelerator finish what it was given."""
    device = batches.device_of(model)
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type == "mps":
        torch.mps.synchronize()


def _summary(times: list[float]) -> Latency:
    if len(times) < 2:
        return Latency(times[0], 0.0)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Latency(median, high - low)
