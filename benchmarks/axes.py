"""How long it takes to find and remove neurons, beside the strongest peer and beside one training step.

    python benchmarks/axes.py                    # every model of tests/zoo, the layers, the large one
    python benchmarks/axes.py --only resnet      # the models whose name contains "resnet"

Every tool works on the same models in the same run, each in a process of its own that is ended when it hangs; times
are processor seconds of one thread. Removal is timed without the proof that prune_neurons adds unless it is told not to
(``verified`` is with it), since the peer gives none. What a
tool made of a model is judged without asking the tool: the entries of the original that are no longer there are set to
zero, and both models must compute the same.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime as dt
import fnmatch
import functools
import importlib.metadata
import json
import multiprocessing
import os
import pickle
import platform
import resource
import statistics
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PEER = "torch-pruning"
AMOUNT = 0.5
LONG = 1.0  # seconds after which one run is enough
LAYERS = (2, 4, 8, 16, 32, 64, 96)
DECLARED: list[torch.library.Library] = []


# What a process does


def prepare() -> None:
    """One thread, quiet, and the zoo of the tests importable."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE.parent))
    if torch.version.cuda is None:
        # The wheel of torchvision expects kernels that a CPU build of torch does not have; no model here runs them.
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)


def zoo() -> dict[str, Any]:
    """Every case of the tests, by name."""
    from tests.zoo import handmade, language, vision  # noqa: F401
    from tests.zoo.case import CASES

    return {**CASES, **vision.CASES, **language.CASES}


def names(_: str, __: int, ___: Any) -> dict[str, Any]:
    """The names of all cases."""
    return {"names": list(zoo())}


def run(model: nn.Module, inputs: Any) -> Any:
    """One forward."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def another(case: Any, model: nn.Module) -> nn.Module:
    """A model like this one; built anew where torch cannot copy it (weight norm by hooks, scripted functions)."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, pickle.PickleError):
        return case.build()


def clock(prepare: Callable[[], Any], work: Callable[[Any], Any], repeats: int) -> float:
    """The median processor seconds of ``work`` on what ``prepare`` makes, after one run to warm up."""
    spent = []
    for _ in range(repeats + 1):
        subject = prepare()
        start = time.process_time()
        work(subject)
        spent.append(time.process_time() - start)
        if spent[0] > LONG:
            break
    return statistics.median(spent[1:] or spent)


def with_netopt(name: str, repeats: int, _: Any) -> dict[str, Any]:
    """Finds the axes of one case, removes half of them by magnitude, and runs one training step."""
    from netopt.axes import find_axes
    from netopt.batches import tensors
    from netopt.prune import prune_neurons

    case = zoo()[name]
    model, inputs = case.build(), case.inputs()

    def step(subject: nn.Module) -> None:
        outputs = [value for _, value in tensors(run(subject, inputs)) if value.requires_grad]
        sum(value.abs().sum() for value in outputs).backward()

    def remove(subject: nn.Module, *, verify: bool = False) -> Any:
        return prune_neurons(
            subject, inputs, AMOUNT, importance="magnitude", scope="layer", verify=verify, progress=False
        )

    row: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    with contextlib.suppress(Exception):
        row["step"] = clock(lambda: another(case, model).train(), step, repeats)
    axes = find_axes(model, inputs)
    row["axes"], row["free"] = len(axes), len(axes.free)
    row["outputs"] = sorted(
        {
            member.tensor.rpartition(".")[0]
            for axis in axes
            if "output" in (axis.frozen or "")
            for member in axis.members
        }
    )
    row["find"] = clock(lambda: model, lambda subject: find_axes(subject, inputs), repeats)
    row["total"] = clock(lambda: another(case, model), remove, repeats)
    row["verified"] = clock(lambda: another(case, model), lambda subject: remove(subject, verify=True), repeats)
    dense, small, inputs = exact_copies(case)
    report = remove(small)
    row["verdict"] = verdict(dense, small, inputs, report.plan.tensors)
    if row["verdict"] == "differs":
        row["verdict"] = "silently wrong" if report.plan.exact else "differs, as announced"
    return row


