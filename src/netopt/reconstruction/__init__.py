"""Second-order pruning: what is kept of a layer is updated to make up for what is removed."""

from __future__ import annotations

from netopt.reconstruction.layerwise import reconstruct
from netopt.reconstruction.solvers import Demand, Problem, admm, sparsegpt, wanda_layerwise
from netopt.reconstruction.target import Moments, regression_target

__all__ = ["Demand", "Moments", "Problem", "admm", "reconstruct", "regression_target", "sparsegpt", "wanda_layerwise"]
