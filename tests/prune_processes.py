"""Run by the tests as one of several processes: prunes in every way, and saves what is left.

``python prune_processes.py FOLDER``, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set as torchrun does.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import netopt
from netopt.errors import InvalidArgumentError

DOUBLE = torch.float64
X = torch.randn(32, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
Y = torch.randint(5, (32,), generator=torch.Generator().manual_seed(2))
WEIGHTS = ("magnitude", "fisher", "taylor", "wanda", "saliency")
NEURONS = ("magnitude", "saliency", "activation", "reconstruction", "taylor")


def model() -> nn.Module:
    """The same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)
        return nn.Sequential(*layers).to(DOUBLE)


def data(rank: int, world: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every ``world``-th batch of four."""
    batches = list(zip(X.split(4), Y.split(4), strict=True))
    return batches[rank::world]


def run(rank: int = 0, world: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """What is left of the model, by case."""
    found = {}
    own, loss_fn = data(rank, world), nn.functional.cross_entropy
    for name in WEIGHTS:
        net = model()
        netopt.prune_weights(net, 0.6, importance=name, data=own, loss_fn=loss_fn, progress=False)
        found[f"weights {name}"] = netopt.masking.state_dict(net)
    for name in NEURONS:
        net, more = model(), {}
        if name in ("taylor", "reconstruction"):  # of outputs, the latter draws random signs
            more = {"loss_fn": loss_fn}
        more |= {"data": own, "repair": False, "progress": False}
        netopt.prune_neurons(net, X[:1], 0.4, importance=name, **more)
        found[f"neurons {name}"] = net.state_dict()
    for kind, more in {"weights": {"importance": "taylor"}, "neurons": {"importance": "saliency"}}.items():
        found[f"gradual {kind}"] = gradual(rank, world, kind=kind, data=own, loss_fn=loss_fn, **more)
    return found


def gradual(rank: int, world: int, **options) -> dict[str, torch.Tensor]:
    """Masks after training, of neurons before they are removed."""
    net = model()
    trained = DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    options |= {"example_inputs": X[:1]} if options["kind"] == "neurons" else {}
    pruner = netopt.GradualPruner(net, final=0.7, end=9, optimizer=optimizer, **options)
    for index in range(8):
        first = index % 4 * 8
        x, y = X[first : first + 8][rank::world], Y[first : first + 8][rank::world]
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x), y).backward()
        optimizer.step()
        pruner.step()
    return dict(netopt.masking.masks(net))


def refused(rank: int) -> list[str]:
    """What is refused, in every process alike, and changes nothing."""
    net, told = model(), []
    calls = [
        lambda: netopt.prune_weights(net, 0.5, importance={"0.weight": torch.rand(24, 6) + rank}, include="0"),
        lambda: netopt.prune_weights(net, 0.5, importance="sparsegpt", data=data(rank, 2)),
        lambda: netopt.prune_neurons(net, X[:1], 0.5, data=data(rank, 2), repair=True),
    ]
    for call in calls:
        try:
            call()
        except InvalidArgumentError as error:
            told.append(str(error))
    assert all(torch.equal(one, net.state_dict()[name]) for name, one in model().state_dict().items())
    return told


def main(folder: str) -> None:
    """Runs every case, in all processes."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {"found": run(rank, dist.get_world_size()), "refused": refused(rank)}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
