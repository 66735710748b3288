"""The hand-made cases, one module a topic; importing this package registers them all."""

from __future__ import annotations

import importlib
import pkgutil

from tests.zoo.case import CASES

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

HANDMADE = tuple(CASES.values())
