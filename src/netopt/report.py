"""What a pruning did, before and after, as a value that can be printed, plotted and saved."""

from __future__ import annotations

import dataclasses
import html
import textwrap
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from netopt.axes import KINDS
from netopt.batches import Inputs
from netopt.errors import InvalidArgumentError
from netopt.figures import figure, scores_by_kind
from netopt.measure import Cost, Latency, latencies, latency
from netopt.tables import WIDTH, columns, groups, html_table, pattern, reasons, shortened, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from netopt.plan import Plan

__all__ = ["PruningReport", "Row", "figure"]

SHOWN = 20
"""So many rows, and so many reasons, are printed one by one; more are grouped, and the rest is only counted."""
WORDS = ("exact", "note", "reason")
"""Heads of columns of words."""


@dataclass(frozen=True)
class Row:
    """One axis (its neurons), or one tensor (its entries).

    Attributes:
        name: The axis's or the tensor's dotted name.
        before: Number of neurons, or of non-zero entries, before.
        after: The number kept.
        exact: Whether the smaller model computes what the masked one does; ``None`` where that is no question.
        note: Anything to add, such as why an axis is not exact or what a pattern made of the amount.
        size: Of a tensor, all entries, those that were zero before too.
        kind: Of an axis, what its neurons are, such as ``"heads"``.
    """

    name: str
    before: int
    after: int
    exact: bool | None = None
    note: str = ""
    size: int | None = None
    kind: str | None = None

    @property
    def total(self) -> int:
        """The number of neurons before, or of all entries."""
        return self.before if self.size is None else self.size

    @property
    def removed(self) -> float:
        """The fraction removed, in ``[0, 1]``; of a tensor, what is zero now."""
        return 1 - self.after / self.total if self.total else 0.0


