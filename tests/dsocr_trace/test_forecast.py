"""Prediction without a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import attrs
import pytest

import dsocr_trace
from analytic.hardware import load_hardware
from analytic.timing.calibration import Sample
from analytic.timing.datasheet import HOST_COSTS, MEMORY_EFFICIENCY, TENSOR_EFFICIENCY, from_datasheet
from dsocr_trace.machine.calibrations import save_calibration
from dsocr_trace.report.units import duration

if TYPE_CHECKING:
    from pathlib import Path

SMOKE = ("predict", "--workload", "dsocr-smoke-v1", "--hardware")
COMMAND = ("predict", "--workload", "dsocr-standard-v1", "--hardware", "rtx-5090")


@pytest.fixture(scope="module")
def standard():
    return dsocr_trace.predict(workload="dsocr-standard-v1", hardware="rtx-5090")


def test_json_holds_stages_and_modules_that_add_up(invoke, standard):
    result = invoke(*COMMAND, "--json")
    found = json.loads(result.stdout)
    assert found == json.loads(json.dumps(standard.summary()))
    assert list(found["stages"]) == ["vision", "prefill", "decode"]
    assert standard.prediction.sampling.keys() == {"prefill", "decode"}
    for stage, sums in found["stages"].items():
        mine = [row for row in found["modules"] if row["stage"] == stage]
        for column in sums.keys() - {"bound", "source", "predicted_wall_ns", "predicted_busy_ns"}:
            assert sum(row[column] for row in mine) == sums[column], column
        outside = [part.times for where, part in standard.prediction.sampling.items() if where == stage]
        wall_ns = sums["predicted_ns"] + sum(times.predicted_ns for times in outside)
        busy_ns = sums["predicted_device_ns"] + sum(times.predicted_device_ns for times in outside)
        assert (sums["predicted_wall_ns"], sums["predicted_busy_ns"]) == (wall_ns, busy_ns)
        assert 0 < busy_ns < wall_ns
        assert {row["source"] for row in mine} == {sums["source"]} == {"datasheet"}
        assert sums["bound"] in {row["bound"] for row in mine} <= {"compute", "memory", "launch", "host", None}
    stages = found["stages"].values()
    assert found["predicted_wall_ns"] == sum(sums["predicted_wall_ns"] for sums in stages)
    assert found["predicted_busy_ns"] == sum(sums["predicted_busy_ns"] for sums in stages)
    assert found["decode_step_ns"] == found["stages"]["decode"]["predicted_wall_ns"] / 511
    assert found["interval"] is None


def test_it_is_what_a_run_predicts(finished, standard):
    run, _ = finished
    smoke = dsocr_trace.predict(workload="dsocr-smoke-v1", hardware="h200")
    assert smoke.stages.set_index("stage").tensor_flops.to_dict() == (
        run.predictions.groupby("stage", sort=False).tensor_flops.sum().to_dict()
    )
    assert standard.stages.set_index("stage").loc["decode", "calls"] == 511 * 525


def test_settings(invoke):
    result = invoke(*COMMAND, "--set", "crop_grid=2x3", "--set", "text_tokens=6", "--set", "max_new_tokens=2", "--json")
    stages = json.loads(result.stdout)["stages"]
    # The published code's own figures for an A4 page: six tiles, the global view, 909 positions.
    assert stages["vision"]["tensor_flops"] == 3_468_866_060_288
    assert stages["vision"]["tensor_flops"] + stages["prefill"]["tensor_flops"] == 4_563_339_525_632
    assert stages["decode"]["tensor_flops"] == 1_204_102_656
    assert stages["decode"]["kv_cache_bytes"] == 61_440
    assert stages["prefill"]["kv_cache_bytes"] == 909 * 61_440


def test_what_counts_as_attention(invoke):
    """The decoder's prefill computes the lower triangle; a counter sees nothing of a flash kernel."""
    stages = {
        counted: json.loads(invoke(*COMMAND, *words, "--json").stdout)["stages"]
        for counted, words in {
            "full": (),
            "executed": ("--set", "attention_flops=executed"),
            "counter": ("--set", "attention_flops=counter", "--set", "attention=flash_attention_2"),
        }.items()
    }
    each = 4 * 1_280 * 12  # FLOPs of a pair of positions in all heads and layers
    prompt, cached = 512, sum(range(513, 1_024))
    prefill = {counted: found["prefill"]["tensor_flops"] for counted, found in stages.items()}
    decode = {counted: found["decode"]["tensor_flops"] for counted, found in stages.items()}
    assert prefill["full"] - prefill["executed"] == each * prompt * (prompt - 1) // 2
    assert prefill["full"] - prefill["counter"] == each * prompt**2
    assert decode["executed"] == decode["full"] == decode["counter"] + each * cached
    assert stages["full"]["vision"] == stages["executed"]["vision"] == stages["counter"]["vision"]


