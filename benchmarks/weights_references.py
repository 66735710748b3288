"""Plain implementations of published pruning algorithms, from their papers, to hold netopt's beside.

Each prunes the linear layers of a model's blocks in place, block after block: the inputs of a block are what the blocks
pruned before it put out, and within a block every layer is solved on the same inputs. No line of netopt is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Solver = Callable[[Tensor, Tensor], Tensor]


class _Reached(BaseException):
    """The first block has been reached."""


def linears(block: nn.Module) -> list[nn.Linear]:
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


def magnitude(blocks: Sequence[nn.Module], amount: float | None, scope: str) -> None:
    """Zeroes the smallest weights, of each layer or of all together; of every four the two smallest if no amount."""
    layers = [layer for block in blocks for layer in linears(block)]
    if amount is None:
        for layer in layers:
            layer.weight.data *= two_of_four(layer.weight.data.abs())
        return
    groups = [layers] if scope == "global" else [[layer] for layer in layers]
    for group in groups:
        together = torch.cat([layer.weight.data.abs().flatten() for layer in group])
        threshold = together.kthvalue(round(amount * len(together))).values
        for layer in group:
            layer.weight.data[layer.weight.data.abs() <= threshold] = 0


def two_of_four(scores: Tensor) -> Tensor:
    """The mask of the two best of every four neighbours in a row."""
    groups = scores.view(-1, 4)
    best = groups.topk(2, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).view_as(scores)


def wanda(amount: float | None) -> Solver:
    """Sun et al. 2023, https://arxiv.org/abs/2306.11695: the smallest |w| ||x|| of each row go, nothing is updated."""

    def solve(weight: Tensor, gram: Tensor) -> Tensor:
        scores = weight.abs() * gram.diagonal().sqrt()
        if amount is None:
            return weight * two_of_four(scores)
        lowest = scores.argsort(dim=1, stable=True)[:, : round(amount * weight.shape[1])]
        return weight.scatter(1, lowest, 0)

    return solve


def sparsegpt(amount: float | None, dampening: float = 0.01, block: int = 128) -> Solver:
    """Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774, with the settings of the paper."""

    def solve(weight: Tensor, gram: Tensor) -> Tensor:
        weight, gram = weight.clone(), gram.clone()
        unused = gram.diagonal() == 0
        gram[unused, unused] = 1
        weight[:, unused] = 0
        gram.diagonal().add_(dampening * gram.diagonal().mean())
        # In double precision: with so little dampening the inverse is not definite otherwise, on some layers.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double()))
        factor = torch.linalg.cholesky(inverse, upper=True).float()
        columns = weight.shape[1]
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            part, inner = weight[:, start:stop].clone(), factor[start:stop, start:stop]
            errors = torch.zeros_like(part)
            dropped = torch.zeros_like(part, dtype=torch.bool)
            if amount is not None:
                scores = part.square() / inner.diagonal().square()
                dropped = scores <= scores.flatten().kthvalue(round(amount * scores.numel())).values
            for column in range(stop - start):
                if amount is None and column % 4 == 0:
                    four = slice(column, column + 4)
                    dropped[:, four] = ~two_of_four(part[:, four].square() / inner.diagonal()[four].square())
                error = torch.where(dropped[:, column], part[:, column], 0) / inner[column, column]
                part[:, column:] -= error[:, None] * inner[column, column:]
                part[dropped[:, column], column] = 0
                errors[:, column] = error
            weight[:, start:stop] = part
            weight[:, stop:] -= errors @ factor[start:stop, stop:]
        return weight

    return solve


def admm(amount: float | None, dampening: float = 0.1, rounds: int = 20, growing: int = 15) -> Solver:
    """Boza 2024, https://arxiv.org/abs/2401.02938, with gradual sparsity and the settings of the paper."""

    def solve(weight: Tensor, gram: Tensor) -> Tensor:
        norm = gram.diagonal().sqrt() + 1e-8
        scaled, gram = weight * norm, gram / norm / norm[:, None]
        gram = gram + dampening * gram.diagonal().mean() * torch.eye(len(gram))
        target = scaled @ gram
        inverse = torch.linalg.inv(gram + torch.eye(len(gram)))
        free, dual, sparse = scaled.clone(), torch.zeros_like(scaled), scaled
        mask = torch.ones_like(scaled, dtype=torch.bool)
        for step in range(rounds):
            if step < growing:
                part = 1 - (1 - (step + 1) / growing) ** 3
                scores = (free + dual).abs()
                if amount is None:
                    # The best two of every four stay throughout; of the others the zeros grow in number.
                    outside = scores.masked_fill(two_of_four(scores), math.inf)
                    count = round(part * 0.5 * scores.numel())
                    mask = outside > outside.flatten().kthvalue(count).values
                else:
                    mask = scores > scores.flatten().kthvalue(max(round(part * amount * scores.numel()), 1)).values
            sparse = (free + dual) * mask
            dual = dual + free - sparse
            free = (target + sparse - dual) @ inverse
        return sparse / norm

    return solve


@torch.no_grad()
def block_after_block(model: nn.Module, blocks: Sequence[nn.Module], data: Sequence[Any], solve: Solver) -> None:
    """Solves every linear layer of ``blocks`` on its second moment, each block on what the one before puts out."""
    calls = [_arguments(model, blocks[0], batch) for batch in data]
    for block in blocks:
        grams: dict[nn.Module, Tensor] = {}

        def add(layer: nn.Module, args: Any, grams: dict[nn.Module, Tensor] = grams) -> None:
            inputs = args[0].flatten(0, -2)
            grams[layer] = grams.get(layer, 0) + inputs.T @ inputs

        hooks = [layer.register_forward_pre_hook(add) for layer in linears(block)]
        for args, kwargs in calls:
            block(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        for layer in linears(block):
            layer.weight.copy_(solve(layer.weight.data, grams[layer]))
        for index, (args, kwargs) in enumerate(calls):
            out = block(*args, **kwargs)
            calls[index] = ((out[0] if isinstance(out, tuple) else out, *args[1:]), kwargs)


def _arguments(model: nn.Module, block: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the first block is called with."""
    caught: list[Any] = []

    def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append((args, kwargs))
        raise _Reached

    hook = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(**batch)
    except _Reached:
        pass
    finally:
        hook.remove()
    return caught[0]
