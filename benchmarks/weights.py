"""What it costs to choose and to wear a mask, beside ``torch.nn.utils.prune`` and beside what any tool must do.

    python benchmarks/weights.py                # 25, 110 and 350 million weights; needs 20 GB for torch's side
    python benchmarks/weights.py table --sizes 25     # the small one, a minute

The floor is reading every weight once and writing a boolean mask. Every measurement runs in a process of its own; the
seconds are of the processor, all threads together, the memory is the highest above what the model itself takes. What is
printed is written to `results/`, and runs of parts add up: each line is of one run.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Only the threads a measurement asks for, in every library.
os.environ["OMP_NUM_THREADS"] = "2"

import torch
from torch import nn
from torch.nn.utils import prune

import netopt
from netopt import importance
from netopt.masking import Scores, keep_best, keep_n_of_m
from netopt.prune import prune_weights
from netopt.reconstruction import Demand, Moments, Problem, aimed

RESULTS = Path(__file__).resolve().parent / "results" / "weights.json"
SIZES = {"25": (512, 8, 0), "110": (768, 12, 30522), "350": (1024, 24, 30522)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOW = ("global_unstructured", "kthvalue", "two_of_four_sorted")
REPEATS = 3


def build(size: str, dtype: torch.dtype) -> nn.Module:
    """The linear layers of a transformer encoder, with random weights."""
    width, blocks, words = SIZES[size]
    shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    with torch.device("meta"):
        layers = [nn.Linear(*shape, bias=False) for _ in range(blocks) for shape in shapes]
        model = nn.Sequential(*layers, *([nn.Linear(width, words, bias=False)] if words else []))
    model.to_empty(device="cpu").to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter.data)
    return model


def floor(model: nn.Module, amount: float) -> Any:
    """Reads every weight once and writes a mask."""
    return [torch.gt(parameter.detach(), amount) for parameter in model.parameters()]


def selection(model: nn.Module, amount: float) -> Any:
    """netopt's choice alone."""
    scores = [Scores(parameter.detach(), magnitude=True) for parameter in model.parameters()]
    return keep_best(scores, round(amount * sum(one.size for one in scores)))


def whole_call(model: nn.Module, amount: float) -> Any:
    """netopt's call: choice, masks on the model, report."""
    return prune_weights(model, amount, progress=False)


def two_of_four(model: nn.Module, _: float) -> Any:
    """netopt's n:m masks alone."""
    return [keep_n_of_m(parameter.detach(), 2, 4, magnitude=True) for parameter in model.parameters()]


def two_of_four_sorted(model: nn.Module, _: float) -> Any:
    """The n:m masks by sorting each group."""
    masks = []
    for parameter in model.parameters():
        groups = parameter.detach().abs().view(-1, 4)
        best = groups.topk(2, dim=-1).indices
        masks.append(torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view_as(parameter))
    return masks


def global_unstructured(model: nn.Module, amount: float) -> Any:
    """Torch's call."""
    weights = [(layer, "weight") for layer in model]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)


def kthvalue(model: nn.Module, amount: float) -> Any:
    """The threshold by torch.kthvalue on everything in one tensor."""
    together = torch.cat([parameter.detach().abs().flatten() for parameter in model.parameters()])
    threshold = together.kthvalue(round(amount * together.numel())).values
    return [parameter.detach().abs() > threshold for parameter in model.parameters()]


METHODS: dict[str, Callable[[nn.Module, float], Any]] = {
    one.__name__: one
    for one in (floor, selection, whole_call, global_unstructured, kthvalue, two_of_four, two_of_four_sorted)
}