def test_the_worst_routing_is_a_bound(invoke, standard):
    worst = json.loads(invoke(*COMMAND, "--set", "routing=worst", "--json").stdout)
    balanced = standard.summary()
    assert (worst["routing"], balanced["routing"]) == ("worst", "balanced")
    for stage, sums in balanced["stages"].items():
        assert sums["tensor_flops"] == worst["stages"][stage]["tensor_flops"]
        assert sums["predicted_device_ns"] <= worst["stages"][stage]["predicted_device_ns"]
    prefills = [each["stages"]["prefill"]["predicted_device_ns"] for each in (balanced, worst)]
    assert prefills[0] < prefills[1]


def test_frames(standard):
    assert standard.modules.predicted_ns.sum() == standard.stages.predicted_ns.sum()
    assert standard.operators.flops.sum() == standard.stages[["tensor_flops", "vector_flops"]].sum().sum()
    assert standard.operators.predicted_ns.sum() == standard.modules.predicted_device_ns.sum()


def test_text_shows_both_clocks_and_what_they_rest_on(invoke, standard):
    lines = [" ".join(line.split()) for line in invoke(*COMMAND).stdout.splitlines()]
    for row in standard.stage_rows:
        wall, busy = row.predicted_wall_ns, row.predicted_busy_ns
        step = duration(standard.decode_step_ns) if row.stage == "decode" else "-"
        times = " ".join(map(duration, (wall, busy, wall - busy)))
        assert f"{row.stage} {times} {step} {row.bound} datasheet" in lines
    # The layers of a list are one line.
    layers = [row for row in standard.module_rows if re.fullmatch(r"model\.layers\.\d+\.mlp", row.module_path)]
    decode = [row for row in layers if row.stage == "decode"]
    times = (sum(row.predicted_ns for row in decode), sum(row.predicted_device_ns for row in decode))
    share = f"{times[0] / standard.wall_ns:.1%}"
    assert f"decode model.layers.*.mlp host 12 {' '.join(map(duration, times))} {share}" in lines
    text = "\n".join(lines)
    assert "1x2 tiles, prompt of 512 positions, 512 new tokens, batch 1, bfloat16, sdpa attention, balanced" in text
    assert f"from the datasheet of rtx-5090 with default efficiencies: {TENSOR_EFFICIENCY:.0%} of the peak" in text
    assert f"{MEMORY_EFFICIENCY:.0%} of the bandwidth" in text
    assert "nothing was measured on it" in text
    processor = invoke(*SMOKE, "cpu-generic").stdout
    assert "from estimated peaks of cpu-generic" in processor
    assert "a processor is its own device" in processor


@pytest.fixture
def calibrated(tmp_path):
    """A device of which only the smallest activation was measured."""
    elements = {256: 4_000.0, 512: 4_100.0}
    samples = tuple(
        Sample("silu", "bfloat16", {"elements": size, "dtype": "bfloat16"}, time, 5_000.0, 0.01, 25)
        for size, time in elements.items()
    )
    device = attrs.evolve(
        from_datasheet(load_hardware("h200")),
        device="My GPU",
        source="calibrated",
        measured_at="2026-01-02T03:04:05+00:00",
        samples=samples,
        notes=("the machine was busy",),
    )
    return save_calibration(device, tmp_path / "mine.parquet")


def test_from_a_calibration_it_says_what_lies_beyond_it(invoke, calibrated):
    text = invoke(*SMOKE, calibrated).stdout
    assert "from a calibration of My GPU, measured 2026-01-02T03:04:05+00:00, with 2 samples" in text
    assert "the machine was busy" in text
    assert "100.0% of the device's time in vision is beyond the calibrated sizes" in text
    found = json.loads(invoke(*SMOKE, calibrated, "--json").stdout)
    assert (found["hardware"], found["device"], found["source"]) == ("h200", "My GPU", "calibrated")
    sources = {(row["stage"], row["module_path"]): row["source"] for row in found["modules"]}
    # One token of the small model activates few enough elements to have been measured.
    assert sources["decode", "model.layers.0.mlp.act_fn"] == "calibrated"
    assert sources["prefill", "model.layers.0.mlp.act_fn"] == "extrapolated"


