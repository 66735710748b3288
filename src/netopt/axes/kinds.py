"""The kind of an axis: what its neurons are in the architecture, from the roles that operations give its dimensions.

No class or attribute is named: heads are what a product of two activations is batched over, a head dimension what it
contracts, the width what several layers that read different things make and add up.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from netopt.axes.layout import Atom, Layout, atoms

if TYPE_CHECKING:
    from netopt.axes.tracing.dims import DimTracer

__all__ = ["KINDS", "kinds_of"]

KINDS = ("width", "ffn", "heads", "kv_heads", "head_dim", "channels", "gates", "experts", "embedding")
"""Every kind, in the order of a summary."""
_GATES = 3
"""From so many times on that a weight makes the same neurons, they are gates, as those of an LSTM."""


def kinds_of(trace: DimTracer, groups: Sequence[Collection[Atom]]) -> list[str | None]:
    """The kind of each group of atoms, or None where no role tells it."""
    roles = _Roles(trace)
    return [next(filter(None, map(roles.kind, group)), None) for group in groups]


class _Roles:
    """What a trace knows of atoms: the parts they play, and which weights make and read them."""

    def __init__(self, trace: DimTracer) -> None:
        self._operations = trace.made_by
        self._makes = trace.makes
        self._makers = _by_atom(trace.makes)
        self._readers = _by_atom(trace.reads)
        self._reads = {name: {atom for one in layouts for atom in atoms(one)} for name, layouts in trace.reads.items()}
        self._playing = {
            role: {atom for layout in layouts for atom in atoms(layout)} for role, layouts in trace.roles.items()
        }
        self._shared = self._key_heads(trace)

    def kind(self, atom: Atom) -> str | None:
        """The kind of one atom."""
        makers = self._makers.get(atom, set())
        if makers and self._plays("heads", atom):
            return "kv_heads" if atom in self._shared else "heads"
        if makers and self._plays("head_dim", atom):
            return "head_dim"
        if self._plays("experts", atom):
            return "experts"
        return self._made(atom, makers) if makers else None

    def _made(self, atom: Atom, makers: Collection[str]) -> str | None:
        """The kind of an atom that is no part of a product of activations, from the weights that make it."""
        if any(list(atoms(layout)).count(atom) >= _GATES for name in makers for layout in self._makes[name]):
            return "gates"
        operations = {operation for name in makers for operation in self._operations[name]}
        if all("conv" in one for one in operations):
            return "channels"
        if all("embedding" in one for one in operations):
            return "embedding"
        if self._plays("added", atom) and self._are_unlike(makers):
            return "width"
        return "ffn" if self._is_read(atom) else None

    def _plays(self, role: str, atom: Atom) -> bool:
        return atom in self._playing.get(role, ())

    def _are_unlike(self, makers: Collection[str]) -> bool:
        """Whether weights read different things: the width is added to, a gate and what it gates read the same."""
        return len({frozenset(self._reads.get(name, ())) for name in makers}) > 1

    def _is_read(self, atom: Atom) -> bool:
        readers = self._readers.get(atom, set())
        return any(not all("embedding" in one for one in self._operations[name]) for name in readers)

    def _key_heads(self, trace: DimTracer) -> set[Atom]:
        """Heads of keys that serve several of queries: of the heads of one product those that are made most often."""
        times = Counter(atom for layouts in trace.makes.values() for one in set(layouts) for atom in atoms(one))
        found: set[Atom] = set()
        for layout in set(trace.roles.get("heads", ())):
            made = [atom for atom in atoms(layout) if atom in self._makers]
            most = max((times[atom] for atom in made), default=0)
            if any(times[atom] < most for atom in made):
                found.update(atom for atom in made if times[atom] == most)
        return found


def _by_atom(named: Mapping[str, Sequence[Layout]]) -> dict[Atom, set[str]]:
    """The names of members by the atoms of their layouts."""
    found: dict[Atom, set[str]] = defaultdict(set)
    for name, layouts in named.items():
        for layout in layouts:
            for atom in atoms(layout):
                found[atom].add(name)
    return found
