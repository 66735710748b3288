"""The calls that make a model smaller."""

from __future__ import annotations

from netopt.prune.weights import prune_weights

__all__ = ["prune_weights"]
