"""Each invariant, corrupted on a real run, must fail it."""

from __future__ import annotations

import pytest

from dsocr_trace.runs import pipeline
from dsocr_trace.runs.invariants import BrokenInvariantError, check_run


@pytest.fixture
def tables(finished):
    run, _ = finished
    return {name: run.table(name) for name in ("attribution", "kernels", "gap", "pages")}


@pytest.fixture
def flops(finished):
    predictions = finished[0].predictions
    sums = predictions.groupby("stage")[["tensor_flops", "vector_flops"]].sum().sum(axis=1)
    return {stage: int(value) for stage, value in sums.items()}


def first(frame, condition) -> int:
    return frame.index[condition][0]


def test_a_sound_run_passes_and_reports_its_sums(tables, flops):
    sums = check_run(tables, flops)
    assert sums["decode"]["event_ns"] == tables["kernels"].query("stage == 'decode'").duration_ns.sum()
    assert sums["vision"]["flops"] == flops["vision"]


def test_one_nanosecond_too_much_in_the_ledger(tables, flops):
    tables["attribution"].loc[0, "measured_self_ns"] += 1
    with pytest.raises(BrokenInvariantError, match=r"the ledger holds .* ns, measured were"):
        check_run(tables, flops)


def test_a_nanosecond_moved_between_stages(tables, flops):
    rows = tables["attribution"]
    rows.loc[first(rows, rows.stage == "decode"), "measured_self_ns"] += 1
    rows.loc[first(rows, rows.stage == "vision"), "measured_self_ns"] -= 1
    with pytest.raises(BrokenInvariantError, match="stage decode: the ledger holds"):
        check_run(tables, flops)


def test_an_event_lost(tables, flops):
    tables["kernels"] = tables["kernels"].assign(duration_ns=tables["kernels"].duration_ns).iloc[:-1]
    with pytest.raises(BrokenInvariantError, match="the ledger holds"):
        check_run(tables, flops)


def test_an_event_without_duration_lost(tables, flops):
    kernels = tables["kernels"]
    kernels.loc[len(kernels)] = kernels.iloc[0]
    kernels.loc[len(kernels) - 1, "duration_ns"] = 0
    with pytest.raises(BrokenInvariantError, match=r"the ledger holds .* events, measured were"):
        check_run(tables, flops)


def test_a_total_that_is_not_the_sum_of_its_parts(tables, flops):
    rows = tables["attribution"]
    rows.loc[first(rows, rows.module_path == "model.layers"), "measured_total_ns"] += 1
    with pytest.raises(BrokenInvariantError, match="the total of module 'model"):
        check_run(tables, flops)


def test_a_module_without_its_parents(tables, flops):
    rows = tables["attribution"]
    tables["attribution"] = rows[~((rows.stage == "decode") & rows.module_path.isin(["", "model"]))]
    kept = set(tables["kernels"].index[~tables["kernels"].module_path.isin(["", "model"])])
    others = tables["kernels"].stage != "decode"
    tables["kernels"] = tables["kernels"][others | tables["kernels"].index.isin(kept)]
    with pytest.raises(BrokenInvariantError, match="the root's total"):
        check_run(tables, flops)


def test_an_event_in_two_places(tables, flops):
    kernels = tables["kernels"]
    kernels.loc[first(kernels, kernels.call_id.notna()), "unclassified_reason"] = "outside_any_module"
    with pytest.raises(BrokenInvariantError, match="1 events have both a call and an unclassified reason, or neither"):
        check_run(tables, flops)


def test_an_event_in_no_place(tables, flops):
    kernels = tables["kernels"]
    kernels.loc[first(kernels, kernels.call_id.isna()), "unclassified_reason"] = None
    with pytest.raises(BrokenInvariantError, match="or neither"):
        check_run(tables, flops)


def test_a_reason_that_nobody_documented(tables, flops):
    kernels = tables["kernels"]
    kernels.loc[first(kernels, kernels.call_id.isna()), "unclassified_reason"] = "magic"
    with pytest.raises(BrokenInvariantError, match="unknown unclassified reason 'magic'"):
        check_run(tables, flops)


def test_a_flop_lost(tables, flops):
    rows = tables["attribution"]
    rows.loc[first(rows, rows.tensor_flops > 0), "tensor_flops"] -= 1
    with pytest.raises(BrokenInvariantError, match="the modules' FLOPs sum to"):
        check_run(tables, flops)


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        ("datasheet_ns", "predicted_device_ns"),
        ("ceilings_ns", "predicted_device_ns"),
        ("launch_ns", "predicted_device_ns"),
        ("shape_ns", "predicted_device_ns"),
        ("unexplained_ns", "measured_ns"),
        ("host_gap_ns", "wall_self_ns"),
    ],
)
def test_a_part_of_the_gap_that_does_not_add_up(tables, flops, part, whole):
    tables["gap"].loc[0, part] += 1
    with pytest.raises(BrokenInvariantError, match=f"the parts of {whole} of .* sum to another number"):
        check_run(tables, flops)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["shape_ns", "predicted_device_ns", "measured_ns", "wall_self_ns"], "measured_ns"),
        (["shape_ns", "predicted_device_ns", "unexplained_ns"], "predicted_device_ns"),
    ],
)
def test_a_gap_that_adds_up_to_something_else(tables, flops, columns, name):
    signs = [-1 if column == "unexplained_ns" else 1 for column in columns]
    tables["gap"].loc[0, columns] += signs
    with pytest.raises(BrokenInvariantError, match=f"the gap holds .* of {name}, the stage has"):
        check_run(tables, flops)


def test_a_broken_run_is_not_written(monkeypatch, tmp_path, invoke):
    def corrupted(*arguments):
        rows = true_table(*arguments)
        rows.loc[0, "measured_self_ns"] += 1
        return rows

    true_table = pipeline.attribution_table
    monkeypatch.setattr(pipeline, "attribution_table", corrupted)
    result = invoke("run", "--workload", "dsocr-smoke-v1", "--max-new-tokens", 2, "--output", tmp_path, "--quiet")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "the ledger holds" in result.stderr
    assert list(tmp_path.iterdir()) == []
