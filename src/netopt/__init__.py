"""Make any PyTorch model smaller and faster, in place: prune neurons, prune weights, distill.

Three calls do the work, ``prune_neurons``, ``prune_weights`` and ``distill``; ``find_axes`` and ``Plan`` show and store
what neuron pruning decides. Nothing optional is imported here.
"""

from netopt import axes, errors, importance, masking
from netopt.axes import find_axes
from netopt.distillation import DistillationReport, distill
from netopt.plan import Plan
from netopt.prune import RepairReport, plan_neurons, prune_neurons, prune_weights, reconstruction_scores, repair, shrink
from netopt.report import PruningReport

__version__ = "0.1.0"

__all__ = [
    "DistillationReport",
    "Plan",
    "PruningReport",
    "RepairReport",
    "axes",
    "distill",
    "errors",
    "find_axes",
    "importance",
    "masking",
    "plan_neurons",
    "prune_neurons",
    "prune_weights",
    "reconstruction_scores",
    "repair",
    "shrink",
]
