r"""Which neurons can go, when what reads them may be refitted afterwards.

A consumer multiplies its inputs with :math:`W`; an error :math:`\Delta W` costs
:math:`\mathrm{tr}(\Delta W^\top G\, \Delta W M)`, where :math:`M` are moments of its inputs and :math:`G` second
moments of the gradients that arrive at its outputs. Optimal brain surgery says what the cheapest :math:`\Delta W`
without some columns costs, and what the others become; neurons are eliminated greedily by that cost, summed over all
consumers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Consumer", "calibrated", "eliminate", "shrunk"]

AT_ONCE = 32
"""One in so many of the neurons left goes at a time, at least one; twice as many while more than ``MANY`` are left."""

MANY = 256

RIDGE = 1e-3


@dataclass(frozen=True)
class Consumer:
    r"""A matrix that reads an axis.

    Attributes:
        curvature: :math:`W^\top G\, W`, ``(columns, columns)``, float64.
        moment: Of the inputs, ``(columns, columns)``, float64.
        columns: Which columns each neuron owns, ``(neurons, columns of one)``.
    """

    curvature: Tensor
    moment: Tensor
    columns: Tensor


def shrunk(moment: Tensor, count: int) -> Tensor:
    """A moment matrix whose correlations are shrunk towards none, as far as ``count`` samples leave them uncertain.

    References:
        Shrinkage algorithms for MMSE covariance estimation (Chen et al., 2010), https://arxiv.org/abs/0907.4698
    """
    size = len(moment)
    if size < 2:
        return moment
    norm = moment.diagonal().clamp(min=1e-12).sqrt()
    squares = float((moment / norm[:, None] / norm[None, :]).square().sum())
    share = ((1 - 2 / size) * squares + size**2) / max((count + 1 - 2 / size) * (squares - size), 1e-9)
    share = min(1.0, share)
    return (1 - share) * moment + share * torch.diag(moment.diagonal())


def eliminate(consumers: Sequence[Consumer], size: int, *, at_once: int = AT_ONCE) -> Tensor:
    """How much the cost rises when each neuron goes, after all that cost less; the dearer neurons score higher.

    Sums of the lowest scores are the predicted cost of removing those neurons, so that one pass serves every budget.

    Args:
        consumers: What reads the axis.
        size: Number of neurons.
        at_once: One in so many of the neurons left is removed at a time; 0 for one by one.

    Returns:
        One score a neuron, float64.

    Example:
        Two inputs that are nearly the same: one of them is cheap, then the other is dear.

        >>> moment = torch.tensor([[1, 0.999, 0], [0.999, 1, 0], [0, 0, 1]]).double()
        >>> scores = eliminate([Consumer(torch.ones(3, 3).double(), moment, torch.arange(3)[:, None])], 3)
        >>> bool(scores[:2].min() < 0.1), bool(scores[2] > 0.1)
        (True, True)
    """
    states = [_State.of(consumer) for consumer in consumers]
    scores = torch.zeros(size, dtype=torch.float64)
    alive, least = torch.arange(size), 0.0
    while len(alive) > 1:
        costs = torch.stack([state.costs() for state in states]).sum(0)
        share = len(alive) * (2 if len(alive) > MANY else 1) // at_once if at_once else 1
        count = min(max(1, share), len(alive) - 1)
        going = torch.sort(costs, stable=True).indices[:count]
        for place in going.tolist():
            # Never below one that went before, so that the order is that of removal.
            least = max(least * (1 + 1e-9), float(costs[place]))
            scores[alive[place]] = least
        stays = torch.ones(len(alive), dtype=torch.bool)
        stays[going] = False
        states = [state.without(going, stays) for state in states]
        alive = alive[stays]
    scores[alive] = least * 1.01 + 1e-300
    return scores


@dataclass(frozen=True)
class _State:
    """A consumer after some neurons have gone: the curvature of its present weights, and the inverse moment."""

    curvature: Tensor
    inverse: Tensor
    columns: Tensor

    @classmethod
    def of(cls, consumer: Consumer) -> _State:
        moment = consumer.moment.clone()
        moment.diagonal().add_(RIDGE * moment.diagonal().mean() + 1e-12)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        return cls(consumer.curvature, inverse, consumer.columns)

    def costs(self) -> Tensor:
        """What the removal of each neuron alone would cost, after the others have made up for it."""
        at = self.columns
        if at.shape[1] == 1:
            only = at[:, 0]
            return self.curvature.diagonal()[only] / self.inverse.diagonal()[only]
        own = self.inverse[at[:, :, None], at[:, None, :]]
        cost = self.curvature[at[:, :, None], at[:, None, :]]
        return torch.linalg.solve(own, cost).diagonal(dim1=1, dim2=2).sum(1)

    def without(self, going: Tensor, stays: Tensor) -> _State:
        """The same with some neurons gone and the weights of the others updated."""
        gone = self.columns[going].flatten()
        left = torch.ones(len(self.inverse), dtype=torch.bool)
        left[gone] = False
        steps = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])[:, left]
        inverse = self.inverse[left][:, left] - self.inverse[left][:, gone] @ steps
        mixed = self.curvature[left][:, gone] @ steps
        curvature = self.curvature[left][:, left] - mixed - mixed.T
        curvature += steps.T @ (self.curvature[gone][:, gone] @ steps)
        new = torch.cumsum(left, 0) - 1
        return _State(curvature, inverse, new[self.columns[stays]])


def calibrated(scores: Tensor, changes: Mapping[int, float]) -> Tensor:
    """Scores whose sums over the lowest are what was seen to change when these went; their order stays.

    Args:
        scores: Of the neurons of one axis; sums over the lowest are the predicted changes.
        changes: For numbers of neurons removed, lowest scores first, the change that was measured.

    Example:
        >>> [round(one, 6) for one in calibrated(torch.tensor([1.0, 2.0, 3.0, 4.0]), {2: 6.0}).tolist()]
        [2.0, 4.0, 6.0, 8.0]
    """
    order = torch.sort(scores, stable=True).indices
    predicted = torch.cat([scores.new_zeros(1), scores[order].cumsum(0)]).double()
    new, start, seen, slope = predicted.clone(), 0, 0.0, 1.0
    for count, change in sorted(changes.items()):
        rise, risen = float(predicted[count] - predicted[start]), max(change - seen, 0.0)
        slope = risen / rise if rise > 0 else slope
        new[start : count + 1] = seen + slope * (predicted[start : count + 1] - predicted[start])
        start, seen = count, seen + risen
    new[start:] = seen + slope * (predicted[start:] - predicted[start])
    rises = torch.cummax(new.diff(), 0).values
    # Never equal, so that the order stays.
    rises += torch.arange(len(scores)) * 1e-12 * max(float(rises[-1]), 1e-300)
    return torch.empty(len(scores), dtype=torch.float64).index_copy_(0, order, rises)
