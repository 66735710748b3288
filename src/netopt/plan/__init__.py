"""What to keep, decided and not yet done: a value that can be printed, saved and carried out."""

from __future__ import annotations

from netopt.plan.sequence import PlanSequence
from netopt.plan.stored import stored
from netopt.plan.value import AxisCut, Plan, shapes_of

__all__ = ["AxisCut", "Plan", "PlanSequence", "shapes_of", "stored"]
