"""The calls that make a model smaller."""

from __future__ import annotations

from netopt.prune.allocation import reconstruction_scores
from netopt.prune.blocks import plan_blocks, prune_blocks
from netopt.prune.experts import plan_experts, prune_experts
from netopt.prune.neurons import plan_neurons, prune_neurons
from netopt.prune.repair import RepairReport, repair
from netopt.prune.shrink import shrink
from netopt.prune.vocabulary import VocabularyReport, prune_vocabulary
from netopt.prune.weights import prune_weights

__all__ = [
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
]