def memory(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(size: str, dtype: str, settings: list[tuple[str, float, int]]) -> list[dict[str, Any]]:
    """Runs every setting (method, amount, threads) on the same model, each in forks of this process."""
    torch.set_num_threads(1)
    for method in METHODS.values():
        method(nn.Sequential(nn.Linear(64, 64, bias=False)).to(DTYPES[dtype]), 0.5)
    model = build(size, DTYPES[dtype])
    return [repeated(model, *setting) for setting in settings]


def repeated(model: nn.Module, method: str, amount: float, threads: int) -> dict[str, Any]:
    """The fastest of three runs, unless it takes long, and the memory of the hungriest."""
    runs = [in_fork(lambda: once(model, method, amount, threads)) for _ in range(1 if method in SLOW else REPEATS)]
    failed = next((run for run in runs if "failed" in run), None)
    return failed or {key: (min if key == "seconds" else max)(run[key] for run in runs) for key in runs[0]}


def once(model: nn.Module, method: str, amount: float, threads: int) -> dict[str, Any]:
    """Runs one method; the seconds of the processor, and the bytes beyond the model for each byte of it."""
    torch.set_num_threads(threads)
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # Rather an error here than the end of another process.
    limit = memory("VmData") + int(0.95 * available())
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, start = memory("VmRSS"), time.process_time()
    try:
        kept = METHODS[method](model, amount)
    except (RuntimeError, MemoryError):
        return {"failed": f"more than {(memory('VmHWM') - before) / held:.1f} B, of which there is no more"}
    seconds = time.process_time() - start
    extra = memory("VmHWM") - before
    del kept
    return {"seconds": seconds, "bytes": extra / held}


def worst(_: str) -> dict[str, Any]:
    """The choice on values that mislead a sample, in times the floor; 25 million float32 weights, one thread."""
    torch.set_num_threads(1)
    size = 25_000_000
    normal = torch.randn(size, generator=torch.Generator().manual_seed(0))
    cases = {
        "normal": normal,
        "sorted": normal.sort().values,
        "periodic": torch.arange(size).remainder(63).float(),
        "all equal": torch.full((size,), 0.5),
        "60 % zeros": normal * (torch.rand(size, generator=torch.Generator().manual_seed(1)) > 0.6),
    }
    found: dict[str, Any] = {}
    for (name, values), amount in itertools.product(cases.items(), (0.5, 0.9)):
        tasks = {
            "floor": lambda values=values, amount=amount: torch.gt(values, amount),
            "selection": lambda values=values, amount=amount: keep_best([Scores(values, True)], round(amount * size)),
        }
        best = dict.fromkeys(tasks, float("inf"))
        for _ in range(REPEATS):
            for task, run in tasks.items():
                start = time.process_time()
                run()
                best[task] = min(best[task], time.process_time() - start)
        found[f"{name}, {amount}"] = best | {"times the floor": best["selection"] / best["floor"]}
    return found


def in_fork(task: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a task in a copy of this process."""
    receive, send = os.pipe()
    if os.fork() == 0:
        os.write(send, json.dumps(task()).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = pipe.read()
    os.wait()
    return json.loads(answer) if answer else {"failed": "killed, for memory most likely"}


def inference(_: str) -> dict[str, Any]:
    """Seconds of one forward at batch 1 of a masked model, over a dense one's."""
    torch.set_num_threads(1)

    def model() -> nn.Sequential:
        return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(1024, 1024), nn.ReLU())]).eval()

    dense, theirs, ours = model(), model(), model()
    weights = [(layer, "weight") for layer in theirs if isinstance(layer, nn.Linear)]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=0.9)
    prune_weights(ours, 0.9, progress=False)
    x = torch.randn(1, 1024)
    best = dict.fromkeys(("dense", "torch", "netopt"), float("inf"))
    with torch.no_grad():
        for _ in range(100):
            # Some calls of one after the other, so that none finds the weights of another in the cache.
            for name, one in (("dense", dense), ("torch", theirs), ("netopt", ours)):
                for _ in range(10):
                    start = time.perf_counter()
                    one(x)
                    best[name] = min(best[name], time.perf_counter() - start)
    return {name: seconds / best["dense"] for name, seconds in best.items()}


