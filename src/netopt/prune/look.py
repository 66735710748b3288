"""What a model has that could be removed: its axes, and which of them may lose neurons."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netopt import measure
from netopt.axes import Axes, Axis, Outputs
from netopt.axes.find import axes_of, counted_outputs
from netopt.batches import Inputs
from netopt.errors import InvalidArgumentError
from netopt.importance.activations import recordable
from netopt.model import checks
from netopt.model.signals import entered
from netopt.model.view import ModelView
from netopt.prune.candidates import AxisSelector, candidates
from netopt.prune.verify import Forward

__all__ = ["Found", "Where", "check_model", "look", "without_gradients"]


@dataclass(frozen=True)
class Where:
    """Which neurons may go, and which results must keep their shape."""

    include: AxisSelector = None
    exclude: AxisSelector = None
    outputs: Outputs = None

    def counted(self, result: Any) -> list[Tensor]:
        """The tensors of a result that count."""
        return counted_outputs(result, self.outputs)


@dataclass(frozen=True)
class Found:
    """What was found in a model.

    Attributes:
        view: What the model holds.
        forward: How the model is run.
        axes: All of them.
        chosen: Those that may lose neurons.
        kept_out: Why the others may not, by name.
    """

    view: ModelView
    forward: Forward
    axes: Axes
    chosen: list[Axis]
    kept_out: dict[str, str]

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulate operations of one forward before anything is done, counted in a run."""
        return measure.count_macs(self.view, self.forward.inputs)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of neurons of each axis that may lose some."""
        return {axis.name: axis.size for axis in self.chosen}


def look(view: ModelView, example_inputs: Inputs, where: Where) -> Found:
    """Finds the axes of a model and which of them may lose neurons.

    Raises:
        NothingToPruneError: No axis may; the message lists the reasons.
    """
    # In inference mode some operations hide from a trace, and none has a gradient.
    with entered(torch.inference_mode(False)):
        inputs = recordable(example_inputs)
        axes = axes_of(view, inputs, outputs=where.outputs)
    chosen, kept_out = candidates(view, axes, where.include, where.exclude)
    return Found(view, Forward(view, inputs, where.counted, axes.steady), axes, chosen, kept_out)


def check_model(model: Any, example_inputs: Inputs) -> ModelView:
    """What a model holds, if neurons can be removed from it.

    Raises:
        ArgumentTypeError: It is no module.
        InvalidArgumentError: Some tensor of it or some input has no values yet, or is sparse, nested or of float8; or
            new tensors would have no values.
    """
    view = checks.check_model(model)
    for name, tensor in view.tensors.items():
        if (problem := checks.problem(tensor)) is not None:
            raise InvalidArgumentError(f"{name!r} {problem}.")
    for tensor in tree_leaves(example_inputs):
        if isinstance(tensor, Tensor) and (problem := checks.problem(tensor)) is not None:
            raise InvalidArgumentError(f"one of example_inputs {problem}.")
    return view


def without_gradients(view: ModelView, error: RuntimeError) -> str | None:
    """What about a model may have made a criterion fail that needs gradients, and what to do; None if nothing."""
    inference = next((name for name, tensor in view.tensors.items() if tensor.is_inference()), None)
    if inference is not None and "nference" in str(error):
        return (
            f"{inference!r} was made in inference mode and takes part in no gradient; make the model outside of "
            'torch.inference_mode(), or use importance="magnitude"'
        )
    if "use_reentrant" in str(error):
        return "its forward uses re-entrant checkpoints, which have no such gradients; say use_reentrant=False there"
    compiled = next((name for name, module in view.modules.items() if _is_compiled(module)), None)
    if compiled is not None:
        where = f"{compiled!r}" if compiled else "the model"
        return f"{where} is compiled; prune before compiling, or hand in what was compiled (`_orig_mod`)"
    return None


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
