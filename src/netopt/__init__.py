"""Make any PyTorch model smaller and faster, in place: prune neurons, prune weights, distill.

Three calls do the work, ``prune_neurons``, ``prune_weights`` and ``distill``; ``find_axes`` and ``Plan`` show and store
what neuron pruning decides. Nothing optional is imported here.
"""

from netopt import axes, errors, importance, masking
from netopt.axes import find_axes
from netopt.distillation import DistillationReport, distill
from netopt.integrations import huggingface as _huggingface  # noqa: F401 - keeps configurations in step
from netopt.plan import Plan
from netopt.plan.blocks import BlockPlan
from netopt.prune import plan_blocks, plan_neurons, prune_blocks, prune_neurons, prune_weights, shrink
from netopt.report import PruningReport

__version__ = "0.1.0"

__all__ = [
    "BlockPlan",
    "DistillationReport",
    "Plan",
    "PruningReport",
    "axes",
    "distill",
    "errors",
    "find_axes",
    "importance",
    "masking",
    "plan_blocks",
    "plan_neurons",
    "prune_blocks",
    "prune_neurons",
    "prune_weights",
    "shrink",
]
