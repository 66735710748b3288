"""Every block of Python on every page runs, in the order of the page, and prints what the page says it prints."""

from __future__ import annotations

import contextlib
import copy
import doctest
import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import netopt
from netopt.importance import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\n+```text\n(?P<output>.*?)```)?", re.DOTALL)
BLOCKS = {page: list(BLOCK.finditer(page.read_text(encoding="utf-8"))) for page in PAGES}


class Net(nn.Module):
    """A small net of images, with the names that pages use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv1(x)).relu()
        return self.head(self.conv2(x).relu().mean((2, 3)))


def setting() -> dict[str, Any]:
    """What pages take for granted: a trained model, data for it, and the imports."""
    torch.manual_seed(0)
    images, labels = torch.rand(96, 1, 8, 8), torch.randint(0, 10, (96,))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    nn.functional.cross_entropy(model(images[:8]), labels[:8]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return {
        "__name__": "page",
        "copy": copy,
        "netopt": netopt,
        "nn": nn,
        "torch": torch,
        "model": model.eval(),
        "teacher": copy.deepcopy(model),
        "student": Net(),
        "images": images,
        "labels": labels,
        "example_inputs": images[:2],
        "calibration": list(images.split(16)),
        "data": DataLoader(TensorDataset(images, labels), batch_size=16),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=16),
        "optimizer": optimizer,
        "train": train,
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step, where a page has a loop of the reader's own."""
    optimizer.zero_grad()
    model(torch.rand(4, 1, 8, 8)).square().mean().backward()
    optimizer.step()


def neutral(text: str) -> str:
    """Without the places of code, which pages give as those of a reader's own file."""
    return re.sub(r"[\w.]+\.(py|md):\d+", "model.py:0", text)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks], ids=name_of)
def test_code_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", {**registry._REGISTERED})  # what a page adds is gone after it
    mpl.use("agg")
    namespace, text = setting(), page.read_text(encoding="utf-8")
    for block in BLOCKS[page]:
        line = text.count("\n", 0, block.start("code")) + 1
        code = compile("\n" * (line - 1) + block["code"], str(page), "exec", dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block["output"] is not None:
            wanted, found = neutral(block["output"]), neutral(printed.getvalue())
            same = doctest.OutputChecker().check_output(wanted, found, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert same, f"{name_of(page)}:{line} prints\n{found}\nand not\n{wanted}"
