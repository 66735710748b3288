"""Second-order pruning: what is kept of a layer is updated to make up for what is removed."""

from __future__ import annotations

from netopt.reconstruction.layerwise import reconstruct
from netopt.reconstruction.solvers import SOLVERS, Demand, admm, sparsegpt

__all__ = ["SOLVERS", "Demand", "admm", "reconstruct", "sparsegpt"]
