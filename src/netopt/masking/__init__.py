"""Masks: values that say what is kept, with one door into ``torch.nn.utils.prune``."""

from __future__ import annotations

from netopt.masking.lifecycle import Sparsity, adopt, bake, masks, put, sparsity, strip

__all__ = ["Sparsity", "adopt", "bake", "masks", "put", "sparsity", "strip"]
