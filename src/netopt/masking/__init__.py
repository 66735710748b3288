"""Masks: values that say what is kept, with one door into ``torch.nn.utils.prune``.

:func:`put` masks parameters, :func:`bake` makes masks permanent, :func:`strip` takes them off, :func:`sparsity` counts
zeros, :func:`hold` keeps them in training, :func:`state_dict` and :func:`load_state_dict` save and load.
"""

from __future__ import annotations

from netopt.masking.checkpoint import load_state_dict, state_dict
from netopt.masking.finish import Finished, finish
from netopt.masking.holding import Hold, hold
from netopt.masking.lifecycle import Sparsity, bake, masks, put, sparsity, strip
from netopt.masking.patterns import keep_n_of_m, keep_per_row
from netopt.masking.quantile import Scores, keep_above, keep_best
from netopt.masking.table import MaskTable

__all__ = [
    "Finished",
    "Hold",
    "MaskTable",
    "Scores",
    "Sparsity",
    "bake",
    "finish",
    "hold",
    "keep_above",
    "keep_best",
    "keep_n_of_m",
    "keep_per_row",
    "load_state_dict",
    "masks",
    "put",
    "sparsity",
    "state_dict",
    "strip",
]
