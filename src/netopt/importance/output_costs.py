"""What errors in a layer cost at the model's outputs, told by two numbers for each row and column of its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netopt.batches import Data
from netopt.importance.contractions import Contraction
from netopt.importance.differentiation import Differentiation
from netopt.importance.inputs import Matrix, filled_like
from netopt.model.parameters import Place

__all__ = ["OutputCosts", "output_costs"]


@dataclass(frozen=True)
class OutputCosts:
    """What errors in the entries of a weight cost at the outputs: of an entry, the product of these two.

    Attributes:
        outputs: Mean squared gradient at each output of the matrix, ``(groups, rows)``.
        inputs: Sum of squares of each input, ``(groups, columns)``.
        matrix: Which entries of the weight.
    """

    outputs: Tensor
    inputs: Tensor
    matrix: Matrix

    def scores(self, value: Tensor) -> Tensor:
        """What each entry of a weight costs if it is zero, in the weight's shape."""
        scores = filled_like(value, 0, torch.float32)
        cost = self.outputs[:, :, None] * self.inputs[:, None, :]
        self.matrix.write(scores, self.matrix.rows(value).float().square() * cost.to(value.device))
        return scores


def output_costs(
    model: nn.Module,
    watched: Mapping[str, Place],
    data: Data,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    outputs: Callable[[Any], list[Tensor]],
    progress: bool = False,
) -> dict[str, OutputCosts]:
    """How much errors of the outputs of each weight's layer, and hence of its entries, change the model's outputs.

    This is the diagonal of a Kronecker-factored curvature: no more is kept than two numbers for each row and column.

    Args:
        model: Run in eval mode, forwards once and backwards twice on every batch, and given back as it was.
        watched: The weights. What is read as several matrices is left out.
        data: Batches of inputs.
        loss_fn: If given, gradients are those of the loss.
        outputs: From the forward's result to the outputs that count.
        progress: Whether to show a progress bar.

    Raises:
        MissingDataError: No output depends on any weight in a differentiable way.

    References:
        Optimizing Neural Networks with Kronecker-factored Approximate Curvature (Martens & Grosse, 2015),
        https://arxiv.org/abs/1503.05671
    """
    seen = _Squares(model, watched, loss_fn, outputs)
    seen.run(data, progress)
    return seen.costs()


class _Squares(Differentiation):
    """Squares of inputs and gradients, batch by batch."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.columns: dict[str, dict[Matrix, Tensor]] = {}
        self.rows: dict[str, Tensor] = {}

    def see_inputs(self, seen: Contraction) -> None:
        known = self.columns.setdefault(seen.reading.name, {})
        with torch.no_grad():
            known[seen.reading.matrix] = known.get(seen.reading.matrix, 0) + seen.reading.square_sums()

    def see_gradient(self, name: str, gradient: Tensor) -> None:
        found = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square().sum(1) / self.passes
        known = self.rows.get(name)
        self.rows[name] = found if known is None or known.shape != found.shape else known + found

    def costs(self) -> dict[str, OutputCosts]:
        """Of each weight that is read as one matrix and met by gradients."""
        found = {}
        for name, columns in self.columns.items():
            (matrix, inputs), *others = columns.items()
            rows = self.rows.get(name)
            if not others and rows is not None and rows.shape == matrix.size[:2]:
                found[name] = OutputCosts(rows / self.samples, inputs, matrix)
        return found