def with_peer(name: str, repeats: int, outputs: list[str]) -> dict[str, Any]:
    """Builds the peer's graph of one case and removes half, told which layers are the model's outputs."""
    import torch_pruning

    from netopt.batches import tensors

    case = zoo()[name]
    model, inputs = case.build(), case.inputs()

    def ignored(subject: nn.Module) -> list[nn.Module]:
        return [module for path, module in subject.named_modules() if path in outputs and path]

    def graph(subject: nn.Module) -> None:
        torch_pruning.DependencyGraph().build_dependency(
            subject, inputs, forward_fn=run, output_transform=differentiable, verbose=False
        )

    def remove(subject: nn.Module) -> None:
        pruner = torch_pruning.pruner.BasePruner(
            subject,
            inputs,
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=AMOUNT,
            ignored_layers=ignored(subject),
            forward_fn=run,
            output_transform=differentiable,
        )
        pruner.step()

    def differentiable(result: Any) -> list[Tensor]:
        return [value for _, value in tensors(result) if value.requires_grad]

    row: dict[str, Any] = {}
    row["find"] = clock(lambda: another(case, model), graph, repeats)
    row["total"] = clock(lambda: another(case, model), remove, repeats)
    dense, small, inputs = exact_copies(case)
    remove(small)
    row["verdict"] = verdict(dense, small, inputs)
    return row


def deep(layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small Llama of so many layers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(3, 61, (2, 7))}


def with_layers(name: str, repeats: int, _: Any) -> dict[str, Any]:
    """Finds the axes of a transformer of so many layers, and counts the operations that it runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from netopt.axes import find_axes

    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    model, inputs = deep(int(name))
    with Operations() as operations:
        run(model, inputs)
    find = clock(lambda: model, lambda subject: find_axes(subject, inputs), repeats)
    return {"layers": int(name), "operations": operations.count, "find": find}


def with_large(_: str, __: int, ___: Any) -> dict[str, Any]:
    """Finds the axes of a Llama of 70 billion parameters that exists in shape only."""
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode

    from netopt.axes import find_axes

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    with FakeTensorMode():
        model = transformers.LlamaForCausalLM(config)
        inputs = {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
        before = peak_gigabytes()
        start = time.process_time()
        axes = find_axes(model, inputs)
        seconds = time.process_time() - start
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "find": seconds,
        "axes": len(axes),
        "free": len(axes.free),
        "gigabytes_before": before,
        "gigabytes_peak": peak_gigabytes(),
    }


def peak_gigabytes() -> float:
    """The most memory this process has held, interpreter and imports included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# The judge


def exact_copies(case: Any) -> tuple[nn.Module, nn.Module, Any]:
    """Two equal models in double precision whose entries are all different, and inputs to match.

    Both are built, since a copy may share what closures and configurations hold.
    """
    models = [different(case.build().double() if case.double else case.build()) for _ in range(2)]
    inputs = case.inputs()
    if case.double:
        inputs = torch.utils._pytree.tree_map(
            lambda value: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value, inputs
        )
    return models[0], models[1], inputs


def different(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with a little noise on every number."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in (*model.parameters(), *floating_buffers(model)):
            if value.is_floating_point():
                value.add_(1e-3 * torch.rand(value.shape, generator=generator, dtype=value.dtype))
    return model.eval()


def floating_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that are not counts or indices."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def kept_entries(dense: Tensor, small: Tensor) -> list[Tensor] | None:
    """For each dimension, the indices of ``dense`` that are left in ``small``; None when they are no such selection."""
    if dense.shape == small.shape:
        return [torch.arange(size) for size in dense.shape]
    if dense.dim() != small.dim() or small.numel() == 0:
        return None
    corner = (dense == small.flatten()[0]).nonzero()
    for base in corner:
        kept = []
        for dim in range(dense.dim()):
            line = dense[tuple(slice(None) if d == dim else base[d] for d in range(dense.dim()))]
            left = small[tuple(slice(None) if d == dim else 0 for d in range(dense.dim()))]
            kept.append((left[:, None] == line[None, :]).int().argmax(1))
        if torch.equal(dense[torch.meshgrid(*kept, indexing="ij")], small):
            return kept
    return None


def verdict(dense: nn.Module, small: nn.Module, inputs: Any, told: Any = None) -> str:
    """Whether ``small`` computes what ``dense`` computes without the entries that are gone; they are zeroed in it.

    Which are gone is read off the tensors, or ``told``: a plan may fold a change of scale into a weight that it keeps.

    A norm over removed neurons is not the norm over zeros, so each norm of the original runs as the smaller one does,
    on the neurons that are left.
    """
    from netopt.batches import tensors

    masked = dense
    parameters = dict(small.named_parameters())
    kept = {}
    with torch.no_grad():
        for name, value in masked.named_parameters():
            if told is not None:
                kept[name] = [told.get(name, {}).get(dim, torch.arange(size)) for dim, size in enumerate(value.shape)]
            else:
                kept[name] = kept_entries(value.detach(), parameters[name].detach()) if name in parameters else None
            if kept[name] is None:
                return "differs"
            if value.dim() == 0:
                continue
            mask = torch.zeros(value.shape, dtype=torch.bool)
            mask[torch.meshgrid(*kept[name], indexing="ij")] = True
            value.mul_(mask)
    if all(parameters[name].shape == value.shape for name, value in masked.named_parameters()):
        return "nothing removed"
    replace_norms(masked, small, kept)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = tensors(run(masked.eval(), inputs))
        torch.manual_seed(0)
        found = tensors(run(small.eval(), inputs))
    if not all(bool(torch.isfinite(value).all()) for _, value in expected):
        return "not judged"  # a weight norm of zeros is 0 / 0
    tolerance = 1e-7 if next(small.parameters()).dtype == torch.float64 else 1e-3
    same = len(expected) == len(found) and all(
        a.shape == b.shape
        and torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * float(a.abs().max()))
        for (_, a), (_, b) in zip(expected, found, strict=True)
    )
    return "right" if same else "differs"


