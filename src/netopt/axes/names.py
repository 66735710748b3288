"""Names of axes: the layer that makes one, then what it counts where a layer makes several."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

__all__ = ["distinct", "layer_of"]


def layer_of(tensor: str) -> str:
    """The layer a tensor belongs to: its module, if it is that module's weight, else the tensor itself."""
    module, _, last = tensor.rpartition(".")
    if ".parametrizations." in f".{tensor}":
        return f".{tensor}".partition(".parametrizations.")[0].lstrip(".") or last
    if module and last.startswith(("weight", "bias")):
        return module
    return tensor


def distinct(bases: Sequence[str], kinds: Sequence[str | None], attributes: Mapping[int, str]) -> list[str]:
    """Names told apart, where a layer makes several axes: by the attribute of their count, their kind, or a number."""
    used: dict[str, int] = defaultdict(int)
    total, alike = Counter(bases), Counter(zip(bases, kinds, strict=True))
    names: list[str] = []
    for index, (base, kind) in enumerate(zip(bases, kinds, strict=True)):
        name = base
        if total[base] > 1:
            told = kind is not None and alike[base, kind] == 1
            what = attributes.get(index, kind if told else used[base])
            name = f"{base}/{what}"
            used[base] += 1
            if name in names:
                name = f"{name}/{used[base]}"
        names.append(name)
    return names
