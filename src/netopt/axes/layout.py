"""What a dimension is made of.

A dimension's layout is an expression over atoms: an :class:`Atom` (an index space of its own), a :class:`Product`
(heads times head-dim flattened into one dimension, row-major) or a :class:`Concat` (a fused projection). Two dimensions
that must shrink together are *unified*: an atom is bound to an expression, two expressions are aligned and split where
their boundaries differ, and what cannot be aligned is frozen, with the reason. Sizes and boundaries only; no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias, final

_MOST_ROWS = 64  # a concatenation is compared row by row up to this many
LOOKED_UP = "is looked up by number"
"""Why an axis with an entry for each number that comes in is frozen."""
OUTPUT = "is a dimension of the model's output"
"""Why an axis of a result is frozen."""


class SizeReason(str):
    """Why an axis is inexact: its size is used as a number, such as the default scale of attention."""

    __slots__ = ()


@final
class Atom:
    """An index space that nothing splits so far; the unknown of the unification.

    Attributes:
        size: Number of positions.
        bound: The layout this atom was found to be, or ``None`` while it is unknown.
        frozen: Why no position may be removed, or ``None``.
        inexact: Why removing a position differs from masking it, or ``None``.
        unit: Whether this is one position of an axis taken apart by a permutation; such an atom may vanish.
    """

    __slots__ = ("bound", "frozen", "inexact", "size", "unit")

    def __init__(self, size: int, frozen: str | None = None, *, unit: bool = False) -> None:
        self.size = size
        self.bound: Layout | None = None
        self.frozen = frozen
        self.inexact: str | None = None
        self.unit = unit

    def __repr__(self) -> str:
        return f"<{self.size}>"


@final
class Product:
    """Several layouts flattened, row-major, into one dimension; sizes multiply."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Sequence[Layout]) -> None:
        self.parts = tuple(parts)
        self.size = math.prod(part.size for part in self.parts)

    def __repr__(self) -> str:
        return "(" + " * ".join(map(repr, self.parts)) + ")"


