"""Experts of a mixture that the example inputs are not routed to.

A mixture of experts sends tokens to some of its experts, by value. The entries of one module list are interchangeable
there: an expert without tokens is run on the inputs of a sibling of its class, and its result has the dimensions of
the sibling's. Without this the widths around it would change and it would keep its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from netopt import batches
from netopt.axes.layout import freeze, unify
from netopt.axes.tracing.dims import DimTracer
from netopt.model.attributes import Parts
from netopt.model.hooks import put_hook
from netopt.model.signals import UndoLog

Substitutes = Mapping[nn.Module, list[nn.Module]]
_WHY = "comes from a layer that these inputs do not reach"


def unrouted(parts: Parts, reached: Collection[str], touched: Collection[str]) -> Substitutes:
    """The entries of lists and dicts of modules that did not run, under a sibling of their class that did.

    Args:
        parts: The modules of the model that has run, by name.
        reached: Names of the modules that were called.
        touched: Names of the tensors that were read.
    """
    found: dict[nn.Module, list[nn.Module]] = {}
    for prefix, container in parts:
        if not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
            continue
        siblings: dict[type, nn.Module] = {}
        entries = [(f"{prefix}.{key}".lstrip("."), entry) for key, entry in container.named_children()]
        for name, entry in entries:
            if name in reached:
                siblings.setdefault(type(entry), entry)
        for name, entry in entries:
            held = [f"{name}.{one}" for one, _ in entry.named_parameters()]
            if held and type(entry) in siblings and name not in reached and not any(one in touched for one in held):
                found.setdefault(siblings[type(entry)], []).append(entry)
    return found


@contextlib.contextmanager
def experts_substituted(substitutes: Substitutes, trace: DimTracer) -> Iterator[None]:
    """Runs each expert once on the first inputs of its sibling, until left."""
    waiting = dict(substitutes)

    def run(sibling: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        for expert in waiting.pop(sibling, ()):
            # One of another shape may raise anything, and is then frozen as not used.
            with contextlib.suppress(Exception):
                _tie(trace, expert(*args, **kwargs), result)

    with UndoLog() as log:
        for sibling in substitutes:
            put_hook(log, sibling, run)
        yield


def _tie(trace: DimTracer, made: Any, result: Any) -> None:
    there = dict(batches.tensors(result))
    trace.reach(tensor for _, tensor in batches.tensors(made))
    for name, tensor in batches.tensors(made):
        other = there.get(name)
        if other is not None and other.shape == tensor.shape:
            for one, two in zip(trace.dims(tensor), trace.dims(other), strict=True):
                unify(one.layout, two.layout, lambda: _WHY)
        else:
            for dim in trace.dims(tensor):
                freeze(dim.layout, _WHY)
