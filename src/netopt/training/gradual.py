"""Pruning a little at each of many training steps, up to an amount, so that training makes up for it on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from netopt import masking
from netopt.axes import find_axes
from netopt.batches import Data, Inputs
from netopt.errors import ArgumentTypeError, InvalidArgumentError, UnknownNameError
from netopt.model.signals import UndoLog
from netopt.plan import Plan
from netopt.prune import prune_neurons, prune_weights, shrink
from netopt.prune.candidates import candidates
from netopt.report import PruningReport
from netopt.training.schedules import Schedule, fraction, resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradualPruner"]

KINDS = ("neurons", "weights")


class GradualPruner:
    r"""Prunes a model step by step while it is trained; call :meth:`step` after each ``optimizer.step()``.

    At step :math:`s` from ``begin`` to ``end``, every ``every`` steps, a fraction of the model as it was at first is
    pruned: ``final * schedule((s - begin) / (end - begin))``; at ``end`` exactly ``final``.

    Args:
        model: Any module; changed in place.
        final: The fraction pruned at the end, in :math:`[0, 1)`.
        end: The step at which ``final`` is reached; steps are counted from 1.
        begin: The step of the first pruning.
        every: Steps between two prunings.
        kind: ``"weights"``, by masks of ``torch.nn.utils.prune``; or ``"neurons"``, by masks until ``end`` and removed
            then, or removed at each step with ``physical=True``.
        schedule: ``"constant"``, ``"linear"``, ``"cubic"``, ``"cosine"``, ``"onecycle"``, or a function of progress.
        importance: As for :func:`netopt.prune_weights` (default ``"magnitude"``) or :func:`netopt.prune_neurons`
            (default ``"saliency"``).
        data: Batches for criteria that need them.
        loss_fn: Of the model's result and targets, for criteria that need the loss.
        optimizer: Follows when neurons are removed.
        example_inputs: Of one forward call; needed for neurons.
        physical: Remove neurons at each step instead of masking them.
        regrow: Let masked weights compete again at each pruning, by the values they have under the mask.
        options: Further arguments of the pruning call, such as ``scope``, ``include``, ``exclude``, ``pattern``.

    Attributes:
        steps: How many steps were counted.
        sparsity: The fraction pruned by now.
        history: ``(step, fraction)`` of each pruning so far.
        plan: What was removed physically so far, or ``None``.

    Raises:
        InvalidArgumentError: ``final`` or the steps are out of range, or neurons are to be pruned without inputs.
        UnknownNameError: There is no such kind or schedule.

    References:
        To prune, or not to prune (Zhu and Gupta, 2017), https://arxiv.org/abs/1710.01878

    Example:
        >>> import torch, netopt
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> pruner = GradualPruner(net, final=0.75, end=10)
        >>> for _ in range(10):
        ...     net(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> netopt.masking.sparsity(net).total
        0.75
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        final: float = 0.9,
        end: int,
        begin: int = 1,
        every: int = 1,
        kind: str = "weights",
        schedule: Schedule = "cubic",
        importance: Any = None,
        data: Data | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        example_inputs: Inputs | None = None,
        physical: bool = False,
        regrow: bool = False,
        **options: Any,
    ) -> None:
        _check(model, final, begin, end, every, kind)
        if kind == "neurons" and example_inputs is None:
            raise InvalidArgumentError("kind='neurons' needs example_inputs, of one forward call.")
        if (physical and kind != "neurons") or (regrow and kind != "weights"):
            raise InvalidArgumentError("physical=True is for kind='neurons', regrow=True for kind='weights'.")
        self.model, self.final, self.kind = model, float(final), kind
        self.begin, self.end, self.every = begin, end, every
        self.steps, self.history = 0, list[tuple[int, float]]()
        self.plan: Plan | None = None
        self._schedule = resolve(schedule)
        self._physical, self._regrow = physical, regrow
        self._inputs, self._optimizer = example_inputs, optimizer
        self._total: int | None = None
        default = "magnitude" if kind == "weights" else "saliency"
        self._options = {"progress": False, "importance": importance or default, "data": data, "loss_fn": loss_fn}
        self._options |= options

    @property
    def sparsity(self) -> float:
        """The fraction pruned by now, of the model as it was at first."""
        return self.history[-1][1] if self.history else 0.0

    def step(self) -> PruningReport | None:
        """Counts a training step and prunes where one is due.

        Returns:
            The report of the pruning, or ``None`` where none was due.
        """
        step = self.steps + 1
        if not self.begin <= step <= self.end or ((step - self.begin) % self.every and step < self.end):
            self.steps = step
            return None
        progress = (step - self.begin) / (self.end - self.begin) if step < self.end else 1.0
        amount = self.final * fraction(self._schedule, progress)

        def prune(_: UndoLog) -> PruningReport | None:
            report = self._weights(amount) if self.kind == "weights" else self._neurons(amount, last=step == self.end)
            self.steps, self.history = step, [*self.history, (step, amount)]
            return report

        return self._whole().run(prune)

    def _whole(self) -> UndoLog:
        """Undoes what the calls inside have done, and gives counts and plan back, if all of it together fails."""
        before = {name: getattr(self, name) for name in ("steps", "history", "plan", "_total")}
        return UndoLog(lambda log: log.callback(vars(self).update, before, on=BaseException), whole=True)

    def _weights(self, amount: float) -> PruningReport:
        if self._regrow:
            masking.strip(self.model)
        return prune_weights(self.model, amount, **self._options)

    def _neurons(self, amount: float, *, last: bool) -> PruningReport | None:
        assert self._inputs is not None, "checked when made"
        if not self._physical:
            report = prune_neurons(self.model, self._inputs, amount, mode="mask", **self._options)
            if last:
                # Baked first, so that the plan has the names of the model as it was.
                masking.bake(self.model)
                report = self._removed(shrink(self.model, self._inputs, self._optimizer))
            return report
        if self._total is None:
            # Counted once, since a fraction is of the model as it is now.
            axes = find_axes(self.model, self._inputs, outputs=self._options.get("outputs"))
            chosen, _ = candidates(self.model, axes, self._options.get("include"), self._options.get("exclude"))
            self._total = sum(axis.size for axis in chosen)
        gone = 0 if self.plan is None else sum(cut.size - len(cut.kept) for cut in self.plan.axes)
        wanted = round(amount * self._total) - gone
        if wanted <= 0:
            return None
        return self._removed(
            prune_neurons(self.model, self._inputs, wanted, optimizer=self._optimizer, **self._options)
        )

    def _removed(self, report: PruningReport) -> PruningReport:
        if report.plan is not None:
            self.plan = self.plan.then(report.plan) if self.plan is not None and self.plan.tensors else report.plan
        return report

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on: the steps, the masks, and what was removed."""
        return {
            "steps": self.steps,
            "history": list(self.history),
            "total": self._total,
            "masks": masking.masks(self.model),
            "plan": None if self.plan is None else self.plan.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken: removes and masks what was, in the model and the optimizer.

        The model must be as large as it was at first. The states of the model and of the optimizer are loaded by the
        caller afterwards.

        Args:
            state: Of a pruner with the same arguments.

        Raises:
            ArgumentTypeError: The state is no mapping.
            InvalidArgumentError: Something is missing from the state.
            PlanMismatchError: The model is another one.
        """
        if not isinstance(state, Mapping):
            raise ArgumentTypeError(f"state must be what state_dict() gave, not {type(state).__name__}.")
        missing = [key for key in ("steps", "history", "total", "masks", "plan") if key not in state]
        if missing:
            raise InvalidArgumentError(f"the state of a GradualPruner lacks {', '.join(map(repr, missing))}.")
        plan = None if state["plan"] is None else Plan.from_dict(state["plan"])
        total = state["total"]
        try:
            steps = int(state["steps"])
            history = [(int(step), float(amount)) for step, amount in state["history"]]
            masks = dict(state["masks"])
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidArgumentError(f"the state of a GradualPruner is broken: {error}.") from error
        if steps < 0 or not (total is None or (type(total) is int and total > 0)):
            raise InvalidArgumentError(f"the state of a GradualPruner is broken: {steps} steps, of {total!r} neurons.")

        def load(_: UndoLog) -> None:
            if plan is not None and plan.tensors:
                plan.apply(self.model, self._optimizer)
            masking.put(self.model, masks)
            self.plan, self._total, self.steps, self.history = plan, total, steps, history

        self._whole().run(load)

    def plot(self) -> Figure:
        """Draws the schedule, and the fraction pruned at each step so far.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from netopt.figures import figure

        drawn = figure(figsize=(6, 3.2), layout="constrained")
        axes = drawn.add_subplot()
        grid = [self.begin + (self.end - self.begin) * index / 100 for index in range(101)]
        shares = [self.final * fraction(self._schedule, index / 100) for index in range(101)]
        axes.plot(grid, [100 * share for share in shares], color="0.6", label="schedule")
        if self.history:
            steps, done = zip(*self.history, strict=True)
            axes.step(steps, [100 * share for share in done], where="post", label="pruned")
        axes.set(xlabel="step", ylabel=f"{self.kind} pruned (%)", title="Gradual pruning")
        axes.legend()
        return drawn


def _check(model: Any, final: float, begin: int, end: int, every: int, kind: str) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(final, bool) or not isinstance(final, (int, float)) or not 0 <= final < 1:
        raise InvalidArgumentError(f"final={final!r} must be a fraction in [0, 1).")
    if not 1 <= begin <= end or every < 1:
        raise InvalidArgumentError(f"steps must satisfy 1 <= begin <= end and every >= 1, not {begin}, {end}, {every}.")
    if kind not in KINDS:
        raise UnknownNameError.of("kind", str(kind), KINDS)
