"""Finds the axes of a model by watching its forward.

The forward is run on the example inputs in evaluation mode, and in training mode too where it may do something else
there; what the operations say of dimensions, and the code of integers, is solved together. The model is read, never
changed.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_iter

from netopt import batches
from netopt.axes import rules as _rules  # noqa: F401 - registers the rules
from netopt.axes.axes import Axes
from netopt.axes.layout import Layout, freeze, mark_inexact
from netopt.axes.literals import remembering_literals
from netopt.axes.memos import memos_passed_by
from netopt.axes.modes import modes_watched
from netopt.axes.tracing.attributes import remembered
from netopt.axes.tracing.described_sizes import settle_described_sizes
from netopt.axes.tracing.dims import DimTracer
from netopt.axes.tracing.sizes import SizeTracer
from netopt.axes.tracing.unrouted_experts import twins_substituted, unreached
from netopt.batches import Inputs
from netopt.errors import ArgumentTypeError, ForwardError, InvalidArgumentError
from netopt.model.attributes import Parts
from netopt.model.restore import Snapshot, random_state
from netopt.model.signals import UndoLog
from netopt.model.view import ModelView

Outputs: TypeAlias = "str | Sequence[str] | Callable[..., Any] | None"


def find_axes(model: nn.Module, example_inputs: Inputs, *, outputs: Outputs = None) -> Axes:
    """Finds which neurons a model has, what is coupled to each, and what cannot be removed and why.

    The forward is run on ``example_inputs`` in evaluation mode, and in training mode too where its code asks for the
    mode and does not only switch dropout by it, without gradients; parameters, buffers, flags, attributes and random
    states are as before afterwards. Fake and meta tensors work alike.

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
        >>> [(axis.name, axis.size, axis.frozen is None) for axis in axes]
        [('0', 16, True), ('0.in', 8, False), ('2', 4, False)]
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    view = ModelView(model)
    parts = view.parts
    attributes = Snapshot(view)
    with UndoLog() as tracing:
        trace = tracing.enter_context(_forgotten(*attributes.tensors()))
        with UndoLog() as log:
            log.callback(random_state())
            log.callback(attributes.put_back)
            attributes.gradients.set_aside()
            log.enter_context(
                _collection_paused(),
                _plain_kernels(),
                torch.inference_mode(False),
                torch.no_grad(),
                _fake_mode(trace.members.values()),
            )
            trace.inputs(leaf for leaf in tree_iter(batches.normalize(example_inputs)) if isinstance(leaf, Tensor))
            _freeze_scripted(parts, trace)
            results: list[tuple[Layout, ...]] = []
            for symbolic in (True, False):
                with attributes.in_mode(model, writes=trace.writes, training=False) as more, modes_watched() as modes:
                    tracer = SizeTracer(model, parts, trace, modes, symbolic)
                    trace.counting = True
                    try:
                        results = _run(model, parts, attributes, example_inputs, tracer, outputs)
                        break
                    except ForwardError:  # code may ask for the very type of an integer
                        trace.work.clear()
                        if not symbolic:
                            raise
                    finally:
                        trace.counting = False
                        # One that was not called as a module, but by its forward.
                        modes.differ |= more or bool(modes.asking)
            readings = tracer.readings
            twins = unreached(parts, tracer.reached, trace.touched)
            if twins:
                with twins_substituted(twins, trace), attributes.in_mode(model, writes=trace.writes, training=False):
                    tracer = SizeTracer(model, parts, trace, modes, symbolic)
                    _run(model, parts, attributes, example_inputs, tracer, outputs)
            if modes.differ or not attributes.flags_alone:
                # Batch norm fails in training mode on a single sample, and a model may refuse to be trained.
                with (
                    contextlib.suppress(ForwardError),
                    attributes.in_mode(model, writes=trace.writes, training=True) as more,
                ):
                    if modes.differ or more:
                        tracer = SizeTracer(model, parts, trace, modes, symbolic)
                        _run(model, parts, attributes, example_inputs, tracer, outputs)
        settle_described_sizes(parts, trace)
        trace.constraints.close()
        if not symbolic:
            _mark_unfollowed(trace)
        trace.settle()
        return Axes(trace, readings, results)


def _run(
    model: nn.Module, parts: Parts, attributes: Snapshot, inputs: Inputs, tracer: SizeTracer, outputs: Outputs
) -> list[tuple[Layout, ...]]:
    """One traced forward; the layouts of the results that count."""
    trace = tracer.trace
    with UndoLog() as log:
        if tracer.symbolic:
            log.enter_context(remembered(parts, attributes, trace.constraints))
        log.enter_context(remembering_literals(parts), memos_passed_by(), warnings.catch_warnings())
        warnings.simplefilter("ignore")  # such as those that a run without gradients alone gives
        with UndoLog() as modes:
            modes.enter_context(trace, tracer)
            result = batches.call(model, inputs)
        counted = counted_outputs(result, outputs)
        trace.reach(counted)
        results = [tuple([dim.layout for dim in trace.dims(tensor)]) for tensor in counted]
        for layouts in results:
            for layout in layouts:
                freeze(layout, "is a dimension of the model's output")
    return results


def counted_outputs(result: Any, outputs: Outputs) -> list[Tensor]:
    """The tensors of a forward's result whose shape must stay, as ``outputs`` says; see :func:`find_axes`."""
    named = batches.tensors(result)
    if outputs is None:
        return [tensor for _, tensor in named]
    if callable(outputs):
        if len(inspect.signature(outputs).parameters) > 1:
            return [tensor for name, tensor in named if outputs(name, tensor)]
        return [tensor for _, tensor in batches.tensors(outputs(result))]
    names = [outputs] if isinstance(outputs, str) else list(outputs)
    chosen = []
    for name in names:
        found = [tensor for path, tensor in named if path == name or path.startswith(f"{name}.")]
        if not found:
            paths = ", ".join(repr(path) for path, _ in named)
            raise InvalidArgumentError(f"outputs={name!r} names no result of the forward; there are {paths}.")
        chosen.extend(found)
    return chosen


@contextmanager
def _forgotten(members: dict[str, Tensor], parameters: frozenset[str]) -> Iterator[DimTracer]:
    """A trace of these tensors, whose notes are taken off them in the end."""
    trace = DimTracer(members, parameters)
    try:
        yield trace
    finally:
        trace.constraints.close()
        trace.forget()


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Leaves garbage for later: a trace makes many small objects, and a search of a large heap takes as long as it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Switches off kernels that fuse many operations into one, so that each is seen."""
    with ExitStack() as stack:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


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
    """Plain integers say nothing of how they are computed with."""
    for tensor in trace.members.values():
        known = trace._known(tensor)
        for layout, _ in known.dims if known is not None else ():
            mark_inexact(layout, "is of a forward that runs with plain integers only, as one that asks for their type")


__all__ = ["Outputs", "counted_outputs", "find_axes"]
