"""Draws the pictures of the documentation: what a report, scores, a schedule, a sensitivity and a trade-off look like.

python examples/pictures.py    # writes docs/images/*.png; needs matplotlib and scikit-learn
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import netopt
from netopt.figures import tradeoff

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
METHODS = {
    "reconstruction/measured+repair": "measured scores, repaired",
    "taylor+repair": "taylor, repaired",
    "taylor": "taylor",
    "magnitude": "magnitude",
    "torch-pruning taylor": "Torch-Pruning, taylor",
}


def save(name: str, drawn: Any) -> None:
    IMAGES.mkdir(exist_ok=True)
    drawn.savefig(IMAGES / f"{name}.png", dpi=110, facecolor="white")
    print(f"docs/images/{name}.png")


def deep() -> None:
    """A report and its scores, of an encoder of twelve layers that was not trained."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(96, 4, 384, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    for parameter in encoder.parameters():  # twelve copies of one layer, each with noise of its own
        parameter.data += torch.randn_like(parameter) * 0.1 * torch.rand(())
    model = nn.Sequential(nn.Embedding(200, 96), encoder, nn.Linear(96, 5)).eval()
    inputs, chosen = torch.randint(5, 200, (4, 16)), ["ffn", "heads"]
    report = netopt.prune_neurons(model, inputs, amount=0.3, include=chosen, scope="kind", progress=False)
    save("report", report.plot())
    save("scores", report.plot_scores())


def digits() -> None:
    """A sensitivity, and a schedule, of a small net trained on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    loaded: Any = load_digits()
    x = torch.tensor(loaded.data, dtype=torch.float32) / 16
    y = torch.tensor(loaded.target)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:1200]), y[:1200]).backward()
        optimizer.step()

    def accuracy(model: nn.Module) -> float:
        return float((model(x[1200:]).argmax(1) == y[1200:]).float().mean())

    save("sensitivity", netopt.sensitivity(net, x[:256], accuracy, over="tensors", progress=False).plot())
    pruner = netopt.GradualPruner(net, final=0.9, schedule="cubic", begin=20, end=160, every=10)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:1200]), y[:1200]).backward()
        optimizer.step()
        pruner.step()
    save("schedule", pruner.plot())


def quality(name: str, measure: str, label: str) -> None:
    """Quality against cost, from a result of `benchmarks/quality.py`."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"quality-{name}.json").read_text(encoding="utf-8"))["rows"]
    dense = next(row[measure] for row in rows if row["method"] == "dense")
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["method"] in METHODS and measure in row:
            curves[METHODS[row["method"]]].append((row["left"], row[measure]))
    save(f"quality_{name}", tradeoff(curves, cost="MACs", quality=label, dense=dense))


if __name__ == "__main__":
    deep()
    digits()
    quality("mnist", "accuracy", "accuracy, MNIST CNN")
    quality("residual", "accuracy", "accuracy, residual net with batch norm")
