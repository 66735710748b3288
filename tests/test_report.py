"""A report says what was done, as text, as HTML, as a figure and as plain data."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import pytest
import torch
from torch import nn

from conftest import unchanged
from netopt.errors import InvalidArgumentError, MissingPackageError, NetoptError
from netopt.measure import Cost, Latency
from netopt.report import PruningReport, Row


def a_report(**changes) -> PruningReport:
    given = {
        "call": "prune_neurons",
        "before": Cost(params=1000, nonzero=990, bytes=4000, macs=2_000_000),
        "after": Cost(params=250, nonzero=250, bytes=1000, macs=500_000),
        "rows": (Row("stem", 64, 16, exact=True), Row("blocks.0.norm", 32, 8, exact=False, note="LayerNorm over it")),
        "frozen": {"head": "is a model output", "<odd>": "reaches & stops"},
        "settings": {"amount": 0.75, "importance": "saliency", "exclude": [nn.Linear], "loss_fn": None},
    }
    return PruningReport(**{**given, **changes})


def test_the_attributes_of_the_contract():
    report = a_report()
    assert (report.params_before, report.params_after) == (1000, 250)
    assert (report.nonzero_before, report.nonzero_after) == (990, 250)
    assert (report.macs_before, report.macs_after) == (2_000_000, 500_000)
    assert (report.bytes_before, report.bytes_after) == (4000, 1000)
    assert report.removed == pytest.approx(0.75)
    assert report.rows[0].removed == pytest.approx(0.75)


def test_text_has_every_number_and_reason_in_aligned_columns():
    text = str(a_report())
    assert text.splitlines()[0] == "prune_neurons: 75.0 % of 96 neurons removed"
    for word in (
        "parameters",
        "1,000",
        "2,000,000",
        "25.0 %",
        "blocks.0.norm",
        "LayerNorm over it",
        "is a model output",
    ):
        assert word in text
    totals = text.splitlines()[1:6]
    assert {line.index("before") + 6 for line in totals[:1]} == {line.index("1,000") + 5 for line in totals[1:2]}
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_long_reports_are_cut_and_say_so():
    report = a_report(rows=tuple(Row(f"axis{i}", 4, 2) for i in range(50)), frozen={f"f{i}": "is" for i in range(30)})
    assert "... and 30 more" in str(report)
    assert "... and 10 more" in str(report)
    assert "more" not in report.table()
    assert "axis49" in report.table()
    assert "... and 30 more" in report._repr_html_()


def test_counts_without_inputs_are_left_out():
    report = a_report(before=Cost(10, 10, 40), after=Cost(10, 1, 40), call="prune_weights", frozen={})
    assert report.macs_before is None
    assert "MACs" not in str(report)
    assert "frozen" not in str(report)
    assert "entries removed" in str(report)


def test_an_empty_report_can_be_shown():
    report = a_report(rows=(), frozen={})
    assert report.removed == 0.0
    assert "0.0 % of 0 neurons" in str(report)
    assert report._repr_html_().startswith("<p>")
    assert report.plot() is not None


def test_html_is_escaped_and_balanced():
    page = a_report()._repr_html_()
    assert "&lt;odd&gt;" in page
    assert "reaches &amp; stops" in page
    for tag in ("table", "tr", "td", "th", "p"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>")


def test_to_dict_is_json_and_complete():
    report = a_report(latency_after=Latency(0.5, 0.1))
    read = json.loads(json.dumps(report.to_dict()))
    assert read["before"]["params"] == 1000
    assert read["after"]["latency"] == {"median": 0.5, "spread": 0.1}
    assert read["before"]["latency"] is None
    assert read["rows"][1] == {
        "name": "blocks.0.norm", "before": 32, "after": 8, "exact": False, "note": "LayerNorm over it", "size": None,
        "kind": None,
    }  # fmt: skip
    assert read["settings"] == {"amount": 0.75, "importance": "saliency", "exclude": ["Linear"], "loss_fn": None}
    assert read["frozen"]["head"] == "is a model output"


def test_a_plan_that_can_be_a_dict_becomes_one():
    class Planned:
        def to_dict(self):
            return {"axes": 2}

    assert a_report(plan=Planned()).to_dict()["plan"] == {"axes": 2}


@pytest.mark.parametrize("dense", ["module", "latency", None])
def test_measuring_adds_seconds_and_changes_nothing(dense):
    model, inputs = nn.Sequential(nn.Linear(4, 4), nn.Dropout()), torch.zeros(2, 4)
    given = {"module": copy.deepcopy(model), "latency": Latency(0.25, 0.0), None: None}[dense]
    report = a_report(subject=model)
    with unchanged(model):
        measured = report.measure(inputs, dense=given, repeats=2)
    assert measured.latency_after.median > 0
    assert (measured.latency_before is None) == (dense is None)
    assert "latency" in str(measured)
    assert "latency" not in str(report)


def test_a_report_does_not_keep_the_model_alive_and_can_be_copied():
    model = nn.Linear(4, 4)
    report = a_report(subject=model)
    copies = [copy.deepcopy(report), pickle.loads(pickle.dumps(report))]
    assert all(one == report for one in copies)
    del model
    for one in (report, *copies):
        with pytest.raises(InvalidArgumentError, match="pass it as model="):
            one.measure(torch.zeros(2, 4))
    assert report.measure(torch.zeros(2, 4), model=nn.Linear(4, 4), repeats=1).latency_after is not None


def test_plot_draws_a_bar_for_each_row(tmp_path):
    figure = a_report().plot()
    assert len(figure.axes[0].patches) == 4
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'netopt\[plots\]'") as caught:
        a_report().plot()
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, NetoptError)