def replace_norms(masked: nn.Module, small: nn.Module, kept: dict[str, list[Tensor]]) -> None:
    """Makes the narrowed norms of ``masked`` run as those of ``small`` on the neurons that are left."""
    for path, module in small.named_modules():
        kind = type(module).__name__
        weight = getattr(module, "weight", None)
        if "Norm" not in kind or "Batch" in kind or "Instance" in kind or weight is None or weight.dim() != 1:
            continue
        left = kept[f"{path}.weight" if path else "weight"][0]
        wide = masked.get_submodule(path)
        if len(left) == wide.weight.shape[0]:
            continue
        wide.forward = functools.partial(narrowed, copy.deepcopy(module), left, wide.weight.shape[0])


def narrowed(module: nn.Module, left: Tensor, size: int, x: Tensor, *rest: Any) -> Tensor:
    """What ``module`` makes of the neurons ``left`` of ``size``, zeros in place of the others."""
    dim = 1 if "Group" in type(module).__name__ or x.shape[-1] != size else -1
    return torch.zeros_like(x).index_copy(dim, left, module(x.index_select(dim, left), *rest))


# Processes that can be ended


TASKS = {"names": names, "netopt": with_netopt, PEER: with_peer, "layers": with_layers, "large": with_large}


def serve(connection: Connection, tool: str) -> None:
    """Answers questions about cases until the connection is closed."""
    prepare()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - the peer prints
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        if question is None:
            connection.send(len(zoo()))
            continue
        name, repeats, more = question
        try:
            answer = TASKS[tool](name, repeats, more)
        except Exception as error:  # a failure is a result
            none = type(error).__name__ == "NothingToPruneError"
            answer = {
                "verdict": "nothing to remove, says why" if none else "fails",
                "error": f"{type(error).__name__}: {str(error)[:300]}",
            }
        connection.send(answer)


