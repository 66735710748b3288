"""Pruning while a model is trained: schedules, gradual pruning, rewinding, and penalties that empty whole axes."""

from netopt.training.gradual import GradualPruner
from netopt.training.regularizer import Regularizer
from netopt.training.rewind import rewind
from netopt.training.schedules import Schedule

__all__ = ["GradualPruner", "Regularizer", "Schedule", "rewind"]
