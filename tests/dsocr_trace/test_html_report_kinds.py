"""What each kind of module could give, and the reports that say so in short: report.md and the terminal's summary."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from dsocr_trace.report.html import stored_tables
from dsocr_trace.report.kinds import ABOVE_ROOF, kind_rows, module_rows, targets
from dsocr_trace.report.markdown import report_markdown
from dsocr_trace.report.terminal import print_summary
from dsocr_trace.report.units import duration


@pytest.fixture(scope="module")
def run(finished):
    return finished[0]


def kinds_of(tables):
    return kind_rows(module_rows(tables["attribution"], tables["predictions"], tables["gap"]), tables["gap"])


def made_gap(**parts):
    """Gap and ledger of four modules and what is outside of them, 100 ns measured in each."""
    paths = ["", "a.0", "a.1", "b", "unclassified"]
    zero = {name: [0] * 5 for name in ("datasheet_ns", "ceilings_ns", "launch_ns", "shape_ns", "host_gap_ns")}
    gap = pd.DataFrame({"stage": "decode", "module_path": paths, "measured_ns": 100, **zero, **parts}).astype(
        dict.fromkeys(zero, "float64")
    )
    predicted = gap[["datasheet_ns", "ceilings_ns", "launch_ns", "shape_ns"]].sum(axis=1)
    gap = gap.assign(
        predicted_device_ns=predicted,
        unexplained_ns=gap["measured_ns"] - predicted,
        wall_self_ns=gap["measured_ns"] + gap["host_gap_ns"],
    )
    named = gap[gap["module_path"] != "unclassified"]
    ledger = pd.DataFrame(
        {
            "stage": "decode", "module_path": named["module_path"], "module_class": ["Root", "A", "A", "B"],
            "parent_path": [None, "", "", ""], "depth": [0, 1, 1, 1], "calls": 1, "event_count": 1,
            "scaled_self_ns": 100, "scaled_total_ns": [400, 100, 100, 100], "wall_total_ns": 0,
            "predicted_self_ns": named["predicted_device_ns"], "predicted_total_ns": 0.0, "tensor_flops": 10,
            "vector_flops": 0, "bytes_total": 10,
        }
    )  # fmt: skip
    predictions = named[["stage", "module_path"]].assign(predicted_ns=1.0, bound="memory", source="calibrated")
    return {"attribution": ledger, "predictions": predictions, "gap": gap}


def test_what_a_kind_could_give_is_what_stands_above_its_roof():
    tables = made_gap(datasheet_ns=[10, 20, 20, 60, 0], ceilings_ns=[0, 10, 10, 10, 0], shape_ns=[0, 40, 40, 0, 0])
    rows = targets(kinds_of(tables), 9).set_index("kind")
    assert rows["modules"].to_dict() == {"a.*": 2, "": 1, "unclassified": 1, "b": 1}
    assert rows["roof_ns"].to_dict() == {"a.*": 60, "": 10, "unclassified": 0, "b": 70}
    assert rows["excess_ns"].to_dict() == {"a.*": 140, "unclassified": 100, "": 90, "b": 30}
    assert rows["cause"].to_dict() == {
        "a.*": "shapes", "": "unexplained", "unclassified": "unexplained", "b": "unexplained"
    }  # fmt: skip


def test_idle_time_of_the_device_is_shared_out_once():
    # The device was idle for 60 ns of the stage. That "b" waited for others is no time of its own.
    tables = made_gap(datasheet_ns=[100, 100, 100, 100, 100], host_gap_ns=[-30, -30, 0, 80, 40])
    rows = kinds_of(tables).set_index("kind")
    assert rows["idle_ns"].to_dict() == pytest.approx({"": 0, "a.*": 0, "b": 40, "unclassified": 20})
    assert targets(kinds_of(tables), 1)["cause"].tolist() == ["host gap"]
    # A device that is always busy has none to share, however long the calls took.
    busy = made_gap(datasheet_ns=[100, 100, 100, 100, 100], host_gap_ns=[-90, -90, 0, 80, 40])
    assert not kinds_of(busy)["idle_ns"].any()
    assert not kinds_of(busy)["excess_ns"].any()


def test_without_a_gap_the_prediction_is_the_roof():
    tables = made_gap(datasheet_ns=[10, 20, 20, 60, 0])
    tables["gap"] = tables["gap"].iloc[:0]
    rows = targets(kinds_of(tables), 9).set_index("kind")
    assert rows["excess_ns"].to_dict() == {"a.*": 160, "": 90, "b": 40}
    assert rows["cause"].isna().all()


def test_markdown_names_the_cost_centres(run):
    tables = stored_tables(run)
    text = report_markdown(run.manifest, tables)
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    for head in (
        "Environment",
        "Aggregates",
        "Per-stage timings and MFU",
        "Top operators",
        "Top kernels",
        "Memory (predicted)",
    ):
        assert head in heads
    assert heads[-2:] == ["Unclassified", "What to optimise first"]
    centres = text.partition("## What to optimise first")[2].strip().splitlines()
    first = targets(kinds_of(tables), 3)
    assert len(centres) == 3
    for line, row in zip(centres, first.to_dict("records"), strict=True):
        assert row["stage"] in line
        assert (row["kind"] or "the root").replace("*", r"\*") in line or row["kind"] == "unclassified"
    gap = run.gap.groupby("stage")["wall_self_ns"].sum()
    assert f"| {duration(gap['decode'])} |" in text.partition("## From the datasheet")[2].partition("##")[0]


def test_the_summary_fits_a_screen(run, capsys):
    tables = stored_tables(run)
    print_summary(str(run.path), run.manifest, tables)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 100
    assert not any("\x1b" in line for line in lines)
    title = next(place for place, line in enumerate(lines) if line.startswith("Furthest above the roof"))
    first = targets(kinds_of(tables), 1).iloc[0]
    assert first["cause"] in ABOVE_ROOF.values()
    assert all(part in lines[title + 4] for part in (first["stage"], first["cause"]))
    assert lines[-1].endswith("report.html")
