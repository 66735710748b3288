"""Run by the tests: two processes distill together, are killed at random steps and taken up again, until they end.

Each life is a pair of forked processes of which one kills itself with SIGKILL; then the other is killed as well.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from netopt.distillation import distill

X = torch.randn(43, 6, generator=torch.Generator().manual_seed(1))
KINDS = ("plain", "accelerate", "fabric", "sharded", "divided")


def engine_of(kind: str) -> object:
    """The engine of one life."""
    if kind == "accelerate":
        from accelerate import Accelerator

        return Accelerator(cpu=True)
    if kind == "fabric":
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        return fabric
    return None


def data_of(kind: str) -> object:
    """Uneven batches, shared by the processes or divided before."""
    rows = TensorDataset(X)
    if kind != "divided":
        return DataLoader(rows, 6, shuffle=True, generator=torch.Generator().manual_seed(3))
    return DataLoader(rows, 3, sampler=DistributedSampler(rows, seed=4))


def train(kind: str, checkpoint: Path, die_at: int | None) -> dict[str, torch.Tensor]:
    """Distills from wherever the checkpoint is; kills itself in the forward of step ``die_at`` of this life."""
    torch.manual_seed(5)
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 5))
    teacher = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5)).requires_grad_(False)
    steps = []

    def die(_module, _inputs):
        steps.append(student.training)
        if die_at is not None and sum(steps) > die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    student[2].register_forward_pre_hook(die)
    if kind == "sharded":
        mesh = init_device_mesh("cpu", (2,))
        for part in (student[0], student[3], student):
            fully_shard(part, mesh=mesh)
    report = distill(
        student, teacher, data_of(kind), engine=engine_of(kind), epochs=4, accumulate=2, loss="kl", hints={"1": "1"},
        scheduler="cosine", validation=[X], clip=1.0, checkpoint=checkpoint, checkpoint_every=1, resume=True, seed=7,
        cache=kind != "divided", progress=False,
    )  # fmt: skip
    weights = {name: getattr(one, "full_tensor", lambda one=one: one)() for name, one in student.state_dict().items()}
    losses = torch.tensor([[one.loss, one.terms["kl"], one.validation] for one in report.history])
    return {**weights, "history": losses, "steps": torch.tensor(report.steps), "best": torch.tensor(report.best)}


def live(kind: str, folder: Path, die_at: int | None) -> bool:
    """One life of both processes; whether they came to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
            )  # fmt: skip
            dist.init_process_group("gloo")
            result = train(kind, folder / "run.pt", die_at if rank == 1 else None)
            torch.save(result, folder / f"{rank}.pt")
            dist.barrier()
            os._exit(0)
        children.append(child)
    if die_at is None:
        return [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    status = os.waitpid(children[1], 0)[1]
    if status == 0:
        return os.waitpid(children[0], 0)[1] == 0
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    return False


def main(folder: Path) -> None:
    """Compares every kind's many lives with its single one."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import accelerate  # noqa: F401
    import lightning_fabric  # noqa: F401

    dice = random.Random(3)
    for kind in KINDS:
        places = [folder / f"{kind}-{which}" for which in ("whole", "killed")]
        for place in places:
            place.mkdir()
        assert live(kind, places[0], None), kind
        count = 1
        while not live(kind, places[1], dice.randint(3, 14) if count < 5 else None):
            count += 1
        ends = [[torch.load(place / f"{rank}.pt", weights_only=True) for rank in range(2)] for place in places]
        wrong = [
            name for whole, killed in zip(*ends, strict=True) for name in whole if not whole[name].equal(killed[name])
        ]
        left = [len(list(place.glob("*.shards"))) for place in places]
        sys.stdout.write(f"{kind}: {count} lives, differing: {wrong}, folders of shards: {left}\n")
        assert count > 2
        assert not wrong
        assert left == ([1, 1] if kind == "sharded" else [0, 0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
