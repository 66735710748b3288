"""Half the experts of a mixture trained on the spot: dropped by a criterion, or merged into those that stay.

    python benchmarks/experts.py                             # held-out squared error by method, over 8 seeds

The task has 12 clusters of inputs of uneven frequency, each with a linear map of its own; the mixture has 16 experts,
of which a token takes two. Merging is the mean, weighted by frequency, of an expert that stays and of those that go and
are nearest to it by their outputs on 1024 calibration inputs, after their inner neurons were aligned (MC-SMoE, Li et
al., 2024, https://arxiv.org/abs/2310.01334); "unaligned" leaves that out. Nothing is trained afterwards.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import netopt

SEEDS, SIZE, WIDTH, INNER = 8, 16, 8, 12
METHODS = ("reap", "frequency", "random", "merged by reap", "merged by frequency", "merged unaligned by reap")


class Uneven:
    """Clusters of inputs, some more frequent, each with a linear map of its own, some of these larger."""

    def __init__(self, count: int, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.centers = 2 * torch.randn(count, WIDTH, generator=self.draw)
        sizes = torch.linspace(0.2, 1.5, count)[torch.randperm(count, generator=self.draw)]
        self.maps = torch.randn(count, WIDTH, WIDTH, generator=self.draw) * sizes[:, None, None] / 3
        self.shares = torch.linspace(1, 4, count)[torch.randperm(count, generator=self.draw)]

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        cluster = torch.multinomial(self.shares, rows, replacement=True, generator=self.draw)
        x = self.centers[cluster] + torch.randn(rows, WIDTH, generator=self.draw) / 2
        return x, torch.einsum("nij,nj->ni", self.maps[cluster], x)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, SIZE)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)) for _ in range(SIZE)]
        )

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2)
        made = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            row, column = (chosen == place).nonzero(as_tuple=True)
            if len(row):
                made = made.index_add(0, row, gates[row, column, None] * expert(x[row]))
        return made


def trained(task: Uneven) -> Mixture:
    model = Mixture()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(250):
        x, y = task.batch(128)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model.eval()


def aligned(expert: nn.Module, other: nn.Module) -> list[Tensor]:
    """The parameters of an expert with its inner neurons in the order of the other's that they are most like."""
    up, bias, down, offset = (one.detach() for one in expert.parameters())
    first, second, third, _ = (one.detach() for one in other.parameters())
    likeness = first @ up.T + second[:, None] * bias + third.T @ down
    order = torch.as_tensor(linear_sum_assignment(-likeness.numpy())[1])
    return [up[order], bias[order], down[:, order], offset]


def merged(model: Mixture, plan: netopt.ExpertPlan, seen: Tensor, *, align: bool) -> Mixture:
    """The model with experts that go merged into those that stay, and these alone left."""
    model = copy.deepcopy(model)
    (cut,) = plan.mixtures
    chosen = model.router(seen).topk(2).indices.flatten()
    share = torch.bincount(chosen, minlength=SIZE).double() + 1e-6
    with torch.no_grad():
        made = torch.stack([expert(seen).flatten() for expert in model.experts])
        near = nn.functional.cosine_similarity(made[:, None], made[None], dim=-1)
        home = {gone: max(cut.kept, key=lambda one: float(near[gone, one])) for gone in cut.removed}
        dense = copy.deepcopy(model)
        for kept in cut.kept:
            group = [kept, *(gone for gone, where in home.items() if where == kept)]
            anchor = dense.experts[kept]
            parts = [aligned(dense.experts[one], anchor) if align else dense.experts[one].parameters() for one in group]
            weights = (share[group] / share[group].sum()).float()
            for target, *values in zip(model.experts[kept].parameters(), *parts, strict=True):
                target.copy_(sum(weight * value for weight, value in zip(weights, values, strict=True)))
    plan.apply(model)
    return model


def run(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    task = Uneven(12, seed)
    model = trained(task)
    (seen, _), (x, y) = task.batch(1024), task.batch(4096)

    def loss(one: nn.Module) -> float:
        return float((one(x) - y).square().mean().detach())

    plans = {}
    for name in ("reap", "frequency", "random"):
        importance = {"": torch.rand(SIZE).tolist()} if name == "random" else name
        plans[name] = netopt.plan_experts(model, seen, 0.5, importance=importance, progress=False)
    found = {"dense": loss(model)}
    for method in METHODS:
        plan = plans[method.rpartition(" ")[2]]
        smaller = copy.deepcopy(model)
        if method.startswith("merged"):
            smaller = merged(model, plan, seen, align="unaligned" not in method)
        else:
            plan.apply(smaller)
        found[method] = loss(smaller)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [run(seed) for seed in range(SEEDS)]
    for method in rows[0]:
        values = torch.tensor([row[method] for row in rows])
        wins = sum(row[method] < row["reap"] for row in rows)
        print(f"{method:26} {values.mean():.3f} (sd {values.std():.3f})  better than reap in {wins} of {SEEDS}")
    path = Path(__file__).resolve().parent / "results" / "experts.json"
    path.write_text(json.dumps({"torch": torch.__version__, "seeds": SEEDS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
