"""Where a model chooses among experts, and what has an entry for each of them.

A router's scores are chosen from; what is read by its first dimension afterwards, with as many entries, are experts:
stacked weights and biases, or a list of modules. What stands beside the scores (a bias for balance) is of the router.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netopt.model.signals import entered
from netopt.model.view import ModelView
from netopt.model.visits import Visits
from netopt.prune.experts.watch import PRODUCTS, Choice, Read, Scores, Step, Watch
from netopt.prune.verify import Forward, trains
from netopt.surgery.attributes import ROWS_OF, Path

__all__ = ["Mixture", "find_mixtures"]

_PICKING = frozenset(["select", "index", "index_select", "unbind", "gather", "slice"])
_BATCHED = frozenset(["bmm", "baddbmm", "_grouped_mm"])
_POINTWISE = frozenset(["add", "mul", "sub", "div", "add_", "mul_", "sub_", "div_", "copy_"])


@dataclass
class Mixture:
    """A router with its experts.

    Attributes:
        scores: The router's scores.
        name: Of the module that holds both.
        needed: How many experts have to stay in every group.
        groups: Into how many groups of equal size they are cut.
        stacked: Dimension by name of each tensor that holds experts.
        beside: The same, of the router and what stands beside its scores.
        lists: Names of the lists with an entry for each.
        frozen: Why none may go.
        numbers: Names of integers of the modules around that are their number.
    """

    scores: Scores
    name: str = ""
    needed: int = 1
    groups: int = 1
    stacked: dict[str, int] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)
    lists: list[str] = field(default_factory=list)
    frozen: str | None = None
    numbers: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many experts there are."""
        return self.scores.size

    @property
    def spare(self) -> int:
        """How many experts may go."""
        return self.size - self.needed * self.groups

    @property
    def tensors(self) -> dict[str, int]:
        """The dimension with an entry for each expert, by name of the tensor."""
        return self.stacked | self.beside

    def attributes(self, view: ModelView) -> Iterator[Path]:
        """Integers below and around the mixture that are the number of its experts."""
        inside = f"{self.name}.".lstrip(".")
        for prefix, module in view.modules.items():
            if f"{prefix}.".lstrip(".").startswith(inside) and not _in_lists(prefix, self.lists):
                for key, value in vars(module).items():
                    if type(value) is int and value == self.size and key not in ROWS_OF and key[0] != "_":
                        yield prefix, key


def find_mixtures(forward: Forward, view: ModelView) -> list[Mixture]:
    """Runs a model and tells where it chooses among experts; those whose experts were not found say why."""
    finder = _Finder(view)
    with entered(finder.visits):
        forward.run(None, Watch(view, finder.look))
        trains(view.model, forward.inputs, Watch(view, finder.look_beside))  # where noise may be added to the scores
    return [mixture for mixture in map(finder.settled, finder.found.values()) if mixture is not None]


