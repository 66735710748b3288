"""What each torch call states about sizes, one module a family; calls are known by their names."""

from netopt.axes.tracing.calls import contraction, queries, shaping, slicing
from netopt.axes.tracing.calls.registry import CallRule, call_rule, find_call_rule

__all__ = ["CallRule", "call_rule", "contraction", "find_call_rule", "queries", "shaping", "slicing"]
