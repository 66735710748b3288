"""Run by the tests as one of several processes: distills in every way an engine offers, and saves the weights.

``python distill_processes.py FOLDER``, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set as torchrun does.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from netopt.distillation import distill

DOUBLE = torch.float64
X = torch.randn(43, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
Y = torch.randint(5, (43,), generator=torch.Generator().manual_seed(2))


def models() -> tuple[nn.Module, nn.Module]:
    """The same student and teacher in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(DOUBLE)
        teacher = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 5)).to(DOUBLE)
    # A teacher without a trainable parameter is what data parallelism refuses to wrap.
    return student, teacher.requires_grad_(False)


class Tokens(nn.Module):
    """Token logits of integer inputs."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, dim, dtype=DOUBLE), nn.Linear(dim, 11, dtype=DOUBLE)

    def forward(self, input_ids):
        return {"logits": self.head(self.embed(input_ids).tanh())}


def token_models() -> tuple[nn.Module, nn.Module]:
    """A language model each, the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Tokens(4), Tokens(12).requires_grad_(False)


def tokens() -> dict[str, torch.Tensor]:
    """Two rows a batch, of which 3 and 17 tokens count; two processes have one row each."""
    ids = torch.randint(11, (8, 20), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[::2, 3:] = -100
    labels[1::2, 17:] = -100
    return {"input_ids": ids, "labels": labels}


def rows(size: int) -> list[dict[str, torch.Tensor]]:
    """The same as batches of so many rows."""
    parts = {name: one.split(size) for name, one in tokens().items()}
    return [dict(zip(parts, pair, strict=True)) for pair in zip(*parts.values(), strict=True)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def loader() -> DataLoader:
    # 43 samples in batches of 6 leave one, so that a process of two has none of it.
    return DataLoader(TensorDataset(X, Y), 6, shuffle=True)


CASES = {
    "tensors": {"data": lambda: (X, Y)},
    "loader": {"data": loader},
    "list": {"data": lambda: list(zip(X.split(6), Y.split(6), strict=True))},
    "accumulated": {"data": loader, "accumulate": 3},
    "cached": {"data": loader, "cache": True},
    "uncached": {"data": loader, "cache": False},
    "hints": {"data": loader, "hints": {"1": "2"}, "clip": 0.5},
    "tokens": {"data": lambda: rows(2), "models": token_models, "hard": 0.5},
    "tokens accumulated": {"data": lambda: rows(4), "models": token_models, "accumulate": 2, "cache": True},
    "all at once": {
        "data": loader,
        "accumulate": 3,
        "cache": True,
        "hints": {"1": "2"},
        "clip": 0.5,
        "validation": (X, Y),
        "metric": "accuracy",
        "scheduler": "cosine",
    },
    "validated": {"data": loader, "validation": (X, Y), "metric": "accuracy"},
}


def shard(model: nn.Module) -> nn.Module:
    """Shards every layer, and the whole, over all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model:
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(case: str, sharded: tuple[str, ...] = (), **options) -> tuple[dict, dict]:
    """Distills one case; returns the student's weights and the report."""
    settings = {**CASES[case], **options}
    student, teacher = settings.pop("models", models)()
    student, teacher = (
        shard(one) if name in sharded else one for name, one in (("student", student), ("teacher", teacher))
    )
    data = settings.pop("data")()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    report = distill(
        student, teacher, data, **{"epochs": 3, "batch_size": 6, "loss": "kl", "hard": 0.3, "seed": 11, **settings},
        optimizer=sgd, progress=False,
    )  # fmt: skip
    assert all(torch.equal(whole(before[name]), whole(value)) for name, value in teacher.state_dict().items())
    state = {name: whole(value).clone() for name, value in student.state_dict().items()}
    return state, report.to_dict()


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def engines() -> dict[str, object]:
    """Plain, Accelerate and Fabric, on the process group there is."""
    from accelerate import Accelerator
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    fabric.launch()
    return {"plain": None, "accelerate": Accelerator(cpu=True), "fabric": fabric}


def no_file_is_left(_student: nn.Module, _epoch: object) -> None:
    """What the processes share has no name any more, so that it goes with them however they end."""
    assert list(Path(tempfile.gettempdir()).glob("netopt-*")) == []


def main(folder: str) -> None:
    """Runs every case under every engine."""
    tempfile.tempdir = folder
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    results = {}
    for name, engine in engines().items():
        for case in CASES:
            results[name, case] = run(case, engine=engine)
    for name, engine in engines().items():
        place = Path(folder) / f"{name}.pt"
        run("hints", engine=engine, epochs=1, checkpoint=place, resume=True)
        results[name, "resumed"] = run("hints", engine=engine, epochs=3, checkpoint=place, resume=True)
    for case in ("loader", "accumulated", "hints"):
        results["sharded student", case] = run(case, ("student",))
        results["both sharded", case] = run(case, ("student", "teacher"))
    run("cached", callbacks=[no_file_is_left])
    sampler = DistributedSampler(TensorDataset(X, Y), shuffle=False, drop_last=True)
    data = DataLoader(TensorDataset(X, Y), 3 + dist.get_rank(), sampler=sampler)
    results["plain", "divided"] = run("list", data=lambda: data)
    torch.save(results, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
