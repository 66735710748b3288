"""What it costs to choose and to wear a mask, beside ``torch.nn.utils.prune`` and beside what any tool must do.

    python benchmarks/weights.py                # 25, 110 and 350 million weights; needs 20 GB for torch's side
    python benchmarks/weights.py --sizes 25     # the small one, a minute

The floor is reading every weight once and writing a boolean mask. Every measurement runs in a process of its own; the
seconds are of the processor, the memory is the highest above what the model itself takes.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import os
import platform
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
from netopt.masking import Scores, keep_best, keep_n_of_m
from netopt.prune import prune_weights
from netopt.reconstruction import SOLVERS, Demand

RESULTS = Path(__file__).resolve().parent / "results" / "weights.json"
SIZES = {"25": (512, 8, 0), "110": (768, 12, 30522), "350": (1024, 24, 30522)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Bytes of memory for each byte of weights, so that a machine that is too small is spared.
NEEDED = {"global_unstructured": 20, "kthvalue": 7}


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
    """Runs every setting (method, amount, threads) on the same model, each in a fork of this process."""
    torch.set_num_threads(1)
    for method in METHODS.values():
        method(nn.Sequential(nn.Linear(64, 64, bias=False)).to(DTYPES[dtype]), 0.5)
    model = build(size, DTYPES[dtype])
    return [in_fork(lambda setting=setting: once(model, *setting)) for setting in settings]


def once(model: nn.Module, method: str, amount: float, threads: int) -> dict[str, Any]:
    """Runs one method; the fastest of three, unless it takes long, and the memory of the first."""
    torch.set_num_threads(threads)
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    repeats = 1 if method in NEEDED or method == "whole_call" else 3
    seconds, extra = [], 0
    for repeat in range(repeats):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before, start = memory("VmRSS"), time.process_time()
        kept = METHODS[method](model, amount)
        seconds.append(time.process_time() - start)
        extra = extra if repeat else memory("VmHWM") - before
        del kept
    return {"seconds": min(seconds), "bytes": extra / held}


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
    return json.loads(answer)


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
        for _ in range(200):
            for name, one in (("dense", dense), ("torch", theirs), ("netopt", ours)):
                start = time.perf_counter()
                one(x)
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: seconds / best["dense"] for name, seconds in best.items()}


def solving(width: str) -> dict[str, Any]:
    """Seconds to solve one square layer, over those its multiplications take at the machine's matrix rate."""
    torch.set_num_threads(1)
    size = int(width)
    weight, x = torch.randn(size, size), torch.randn(2 * size, size)
    moment = x.T @ x
    start = time.process_time()
    target = weight @ moment
    rate = 2 * size**3 / (time.process_time() - start)
    # In cubes of the width: products with the moment of every step, inversions and factors.
    cubes = {"admm": 2 * (20 + 24 + 1) + 2, "sparsegpt": 1 / 3 + 2 / 3 + 1 / 3 + 1 + 2 + 1 / 3}
    result: dict[str, Any] = {"gigaflops": rate / 1e9}
    for name, solver in SOLVERS.items():
        start = time.process_time()
        solver(weight, moment, target, Demand(size, size * size // 2))
        seconds = time.process_time() - start
        result[name] = {"seconds": seconds, "times the arithmetic": seconds * rate / (cubes[name] * size**3)}
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


def fits(method: str, size: str, dtype: str) -> bool:
    """Whether the memory at hand is enough."""
    width, blocks, words = SIZES[size]
    weights = 12 * width * width * blocks + width * words
    # Half of it is left to others.
    return 1.5 * (1 + NEEDED.get(method, 3)) * weights * DTYPES[dtype].itemsize < available()


def table(sizes: list[str], threads: list[int]) -> list[dict[str, Any]]:
    """Measures and prints, one line a setting."""
    rows = []
    print("times the floor (seconds of the processor), and bytes of memory for each byte of weights")
    print(f"{'':28}" + "".join(f"{name:>24}" for name in METHODS if name != "floor"))
    for size, dtype in itertools.product(sizes, DTYPES):
        methods = [method for method in METHODS if fits(method, size, dtype)]
        settings = list(itertools.product(methods, (0.5, 0.9), threads))
        results = dict(zip(settings, in_process("measure", size, dtype, json.dumps(settings)), strict=True))
        for amount, count in itertools.product((0.5, 0.9), threads):
            found = {method: results[method, amount, count] for method in methods}
            # The floor does not depend on the amount: the least disturbed measurement counts.
            found["floor"] = min((results["floor", one, count] for one in (0.5, 0.9)), key=lambda run: run["seconds"])
            line = f"{size:>4} M {dtype:9} {amount} {count} thread{'s' if count > 1 else ' '}"
            for method in METHODS:
                if method != "floor":
                    line += cell(found.get(method), found["floor"])
            print(line, flush=True)
            rows.append({"millions": size, "dtype": dtype, "amount": amount, "threads": count} | found)
    return rows


def cell(found: dict[str, Any] | None, least: dict[str, Any]) -> str:
    """One entry of the table."""
    if found is None:
        return f"{'not enough memory':>24}"
    return f"{found['seconds'] / least['seconds']:14.1f} x {found['bytes']:6.2f} B"


def main() -> None:
    """Runs everything and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--width", default="4096", help="of the layer that the solvers are timed on")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task, *arguments = options.task
        if task == "measure":
            print(json.dumps(measure(arguments[0], arguments[1], json.loads(arguments[2]))))
        else:
            print(json.dumps({"inference": inference, "solving": solving}[task](arguments[0])))
        return
    found: dict[str, Any] = {"rows": table(options.sizes, options.threads)}
    found["inference"] = in_process("inference", "-")
    print("one forward at batch 1, times the dense model's:", found["inference"])
    found["solving"] = in_process("solving", options.width)
    print(f"a layer of {options.width} x {options.width}:", json.dumps(found["solving"]))
    machine = {"date": dt.date.today().isoformat(), "machine": platform.platform(), "processors": os.cpu_count()}
    versions = {"torch": torch.__version__, "netopt": getattr(netopt, "__version__", "")}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(machine | versions | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
