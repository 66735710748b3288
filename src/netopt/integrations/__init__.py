"""What connects to other people's libraries, imported on demand."""

from netopt.integrations.pruned import load_pruned, save_pruned

__all__ = ["load_pruned", "save_pruned"]