class _Finder:
    """Notes choices, and what is read by expert after each."""

    def __init__(self, view: ModelView) -> None:
        self.visits = Visits(view.parts)
        self.found: dict[str, Mixture] = {}
        self._latest: dict[int, Mixture] = {}
        self._beside: dict[str, dict[str, int]] = {}
        self._joined: dict[str, dict[str, int]] = {}
        self._counted: dict[str, tuple[Any, int]] = {}
        self._lists = {
            name: len(module._modules)
            for name, module in view.modules.items()
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module._modules) > 1
        }

    def look(self, step: Step) -> None:
        """Notes a choice, what stands beside scores, and what is read by expert."""
        if step.choice is not None:
            self._note(step.choice)
        self.look_beside(step)
        for read in step.reads:
            for size, mixture in self._latest.items():
                dim = _by_expert(step, read, size)
                if dim is not None and read.name != mixture.scores.router:
                    mixture.stacked.setdefault(read.name, dim)
        self._note_list()

    def look_beside(self, step: Step) -> None:
        """Notes what stands beside scores: tensors, and other scores with those that made them."""
        if step.scores is None:
            return
        if step.name in _POINTWISE:
            self._joined.setdefault(step.scores.router, {}).update({one.router: one.dim for one in step.others})
        for read in step.reads:
            if read.stored.shape == (step.scores.size,):
                self._beside.setdefault(step.scores.router, {})[read.name] = 0

    def _note(self, choice: Choice) -> None:
        scores = choice.scores
        mixture = self.found.setdefault(scores.router, Mixture(scores))
        if not choice.along:
            mixture.frozen = "ranks what the experts are offered, not the experts"
        visit = self.visits.current
        # Choosing one twice in a run takes two experts.
        run, before = self._counted.get(scores.router, (None, 0))
        again = before if run == visit[:2] and choice.groups == 1 else 0
        if choice.groups == 1:
            self._counted[scores.router] = visit[:2], choice.count + again
        mixture.groups = max(mixture.groups, choice.groups)
        mixture.needed = max(mixture.needed, -(-(choice.count + again) // mixture.groups))
        self._latest[scores.size] = mixture

    def _note_list(self) -> None:
        steps = self.visits.current.module.split(".")
        for length in range(len(steps)):
            held = ".".join(steps[:length])
            mixture = self._latest.get(self._lists.get(held, 0))
            inside = mixture is not None and mixture.scores.router.startswith(f"{held}.".lstrip("."))
            if mixture is not None and not inside and held not in mixture.lists:
                mixture.lists.append(held)

    def settled(self, mixture: Mixture) -> Mixture | None:
        """The mixture with those experts that are closest to the router; None if it has none."""
        router = mixture.scores.router
        near = {name: _common(router, name) for name in (*mixture.stacked, *mixture.lists)}
        if not near:
            return None
        closest = max(map(len, near.values()))
        mixture.stacked = {name: dim for name, dim in mixture.stacked.items() if len(near[name]) == closest}
        mixture.lists = [name for name in mixture.lists if len(near[name]) == closest]
        mixture.lists = [name for name in mixture.lists if not _in_lists(name, mixture.lists)]
        mixture.name = ".".join(max(near.values(), key=len))
        while mixture.name and mixture.name not in self.visits.counts:
            mixture.name = mixture.name.rpartition(".")[0]
        mixture.beside = {router: mixture.scores.dim, **self._beside.get(router, {})}
        for other, dim in self._joined.get(router, {}).items():
            mixture.beside |= {other: dim, **self._beside.get(other, {})}
        mixture.stacked = {
            name: dim
            for name, dim in mixture.stacked.items()
            if not (name in mixture.beside or _in_lists(name, mixture.lists))
        }
        if mixture.frozen is None and mixture.spare < mixture.groups:
            mixture.frozen = f"needs {mixture.needed * mixture.groups} of its {mixture.size} experts"
        return mixture


def _by_expert(step: Step, read: Read, size: int) -> int | None:
    """The dimension of a tensor whose entries an operation takes as those of experts."""
    name, args, given, stored = step.name, step.args, read.given, read.stored
    if not given.dim() or given.shape[0] != size or name == "convolution":
        return None
    dim = read.dim_of(0, size)
    if dim is None:
        return None
    if name in _PICKING:
        along = args[1] if name != "index" else next((at for at, one in enumerate(args[1]) if one is not None), 0)
        along = 0 if name == "unbind" and len(args) < 2 else along
        return dim if along in (0, -given.dim()) and name != "slice" else None
    if name in _BATCHED and given.dim() == 3:
        return dim
    if stored.dim() > 2 and name not in PRODUCTS:
        return dim if stored.shape[dim] == size else None
    if name in _POINTWISE and stored.dim() == 2:
        return dim
    others = [one for one in tree_leaves(args) if isinstance(one, Tensor) and one is not given]
    same = any(one.shape == (size,) for one in others)
    return dim if name in _POINTWISE and stored.dim() == 1 and same else None


def _common(one: str, other: str) -> tuple[str, ...]:
    """The steps that two names begin with, the last of each left out."""
    pairs = zip(one.split(".")[:-1], other.split(".")[:-1], strict=False)
    found: list[str] = []
    for first, second in pairs:
        if first != second:
            break
        found.append(first)
    return tuple(found)


def _in_lists(name: str, lists: list[str]) -> bool:
    return any(name.startswith(f"{held}.") for held in lists)
