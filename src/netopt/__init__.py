"""Make any PyTorch model smaller and faster, in place: prune neurons, prune weights, distill.

Three calls do the work, ``prune_neurons``, ``prune_weights`` and ``distill``; ``find_axes`` and ``Plan`` show and store
what neuron pruning decides. Nothing optional is imported here, and the rest when it is first used.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from netopt import (
        axes,
        calibration,
        distillation,
        errors,
        importance,
        masking,
        measure,
        plan,
        reconstruction,
        report,
    )
    from netopt.axes import find_axes
    from netopt.distillation import DistillationReport, distill
    from netopt.integrations.huggingface.pretrained import shrink_pretrained
    from netopt.integrations.pruned import load_pruned, save_pruned
    from netopt.masking import finish
    from netopt.plan import Plan, PlanSequence
    from netopt.plan.blocks import BlockPlan
    from netopt.plan.experts import ExpertPlan
    from netopt.prune import (
        RepairReport,
        VocabularyReport,
        plan_blocks,
        plan_experts,
        plan_neurons,
        prune_blocks,
        prune_experts,
        prune_neurons,
        prune_vocabulary,
        prune_weights,
        reconstruction_scores,
        repair,
        shrink,
    )
    from netopt.report import PruningReport
    from netopt.sensitivities import SensitivityReport, sensitivity
    from netopt.training import GradualPruner, Regularizer, rewind

__version__ = "0.1.0"

__all__ = [
    "BlockPlan",
    "DistillationReport",
    "ExpertPlan",
    "GradualPruner",
    "Plan",
    "PlanSequence",
    "PruningReport",
    "Regularizer",
    "RepairReport",
    "SensitivityReport",
    "VocabularyReport",
    "axes",
    "calibration",
    "distill",
    "distillation",
    "errors",
    "find_axes",
    "finish",
    "importance",
    "load_pruned",
    "masking",
    "measure",
    "plan",
    "plan_blocks",
    "plan_experts",
    "plan_neurons",
    "prune_blocks",
    "prune_experts",
    "prune_neurons",
    "prune_vocabulary",
    "prune_weights",
    "reconstruction",
    "reconstruction_scores",
    "repair",
    "report",
    "rewind",
    "save_pruned",
    "sensitivity",
    "shrink",
    "shrink_pretrained",
]

_HOMES = {
    "axes": ("find_axes",),
    "distillation": ("DistillationReport", "distill"),
    "integrations.huggingface.pretrained": ("shrink_pretrained",),
    "integrations.pruned": ("load_pruned", "save_pruned"),
    "masking": ("finish",),
    "plan": ("Plan", "PlanSequence"),
    "plan.blocks": ("BlockPlan",),
    "plan.experts": ("ExpertPlan",),
    "prune": (
        "RepairReport",
        "VocabularyReport",
        "plan_blocks",
        "plan_experts",
        "plan_neurons",
        "prune_blocks",
        "prune_experts",
        "prune_neurons",
        "prune_vocabulary",
        "prune_weights",
        "reconstruction_scores",
        "repair",
        "shrink",
    ),
    "report": ("PruningReport",),
    "sensitivities": ("SensitivityReport", "sensitivity"),
    "training": ("GradualPruner", "Regularizer", "rewind"),
}
"""Where names come from, which are imported when they are first used."""


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is not None:
        value = getattr(importlib.import_module(f"netopt.{home}"), name)
    elif not name.startswith("_") and find_spec(f"netopt.{name}") is not None:
        value = importlib.import_module(f"netopt.{name}")
    else:
        raise AttributeError(f"module 'netopt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
