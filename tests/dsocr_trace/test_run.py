"""The main job on the small variant, seen through what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import attrs
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import dsocr_trace
from analytic.config import variant_config
from analytic.hardware import load_hardware
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr
from analytic.predict import predict, stage_rows
from analytic.timing.calibration import Calibration, Sample
from analytic.timing.datasheet import from_datasheet
from analytic.workload import load_workload
from dsocr_trace.machine.calibrations import save_calibration
from dsocr_trace.machine.environment import device_properties
from dsocr_trace.runs.gap import PREDICTED_PARTS
from dsocr_trace.runs.schemas import TABLES

STAGES = ["vision", "prefill", "decode"]
#: Modules of the small variant that one view's encoding calls: found by counting the classes' forwards by hand.
DECODE_CALLS_PER_STEP = 71


def test_every_table_opens_with_pandas_alone(finished):
    run, _ = finished
    for name, schema in TABLES.items():
        path = run.path / f"{name}.parquet"
        assert list(pd.read_parquet(path).columns) == schema.names
        assert pq.read_schema(path).remove_metadata().equals(schema), name


def test_decode_is_sampled_and_scaled(finished):
    run, _ = finished
    kernels = run.kernels
    assert sorted(kernels.loc[kernels.stage == "decode", "step"].unique()) == [2, 4, 6]
    assert run.manifest["pages"][0]["profiled_steps"] == [2, 4, 6]
    decode = run.attribution[run.attribution.stage == "decode"]
    assert np.allclose(decode.scaled_self_ns, decode.measured_self_ns * 7 / 3, rtol=0, atol=0.5)
    rest = run.attribution[run.attribution.stage != "decode"]
    assert np.array_equal(rest.scaled_self_ns, rest.measured_self_ns)


def test_the_ledger_holds_what_was_measured(finished):
    run, _ = finished
    by_stage = run.attribution.groupby("stage")[["measured_self_ns", "event_count"]].sum()
    measured = run.kernels.groupby("stage")["duration_ns"].agg(["sum", "size"])
    assert set(by_stage.index) >= set(STAGES)
    assert np.array_equal(by_stage.sort_index().to_numpy(), measured.sort_index().to_numpy())


def test_every_event_has_a_call_or_a_reason(finished):
    run, _ = finished
    kernels = run.kernels
    assert (kernels.call_id.isna() == kernels.unclassified_reason.notna()).all()
    calls = run.calls.set_index("call_id")
    named = kernels[kernels.call_id.notna()]
    own = calls.loc[named.call_id.astype("int64")]
    assert np.array_equal(own.module_path, named.module_path)
    slack = run.manifest["clock"]["residual_ns"]
    assert (named.launch_ns.to_numpy() >= own.start_ns.to_numpy() - slack).all()
    assert (named.launch_ns.to_numpy() <= own.end_ns.to_numpy() + slack).all()


def test_the_rest_lies_outside_the_root_call(finished):
    run, _ = finished
    rest = run.kernels[run.kernels.call_id.isna()]
    assert set(rest.unclassified_reason) == {"outside_any_module"}
    assert "aten::argmax" in set(rest.name)


def test_calls_and_call_graph(finished):
    run, _ = finished
    calls = run.calls[run.calls["pass"] == "traced"]
    assert (calls[calls.stage == "decode"].groupby("step").size() == DECODE_CALLS_PER_STEP).all()
    assert calls[calls.stage == "decode"].step.nunique() == 7
    graph = run.callgraph.set_index(["stage", "child_path"])
    attention = ("vision", "model.vision_model.transformer.layers.0.self_attn")
    assert graph.loc[attention, "call_count"] == 2
    assert graph.loc[attention, "child_class"] == "NoTPAttention"
    assert graph.call_count.sum() == len(calls)


def test_directly_called_forwards_have_measured_rows(finished):
    run, _ = finished
    rows = run.attribution.set_index(["stage", "module_path"])
    for name in ("self_attn", "mlp"):
        row = rows.loc[("vision", f"model.vision_model.transformer.layers.0.{name}")]
        assert row.calls == 2
        assert row.measured_self_ns > 0


def test_predictions_are_the_analytic_engines(finished):
    run, summary = finished
    workload = load_workload("dsocr-smoke-v1")
    model = deepseek_ocr(variant_config(workload.variant))
    prediction = predict(model, workload, device=from_datasheet(load_hardware("h200")), policy=Policy())
    for row in stage_rows(prediction):
        mine = run.predictions[run.predictions.stage == row.stage]
        assert mine.tensor_flops.sum() == row.tensor_flops
        assert summary["stages"][row.stage]["tensor_flops"] == row.tensor_flops
    # Measured and predicted calls agree module by module: routing was measured in this very run.
    joined = run.attribution.dropna(subset="analytic_layer").merge(
        run.predictions[["stage", "module_path", "calls"]], on=["stage", "module_path"], suffixes=("", "_predicted")
    )
    assert np.array_equal(joined.calls, joined.calls_predicted)


def test_summary_agrees_with_the_tables(finished):
    run, summary = finished
    assert summary["run_dir"] == str(run.path)
    assert len(summary["tokens"]) == 8
    for stage, entry in summary["stages"].items():
        mine = run.attribution[run.attribution.stage == stage]
        assert entry["measured_ns"] == mine.measured_self_ns.sum()
        assert entry["event_count"] == mine.event_count.sum()
        assert entry["calls"] == mine.calls.sum()
        assert entry["wall_ns"] > 0
        (page,) = run.pages[(run.pages.page == "total") & (run.pages.stage == stage)].to_dict("records")
        assert entry["predicted_ns"] == page["predicted_ns"]
        assert entry["predicted_device_ns"] == page["predicted_device_ns"]
    rest = run.attribution[run.attribution.module_path == "unclassified"]
    assert summary["unclassified"]["outside_any_module"]["ns"] == rest.measured_self_ns.sum()
    named = run.attribution.measured_self_ns.sum() - rest.measured_self_ns.sum()
    assert summary["coverage"] == pytest.approx(named / run.attribution.measured_self_ns.sum())


def test_vision_time_is_not_counted_as_prefill(finished):
    run, _ = finished
    traced = run.calls[run.calls["pass"] == "traced"]
    root = traced[(traced.module_path == "") & (traced.stage == "prefill")].iloc[0]
    pages = run.pages[run.pages.page == "total"].set_index("stage")
    both = pages.loc["vision", "wall_ns"] + pages.loc["prefill", "wall_ns"]
    assert both >= root.end_ns - root.start_ns
    assert pages.loc["prefill", "wall_ns"] < root.end_ns - root.start_ns


def test_predicted_weights_are_the_live_ones(finished):
    run, _ = finished
    memory = run.memory
    assert np.array_equal(memory.predicted_weight_bytes, memory.measured_weight_bytes)
    decode = memory[memory.stage == "decode"].set_index("module_path")
    # Held once, however many steps read them: 2020 words of 128 numbers of two bytes.
    assert decode.loc["lm_head", "predicted_weight_bytes"] == 2020 * 128 * 2


def test_the_cache_grew_as_predicted(finished):
    run, _ = finished
    memory = run.memory
    assert np.array_equal(memory.predicted_kv_cache_bytes, memory.measured_kv_cache_bytes)
    assert set(memory[memory.measured_kv_cache_bytes > 0].stage) == {"prefill", "decode"}
    assert memory.measured_activation_peak_bytes.isna().all()


def test_manifest_says_how_it_was_made(finished):
    run, _ = finished
    manifest = run.manifest
    assert manifest["schema_version"] == 2
    assert manifest["expert_routing"]["source"] == "measured"
    assert manifest["weights"] == "seeded random"
    assert manifest["device_state"] is None
    assert manifest["overhead"]["pairs"] == 7
    assert manifest["hardware"]["provenance"] == manifest["prediction"]["source"] == "estimated"
    assert manifest["prediction"]["file"] is manifest["prediction"]["measured_at"] is None
    assert 0 < manifest["clock"]["residual_ns"] <= manifest["clock"]["tolerance_ns"]
    assert manifest["conserved"]["decode"]["events"] == (run.kernels.stage == "decode").sum()


def test_report_names_the_heaviest_module_first(finished):
    run, _ = finished
    text = (run.path / "report.md").read_text(encoding="utf-8")
    named = run.attribution[run.attribution.module_path != "unclassified"]
    first = named.loc[named.scaled_self_ns.idxmax()]
    section = text.split("## Top modules")[1].split("\n")
    assert f"| {first.stage} | `{first.module_path}` |" in section[4]


def test_two_pages_and_repeats(tmp_path, page_files, invoke):
    result = invoke(
        "run", "--workload", "dsocr-smoke-v1", "--device", "cpu", "--output", tmp_path, "--run-id", "pages", "--quiet",
        "--repeat", 2, "--max-new-tokens", 3, "--json", *(part for path in page_files for part in ("--image", path)),
    )  # fmt: skip
    summary = json.loads(result.stdout)
    run = dsocr_trace.load(tmp_path / "pages")
    assert [len(page["tokens"]) for page in summary["pages"]] == [3, 3]
    pages = run.pages.set_index(["page", "stage"])
    for stage in STAGES:
        for column in ("wall_ns", "measured_ns", "tensor_flops", "forwards", "predicted_ns", "predicted_device_ns"):
            parts = sum(pages.loc[(path.name, stage), column] for path in page_files)
            assert pages.loc[("total", stage), column] == parts
            assert parts > 0
    # The second page is small: no tiles, so a shorter prompt.
    assert pages.loc[(page_files[1].name, "prefill"), "seq_len"] == 273 + 19
    assert set(run.calls["pass"]) == {"traced", "traced-2", "profiled"}
    assert set(run.calls.page) == set(run.kernels.page) == {0, 1}
    assert all(len(page["repeats"]) == 2 for page in run.manifest["pages"])
    # Calls are those of the first repeat, so the gap's walls are too.
    walls = run.gap.groupby("stage").wall_self_ns.sum()
    for stage in STAGES:
        assert walls[stage] == sum(page["repeats"][0][f"{stage}_ns"] for page in run.manifest["pages"])
        assert (
            run.predictions[run.predictions.stage == stage].predicted_ns.sum()
            <= pages.loc[("total", stage), "predicted_ns"]
        )


def test_one_token_has_no_decode(tmp_path, invoke):
    result = invoke(
        "run", "--workload", "dsocr-smoke-v1", "--device", "cpu", "--output", tmp_path, "--run-id", "one", "--quiet",
        "--max-new-tokens", 1, "--json",
    )  # fmt: skip
    summary = json.loads(result.stdout)
    assert summary["overhead_ratio"] is None
    assert summary["stages"]["decode"]["calls"] == 0


def test_predicted_times_are_the_device_and_the_clock(finished):
    run, _ = finished
    device = run.predictions.set_index(["stage", "module_path"]).predicted_device_ns
    ledger = run.attribution.set_index(["stage", "module_path"]).predicted_self_ns
    assert np.array_equal(ledger.loc[device.index], device)
    assert run.operators.groupby("stage").predicted_ns.sum().loc[STAGES].tolist() == [
        device.loc[stage].sum() for stage in STAGES
    ]
    assert set(run.predictions.bound) >= {"memory", "launch", "host"}
    # A processor is its own device: the clock has its time and the host's.
    both = run.predictions.predicted_device_ns + run.predictions.predicted_host_ns
    assert (run.predictions.predicted_ns - both).abs().max() <= 1
    pages = run.pages[run.pages.page == "total"].set_index("stage")
    assert pages.loc["vision", "predicted_device_ns"] == device.loc["vision"].sum()
    for stage in ("prefill", "decode"):
        # Beyond the modules: the choice of tokens.
        assert pages.loc[stage, "predicted_device_ns"] > device.loc[stage].sum()
        assert pages.loc[stage, "predicted_ns"] > pages.loc[stage, "predicted_device_ns"]


def test_the_gap_splits_every_modules_time(finished):
    run, _ = finished
    gap = run.gap
    assert len(gap) == (run.attribution.module_path != "unclassified").sum() + gap.stage.nunique()
    parts = ["ceilings_ns", "launch_ns", "shape_ns", "unexplained_ns", "host_gap_ns"]
    assert np.array_equal(gap[["datasheet_ns", *parts]].sum(axis=1), gap.wall_self_ns)
    assert np.array_equal(gap[list(PREDICTED_PARTS)].sum(axis=1), gap.predicted_device_ns)
    # Without a calibration no operator has a curve of its own.
    assert (gap.shape_ns == 0).all()
    sums = gap.groupby("stage")[["predicted_device_ns", "measured_ns", "wall_self_ns"]].sum()
    pages = run.pages[run.pages.page == "total"].set_index("stage")
    for stage in STAGES:
        assert sums.loc[stage, "predicted_device_ns"] == pages.loc[stage, "predicted_device_ns"]
        assert sums.loc[stage, "wall_self_ns"] == pages.loc[stage, "wall_ns"]
        mine = run.attribution[run.attribution.stage == stage]
        assert sums.loc[stage, "measured_ns"] == mine.scaled_self_ns.sum()


def test_the_gaps_walls_are_of_calls_without_those_inside(finished):
    run, _ = finished
    calls = run.calls[run.calls["pass"] == "traced"]
    gap = run.gap.set_index(["stage", "module_path"])
    leaf = calls[(calls.module_path == "lm_head") & (calls.stage == "decode")]
    assert gap.loc[("decode", "lm_head"), "wall_self_ns"] == (leaf.end_ns - leaf.start_ns).sum()
    everything = gap.wall_self_ns.drop("unclassified", level="module_path").sum()
    roots = calls[calls.parent_call_id.isna()]
    assert everything == (roots.end_ns - roots.start_ns).sum()


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Of this processor, where products take three times what its ceilings allow."""
    plain = from_datasheet(load_hardware("cpu-generic"))
    samples = tuple(
        Sample(
            "linear",
            "bfloat16",
            {"rows": rows, "in_features": side, "out_features": side, "dtype": "bfloat16", "bias": False},
            3 * 2 * rows * side**2 / plain.tensor_flops_per_s["bfloat16"] * 1e9 + 10_000,
            0.0,
            0.01,
            5,
        )
        for rows in (1, 512)
        for side in (64, 128, 512)
    )
    return attrs.evolve(
        plain,
        device=device_properties(torch.device("cpu"))["name"],
        samples=samples,
        source="calibrated",
        measured_at="2026-01-02T03:04:05+00:00",
        notes=("the machine was busy",),
    )


