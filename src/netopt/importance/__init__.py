"""How much each weight matters: criteria by name, and the evidence they judge by."""

from __future__ import annotations

from netopt.importance import criteria as _criteria  # noqa: F401  (registers the criteria)
from netopt.importance import neurons as _neurons  # noqa: F401  (registers those of neurons)
from netopt.importance.evidence import Evidence, collect
from netopt.importance.neurons import saliency_within
from netopt.importance.registry import Criterion, Importance, criterion, lookup, names, updates_layers
from netopt.importance.scores import scores

__all__ = [
    "Criterion",
    "Evidence",
    "Importance",
    "collect",
    "criterion",
    "lookup",
    "names",
    "saliency_within",
    "scores",
    "updates_layers",
]
