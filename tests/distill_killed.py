"""Run by the tests: kills distillations at random steps and takes them up again, until they end; compares the weights.

Each life is a forked process that kills itself with SIGKILL, so that nothing can be tidied up.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from netopt.distillation import distill

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))


class Noisy(Dataset):
    """Augmented at random, in the process that draws."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index):
        return X[index] + 0.1 * torch.randn(6) + random.random() * 0.01


def cosine_steps(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


def judge(student):
    with torch.no_grad():
        return -student(X).square().mean().item()


SCENARIOS = {
    "tensors, cached, accumulated": {
        "data": lambda: X, "accumulate": 2, "scheduler": cosine_steps, "checkpoint_every": 1, "loss": "kl",
    },
    "augmented loader, best weights": {
        "data": lambda: DataLoader(Noisy(), 8, shuffle=True), "validation": judge, "checkpoint_every": 3, "clip": 0.5,
    },
    "loader with workers": {
        "data": lambda: DataLoader(Noisy(), 8, shuffle=True, num_workers=1), "epochs": 2, "checkpoint_every": 2,
    },
    "own generator, projected hint, by epoch": {
        "data": lambda: DataLoader(X, 8, shuffle=True, generator=torch.Generator().manual_seed(3)), "hints": {"0": "0"},
    },
    "list of batches, hashed cache": {
        "data": lambda: list(X.split(8)), "checkpoint_every": 2, "optimizer": lambda p: torch.optim.SGD(p, 0.05, 0.9),
    },
}  # fmt: skip


def train(scenario: str, checkpoint: Path, die_at: int | None) -> dict[str, torch.Tensor]:
    """Distills from wherever the checkpoint is; kills itself in the forward of step ``die_at`` of this life."""
    torch.manual_seed(5)
    student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 5))
    teacher = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 5))
    steps = []

    def die(_module, _inputs):
        steps.append(student.training)
        if die_at is not None and sum(steps) > die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    student[3].register_forward_pre_hook(die)
    settings = {"epochs": 4, "batch_size": 8, "seed": 7, "progress": False, **SCENARIOS[scenario]}
    report = distill(student, teacher, settings.pop("data")(), checkpoint=checkpoint, resume=True, **settings)
    return {**student.state_dict(), "steps": torch.tensor(report.steps), "loss": torch.tensor(report.loss)}


def lives(scenario: str, folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Returns how many lives it took, and the weights in the end."""
    dice, count = random.Random(2), 0
    while True:
        count += 1
        child = os.fork()
        if child == 0:
            result = train(scenario, folder / "run.pt", dice.randint(3, 12) if count < 9 else None)
            torch.save(result, folder / "done.pt")
            os._exit(0)
        dice.randint(3, 12)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return count, torch.load(folder / "done.pt", weights_only=True)
        assert os.WTERMSIG(status) == signal.SIGKILL, status


def main(folder: Path) -> None:
    """Compares every scenario's many lives with its single one."""
    torch.set_num_threads(1)
    for number, scenario in enumerate(SCENARIOS):
        places = [folder / f"{number}-{kind}" for kind in ("whole", "killed")]
        for place in places:
            place.mkdir()
        whole = train(scenario, places[0] / "run.pt", None)
        count, killed = lives(scenario, places[1])
        wrong = [name for name, value in whole.items() if not torch.equal(value, killed[name])]
        left = [
            path.name for place in places for path in place.iterdir() if path.suffix in (".cache", ".new", ".partial")
        ]
        sys.stdout.write(f"{scenario}: {count} lives, differing: {wrong}, left: {left}\n")
        assert count > 2
        assert not wrong
        assert not left


if __name__ == "__main__":
    main(Path(sys.argv[1]))
