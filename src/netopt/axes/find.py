"""Finds the axes of a model: borrow, trace, solve, restore.

What a trace needs of the model is borrowed: its mode, its gradients, and its integers, which are symbolic for the time
being. One forward in evaluation mode is traced; each module that reads ``training`` runs in training as well, since it
may compute something else there. Where that cannot be told module by module, a second forward is traced. Equations
between dimensions, and between these and integers, are solved together. Everything borrowed is given back, whatever
happens, and nothing outside the model is changed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_iter

from netopt import batches
from netopt.axes import rules as _rules  # noqa: F401 - registers the rules
from netopt.axes.axes import Axes
from netopt.axes.layout import OUTPUT, Layout, freeze, mark_inexact
from netopt.axes.tracing.attributes import symbolic_integers
from netopt.axes.tracing.described_sizes import bind_described_sizes
from netopt.axes.tracing.dims import DimTracer
from netopt.axes.tracing.sizes import SizeTracer
from netopt.axes.tracing.training_flag import TrainingFlag, lendable
from netopt.axes.tracing.unrouted_experts import experts_substituted, unrouted
from netopt.batches import Inputs
from netopt.errors import ArgumentTypeError, ForwardError, InvalidArgumentError
from netopt.model.attributes import Parts
from netopt.model.checks import check_values, problem
from netopt.model.precision import uncached
from netopt.model.restore import Snapshot, preserve_random_state
from netopt.model.signals import UndoLog
from netopt.model.turns import InTurn
from netopt.model.view import ModelView

Traced: TypeAlias = "tuple[SizeTracer, list[tuple[Layout, ...]]]"
Outputs: TypeAlias = "str | Sequence[str] | Callable[..., Any] | None"


def find_axes(model: nn.Module, example_inputs: Inputs, *, outputs: Outputs = None) -> Axes:
    """Finds which neurons a model has, what is coupled to each, and what cannot be removed and why.

    The forward is run on ``example_inputs`` in evaluation mode, without gradients, and modules that read ``training``
    run in training mode as well; parameters, buffers, flags, attributes and random states are as before afterwards.
    What fails in training mode is left out. Fake and meta tensors work alike.

    Args:
        model: Any module.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs, of one forward call.
        outputs: Which results must keep their shape. By default every tensor reached through tuples, lists, dicts and
            dataclasses. A name or names of results (``"logits"``, ``"0"``), a predicate of a result's dotted name and
            tensor, or a function of the whole result that returns those that count.

    Returns:
        A sequence of :class:`~netopt.axes.Axis`; print it for a table.

    Raises:
        ForwardError: The forward fails on the example inputs.
        InvalidArgumentError: ``outputs`` names no result.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> axes = find_axes(net, torch.randn(1, 8))
        >>> {axis.name: axis.size for axis in axes if axis.frozen is None}
        {'0': 16}
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    view = ModelView(model)
    check_values(view)
    nested = next((name for name, tensor in view.tensors.items() if tensor.is_nested), None)
    if nested is not None:
        raise InvalidArgumentError(f"{nested!r} {problem(view.tensors[nested])}.")
    return axes_of(view, example_inputs, outputs)


def axes_of(view: ModelView, example_inputs: Inputs, outputs: Outputs = None) -> Axes:
    """As :func:`find_axes`, of a model that is listed and checked already."""
    with InTurn([view]) as tracing:
        attributes = Snapshot(view)
        trace = tracing.enter_context(_closed(*attributes.tensors()))
        with preserve_random_state() as borrowed:
            borrowed.callback(attributes.put_back)
            attributes.gradients.set_aside()
            borrowed.enter_context(torch.inference_mode(False), torch.no_grad(), _fake_mode(trace.members.values()))
            trace.inputs(leaf for leaf in tree_iter(batches.normalize(example_inputs)) if isinstance(leaf, Tensor))
            _freeze_scripted(view.parts, trace)
            run = _Forward(view, attributes, trace, example_inputs, outputs).run
            tracer, results = _first(run, trace, lent=_sets_flags_alone(view, attributes, trace))
            substitutes = unrouted(view.parts, tracer.reached, trace.touched)
            if substitutes:
                with experts_substituted(substitutes, trace):
                    run(training=False, symbolic=tracer.symbolic)
            if tracer.flag is None or tracer.flag.whole:
                with contextlib.suppress(ForwardError):  # a model may refuse to be trained on these inputs
                    run(training=True, symbolic=tracer.symbolic)
        view.written = trace.writes.written
        bind_described_sizes(view.parts, trace)
        trace.constraints.close()
        if not tracer.symbolic:
            _mark_unfollowed(trace)
        trace.finalize()
        return Axes(trace, tracer.readings, results)