def test_it_loads_nothing_that_it_does_without(calibrated):
    """Loading is half of the time until the answer."""
    heavy = ("torch", "pandas", "scipy", "sympy", "yaml", "pyarrow.dataset", "importlib.metadata")
    code = (
        "import sys; from dsocr_trace.cli import cli\n"
        f"cli({[*SMOKE, str(calibrated)]}, standalone_mode=False)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.splitlines()[-1] == "[]"


def backtest_of(tmp_path: Path, **changed: object) -> Path:
    """Summary of a backtest, as far as a prediction reads it."""
    told = {
        "device": {"name": "My GPU"}, "variant": "deepseek-ocr-v1-base", "dtype": "bfloat16", "attention": "sdpa",
        "verdict": "met", "trials_accepted": 20, "interval": {"share": 0.9, "low": 0.5, "high": 2.0},
    }  # fmt: skip
    path = tmp_path / "backtest.json"
    path.write_text(json.dumps(told | changed), encoding="utf-8")
    return path


def test_a_backtest_gives_an_interval(invoke, calibrated, tmp_path):
    path = backtest_of(tmp_path)
    found = json.loads(invoke(*SMOKE, calibrated, "--backtest", path, "--json").stdout)
    wall = found["predicted_wall_ns"]
    assert (found["interval"]["low_ns"], found["interval"]["high_ns"]) == (round(wall / 2), wall * 2)
    # The directory stands for its summary.
    text = invoke(*SMOKE, calibrated, "--backtest", tmp_path).stdout
    assert f"expect {duration(wall / 2)} to {duration(wall * 2)} in all" in text
    assert "0.50 to 2.00 times predicted in the middle 90% of 20 trials of deepseek-ocr-v1-base in bfloat16" in text
    assert "its verdict: met" in text
    python = dsocr_trace.predict("dsocr-smoke-v1", str(calibrated), backtest=path)
    assert python.summary()["interval"] == found["interval"]


@pytest.mark.parametrize(
    ("changed", "words", "part"),
    [
        ({}, ("--hardware", "h200"), "from a calibration, h200 is predicted from its peaks; give a calibration"),
        ({"device": {"name": "Other"}}, (), "is of Other, the prediction for My GPU; give another with --backtest"),
        ({"dtype": "float32"}, (), "ran in float32, the prediction is in bfloat16"),
        ({"interval": None}, (), "no trial of backtest"),
        ({"device": None}, (), "is not the summary of a backtest: fields are missing or unknown"),
        ({}, ("--backtest", "nowhere"), "backtest nowhere cannot be read"),
        ({}, ("--backtest", __file__), "is no JSON"),
    ],
)
def test_a_backtest_of_something_else_is_refused(invoke, calibrated, changed, words, part):
    path = backtest_of(calibrated.parent, **changed)
    result = invoke(*SMOKE, calibrated, "--backtest", path, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert part in result.stderr
    assert result.stderr.count("\n") == 1


def test_host_costs_are_those_of_the_kind_of_device(standard):
    """What a module call costs the host, over all calls of the model."""
    calls = sum(standard.prediction.work.calls.values())
    spent = sum(part.times.predicted_host_ns for part in standard.prediction.module_calls.values())
    assert spent == pytest.approx(calls * HOST_COSTS["cuda"].module_call_ns)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--set", "batchsize=4"), "did you mean batch_size?"),
        (("--set", "attention_flop=full"), "did you mean attention_flops?"),
        (("--set", "attention_flops=some"), "must be one of full, executed, counter; change it with --set"),
        (("--set", "routing=measured"), "must be one of balanced, worst; change it with --set"),
        (
            ("--set", "max_new_tokens=9000"),
            "the sequence grows to 9511 positions (512 of the prompt), the model has 8192",
        ),
        (("--hardware", "gtx-1080"), "no hardware 'gtx-1080'"),
        (("--hardware", "gtx-1080.parquet"), "no calibration gtx-1080.parquet; make one with dsocr-trace calibrate"),
        (("--variant", "huge"), "no variant 'huge'"),
    ],
)
def test_bad_input(invoke, arguments, part):
    result = invoke(*COMMAND, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert part in result.stderr
    assert result.stderr.count("\n") == 1