class Worker:
    """A process that answers, and is started anew after it had to be ended."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.process: Any = None

    def ask(self, name: str, repeats: int, more: Any, timeout: float) -> dict[str, Any]:
        """What the tool says about one case; a process that works longer than ``timeout`` seconds is ended."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs, self.tool), daemon=True)
            self.process.start()
            theirs.close()
            self.connection.send(None)  # answered once everything is imported
            self.connection.recv()
        self.connection.send((name, repeats, more))
        begin = self.worked()
        try:
            while self.worked() - begin < timeout:
                if self.connection.poll(0.2):
                    return self.connection.recv()
            answer = {"verdict": "hangs", "error": f"no answer within {timeout:.0f} s"}
        except EOFError:
            answer = {"verdict": "fails", "error": "the process ended"}
        self.close()
        return answer

    def worked(self) -> float:
        """Processor seconds of the process so far, so that what else the machine does is no time-out."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return time.monotonic()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


@contextlib.contextmanager
def workers(*tools: str) -> Iterator[list[Worker]]:
    """One process for each tool, ended afterwards."""
    started = [Worker(tool) for tool in tools]
    try:
        yield started
    finally:
        for worker in started:
            worker.close()


# Tables


def quotient(a: float | None, b: float | None) -> str:
    """How many times ``a`` is ``b``."""
    return f"{a / b:8.1f}" if a is not None and b else "       -"


def seconds(value: float | None) -> str:
    """Seconds in a column."""
    return f"{value:8.3f}" if value is not None else "       -"


def compare(patterns: list[str], repeats: int, timeout: float, jobs: int) -> dict[str, Any]:
    """Every case by both tools, ``jobs`` cases at a time."""
    rows: dict[str, Any] = {}
    head = " ".join(f"{title:>8}" for title in ("find", "remove", "verified", "step"))
    print(f"{'model':44} {head} | {'peer':>8} | {'peer/us':>8} {'us/step':>8}  verdicts")
    with workers("names") as (listing,):
        known = listing.ask("", 0, None, timeout)["names"]
    chosen = [name for name in known if any(fnmatch.fnmatch(name, f"*{pattern}*") for pattern in patterns or [""])]
    waiting = iter(chosen)

    def work() -> None:
        with workers("netopt", PEER) as (ours, theirs):
            for name in waiting:
                rows[name] = both(name, ours, theirs, repeats, timeout)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary = summarise(rows)
    print(json.dumps(summary, indent=2))
    return {"summary": summary, "models": {name: rows[name] for name in chosen if name in rows}}


def both(name: str, ours: Worker, theirs: Worker, repeats: int, timeout: float) -> dict[str, Any]:
    """One case by both tools, as a line of the table."""
    mine = ours.ask(name, repeats, None, timeout)
    peer = theirs.ask(name, repeats, mine.get("outputs", []), timeout)
    if peer["verdict"] == "differs":
        peer["verdict"] = "differs, as ours" if mine["verdict"] == "differs, as announced" else "silently wrong"
    total, other, step = mine.get("total"), peer.get("total"), mine.get("step")
    spent = " ".join(seconds(mine.get(key)) for key in ("find", "total", "verified", "step"))
    line = f"{name:44} {spent} | {seconds(other)} |"
    print(f"{line} {quotient(other, total)} {quotient(total, step)}  {mine['verdict']} | {peer['verdict']}", flush=True)
    return {"netopt": mine, PEER: peer}


def summarise(rows: dict[str, Any]) -> dict[str, Any]:
    """How often each tool is right, and ratios of times where both are."""
    faster = [
        row[PEER]["total"] / row["netopt"]["total"]
        for row in rows.values()
        if "total" in row["netopt"] and "total" in row[PEER] and row[PEER]["verdict"] == "right"
    ]
    steps = [
        row["netopt"]["total"] / row["netopt"]["step"]
        for row in rows.values()
        if row["netopt"].keys() >= {"total", "step"}
    ]
    return {
        "models": len(rows),
        "netopt": dict(Counter(row["netopt"]["verdict"] for row in rows.values())),
        PEER: dict(Counter(row[PEER]["verdict"] for row in rows.values())),
        "both_right": len(faster),
        "times_faster": {"least": min(faster), "median": statistics.median(faster), "most": max(faster)}
        if faster
        else None,
        "training_steps": {"median": statistics.median(steps), "most": max(steps)} if steps else None,
    }


def by_depth(repeats: int, timeout: float) -> list[dict[str, Any]]:
    """The cost from a shallow to a deep transformer; linear is a constant time for each operation."""
    rows = []
    print(f"\n{'layers':>8} {'operations':>10} {'seconds':>8} {'microseconds an operation':>26}")
    with workers("layers") as (worker,):
        for layers in LAYERS:
            row = worker.ask(str(layers), repeats, None, timeout)
            rows.append(row)
            if "find" in row:
                each = 1e6 * row["find"] / row["operations"]
                print(f"{layers:8} {row['operations']:10} {row['find']:8.3f} {each:26.0f}")
            else:
                print(f"{layers:8} {row['error']}")
    return rows


def large(timeout: float) -> dict[str, Any]:
    """The model that no memory here could hold."""
    with workers("large") as (worker,):
        row = worker.ask("", 1, None, timeout)
    print(f"\nLlama, 70 billion parameters in shape only: {row}")
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds over operations."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "find" in row]
    figure, axes = plt.subplots(figsize=(5, 3.2))
    axes.plot([row["operations"] for row in rows], [row["find"] for row in rows], "o-")
    for row in rows:
        axes.annotate(f"{row['layers']}", (row["operations"], row["find"]), textcoords="offset points", xytext=(-4, 6))
    axes.set(
        xlabel="operations of one forward (numbers: layers)",
        ylabel="find_axes, seconds",
        xlim=(0, None),
        ylim=(0, None),
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    packages = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{processor}, {os.cpu_count()} cores, one thread used",
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    """One run, one table, one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="models whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=1, help="models measured at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=30, help="processor seconds for one tool on one model")
    parser.add_argument("--output", type=Path, default=RESULTS / "axes.json")
    arguments = parser.parse_args()
    result = {
        "about": machine(),
        **compare(arguments.only, arguments.repeats, arguments.timeout, arguments.jobs),
        "depth": by_depth(arguments.repeats, arguments.timeout),
        "large": large(5 * arguments.timeout),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    plot(result["depth"], arguments.output.with_name("axes_depth.png"))
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