def short_run(invoke, root: Path, name: str, *options: object) -> dsocr_trace.Run:
    result = invoke(
        "run", "--workload", "dsocr-smoke-v1", "--device", "cpu", "--output", root, "--run-id", name, "--quiet",
        "--max-new-tokens", 2, *options,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return dsocr_trace.load(root / name)


def test_a_calibration_is_what_times_are_from(tmp_path, invoke, calibration):
    path = save_calibration(calibration, tmp_path / "mine.parquet")
    run = short_run(invoke, tmp_path, "calibrated", "--hardware", path)
    assert run.manifest["prediction"] == {
        "device": calibration.device,
        "source": "calibrated",
        "tensor_flops_per_s": calibration.tensor_flops_per_s["bfloat16"],
        "memory_bytes_per_s": calibration.memory_bytes_per_s[max(calibration.memory_bytes_per_s)],
        "file": str(path),
        "measured_at": "2026-01-02T03:04:05+00:00",
        "notes": ["the machine was busy"],
    }
    assert run.manifest["hardware"]["name"] == "cpu-generic"
    assert not any("the prediction is for" in note for note in run.manifest["notes"])
    rows = run.predictions.set_index(["stage", "module_path"])
    head = rows.loc[("prefill", "model.layers.0.self_attn.q_proj")]
    assert head.source == "calibrated"
    assert head.extrapolated_ns == 0
    # No samples of its operators: their roofs.
    assert rows.loc[("prefill", "model.norm"), "source"] == "extrapolated"
    gap = run.gap.set_index(["stage", "module_path"])
    assert gap.loc[("prefill", "model.layers.0.self_attn.q_proj"), "shape_ns"] > 0
    assert gap.loc[("prefill", "model.norm"), "shape_ns"] == 0


def test_a_prediction_for_another_device_says_so(tmp_path, invoke, calibration):
    path = save_calibration(attrs.evolve(calibration, device="Elsewhere 9000"), tmp_path / "other.parquet")
    here = device_properties(torch.device("cpu"))["name"]
    for hardware, predicted in ((path, "Elsewhere 9000 (calibrated)"), ("h200", "h200 (datasheet)")):
        run = short_run(invoke, tmp_path, Path(hardware).stem, "--hardware", hardware)
        assert f"the prediction is for {predicted}, measured was {here}" in run.manifest["notes"]


def test_a_calibration_for_another_dtype_is_refused(tmp_path, invoke, calibration):
    path = save_calibration(calibration, tmp_path / "mine.parquet")
    result = invoke(
        "run", "--workload", "dsocr-smoke-v1", "--device", "cpu", "--output", tmp_path / "runs", "--hardware", path,
        "--dtype", "fp32",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.stderr == (
        f"dsocr-trace: {calibration.device} was calibrated for models in bfloat16, not in float32; choose another with "
        "--dtype, or measure it with dsocr-trace calibrate --dtype\n"
    )
    assert not (tmp_path / "runs").exists()


def test_predictions_know_nothing_of_measured_runs(finished, tmp_path, monkeypatch, invoke):
    """The same in an empty folder and beside a finished run, whatever was measured there."""
    beside = finished[0].path.parent
    (tmp_path / "empty").mkdir()
    told = []
    for folder in (tmp_path / "empty", beside, finished[0].path):
        monkeypatch.chdir(folder)
        result = invoke("predict", "--workload", "dsocr-smoke-v1", "--hardware", "h200", "--json")
        assert result.exit_code == 0, result.output
        told.append(result.stdout)
    assert told[0] == told[1] == told[2]
    alone, second = (
        short_run(invoke, root, name, "--hardware", "epyc-9654")
        for root, name in ((tmp_path / "empty", "alone"), (beside, "beside"))
    )
    pd.testing.assert_frame_equal(alone.predictions, second.predictions)
    predicted = ["stage", "module_path", *PREDICTED_PARTS, "predicted_device_ns"]
    pd.testing.assert_frame_equal(alone.gap[predicted], second.gap[predicted])
    assert (alone.gap.measured_ns != second.gap.measured_ns).any()


def test_the_time_model_cannot_reach_what_is_measured():
    """By the contract that `make lint` checks, and in a process of its own."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (contract,) = (entry for entry in contracts if "analytic.timing" in entry.get("source_modules", ()))
    assert contract["type"] == "forbidden"
    assert {"analytic.timing", "stage_runners.calibration"} <= set(contract["source_modules"])
    assert {"hooks.tracer", "hooks.capture", "stage_runners.stage1", "dsocr_trace.runs.store"} <= set(
        contract["forbidden_modules"]
    )
    rooms = ("hooks", "stage_runners", "dsocr_trace")
    code = f"import analytic.predict, sys; print([name for name in sys.modules if name.split('.')[0] in {rooms}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"


def test_help_is_quick_to_import():
    heavy = ("torch", "pandas", "pyarrow", "transformers", "numpy")
    code = f"import dsocr_trace.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"
