"""What a pruning did, before and after, as a value that can be printed, plotted and saved."""

from __future__ import annotations

import dataclasses
import html
import io
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from netopt.axes import KINDS
from netopt.batches import Inputs
from netopt.errors import InvalidArgumentError, MissingPackageError
from netopt.measure import Cost, Latency, latencies, latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PruningReport", "Row"]

SHOWN = 20
"""So many rows, and so many reasons, are printed before the rest is only counted."""


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
    plan: Any = None
    frozen: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    latency_before: Latency | None = None
    latency_after: Latency | None = None
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
        plan = self.plan.to_dict() if hasattr(self.plan, "to_dict") else None
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
        }

    def table(self, rows: int | None = None) -> str:
        """Returns the report as text, with the first ``rows`` rows and reasons, by default all of them."""
        lines = [self._headline(), *_columns([["", "before", "after", ""], *self._totals()])]
        lines += [line for line in (self.by_kind(), *self._notes()) if line]
        if self.rows:
            cells = [
                self._heads(),
                *([_shown(row)[index] for index in self._kept_columns()] for row in self.rows[:rows]),
            ]
            lines += ["", *_columns(cells), *_rest(self.rows, rows)]
        if self.frozen:
            width = max(len(name) for name in list(self.frozen)[:rows])
            reasons = [f"  {name:<{width}}  {reason}" for name, reason in list(self.frozen.items())[:rows]]
            lines += ["", f"{self._left()}:", *reasons, *_rest(self.frozen, rows)]
        return "\n".join(lines)

    def plot(self, rows: int | None = 40) -> Figure:
        """Draws what was kept of each axis or tensor, and returns the figure; needs matplotlib.

        Args:
            rows: Draw the first so many rows; ``None`` draws all.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        drawn = self.rows[:rows]
        figure = _figure(figsize=(8, 1.2 + 0.28 * max(len(drawn), 1)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(drawn))
        axes.barh(places, [row.total for row in drawn], color="#d7dce2", label="before")
        axes.barh(places, [row.after for row in drawn], color="#2f6db2", label="kept")
        axes.set_yticks(list(places), [row.name for row in drawn])
        axes.invert_yaxis()
        axes.set_xlabel(self._unit())
        axes.set_title(self._headline())
        axes.spines[["top", "right"]].set_visible(False)
        if drawn:
            axes.legend(frameon=False, loc="lower right")
        return figure

    def __str__(self) -> str:
        return self.table(SHOWN)

    def _repr_html_(self) -> str:
        totals = _html_table(["", "before", "after", ""], self._totals())
        cells = [[_shown(row)[index] for index in self._kept_columns()] for row in self.rows[:SHOWN]]
        rows = _html_table(self._heads(), cells) if cells else ""
        frozen = _html_table([self._left(), "reason"], [list(item) for item in list(self.frozen.items())[:SHOWN]])
        more = "".join(f"<p>{line.strip()}</p>" for line in _rest(self.rows, SHOWN))
        kept_out = "".join(f"<p>{line.strip()}</p>" for line in _rest(self.frozen, SHOWN))
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in (self.by_kind(), *self._notes()) if line)
        return (
            f"<p><b>{html.escape(self._headline())}</b></p>{totals}{lines}{rows}{more}"
            f"{frozen if self.frozen else ''}{kept_out}"
        )

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
        return "entries" if self.call == "prune_weights" else "neurons"

    def _headline(self) -> str:
        total = sum(row.total for row in self.rows)
        if any(row.size is not None for row in self.rows):
            was = 1 - sum(row.before for row in self.rows) / max(total, 1)
            return f"{self.call}: {self.removed:.1%} zero ({was:.1%} before) of {total:,} entries".replace("%", " %")
        return f"{self.call}: {self.removed:.1%} of {total:,} {self._unit()} removed".replace("%", " %")

    def _totals(self) -> list[list[str]]:
        counts: list[tuple[str, int | None, int | None]] = [
            ("parameters", self.before.params, self.after.params),
            ("non-zero", self.before.nonzero, self.after.nonzero),
            ("MACs", self.before.macs, self.after.macs),
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
        heads = ["axis", self._unit(), "kept", "removed", "exact", "note"]
        if self.call == "prune_weights":
            heads[0], heads[3] = "tensor", "zero" if any(row.size is not None for row in self.rows) else "removed"
        return [heads[index] for index in self._kept_columns()]

    def _kept_columns(self) -> list[int]:
        # "exact" is worth a column only where something is not, and notes only where there are any.
        said = [0, 1, 2, 3]
        if any(row.exact is False for row in self.rows):
            said.append(4)
        if any(row.note for row in self.rows):
            said.append(5)
        return said


def _figure(**settings: Any) -> Figure:
    """A figure outside of pyplot, so that no window opens, which a notebook shows nonetheless."""
    try:
        from matplotlib import figure
    except ImportError as error:
        raise MissingPackageError(
            "report.plot() draws with matplotlib, which is not installed; pip install 'netopt[plots]'."
        ) from error

    class Figure(figure.Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Figure(**settings)


def _shown(row: Row) -> list[str]:
    exact = {True: "yes", False: "no", None: ""}[row.exact]
    removed = f"{row.removed * 100:.1f} %"
    return [row.name, f"{row.total:,}", f"{row.after:,}", removed, exact, row.note]


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


def _columns(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lays out cells in columns: names to the left, numbers to the right, notes at the end."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [0, *(index for index, head in enumerate(cells[0]) if head in ("exact", "note"))]
    for line in cells:
        parts = [f"{c:<{w}}" if i in words else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        yield "  ".join(parts).rstrip()


def _rest(listed: Sequence[Any] | Mapping[str, str], shown: int | None) -> list[str]:
    left = 0 if shown is None else len(listed) - shown
    return [f"  ... and {left} more"] if left > 0 else []


def _html_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(one)}</th>" for one in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="text-align:{"right" if i else "left"}">{html.escape(one)}</td>' for i, one in enumerate(line)
        )
        + "</tr>"
        for line in cells
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


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
