"""What each special mechanism of the tracing is for: each is switched off, and the answers are compared.

    python benchmarks/ablation.py                     # every model of tests/zoo
    python benchmarks/ablation.py --only transformers # the models whose name contains "transformers"

A mechanism that changes the answer for no library's model and for fewer than three hand-made ones has to justify its
lines. Every mechanism is switched off in a process of its own, forked from one that has loaded the zoo; an answer is
which axes are free, their members, exactness, half counts and the integers these set.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from typing import Any

import axes as bench
import torch

LIBRARIES = ("timm.", "torchvision.", "transformers.")


def nothing(*_: Any, **__: Any) -> None:
    """Does not do what it stands for."""


def without(*changes: tuple[str, str, Any]) -> Callable[[], None]:
    """Replaces attributes, each named by a file of the package and a dotted name in it."""

    def change() -> None:
        import importlib

        for file, name, value in changes:
            holder: Any = importlib.import_module(f"netopt.{file}")
            *path, last = name.split(".")
            for part in path:
                holder = getattr(holder, part)
            setattr(holder, last, value)

    return change


class Forgetful(list[Any]):
    """A list that stays empty."""

    def append(self, _: Any) -> None:
        """Does nothing."""


def forget(field: str) -> Callable[[], None]:
    """Lets the constraints of a trace keep nothing in one of their lists."""

    def change() -> None:
        from netopt.axes.tracing import dims

        plain = dims.Constraints

        def constraints() -> Any:
            made = plain()
            setattr(made, field, Forgetful())
            return made

        dims.Constraints = constraints  # type: ignore[assignment, misc]

    return change


def untrained(run: Callable[..., Any]) -> Callable[..., Any]:
    """A traced forward that does not run in training mode."""
    from netopt.errors import ForwardError

    def traced(*args: Any, training: bool, **kwargs: Any) -> Any:
        if training:
            raise ForwardError("is left out")
        return run(*args, training=training, **kwargs)

    return traced


def evaluation_only() -> None:
    """Traces the forward in evaluation mode alone."""
    from netopt.axes import find

    find._sets_flags_alone = lambda *_: False
    find._run = untrained(find._run)


def whole_modes() -> None:
    """Traces the forward twice, once in each mode."""
    from netopt.axes import find

    find._sets_flags_alone = lambda *_: False


def unsalted() -> None:
    """Symbolic integers hash as the plain ones they equal."""
    from netopt.symbolic import number

    number.Constraints.hash_of = lambda _, one: hash(number.plain(one))  # type: ignore[method-assign]


def by_all_marks(trace: Any) -> None:
    """Marks count whether or not they reach a result."""
    for mark in trace._marks:
        mark.state(mark.layout, mark.why)


MECHANISMS: dict[str, Callable[[], None]] = {
    "nothing": nothing,
    "symbolic integers": without(("axes.tracing.attributes", "_Wrapping.module", nothing)),
    "integers of configurations": without(("axes.tracing.attributes", "_Wrapping.attributes", nothing)),
    "integers inside containers": without(("axes.tracing.attributes", "_Wrapping.items", nothing)),
    "dicts keyed by value": without(("axes.tracing.attributes", "_keyed_by_value", lambda value: value)),
    "guards": forget("guards"),
    "numbers": forget("numbers"),
    "training mode": evaluation_only,
    "training flag": whole_modes,
    "salted hashes": unsalted,
    "implicit sizes": without(("axes.axes", "bind_implicit_sizes", nothing)),
    "unrouted experts": without(("axes.find", "unrouted", lambda *_: {})),
    "marks that reach a result": without(("axes.tracing.dims", "DimTracer.finalize", by_all_marks)),
    "copy on write": without(("model.writes", "CopyOnWrite.save", nothing)),
    "unfused kernels": without(("axes.tracing.sizes", "unfused", lambda function: function)),
}


def answer(case: Any) -> tuple[Any, float]:
    """What is found of one case, of a kind of model that has run before, and the seconds of the search."""
    from netopt.axes import find_axes

    with contextlib.suppress(Exception):
        bench.run(case.build(), case.inputs())
    model, inputs = case.build(), case.inputs()
    before = {name: value.clone() for name, value in model.state_dict().items() if hasattr(value, "clone")}
    start = time.process_time()
    try:
        axes = find_axes(model, inputs)
    except Exception as error:
        return f"fails: {type(error).__name__}", time.process_time() - start
    seconds = time.process_time() - start
    half = axes.feasible({axis.name: max(1, axis.size // 2) for axis in axes.free})
    found = [
        [[axis.size, [str(member) for member in axis.members], axis.exact] for axis in axes.free],
        sorted(half.values()),
        sorted([str(one.path), one.value] for one in axes.attribute_values(half)),
        [name for name, value in model.state_dict().items() if name in before and not same(value, before[name])],
    ]
    return found, seconds


def same(one: Any, other: Any) -> bool:
    """Whether two tensors hold the same entries."""
    return one.is_meta or one.shape != other.shape or torch.equal(one.nan_to_num(), other.nan_to_num())


def answers(mechanism: str, names: list[str], sender: Any) -> None:
    """Switches one mechanism off and answers every case; runs in a process of its own."""
    MECHANISMS[mechanism]()
    cases = bench.zoo()
    sender.send({name: answer(cases[name]) for name in names})


def ablate(names: list[str]) -> dict[str, Any]:
    """Per mechanism, which models change, and the time as a share of that with everything on."""
    context = multiprocessing.get_context("fork")
    rows: dict[str, Any] = {}
    full: dict[str, Any] = {}
    for mechanism in MECHANISMS:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=answers, args=(mechanism, names, sender))
        process.start()
        sender.close()
        found = receiver.recv()
        process.join()
        full = full or found
        changed = [name for name in names if found[name][0] != full[name][0]]
        spent, whole = (sum(one[name][1] for name in names if name not in changed) for one in (found, full))
        rows[mechanism] = {
            "libraries": [name for name in changed if name.startswith(LIBRARIES)],
            "handmade": [name for name in changed if not name.startswith(LIBRARIES)],
            "time": round(spent / whole, 2),
        }
        row = rows[mechanism]
        some = ", ".join((row["libraries"] + row["handmade"])[:4])
        counts = f"{len(row['libraries']):>9} {len(row['handmade']):>9}"
        print(f"{mechanism:28} {counts} {row['time']:>6}  {some}", flush=True)
    return rows


def main() -> None:
    """Prints the table and writes it beside the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the models")
    parser.add_argument("--skip", nargs="*", default=[], help="parts of the names of models to leave out")
    chosen = parser.parse_args()
    bench.prepare()
    names = [name for name in bench.zoo() if chosen.only in name and not any(part in name for part in chosen.skip)]
    print(f"{len(names)} models\n{'switched off':28} {'libraries':>9} {'hand-made':>9} {'time':>6}")
    rows = ablate(names)
    now = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
    about = {
        "date": now,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if not chosen.only:
        found = {"about": about, "models": len(names), "skipped": chosen.skip, "mechanisms": rows}
        (bench.RESULTS / "ablation.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
