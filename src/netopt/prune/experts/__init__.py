"""Experts: rows of a router leave with what they choose."""

from __future__ import annotations

from netopt.prune.experts.call import plan_experts, prune_experts

__all__ = ["plan_experts", "prune_experts"]