@final
class Concat:
    """Several layouts one after the other in one dimension; sizes add up."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Sequence[Layout]) -> None:
        self.parts = tuple(parts)
        self.size = sum(part.size for part in self.parts)

    def __repr__(self) -> str:
        return "(" + " + ".join(map(repr, self.parts)) + ")"


Layout: TypeAlias = Atom | Product | Concat
LAYOUTS = (Atom, Product, Concat)


def resolve(layout: Layout) -> Layout:
    """Returns ``layout`` with bound atoms replaced and nested expressions of one kind flattened."""
    if type(layout) is Atom:
        bound = layout.bound
        if bound is None:
            return layout
        if type(bound) is not Atom or bound.bound is not None:
            bound = layout.bound = resolve(bound)  # later look-ups take one step
        return bound
    is_product = isinstance(layout, Product)
    if _is_settled(layout, is_product):
        return layout
    parts: list[Layout] = []
    changed = len(layout.parts) < 2  # one part alone is no expression
    for part in layout.parts:
        found = resolve(part)
        changed = changed or found is not part
        if is_product and found.size == 1 and isinstance(found, Atom) and not found.unit:
            changed = True
        elif not isinstance(found, Atom) and type(found) is type(layout):
            parts.extend(found.parts)
            changed = True
        else:
            parts.append(found)
    if not changed:
        return layout
    if not parts:
        return Atom(1)
    return parts[0] if len(parts) == 1 else type(layout)(parts)


def _is_settled(layout: Product | Concat, is_product: bool) -> bool:
    """Whether nothing of an expression can be replaced or left out; by far the most frequent case."""
    for part in layout.parts:
        if type(part) is not Atom or part.bound is not None or (is_product and part.size == 1 and not part.unit):
            return False
    return len(layout.parts) > 1


def product(parts: Iterable[Layout]) -> Layout:
    """The layouts flattened into one dimension, simplified."""
    return resolve(Product(tuple(parts)))


def concat(parts: Iterable[Layout]) -> Layout:
    """The layouts joined into one dimension, simplified."""
    return resolve(Concat(tuple(parts)))


def atoms(layout: Layout) -> Iterator[Atom]:
    """Every atom of a layout, in the order of its positions; one that appears twice is yielded twice."""
    layout = resolve(layout)
    if type(layout) is Atom:
        yield layout
    else:
        for part in layout.parts:
            yield from atoms(part)


def count(layout: Layout, counts: dict[Atom, int]) -> int:
    """The size of ``layout`` once its atoms have ``counts`` positions; an atom not named keeps its size."""
    layout = resolve(layout)
    if type(layout) is Atom:
        return counts.get(layout, layout.size)
    if isinstance(layout, Product):
        return math.prod(count(part, counts) for part in layout.parts)
    return sum(count(part, counts) for part in layout.parts)


def freeze(layout: Layout, why: str) -> None:
    """Keeps every position of ``layout``; the first reason given stays."""
    if type(layout) is Atom and layout.bound is None:
        if layout.frozen is None:
            layout.frozen = why
        return
    for atom in atoms(layout):
        if atom.frozen is None:
            atom.frozen = why


def mark_inexact(layout: Layout, why: str) -> None:
    """States that removing a position of ``layout`` is not the same as masking it; the first reason stays."""
    for atom in atoms(layout):
        if atom.inexact is None:
            atom.inexact = why


def bind(atom: Atom, layout: Layout) -> None:
    """States that ``atom`` is ``layout``, which inherits what was known of the atom."""
    if atom.frozen is not None:
        freeze(layout, atom.frozen)
    if atom.inexact is not None:
        mark_inexact(layout, atom.inexact)
    if atom.unit and isinstance(layout, Atom):
        layout.unit = True
    atom.bound = layout


def split_product(layout: Layout, size: int) -> tuple[Layout, Layout] | None:
    """Reads ``layout`` as ``size`` rows of equal length, ``head * tail``; ``None`` where its boundaries forbid it."""
    layout = resolve(layout)
    if size == 1:
        return Atom(1), layout
    if size == layout.size:
        return layout, Atom(1)
    if layout.size % size:
        return None
    if isinstance(layout, Atom):
        head, tail = Atom(size), Atom(layout.size // size)
        bind(layout, Product((head, tail)))
        return head, tail
    if isinstance(layout, Product):
        return _split_inside_product(layout, size)
    row = layout.size // size
    if any(part.size % row for part in layout.parts):
        return _rows_of_parts(layout, size)
    tail = Atom(row)
    heads: list[Layout] = []
    for part in layout.parts:
        rows = split_product(part, part.size // row)
        if rows is None or not unify(rows[1], tail):
            return None
        heads.append(rows[0])
    return concat(heads), resolve(tail)


def _rows_of_parts(layout: Layout, size: int) -> tuple[Layout, Layout] | None:
    """Cuts a concatenation into rows where its parts are no whole numbers of them; the rows are one and the same."""
    if size > _MOST_ROWS:
        return None
    rows: list[Layout] = []
    rest = layout
    for _ in range(size - 1):
        halves = split_concat(rest, layout.size // size)
        if halves is None:
            return None
        rows.append(halves[0])
        rest = halves[1]
    if not all(unify(rest, row) for row in rows):
        return None
    return Concat([Atom(1) for _ in range(size)]), resolve(rest)


def _split_inside_product(layout: Product, size: int) -> tuple[Layout, Layout] | None:
    head: list[Layout] = []
    rest = size
    for index, part in enumerate(layout.parts):
        if rest % part.size == 0:
            head.append(part)
            rest //= part.size
            if rest == 1:
                return product(head), product(layout.parts[index + 1 :])
            continue
        halves = split_product(part, rest)
        if halves is None:
            return None
        return product([*head, halves[0]]), product([halves[1], *layout.parts[index + 1 :]])
    return None


def split_concat(layout: Layout, size: int) -> tuple[Layout, Layout] | None:
    """Cuts ``layout`` after its first ``size`` positions; ``None`` where its boundaries forbid it."""
    layout = resolve(layout)
    if not 0 < size < layout.size:
        return None
    if isinstance(layout, Atom):
        first, rest = Atom(size), Atom(layout.size - size)
        bind(layout, Concat((first, rest)))
        return first, rest
    if isinstance(layout, Product):
        return _cut_product(layout, size)
    taken = 0
    for index, part in enumerate(layout.parts):
        if taken + part.size <= size:
            taken += part.size
            continue
        if taken == size:
            return concat(layout.parts[:index]), concat(layout.parts[index:])
        halves = split_concat(part, size - taken)
        if halves is None:
            return None
        return concat([*layout.parts[:index], halves[0]]), concat([halves[1], *layout.parts[index + 1 :]])
    return None


def _cut_product(layout: Product, size: int) -> tuple[Layout, Layout] | None:
    """Cuts a product between two of its rows, or inside one, where the row's own parts allow it."""
    head, tail = layout.parts[0], product(layout.parts[1:])
    whole, into = divmod(size, tail.size)
    if into == 0:
        halves = split_concat(head, whole)
        return None if halves is None else (product((halves[0], tail)), product((halves[1], tail)))
    before: list[Layout] = []
    behind: list[Layout] = [head]
    for position in [whole, 1] if whole else [1]:  # what lies before the row that is cut, then that row
        if behind[-1].size == position:
            before.append(behind.pop())
            continue
        halves = split_concat(behind.pop(), position)
        if halves is None:
            return None
        before.append(halves[0])
        behind.append(halves[1])
    row = split_concat(tail, into)
    if row is None:
        return None
    return (
        concat([*(product((rows, tail)) for rows in before[:-1]), row[0]]),
        concat([row[1], *(product((rows, tail)) for rows in behind)]),
    )


