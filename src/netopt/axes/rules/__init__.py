"""How dimensions go through each operation, one module a family."""

from netopt.axes.rules import (
    contraction,
    convolution,
    creation,
    indexing,
    linear_algebra,
    losses,
    normalization,
    pointwise,
    quantization,
    recurrent,
    reduction,
    shape,
    spatial,
    spectral,
)

__all__ = [
    "contraction",
    "convolution",
    "creation",
    "indexing",
    "linear_algebra",
    "losses",
    "normalization",
    "pointwise",
    "quantization",
    "recurrent",
    "reduction",
    "shape",
    "spatial",
    "spectral",
]
