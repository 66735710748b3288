"""What a user would write, held to pyright's strict mode by ``test_typing.py``; nothing here is run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import netopt


def loss_fn(result: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(result, targets)


def accuracy(model: nn.Module) -> float:
    output: Tensor = model(torch.randn(2, 8))
    return float(output.argmax(1).float().mean())


def prune(model: nn.Module, x: Tensor, data: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    report = netopt.prune_neurons(model, x, 0.5, data=data, optimizer=optimizer, exclude=["head", nn.Embedding])
    plan = report.plan
    if plan is not None:
        kept: dict[str, int] = {axis.name: len(axis.kept) for axis in plan.axes}
        print(kept, report.before.params, report.after.macs, str(report))
    netopt.prune_neurons(model, {"x": x}, {"conv1": 0.5, "*": 4}, scope="layer", importance="taylor", loss_fn=loss_fn)
    masked = netopt.prune_weights(model, 0.9, pattern="2:4", importance="wanda", data=data)
    print(masked.settings, netopt.masking.sparsity(model).total, netopt.finish(model).modules)
    print(netopt.measure.count_parameters(model), netopt.measure.count_macs(model, x))


def train(model: nn.Module, teacher: nn.Module, x: Tensor, data: list[tuple[Tensor, Tensor]]) -> None:
    pruner = netopt.GradualPruner(model, final=0.9, end=100, schedule=lambda progress: progress**2)
    step = pruner.step()
    if step is not None:
        print(step.to_dict())
    pruner.load_state_dict(pruner.state_dict())
    penalty: Tensor = netopt.Regularizer(model, x, strength=1e-3)()
    print(model(x).sum() + penalty)
    report = netopt.distill(model, teacher, data, epochs=2, loss={"kl": 1.0}, hard=0.1)
    print(report.to_dict())


def look(model: nn.Module, x: Tensor) -> dict[str, float]:
    for axis in netopt.find_axes(model, x):
        print(axis.name, axis.size, axis.kind)
    netopt.Plan.load("plan.json").apply(model)
    netopt.plan.Plan.load("plan.json").save("again.json")
    try:
        netopt.prune_blocks(model, x, 2)
    except netopt.errors.NothingToPruneError as error:
        print(error)
    return netopt.sensitivity(model, x, accuracy, over="kinds").amounts(at=0.98)
