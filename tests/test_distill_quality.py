"""What distillation is for: a student with few labels, and one that was cut out of its teacher, do better with it."""

from __future__ import annotations

import copy
import itertools
import statistics

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from netopt.distillation import distill
from netopt.prune import prune_neurons

SEEDS = 3


def mlp(*widths: int) -> nn.Sequential:
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.fixture(name="digits", scope="module")
def held_out_digits():
    """Standardised digits, 1257 to train and 540 to test on, and a teacher trained on the first."""
    pixels, classes = load_digits(return_X_y=True)
    split = train_test_split(pixels, classes, test_size=540, stratify=classes, random_state=0)
    x, test_x, y, test_y = (torch.as_tensor(one) for one in split)
    mean, deviation = x.mean(0), x.std(0) + 0.16
    x, test_x = ((one - mean).div(deviation).float() for one in (x, test_x))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = mlp(64, 128, 64, 10)
        optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
        for _ in range(300):
            index = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            F.cross_entropy(teacher(x[index]), y[index]).backward()
            optimizer.step()
    return teacher, x, y, test_x, test_y


def accuracy(model, x, y):
    with torch.no_grad():
        return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


def test_unlabelled_inputs_and_a_teacher_beat_a_hundred_labels(digits):
    teacher, x, y, test_x, test_y = digits
    scores = {"labels": [], "kl": [], "mse": []}
    for seed in range(SEEDS):
        few = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:100]
        for kind, each in scores.items():
            torch.manual_seed(seed)
            student = mlp(64, 8, 10)
            data = (x[few], y[few]) if kind == "labels" else x
            how = {"loss": "kl", "hard": 1.0} if kind == "labels" else {"loss": kind}
            distill(student, teacher, data, steps=400, lr=2e-2, scheduler="cosine", seed=seed, progress=False, **how)
            each.append(accuracy(student, test_x, test_y))
    means = {kind: statistics.mean(each) for kind, each in scores.items()}
    assert means["kl"] > means["labels"] + 8
    assert means["mse"] > means["labels"] + 6
    assert all(a > b for a, b in zip(scores["kl"], scores["labels"], strict=True))


def test_the_plan_of_a_pruning_guides_what_is_left(digits):
    """With 48 images, hints at the kept neurons find back more than the outputs alone."""
    teacher, x, _, test_x, test_y = digits
    student = copy.deepcopy(teacher)
    report = prune_neurons(student, (x[:1],), amount=0.6, data=[x[:200]], progress=False)
    scores = {}
    for kind, hints in (("outputs", None), ("plan", report.plan), ("report", report)):
        one = copy.deepcopy(student)
        told = distill(one, teacher, x[:48], loss="kl", hints=hints, steps=80, lr=3e-3, seed=0, progress=False)
        scores[kind] = accuracy(one, test_x, test_y)
    assert set(told.history[-1].terms) == {"kl", "hint 0", "hint 2"}
    assert scores["plan"] == scores["report"] > scores["outputs"]
