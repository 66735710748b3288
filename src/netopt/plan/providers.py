"""Integrations that register plan hooks; imported when the first plan is made, so that importing netopt stays cheap."""

from __future__ import annotations

import importlib

__all__ = ["load"]

PROVIDERS = ("netopt.integrations.huggingface",)


def load() -> None:
    """Imports every provider; once imported, they cost nothing."""
    for name in PROVIDERS:
        importlib.import_module(name)