def _sets_flags_alone(view: ModelView, attributes: Snapshot, trace: DimTracer) -> bool:
    """Whether a change of mode changes the ``training`` of modules and nothing else, and that can be lent."""
    if not lendable(view.parts):
        return False
    if attributes.modes_are_flags:
        return True
    try:
        for training in (True, False):
            with attributes.in_mode(view.model, writes=trace.writes, training=training) as changed:
                if changed:
                    return False
    except ForwardError:  # it may refuse to be trained
        return False
    return True


def _first(run: Callable[..., Traced], trace: DimTracer, *, lent: bool) -> Traced:
    """The forward in evaluation mode, whose work is counted."""
    trace.counting, symbolic = True, True
    try:
        while True:
            try:
                return run(training=False, symbolic=symbolic, lent=lent)
            except ForwardError as error:  # noqa: PERF203 - four tries at most
                if lent:
                    lent = False  # code may set the mode, or look for it elsewhere
                elif not symbolic:
                    raise
                elif trace.constraints.salt is not None and isinstance(error.__cause__, KeyError):
                    # A dict that is no attribute of the model's is looked up by a size: plain hashes find it.
                    trace.constraints.salt = None
                else:
                    symbolic = False  # code may test for the very type of an integer
                trace.work.clear()
    finally:
        trace.counting = False


@dataclass(frozen=True)
class _Forward:
    """The forward that is traced: once, or once in each mode."""

    view: ModelView
    attributes: Snapshot
    trace: DimTracer
    inputs: Inputs
    outputs: Outputs

    def run(self, *, training: bool, symbolic: bool, lent: bool = False) -> Traced:
        """One traced forward: its tracer, and the layouts of the results that count."""
        view, attributes, trace = self.view, self.attributes, self.trace
        tracer = SizeTracer(view, trace, symbolic=symbolic)
        with UndoLog() as log:
            uncached(log)
            mode = None if lent else training
            log.enter_context(attributes.in_mode(view.model, writes=trace.writes, training=mode))
            if lent:
                tracer.flag = log.enter_context(TrainingFlag(view.parts, tracer))
            if symbolic:
                log.enter_context(symbolic_integers(view.parts, attributes, trace.constraints))
            with UndoLog() as modes:
                modes.enter_context(trace, tracer)
                result = batches.call(view.model, self.inputs)
            counted = counted_outputs(result, self.outputs)
            trace.reach(counted)
            results = [tuple([dim.layout for dim in trace.dims(tensor)]) for tensor in counted]
            for layouts in results:
                for layout in layouts:
                    freeze(layout, OUTPUT)
        return tracer, results


def counted_outputs(result: Any, outputs: Outputs) -> list[Tensor]:
    """The tensors of a forward's result whose shape must stay, selected by ``outputs``; see :func:`find_axes`."""
    named = batches.tensors(result)
    if outputs is None:
        return [tensor for _, tensor in named]
    if callable(outputs):
        if len(inspect.signature(outputs).parameters) > 1:
            return [tensor for name, tensor in named if outputs(name, tensor)]
        return [tensor for _, tensor in batches.tensors(outputs(result))]
    names = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(f"outputs must be names of results, or a function of the result, not {outputs!r}.")
    chosen = []
    for name in names:
        found = [tensor for path, tensor in named if path == name or path.startswith(f"{name}.")]
        if not found:
            paths = ", ".join(repr(path) for path, _ in named)
            raise InvalidArgumentError(f"outputs={name!r} names no result of the forward; there are {paths}.")
        chosen.extend(found)
    return chosen


@contextmanager
def _closed(members: dict[str, Tensor], parameters: frozenset[str]) -> Iterator[DimTracer]:
    """A trace of these tensors, closed in the end."""
    trace = DimTracer(members, parameters)
    try:
        yield trace
    finally:
        trace.constraints.close()
        trace.close()


@contextmanager
def _fake_mode(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Enters the mode a fake model belongs to, so that tensors made by the forward are fake too."""
    fake = next((tensor for tensor in tensors if isinstance(tensor, FakeTensor)), None)
    if fake is None:
        yield
    else:
        with fake.fake_mode:
            yield


def _freeze_scripted(parts: Parts, trace: DimTracer) -> None:
    """The integers of a scripted module cannot be rewritten."""
    for _, module in parts:
        if isinstance(module, torch.jit.ScriptModule):
            for tensor in (*module.parameters(), *module.buffers()):
                for dim in trace.dims(tensor):
                    freeze(dim.layout, "belongs to a scripted module, whose sizes cannot be rewritten")


def _mark_unfollowed(trace: DimTracer) -> None:
    """Plain integers do not record how they are computed with."""
    for tensor in trace.members.values():
        known = trace._info(tensor)
        for layout, _ in known.dims if known is not None else ():
            mark_inexact(layout, "is of a forward that runs with plain integers only, as one that tests for their type")


__all__ = ["Outputs", "axes_of", "counted_outputs", "find_axes"]
