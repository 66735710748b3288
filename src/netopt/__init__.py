"""Make any PyTorch model smaller: prune neurons, prune weights, distill."""

__version__ = "0.1.0"
