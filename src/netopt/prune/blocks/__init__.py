"""Depth: blocks leave the lists they are called from."""

from __future__ import annotations

from netopt.prune.blocks.call import plan_blocks, prune_blocks

__all__ = ["plan_blocks", "prune_blocks"]
