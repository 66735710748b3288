"""Distillation: a student is trained to return what a teacher returns."""

from netopt.distillation.call import distill
from netopt.distillation.loss import losses
from netopt.distillation.loss.cache import Cache
from netopt.distillation.loss.hints import Hint
from netopt.distillation.report import DistillationReport

__all__ = ["Cache", "DistillationReport", "Hint", "distill", "losses"]
