"""Depth: SmolLM2-135M (30 blocks) without 3 and 6 of them, beside plain ShortGPT, on the same held-out tokens.

    python benchmarks/blocks.py --packages FOLDER            # perplexity by method and count, about 13 minutes a seed

Model, text and split are those of ``quality.py language``: calibration windows come from the first half of the text,
perplexity from 8192 tokens of the second. Nothing is trained. The reference is ShortGPT as its paper has it, written
out by hand below: hooks, one minus the mean cosine, the lowest blocks leave the list.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from quality import Language, declare, line, save
from torch import nn

import netopt

COUNTS = (3, 6)
WINDOWS = 4


def influence_by_hand(model: nn.Module, windows: torch.Tensor) -> list[float]:
    """One minus the mean cosine between what enters and what leaves each layer."""
    sums = [0.0] * len(model.model.layers)

    def look(place: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, result: torch.Tensor | tuple) -> None:
            made = result if isinstance(result, torch.Tensor) else result[0]
            sums[place] += float((1 - F.cosine_similarity(args[0], made, dim=-1)).mean())

        return hook

    handles = [layer.register_forward_hook(look(place)) for place, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return sums


def without(case: Language, gone: Sequence[int]) -> nn.Module:
    """A copy that lacks some layers, by hand."""
    model = copy.deepcopy(case.model)
    model.model.layers = nn.ModuleList(layer for place, layer in enumerate(model.model.layers) if place not in gone)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    return model


def by_shortgpt(case: Language, windows: torch.Tensor) -> dict[int, list[int]]:
    scores = influence_by_hand(case.model, windows)
    order = sorted(range(len(scores)), key=lambda place: scores[place])
    return {count: sorted(order[:count]) for count in COUNTS}


def by_netopt(case: Language, windows: torch.Tensor, importance: str) -> dict[int, list[int]]:
    """What is removed at each count; what a greedy choice removes first is the choice among all it removes."""
    found, among = {}, None
    data = [{"input_ids": part} for part in windows.split(2)]
    for count in sorted(COUNTS, reverse=True):
        plan = netopt.plan_blocks(
            case.model, case.example, amount=count, importance=importance, data=data, include=among, progress=False
        )
        found[count] = list(plan.stacks[0].removed)
        among = [f"model.layers.{place}" for place in found[count]]
    return found


METHODS: dict[str, Callable[[Language, torch.Tensor], dict[int, list[int]]]] = {
    "shortgpt": by_shortgpt,
    "influence": lambda case, windows: by_netopt(case, windows, "influence"),
    "loss": lambda case, windows: by_netopt(case, windows, "loss"),
}


def run(seeds: int) -> None:
    rows, known = [], {}
    for seed in range(seeds):
        case = Language(seed)
        if not rows:
            rows.append({"method": "dense", **case.evaluate(case.model)})
            print(line(rows[0]), flush=True)
        windows = torch.cat([batch["input_ids"] for batch in case.calibration])[:WINDOWS]
        for method, choose in METHODS.items():
            start = time.process_time()
            chosen = choose(case, windows)
            seconds = time.process_time() - start
            for count, gone in chosen.items():
                if tuple(gone) not in known:
                    known[tuple(gone)] = case.evaluate(without(case, gone))
                row = {"method": method, "seed": seed, "removed": count, "blocks": gone, "cpu_seconds": seconds}
                rows.append(row | known[tuple(gone)])
                print(line(rows[-1]), flush=True)
                save("blocks", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="choices of calibration windows")
    parser.add_argument("--packages", action="append", default=[], help="a folder with the packages of model and text")
    asked = parser.parse_args()
    sys.path[:0] = asked.packages
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept = declare()
    run(asked.seeds)
    del kept


if __name__ == "__main__":
    sys.exit(main())