def shatter(layout: Layout) -> list[Layout]:
    """Takes a layout apart into its single positions, so that a permutation can be stated."""
    layout = resolve(layout)
    if isinstance(layout, Atom):
        if layout.size == 1:
            if layout.bound is None:
                layout.unit = True
            return [layout]
        units = [Atom(1, unit=True) for _ in range(layout.size)]
        bind(layout, Concat(units))
        return list(units)
    if isinstance(layout, Concat):
        return [unit for part in layout.parts for unit in shatter(part)]
    rows = [shatter(part) for part in layout.parts]
    positions: list[Layout] = rows[0]
    for row in rows[1:]:
        positions = [product((head, tail)) for head in positions for tail in row]
    return positions


def unify(left: Layout, right: Layout, because: Callable[[], str] | None = None) -> bool:
    """States that two dimensions are one and the same.

    Args:
        left: A layout.
        right: Another layout of the same size.
        because: Called for the reason when the two cannot be aligned.

    Returns:
        Whether they could be aligned; where not, both are frozen.
    """
    left, right = resolve(left), resolve(right)
    if left is right:
        return True
    if left.size != right.size:
        return _conflict(left, right, because)
    if type(left) is Atom and type(right) is Atom:
        bind(left, right)
        return True
    if isinstance(right, Atom):
        left, right = right, left
    if isinstance(left, Atom):
        if any(atom is left for atom in atoms(right)):
            return _conflict(left, right, because)
        bind(left, right)
        return True
    if isinstance(left, Product) and isinstance(right, Product):
        return _unify_products(left, right, because)
    if isinstance(left, Concat) and isinstance(right, Concat):
        return _unify_concats(left, right, because)
    if isinstance(left, Concat):
        left, right = right, left
    assert isinstance(left, Product)
    assert isinstance(right, Concat)
    return _unify_product_with_concat(left, right, because)


def _conflict(left: Layout, right: Layout, because: Callable[[], str] | None) -> bool:
    why = because() if because else "its dimensions are aligned in two ways"
    freeze(left, why)
    freeze(right, why)
    return False


def _unify_products(left: Layout, right: Layout, because: Callable[[], str] | None) -> bool:
    while True:
        left, right = resolve(left), resolve(right)
        if not (isinstance(left, Product) and isinstance(right, Product)):
            return unify(left, right, because)
        first, second = left.parts[0], right.parts[0]
        size = first.size if first.size == second.size else math.gcd(first.size, second.size)
        if size == 1 and not first.size == second.size == 1:
            return _conflict(left, right, because)
        if first.size == second.size:
            heads = (first, product(left.parts[1:])), (second, product(right.parts[1:]))
        else:
            heads = split_product(left, size), split_product(right, size)
        if heads[0] is None or heads[1] is None:
            return _conflict(left, right, because)
        if not unify(heads[0][0], heads[1][0], because):
            freeze(left, "it is a factor of a dimension that cannot be aligned")
            freeze(right, "it is a factor of a dimension that cannot be aligned")
            return False
        left, right = heads[0][1], heads[1][1]


def _unify_concats(left: Concat, right: Concat, because: Callable[[], str] | None) -> bool:
    """Walks along both, cutting the longer part where the shorter one ends."""
    aligned = True
    lefts, rights = list(reversed(left.parts)), list(reversed(right.parts))
    while lefts and rights:
        first, second = _next(lefts), _next(rights)
        if first.size == second.size:
            aligned = unify(first, second, because) and aligned
        elif not lefts or not rights:
            return unify(concat([first, *reversed(lefts)]), concat([second, *reversed(rights)]), because) and aligned
        else:
            size = min(first.size, second.size)
            longer, rest = (first, lefts) if first.size > size else (second, rights)
            halves = split_concat(longer, size)
            if halves is None:
                return _conflict(concat([first, *reversed(lefts)]), concat([second, *reversed(rights)]), because)
            aligned = unify(halves[0], second if longer is first else first, because) and aligned
            rest.append(halves[1])
    return aligned


def _next(parts: list[Layout]) -> Layout:
    """The last of ``parts``, taken off; one that has become a concatenation is opened."""
    found = resolve(parts.pop())
    while isinstance(found, Concat):
        parts.extend(reversed(found.parts))
        found = resolve(parts.pop())
    return found


def _unify_product_with_concat(left: Product, right: Concat, because: Callable[[], str] | None) -> bool:
    """A product equals a concatenation when every summand is a number of whole rows of it."""
    for cut in range(1, len(left.parts)):
        tail = product(left.parts[cut:])
        if any(part.size % tail.size for part in right.parts):
            continue
        heads: list[Layout] = []
        for part in right.parts:
            rows = split_product(part, part.size // tail.size)
            if rows is None or not unify(rows[1], tail, because):
                return _conflict(left, right, because)
            heads.append(rows[0])
        return unify(product(left.parts[:cut]), concat(heads), because)
    return _conflict(left, right, because)
