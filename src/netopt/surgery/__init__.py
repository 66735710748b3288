"""How a model is made smaller in place, with everything that depends on its shapes, and put back on failure."""

from __future__ import annotations

from netopt.surgery.attributes import Path, read
from netopt.surgery.commit import Contents, Operation, prepare
from netopt.surgery.optimizers import as_optimizers
from netopt.surgery.tensors import Swap, find_tensor, named_tensors, narrow, successor

__all__ = [
    "Contents",
    "Operation",
    "Path",
    "Swap",
    "as_optimizers",
    "find_tensor",
    "named_tensors",
    "narrow",
    "prepare",
    "read",
    "successor",
]
