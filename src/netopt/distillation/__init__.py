"""Distillation: a student learns to say what a teacher says."""

from netopt.distillation import losses
from netopt.distillation.cache import Cache
from netopt.distillation.call import distill
from netopt.distillation.hints import Hint
from netopt.distillation.report import DistillationReport

__all__ = ["Cache", "DistillationReport", "Hint", "distill", "losses"]