@dataclass(frozen=True, kw_only=True)
class PruningReport:
    """What :func:`netopt.prune_neurons` or :func:`netopt.prune_weights` did.

    ``str(report)`` is a table, a notebook shows it as one, :meth:`plot` draws it and :meth:`to_dict` is ready for JSON.

    Attributes:
        call: The function called, ``"prune_neurons"`` or ``"prune_weights"``.
        before: What the model cost before; see :class:`netopt.measure.Cost`.
        after: What it costs now.
        rows: One row an axis for neurons, one a tensor for weights.
        plan: The plan that was carried out, for neurons; ``None`` for weights.
        frozen: Names of what could not be pruned, or is not unless it is named, with the reason; of weights, with
            their share of the parameters.
        notes: What else is to be known, by what it is about: whether a configuration loads with ``from_pretrained``.
        settings: What was asked for, such as ``{"amount": 0.5, "importance": "saliency"}``.
        latency_before: Seconds of a forward call before, if measured; see :meth:`measure`.
        latency_after: Seconds of a forward call now, if measured.
        repair: What the repair did, weight by weight; ``None`` where nothing was repaired.
        batch: Samples in the example inputs, where their first dimension counts them; MACs are shown for one.
        already: The fraction of the parameters that earlier calls had removed, of which this one knows nothing.
        scores: Of neurons, by axis, higher means keep; empty where nothing was scored.
        subject: The pruned model, given as it is and kept as a weak reference, for :meth:`measure` alone.

    Example:
        >>> report = PruningReport(
        ...     call="prune_neurons",
        ...     before=Cost(params=204, nonzero=204, bytes=816, macs=192),
        ...     after=Cost(params=104, nonzero=104, bytes=416, macs=96),
        ...     rows=(Row("0", 16, 8, exact=True),),
        ...     frozen={"2": "is a model output"},
        ... )
        >>> print(report)
        prune_neurons: 50.0 % of 16 neurons removed
                     before  after
        parameters      204    104   51.0 %
        non-zero        204    104   51.0 %
        MACs            192     96   50.0 %
        bytes           816    416   51.0 %
        <BLANKLINE>
        axis  neurons  kept  removed
        0          16     8   50.0 %
        <BLANKLINE>
        frozen:
          2  is a model output
    """

    call: str
    before: Cost
    after: Cost
    rows: tuple[Row, ...] = ()
    plan: Plan | None = None
    frozen: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    latency_before: Latency | None = None
    latency_after: Latency | None = None
    repair: Any = None
    batch: int | None = None
    already: float = 0.0
    scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    subject: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.subject, nn.Module):
            object.__setattr__(self, "subject", weakref.ref(self.subject))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "subject": None}

    @property
    def params_before(self) -> int:
        """Entries of all parameters, before."""
        return self.before.params

    @property
    def params_after(self) -> int:
        """Entries of all parameters, now."""
        return self.after.params

    @property
    def nonzero_before(self) -> int:
        """Non-zero entries of all parameters, before."""
        return self.before.nonzero

    @property
    def nonzero_after(self) -> int:
        """Non-zero entries of all parameters, now, masks taken into account."""
        return self.after.nonzero

    @property
    def macs_before(self) -> int | None:
        """Multiply-accumulate operations of a forward call on the example inputs, before; ``None`` without inputs."""
        return self.before.macs

    @property
    def macs_after(self) -> int | None:
        """Multiply-accumulate operations of a forward call on the example inputs, now; ``None`` without inputs."""
        return self.after.macs

    @property
    def bytes_before(self) -> int:
        """Memory of parameters and buffers, before."""
        return self.before.bytes

    @property
    def bytes_after(self) -> int:
        """Memory of parameters and buffers, now; masks are buffers."""
        return self.after.bytes

    @property
    def removed(self) -> float:
        """The fraction of the rows' neurons that was removed, or of their entries that is zero now, in ``[0, 1]``."""
        total = sum(row.total for row in self.rows)
        return 1 - sum(row.after for row in self.rows) / total if total else 0.0

    def measure(
        self,
        inputs: Inputs,
        *,
        dense: nn.Module | Latency | None = None,
        model: nn.Module | None = None,
        repeats: int = 30,
    ) -> PruningReport:
        """Returns this report with measured seconds of one forward call.

        Args:
            inputs: Example inputs of one forward call.
            dense: A copy of the model from before, then both are timed in turns; or its latency, if measured earlier.
                Without it, only the pruned model is timed.
            model: The pruned model, by default the one that was pruned, as long as it is alive.
            repeats: Number of timed calls.

        Raises:
            ForwardError: a forward failed on ``inputs``.
            InvalidArgumentError: ``repeats`` is less than 1, or the pruned model is gone.
        """
        model = model or (self.subject() if self.subject is not None else None)
        if model is None:
            raise InvalidArgumentError("the pruned model is no longer known to this report; pass it as model=.")
        if isinstance(dense, nn.Module):
            old, new = latencies([dense, model], inputs, repeats)
        else:
            old, new = dense or self.latency_before, latency(model, inputs, repeats)
        return dataclasses.replace(self, latency_before=old, latency_after=new)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain numbers, strings, lists and dicts, ready for :func:`json.dumps`."""
        plan = None if self.plan is None else self.plan.to_dict()
        return {
            "call": self.call,
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "before": {**dataclasses.asdict(self.before), "latency": _asdict(self.latency_before)},
            "after": {**dataclasses.asdict(self.after), "latency": _asdict(self.latency_after)},
            "removed": self.removed,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "frozen": dict(self.frozen),
            "notes": dict(self.notes),
            "plan": plan,
            "repair": None if self.repair is None else self.repair.to_dict(),
        }

    def table(self, rows: int | None = None, *, grouped: bool = False) -> str:
        """Returns the report as text of at most 100 columns.

        Args:
            rows: Show the first so many rows and reasons, by default all of them, and say how many are left.
            grouped: Whether more rows than that are put together where their names differ in a number alone, as
                ``layer.*.dense (12)``.
        """
        head = [line for text in (self._headline(), *self._hints()) for line in textwrap.wrap(text, WIDTH)]
        lines = [*head, *columns([["", "before", "after", ""], *self._totals()])]
        lines += [line for text in (self.by_kind(), *self._notes()) if text for line in textwrap.wrap(text, WIDTH)]
        if self.rows:
            shown = self._groups(rows if grouped else None)
            cells = [self._heads(), *(self._cells(one) for one in shown[:rows])]
            lines += ["", *columns(cells, WORDS), *_rest(shown, rows)]
        if self.frozen:
            named = self._reasons(rows if grouped else None)
            lines += ["", f"{self._left()}:", *reasons(named[:rows]), *_rest(named, rows)]
        if self.repair is not None:
            lines += ["", self.repair.table(rows)]
        return "\n".join(lines)

    def plot(self, rows: int | None = 40) -> Figure:
        """Draws the share of each axis or tensor that was kept, and returns the figure; needs matplotlib.

        Args:
            rows: Draw at most so many bars. Where there are more, names that differ in a number alone share a bar,
                with a line from the least to the most that one of them kept; of what is still more, the largest are
                drawn, and the figure says what is left out. ``None`` draws all, one by one.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        every = self._groups(rows)
        largest = sorted(range(len(every)), key=lambda index: -every[index].total)[:rows]
        drawn = [every[index] for index in sorted(largest)]
        drawn_on = figure(figsize=(8, 1.6 + 0.27 * max(len(drawn), 1)), layout="constrained")
        axes = drawn_on.add_subplot()
        _draw(axes, drawn)
        axes.set_xlabel(f"{self._unit()} kept, % of each {self._heads()[0]}")
        drawn_on.suptitle(textwrap.fill(self._headline(), 96), x=0.01, ha="left", fontsize=10)
        if drawn:
            axes.axvline(100 * (1 - self.removed), color="#c8553d", linewidth=1, linestyle=":", label="all together")
            drawn_on.legend(loc="outside right upper", frameon=False)
        left = [one for index, one in enumerate(every) if index not in largest]
        if left:
            share = sum(one.total for one in left) / max(sum(one.total for one in every), 1)
            text = f"... and {len(left)} smaller ones, {share:.1%} of the {self._unit()}; plot(rows=None) draws all"
            axes.annotate(text, (0, 0), (0, -38), "axes fraction", "offset points", fontsize=8)
        return drawn_on

    def plot_scores(self) -> Figure:
        """Draws how the scores of neurons are distributed, a panel a kind, those that stay and those that go.

        Raises:
            InvalidArgumentError: The report holds no scores: weights were pruned, or what goes was given.
            MissingPackageError: matplotlib is not installed.
        """
        if not self.scores or self.plan is None:
            raise InvalidArgumentError(
                "this report holds no scores of neurons; prune_neurons with a criterion has them."
            )
        kinds = {row.name: row.kind for row in self.rows}
        return scores_by_kind(self.scores, {cut.name: cut.kept for cut in self.plan.axes}, kinds)

    def __str__(self) -> str:
        return self.table(SHOWN, grouped=True)

    def __repr__(self) -> str:
        costs = [f"{name} {old} -> {new}" for name, old, new, _ in self._totals() if name != "bytes"]
        return f"<{self._headline()}; {', '.join(costs)}>"

    def _repr_html_(self) -> str:
        totals = html_table(["", "before", "after", ""], self._totals())
        shown, named = self._groups(SHOWN), self._reasons(SHOWN)
        rows = html_table(self._heads(), [self._cells(one) for one in shown[:SHOWN]], WORDS) if shown else ""
        more = "".join(f"<p>{line.strip()}</p>" for line in _rest(shown, SHOWN))
        frozen = html_table([self._left(), "reason"], named[:SHOWN], WORDS) if named else ""
        kept_out = "".join(f"<p>{line.strip()}</p>" for line in _rest(named, SHOWN))
        texts = [*self._hints(), self.by_kind(), *self._notes()]
        hints = "".join(f"<p>{html.escape(text)}</p>" for text in texts if text)
        return f"<p><b>{html.escape(self._headline())}</b></p>{hints}{totals}{rows}{more}{frozen}{kept_out}"

    def _groups(self, most: int | None) -> list[_Group]:
        """The rows, or where there are more than ``most``, those together whose names have one pattern."""
        if most is None or len(self.rows) <= most:
            return [_Group(row.name, (row,)) for row in self.rows]
        found = groups((pattern(row.name), row) for row in self.rows)
        return [_Group(name if len(rows) > 1 else rows[0].name, tuple(rows)) for name, rows in found.items()]

    def _reasons(self, most: int | None) -> list[tuple[str, str]]:
        if most is None or len(self.frozen) <= most:
            return list(self.frozen.items())
        found = groups(((pattern(name), pattern(reason)), name) for name, reason in self.frozen.items())
        return [
            (
                f"{name} ({len(names)})" if len(names) > 1 else names[0],
                reason if len(names) > 1 else self.frozen[names[0]],
            )
            for (name, reason), names in found.items()
        ]

    def by_kind(self) -> str:
        """Returns what became of each kind of axis, ``"width 768 -> 640, ffn 3072 -> 2048 in 12 layers"``."""
        kinds: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.kind is not None:
                kinds.setdefault(row.kind, []).append(row)
        return ", ".join(_kind(name, kinds[name]) for name in sorted(kinds, key=_place))

    def _notes(self) -> list[str]:
        return [f"{name}: {text}" for name, text in self.notes.items()]

    def _left(self) -> str:
        return "left out" if self.call == "prune_weights" else "frozen"

    def _unit(self) -> str:
        return {"prune_weights": "entries", "prune_blocks": "blocks", "prune_experts": "experts"}.get(
            self.call, "neurons"
        )

    def _headline(self) -> str:
        total = sum(row.total for row in self.rows)
        if any(row.size is not None for row in self.rows):
            was = 1 - sum(row.before for row in self.rows) / max(total, 1)
            return f"{self.call}: {self.removed:.1%} zero ({was:.1%} before) of {total:,} entries".replace("%", " %")
        line = f"{self.call}: {self.removed:.1%} of {total:,} {self._unit()} removed"
        if self.already:
            line += f", of the model as it is now ({self.already:.1%} of its parameters had been removed before)"
        return line.replace("%", " %")

    def _hints(self) -> list[str]:
        """An amount that is counted and looks like a percentage."""
        amount = self.settings.get("amount")
        if type(amount) is not int or not 2 <= amount < 100 or abs(self.removed - amount / 100) < 0.02:
            return []
        share = f"for {amount} percent write amount={amount / 100:g}"
        return [f"amount={amount} is a count; {share}"]

    def _totals(self) -> list[list[str]]:
        macs, old_macs, new_macs = "MACs", self.before.macs, self.after.macs
        batch = self.batch or 1
        if batch > 1 and old_macs and new_macs is not None and old_macs % batch == new_macs % batch == 0:
            macs, old_macs, new_macs = f"MACs per sample (batch of {batch:,})", old_macs // batch, new_macs // batch
        counts: list[tuple[str, int | None, int | None]] = [
            ("parameters", self.before.params, self.after.params),
            ("non-zero", self.before.nonzero, self.after.nonzero),
            (macs, old_macs, new_macs),
            ("bytes", self.before.bytes, self.after.bytes),
        ]
        lines = [
            [name, f"{old:,}", f"{new:,}", f"{_ratio(new, old)}"]
            for name, old, new in counts
            if old is not None and new is not None
        ]
        if self.latency_after is not None:
            old = self.latency_before
            ratio = _ratio(self.latency_after.median, old.median) if old else ""
            lines.append(["latency", _milliseconds(old), _milliseconds(self.latency_after), ratio])
        return lines

    def _heads(self) -> list[str]:
        first = {"prune_blocks": "stack", "prune_experts": "mixture"}.get(self.call, "axis")
        heads = [first, self._unit(), "kept", "removed", "exact", "note"]
        if self.call == "prune_weights":
            heads[0], heads[3] = "tensor", "zero" if any(row.size is not None for row in self.rows) else "removed"
        return [heads[index] for index in self._kept_columns()]

    def _cells(self, group: _Group) -> list[str]:
        cells = group.cells()
        return [cells[index] for index in self._kept_columns()]

    def _kept_columns(self) -> list[int]:
        # "exact" is worth a column only where something is not, and notes only where there are any.
        said = [0, 1, 2, 3]
        if any(row.exact is False for row in self.rows):
            said.append(4)
        if any(row.note for row in self.rows):
            said.append(5)
        return said


