"""Second-order pruning: what is kept of a layer is updated to make up for what is removed."""

from __future__ import annotations

from netopt.reconstruction.aim import Moments, aimed
from netopt.reconstruction.layerwise import reconstruct
from netopt.reconstruction.solvers import Demand, Problem, admm, sparsegpt, wanda_layerwise

__all__ = ["Demand", "Moments", "Problem", "admm", "aimed", "reconstruct", "sparsegpt", "wanda_layerwise"]