def solving(width: str) -> dict[str, Any]:
    """Seconds to solve one square layer, over those its multiplications take at the machine's matrix rate.

    And to find out what it aims at, on inputs that have changed by a tenth.
    """
    torch.set_num_threads(1)
    size = int(width)
    weight, x = torch.randn(size, size), torch.randn(2 * size, size)
    moment = x.T @ x
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        target = weight @ moment
        times.append(time.process_time() - start)
    rate = 2 * size**3 / min(times)
    # In cubes of the width. admm: a factor and an inverse from it, and a product with one of them for every round and
    # step. sparsegpt: two factors, an inverse and a solution by the first, and the errors' way to what comes later.
    cubes = {"admm": 1 / 3 + 2 / 3 + 2 * (20 + 24 + 1), "sparsegpt": 1 / 3 + 2 / 3 + 1 / 3 + 2 + 1}
    result: dict[str, Any] = {"gigaflops": rate / 1e9}
    for name, volume in cubes.items():
        solver = importance.lookup(name, of="layers")
        start = time.process_time()
        solver(Problem(weight[None], moment[None], target[None], Demand(size, size * size // 2)))
        seconds = time.process_time() - start
        result[name] = {"seconds": seconds, "times the arithmetic": seconds * rate / (volume * size**3)}
    halves = [(one, one + 0.1 * torch.randn_like(one)) for one in x.split(size)]
    own = torch.stack([changed.T @ changed for _, changed in halves])[:, None]
    cross = torch.stack([one.T @ changed for one, changed in halves])[:, None]
    start = time.process_time()
    aimed(weight[None], Moments(own, cross))
    result["aim"] = {"seconds": time.process_time() - start}
    return result


def in_process(task: str, *arguments: str) -> Any:
    """Runs a task in a process of its own."""
    command = [sys.executable, __file__, "--task", task, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def available() -> int:
    """Bytes of memory that are free."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def table(size: str, dtype: str, threads: int, amounts: list[float]) -> list[dict[str, Any]]:
    """Measures and prints one size and dtype, one line an amount."""
    settings = list(itertools.product(METHODS, amounts, [threads]))
    results = dict(zip(settings, in_process("measure", size, dtype, json.dumps(settings)), strict=True))
    rows = []
    for amount in amounts:
        found = {method: results[method, amount, threads] for method in METHODS}
        # The floor does not depend on the amount: the least disturbed measurement counts.
        found["floor"] = min((results["floor", one, threads] for one in amounts), key=lambda run: run["seconds"])
        line = f"{size:>4} M {dtype:9} {amount} {threads} thread{'s' if threads > 1 else ' '}"
        print(
            line + "".join(cell(found[method], found["floor"]) for method in METHODS if method != "floor"), flush=True
        )
        asked = {"date": dt.date.today().isoformat(), "millions": size, "dtype": dtype, "amount": amount}
        rows.append(asked | {"threads": threads} | found)
    return rows


def cell(found: dict[str, Any], least: dict[str, Any]) -> str:
    """One entry of the table."""
    if "failed" in found:
        return f"{'not enough memory':>24}"
    return f"{found['seconds'] / least['seconds']:14.1f} x {found['bytes']:6.2f} B"


def add(part: str, value: Any, keys: tuple[str, ...] = ()) -> None:
    """Writes results into the JSON, rows in place of those that agree in ``keys``."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if keys:
        old = [row for row in known.get(part, []) if all(any(row[key] != one[key] for key in keys) for one in value)]
        value = sorted(old + value, key=lambda row: [str(row[key]) for key in keys])
    machine = {"date": dt.date.today().isoformat(), "machine": platform.platform(), "processors": os.cpu_count()}
    versions = {"torch": torch.__version__, "netopt": netopt.__version__}
    RESULTS.parent.mkdir(exist_ok=True)
    text = json.dumps(known | machine | versions | {part: value}, indent=1)
    RESULTS.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Runs everything, or a part, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("table", "worst", "inference", "solving")
    parser.add_argument("parts", nargs="*", default=list(parts), help=f"what to run, of {', '.join(parts)}")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--width", default="4096", help="of the layer that the solvers are timed on")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task, *arguments = options.task
        if task == "measure":
            print(json.dumps(measure(arguments[0], arguments[1], json.loads(arguments[2]))))
        else:
            tasks = {"inference": inference, "solving": solving, "worst": worst}
            print(json.dumps(tasks[task](arguments[0])))
        return
    if "table" in options.parts:
        print("times the floor (seconds of the processor), and bytes of memory for each byte of weights")
        print(f"{'':28}" + "".join(f"{name:>24}" for name in METHODS if name != "floor"))
        for size, dtype, threads in itertools.product(options.sizes, options.dtypes, options.threads):
            add("rows", table(size, dtype, threads, options.amounts), ("millions", "dtype", "threads", "amount"))
    for part in ("worst", "inference", "solving"):
        if part in options.parts:
            found = in_process(part, options.width)
            print(part, json.dumps(found, indent=1), flush=True)
            if part == "solving":
                # One result a width.
                known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
                found = known.get(part, {}) | {options.width: {"date": dt.date.today().isoformat()} | found}
            add(part, found)


if __name__ == "__main__":
    main()