@dataclass(frozen=True)
class _Group:
    """Rows that are shown as one, under a pattern where they are several."""

    pattern: str
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        return self.pattern if len(self.rows) == 1 else f"{self.pattern} ({len(self.rows)})"

    @property
    def total(self) -> int:
        return sum(row.total for row in self.rows)

    @property
    def kept(self) -> float:
        """The share kept, in percent."""
        return 100 * sum(row.after for row in self.rows) / max(self.total, 1)

    def cells(self) -> list[str]:
        exact = {row.exact for row in self.rows}
        word = "no" if False in exact else "yes" if True in exact else ""
        notes = list(dict.fromkeys(row.note for row in self.rows if row.note))
        note = "; ".join(notes[:1]) + ("; ..." if len(notes) > 1 else "")
        removed = f"{100 - self.kept if self.total else 0:.1f} %"
        before, after = span([row.total for row in self.rows]), span([row.after for row in self.rows])
        return [self.name, before, after, removed, word, note]


def _draw(axes: Axes, drawn: Sequence[_Group]) -> None:
    """One bar a group, and beside it how many of how many were kept."""
    places = range(len(drawn))
    axes.barh(places, [100] * len(drawn), color="#d7dce2", label="removed")
    axes.barh(places, [one.kept for one in drawn], color="#2f6db2", label="kept")
    for place, one in enumerate(drawn):
        shares = [100 * (1 - row.removed) for row in one.rows]
        if max(shares) - min(shares) > 0.5:
            axes.plot([min(shares), max(shares)], [place, place], color="#17395e", marker="|", linewidth=1.2)
        counts = f"{span([row.after for row in one.rows])} of {span([row.total for row in one.rows])}"
        axes.text(101, place, counts, va="center", fontsize=8)
    axes.set_yticks(list(places), [shortened(one.name) for one in drawn], fontsize=8)
    axes.set_ylim(max(len(drawn), 1) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)


def _kind(name: str, rows: Sequence[Row]) -> str:
    """``"ffn 3072 -> 2048 in 12 layers"``, with the range where layers differ."""
    before, after = (_span([getattr(row, which) for row in rows]) for which in ("before", "after"))
    return f"{name} {before} -> {after}" + (f" in {len(rows)} layers" if len(rows) > 1 else "")


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _place(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _ratio(new: float, old: float) -> str:
    return f"{new / old * 100:.1f} %" if old else ""


def _milliseconds(latency: Latency | None) -> str:
    return "" if latency is None else f"{latency.median * 1e3:.3f} ms"


def _rest(listed: Sequence[Any] | Mapping[str, str], shown: int | None) -> list[str]:
    left = 0 if shown is None else len(listed) - shown
    return [f"  ... and {left} more"] if left > 0 else []


def _asdict(latency: Latency | None) -> dict[str, float] | None:
    return None if latency is None else dataclasses.asdict(latency)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return getattr(value, "__name__", None) or type(value).__name__
