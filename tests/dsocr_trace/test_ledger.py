"""The join on a tree small enough to add up by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from dsocr_trace.runs.gap import gap_table
from dsocr_trace.runs.ledger import attribution_table, memory_table, operators_table
from stage_runners.measurement import MeasuredMemory

MODULES = pd.DataFrame(
    {
        "module_path": ["", "a", "a.x", "b"],
        "module_class": ["Root", "A", "Linear", "B"],
        "analytic_layer": ["Root", None, "Linear", None],
        "parent_path": [None, "", "a", ""],
        "depth": [0, 1, 2, 1],
        "weight_bytes": [0, 0, 64, 8],
    }
)
CALLS = pd.DataFrame(
    {
        "call_id": [0, 1, 2, 3, 4],
        "parent_call_id": [None, 0, 1, 0, 3],
        "stage": ["decode"] * 5,
        "module_path": ["", "a", "a.x", "a", "a.x"],
        "start_ns": [0, 10, 20, 50, 60],
        "end_ns": [100, 40, 30, 90, 70],
    }
)
KERNELS = pd.DataFrame(
    {
        "stage": ["decode", "decode", "decode", "decode", "other"],
        "module_path": ["a.x", "a.x", "", "unclassified", "unclassified"],
        "operator_category": ["linear", "other", "elementwise", "reduction", "copy"],
        "duration_ns": [30, 10, 5, 15, 7],
        "scaled_ns": [60.0, 20.0, 10.0, 30.0, 7.0],
        "unclassified_reason": [None, None, None, "outside_any_module", "no_launch_record"],
    }
)
PREDICTIONS = pd.DataFrame(
    {
        "stage": ["decode", "decode"],
        "module_path": ["a.x", "a"],
        "predicted_ns": [70, 90],
        "predicted_device_ns": [60, 20],
        "datasheet_ns": [12, 3],
        "roof_ns": [50, 20],
        "floor_ns": [8, 16],
        "tensor_flops": [1_000, 0],
        "vector_flops": [0, 50],
        "bytes_read": [300, 20],
        "bytes_written": [100, 20],
        "weight_bytes": [64, 0],
        "activation_peak_bytes": [100, 20],
        "kv_cache_bytes": [0, 0],
    }
)


@pytest.fixture
def rows() -> pd.DataFrame:
    table = attribution_table(MODULES, CALLS, KERNELS, PREDICTIONS)
    return table.set_index(["stage", "module_path"])


def test_self_values(rows):
    linear = rows.loc[("decode", "a.x")]
    assert (linear.measured_self_ns, linear.event_count, linear.calls, linear.wall_total_ns) == (40, 2, 2, 20)
    assert (linear.scaled_self_ns, linear.predicted_self_ns) == (80, 60)
    assert (linear.tensor_flops, linear.bytes_total) == (1_000, 400)


def test_totals_roll_up_the_tree(rows):
    decode = rows.loc["decode"]
    assert decode.loc["a", "measured_total_ns"] == 40
    assert decode.loc["a", "measured_self_ns"] == 0
    assert decode.loc["", "measured_total_ns"] == 45
    assert decode.loc["", "predicted_total_ns"] == 80
    assert decode.loc["", "scaled_total_ns"] == 90


def test_rates_use_the_scaled_time(rows):
    linear = rows.loc[("decode", "a.x")]
    assert linear.ratio_predicted_to_measured == pytest.approx(60 / 80)
    assert linear.achieved_flops_per_s == pytest.approx(1_000 / 80e-9)
    assert linear.achieved_bytes_per_s == pytest.approx(400 / 80e-9)
    assert linear.share_of_time == pytest.approx(40 / 60)
    assert pd.isna(rows.loc[("decode", "a"), "ratio_predicted_to_measured"])


def test_the_bucket_keeps_its_reasons(rows):
    assert rows.loc[("decode", "unclassified"), "unclassified_reason"] == "outside_any_module"
    other = rows.loc[("other", "unclassified")]
    assert (other.measured_self_ns, other.scaled_self_ns, other.event_count) == (7, 7, 1)


def test_a_module_that_did_nothing_has_no_row(rows):
    assert ("decode", "b") not in rows.index


def test_without_predictions_those_columns_stay_empty():
    rows = attribution_table(MODULES, CALLS, KERNELS, PREDICTIONS.iloc[:0])
    assert rows.predicted_self_ns.isna().all()
    assert rows.measured_self_ns.sum() == KERNELS.duration_ns.sum()


def test_operators_of_a_module_predicted_as_one_category_keep_it():
    predicted = pd.DataFrame(
        {
            "stage": ["decode"] * 3,
            "module_path": ["a.x", "", ""],
            "operator_category": ["linear", "copy", "elementwise"],
            "predicted_ns": [60, 1, 2],
            "flops": [1_000, 0, 10],
            "bytes": [400, 1, 2],
        }
    )
    rows = operators_table(KERNELS, predicted).set_index(["module_path", "operator_category"])
    assert rows.loc[("a.x", "linear"), ["event_count", "measured_ns", "scaled_ns"]].tolist() == [2, 40, 80]
    assert ("a.x", "other") not in rows.index
    assert rows.loc[("", "elementwise"), "measured_ns"] == 5
    assert rows.loc[("", "copy"), ["event_count", "measured_ns"]].tolist() == [0, 0]
    assert rows.measured_ns.sum() == KERNELS.duration_ns.sum()
    assert rows.loc[("", "elementwise"), "share_of_module_flops"] == 1


def memory(measured: MeasuredMemory) -> pd.DataFrame:
    return memory_table(MODULES, PREDICTIONS, {"a.x": 64, "a": 0}, measured).set_index("module_path")


def test_memory_puts_live_weights_beside_predicted_ones():
    rows = memory(MeasuredMemory({}, {}))
    assert rows.loc["a.x", ["predicted_weight_bytes", "measured_weight_bytes"]].tolist() == [64, 64]
    assert rows.measured_activation_peak_bytes.isna().all()
    assert rows.measured_kv_cache_bytes.tolist() == [0, 0]


def test_memory_joins_what_was_measured_by_stage_and_module():
    measured = MeasuredMemory(
        cache_growth_bytes={("decode", "a"): 40, ("prefill", "a"): 999},
        activation_peak_bytes={("decode", "a.x"): 7, ("prefill", "a"): 999, ("decode", "b"): 999},
    )
    rows = memory(measured)
    assert rows.loc["a.x", ["measured_activation_peak_bytes", "measured_kv_cache_bytes"]].tolist() == [7, 0]
    assert rows.loc["a", "measured_kv_cache_bytes"] == 40
    assert pd.isna(rows.loc["a", "measured_activation_peak_bytes"])


SAMPLING = pd.DataFrame(
    {"datasheet_ns": [0], "roof_ns": [9], "floor_ns": [4], "predicted_device_ns": [11]}, index=["decode"]
)
GAP_COLUMNS = [
    "datasheet_ns", "ceilings_ns", "launch_ns", "shape_ns", "predicted_device_ns", "unexplained_ns", "measured_ns",
    "host_gap_ns", "wall_self_ns",
]  # fmt: skip


def gap(predictions: pd.DataFrame, sampling: pd.DataFrame) -> pd.DataFrame:
    attribution = attribution_table(MODULES, CALLS, KERNELS, predictions)
    rows = gap_table(attribution, CALLS, predictions, sampling, {"decode": 130})
    return rows.set_index(["stage", "module_path"])[GAP_COLUMNS]


def test_the_gap_from_the_datasheet_to_the_clock():
    rows = gap(PREDICTIONS, SAMPLING)
    assert rows.loc["decode"].to_dict("index") == {
        path: dict(zip(GAP_COLUMNS, numbers, strict=True))
        for path, numbers in {
            # Each of its two calls took 10 ns, and its events 80 ns on all forwards.
            "a.x": [12, 50 - 8 - 12, 8, 60 - 50, 60, 80 - 60, 80, 20 - 80, 20],
            "a": [3, 20 - 16 - 3, 16, 0, 20, 0 - 20, 0, 50, 30 + 40 - 20],
            # Called, and nothing is predicted to run there.
            "": [0, 0, 0, 0, 0, 10, 10, 30 - 10, 100 - 30 - 40],
            "unclassified": [0, 9 - 4, 4, 11 - 9, 11, 30 - 11, 30, 30 - 30, 130 - 100],
        }.items()
    }
    assert rows.loc[("other", "unclassified")].tolist() == [0, 0, 0, 0, 0, 7, 7, -7, 0]


def test_the_gap_without_predictions_keeps_what_was_measured():
    rows = gap(PREDICTIONS.iloc[:0], SAMPLING.iloc[:0])
    assert rows[GAP_COLUMNS[:6]].isna().all(axis=None)
    assert rows.measured_ns.sum() == KERNELS.scaled_ns.sum()
    assert rows.loc["decode", "wall_self_ns"].sum() == 130


def test_the_gap_predicts_nothing_for_what_no_layer_stands_for():
    modules = MODULES.assign(analytic_layer=["Root", "other", "Linear", None])
    predictions = PREDICTIONS[PREDICTIONS.module_path != "a"]
    attribution = attribution_table(modules, CALLS, KERNELS, predictions)
    rows = gap_table(attribution, CALLS, predictions, SAMPLING, {"decode": 130}).set_index(["stage", "module_path"])
    assert rows.loc[("decode", "a"), GAP_COLUMNS[:6]].isna().all()
    assert rows.loc[("decode", "a"), GAP_COLUMNS[6:]].tolist() == [0, 50, 50]
    assert rows.loc["decode"].drop("a").notna().all(axis=None)
