"""Why a number is what it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import attrs
import pytest
import sympy
from PIL import Image

from analytic.config import variant_config
from analytic.cost import DTYPES
from analytic.hardware import load_hardware
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr
from analytic.operators import OPERATORS
from analytic.predict import TIME_COLUMNS, module_rows
from analytic.timing.calibration import Sample
from analytic.timing.curves import Curves, cost_of
from analytic.timing.datasheet import from_datasheet
from analytic.whatif import Scenario
from analytic.workload import load_workload
from dsocr_trace.forecasts.arithmetic import Arithmetic
from dsocr_trace.forecasts.explain import explain, summarised
from dsocr_trace.forecasts.forecast import forecast as forecast_of
from dsocr_trace.forecasts.forecast import predict_words
from dsocr_trace.forecasts.of_run import run_forecast
from dsocr_trace.machine.calibrations import save_calibration
from dsocr_trace.runs.store import load

PREDICTED = ("--workload", "dsocr-standard-v1", "--hardware", "h200")
BF16 = DTYPES["bfloat16"]
ATTENTION = "model.layers.3.self_attn"
NUMBERS = ("tensor_flops", "vector_flops", "bytes_read", "bytes_written", "weight_bytes", "activation_bytes")


@pytest.fixture(scope="module")
def standard():
    return predict_words("dsocr-standard-v1", "h200", variant=None, settings=[])


@pytest.fixture(scope="module")
def two_pages(tmp_path_factory, invoke):
    """A run of two pages of different size."""
    root = tmp_path_factory.mktemp("two")
    for name, size in {"tall.png": (640, 1280), "small.png": (600, 400)}.items():
        Image.new("RGB", size, "white").save(root / name)
    result = invoke(
        "run", "--workload", "dsocr-smoke-v1", "--device", "cpu", "--output", root, "--run-id", "two",
        "--image", root / "tall.png", "--image", root / "small.png", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return load(root / "two")


def told(invoke, path, *options):
    result = invoke("explain", path, *options, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("path", ["(root)", "model", ATTENTION, "model.layers.4.mlp", "model.sam_model.blocks.1.attn"])
def test_operators_add_up_to_the_row_of_the_prediction(standard, path):
    rows = {row.stage: row for row in module_rows(standard.prediction) if row.module_path == path.replace("(root)", "")}
    found = explain(standard, path)
    assert [stage.row for stage in found.stages] == list(rows.values())
    for stage in found.stages:
        for column in NUMBERS:
            lines = [timed.line for operation in stage.operations for timed in operation.lines]
            assert sum(getattr(line.cost, column) for line in lines) == getattr(stage.row, column)
        times = [operation.predicted.times for operation in stage.operations]
        called = standard.prediction.module_calls[stage.stage, stage.row.module_path].times
        for column in TIME_COLUMNS:
            whole = sum(getattr(each, column) for each in (*times, called))
            assert whole == getattr(stage.row, column)
        assert sum(part.total_ns for part in stage.host) == stage.row.predicted_host_ns
        for part in stage.host:
            if part.each_ns is not None:
                assert part.total_ns == pytest.approx(part.count * part.each_ns)
        floor_ns = standard.device.host.kernel_floor_ns
        for operation in stage.operations:
            assert operation.launches * floor_ns == pytest.approx(operation.predicted.times.floor_ns)


#: Operators of which the calibration of `calibrated` has samples, with their sizes.
MEASURED = {
    "linear": [
        {"rows": rows, "in_features": size, "out_features": size, "dtype": "bfloat16", "bias": False}
        for rows in (1, 16, 512)
        for size in (64, 256, 1024)
    ],
    "rms_norm": [{"rows": rows, "width": 128, "dtype": "bfloat16"} for rows in (1, 64, 1024)],
    "silu": [{"elements": elements, "dtype": "bfloat16"} for elements in (256, 1 << 14)],
}


@pytest.fixture(scope="module")
def calibrated():
    """A processor whose caches are faster than its memory, whose large results cost new memory, and some samples."""
    device = from_datasheet(load_hardware("cpu-generic"))
    device = attrs.evolve(
        device,
        device="A processor",
        source="calibrated",
        measured_at="2026-01-02T03:04:05+00:00",
        host=attrs.evolve(device.host, fresh_byte_ns=0.3, fresh_from_bytes=1 << 19),
        memory_bytes_per_s={1 << 12: 4e10, 1 << 20: 3e10, 1 << 26: 1.2e10},
    )
    roofs = Curves(device)
    samples = []
    for operator, sizes in MEASURED.items():
        for number, arguments in enumerate(sizes):
            (call,) = OPERATORS[operator](**arguments | {"dtype": BF16}).calls
            took = roofs.time(call).device_ns * (1.3 + 0.1 * number)
            samples.append(Sample(operator, "bfloat16", arguments, took, 0.0, 0.01, 9))
    return attrs.evolve(device, samples=tuple(samples))


@pytest.fixture(scope="module")
def small(calibrated):
    """The small workload on that processor."""
    workload = load_workload("dsocr-smoke-v1")
    return forecast_of(deepseek_ocr(variant_config(workload.variant)), Scenario(workload, Policy()), calibrated)


#: Modules of both models.
EXPLAINED = (
    "model",
    "lm_head",
    "model.layers.1.self_attn",
    "model.layers.1.input_layernorm",
    "model.layers.1.mlp.shared_experts.down_proj",
    "model.sam_model.blocks.1.attn",
    "model.sam_model.neck.2",
)


@pytest.mark.parametrize("which", ["standard", "small"])
def test_steps_give_the_times_of_the_model_by_hand(request, which):
    """From the fields of each step alone; where sizes grow, a decode step lies between its first and its last."""
    found = request.getfixturevalue(which)
    seen = set()
    for path in EXPLAINED:
        for stage in explain(found, path).stages:
            for operation in stage.operations:
                bounds = [0.0, 0.0]
                for timed in operation.lines:
                    for call in timed.times:
                        for step in call.steps:
                            check_by_hand(step, found.device)
                            seen.add((step.source, step.new_memory_ns > 0))
                    if timed.times:
                        for side, call in enumerate((timed.times[0], timed.times[-1])):
                            bounds[side] += timed.line.calls * sum(s.device_ns * s.times for s in call.steps)
                rounding = 1e-6 * bounds[1] + 1
                device_ns = operation.predicted.times.predicted_device_ns
                assert min(bounds) - rounding <= device_ns <= max(bounds) + rounding, (path, operation)
    if which == "small":
        assert seen >= {("calibrated", False), ("extrapolated", False), ("roof", False), ("roof", True)}
    else:
        assert seen == {("roof", False)}


def check_by_hand(step, device):
    cost = cost_of(step.operator, step.arguments)
    assert (step.tensor_flops, step.weight_bytes) == (cost.tensor_flops, cost.weight_bytes)
    assert step.weight_bytes + step.rest_bytes == cost.bytes_total
    compute = step.tensor_flops / step.peak_flops_per_s * 1e9 if step.tensor_flops else 0
    weights = step.weight_bytes / step.weight_bytes_per_s * 1e9 if step.weight_bytes else 0
    rest = step.rest_bytes / step.rest_bytes_per_s * 1e9 if step.rest_bytes else 0
    new = cost.activation_bytes * device.host.fresh_byte_ns
    new = new if cost.activation_bytes >= device.host.fresh_from_bytes else 0
    assert step.new_memory_ns == pytest.approx(new, abs=1e-6)
    assert step.floor_ns == device.host.kernel_floor_ns
    assert step.device_ns == pytest.approx((step.floor_ns + max(compute, weights + rest)) * step.ratio + new)
    if step.source == "roof":
        assert step.ratio == pytest.approx(1)
    if step.rest_bytes:
        # Between the bandwidths of the measured copies.
        copies = device.memory_bytes_per_s.values()
        assert min(copies) * 0.999 <= step.rest_bytes_per_s <= max(copies) * 1.001


def test_what_causal_attention_executes_is_what_is_timed(standard):
    """The table counts the rectangle, the kernel computes the triangle."""
    prefill, decode = (
        next(line for operation in stage.operations for line in operation.lines if line.line.name == "fused_attention")
        for stage in explain(standard, ATTENTION).stages
    )
    (step,) = prefill.times[0].steps
    assert step.tensor_flops == prefill.line.cost.tensor_flops // 2 + 2 * 10 * 512 * 128
    first, last = (call.steps[0].tensor_flops for call in decode.times)
    assert (first, last) == (4 * 10 * 513 * 128, 4 * 10 * 1023 * 128)


def test_a_sequence_with_samples_is_one_launch_and_without_them_its_parts(calibrated):
    arguments = {"rows": 64, "width": 128, "dtype": BF16}
    (known,) = Arithmetic(calibrated).times(OPERATORS["rms_norm"], arguments, "decode")
    assert [step.operator for step in known.steps] == ["rms_norm"]
    (unknown,) = Arithmetic(attrs.evolve(calibrated, samples=())).times(OPERATORS["rms_norm"], arguments, "decode")
    (call,) = OPERATORS["rms_norm"](**arguments).calls
    assert sum(step.times for step in unknown.steps) == sum(int(part.times) for part in call.parts.calls) > 1


def test_text_shows_terms_ratio_and_source(invoke, calibrated, tmp_path):
    path = save_calibration(calibrated, tmp_path / "mine.parquet")
    text = invoke("explain", "lm_head", "--workload", "dsocr-smoke-v1", "--hardware", path, "--stage", "decode").stdout
    (terms,) = (line for line in text.splitlines() if "floor" in line and " = " in line)
    found = told(invoke, "lm_head", "--workload", "dsocr-smoke-v1", "--hardware", path)["stages"]["decode"]
    ((step,),) = (call["steps"] for call in found["operations"][0]["operators"][0]["times"])
    assert f"{step['weight_bytes']:,} B of weights / 12 GB/s + {step['rest_bytes']:,} B / " in terms
    assert f"x {step['ratio']:.3g}, {step['source']}, = " in terms
    for words in (
        "copies, by what they move: 4.1 kB at 40 GB/s, 1.05 MB at 30 GB/s, 67.1 MB at 12 GB/s",
        "new memory: 0.3 ns per byte of a result of 524 kB and more",
        "times are from a calibration of A processor",
        "datasheet's roofline",
        "calls of the module 7 x 1 µs = 7 µs",
    ):
        assert words in text


def test_json_has_formulas_that_give_its_numbers(invoke):
    prefill = told(invoke, ATTENTION, *PREDICTED)["stages"]["prefill"]
    checked = 0
    for operation in prefill["operations"]:
        for line in operation["operators"]:
            names = {name: int(size) for name, size in line["arguments"].items() if size.isdecimal()} | {"b": 2}
            for column, formula in line["formulas"].items():
                symbols = {name: sympy.Symbol(name) for name in names}
                value = sympy.sympify(formula, locals=symbols).subs({symbols[name]: names[name] for name in names})
                assert value * line["calls"] == line[column]
                checked += 1
    assert checked > 10
    for column in ("predicted_device_ns", "datasheet_ns", "roof_ns", "floor_ns"):
        assert sum(operation[column] for operation in prefill["operations"]) == prefill[column]
    assert sum(part["total_ns"] for part in prefill["host"]) == prefill["predicted_host_ns"]
    assert {source for operation in prefill["operations"] for source in operation["sources"]} == {"datasheet"}


def test_ceilings_are_those_of_the_device(invoke):
    (operation,) = told(invoke, "lm_head", *PREDICTED, "--stage", "prefill")["stages"]["prefill"]["operations"]
    h200 = load_hardware("h200")
    assert operation["ceilings"]["tensor_flops_per_s"] == h200.tensor_peak("bfloat16")
    assert operation["ceilings"]["memory_source"] == h200.memory_bytes_per_s.source
    (line,) = operation["operators"]
    seconds = max(
        line["tensor_flops"] / h200.tensor_peak("bfloat16"),
        (line["bytes_read"] + line["bytes_written"]) / h200.memory_bytes_per_s.value,
    )
    assert operation["datasheet_ns"] == round(seconds * 1e9) < operation["roof_ns"]
    assert operation["ratio"] == operation["predicted_device_ns"] / operation["roof_ns"] == 1
    text = invoke("explain", "lm_head", *PREDICTED).stdout
    assert h200.tensor_flops_per_s["bfloat16"].source in text
    assert "linear(rows=512, in_features=1280, out_features=129280, dtype=bfloat16 (b = 2), bias=False)" in text
    assert f"2*rows*in_features*out_features = {line['tensor_flops']:,}" in text


def test_sizes_that_grow_are_summarised(invoke, standard):
    text = invoke("explain", ATTENTION, *PREDICTED, "--stage", "decode").stdout
    assert "keys=513..1023" in text
    assert "prefill" not in text
    assert "with keys=513:" in text
    assert "with keys=1023:" in text
    decode = explain(standard, ATTENTION, ["decode"]).stages[0]
    keys = [
        timed.line.arguments["keys"]
        for operation in decode.operations
        for timed in operation.lines
        if timed.line.name == "fused_attention"
    ]
    assert [summarised(each) for each in keys] == [f"{keys[0][0]}..{keys[0][-1]}"]


def test_settings_change_what_is_explained(invoke):
    found = told(invoke, ATTENTION, *PREDICTED, "--set", "attention=eager", "--set", "batch_size=2")
    names = [operation["name"] for operation in found["stages"]["prefill"]["operations"]]
    assert "eager_attention" in names
    assert "fused_attention" not in names
    assert found["attention"] == "eager"


def test_a_container_points_to_what_is_below_it(invoke):
    found = told(invoke, "model.vision_model.transformer", *PREDICTED)
    assert found["stages"]["vision"]["operations"] == []
    children = found["children"]
    assert [child["module_path"] for child in children] == ["model.vision_model.transformer.layers"]
    text = invoke("explain", "model.vision_model.transformer", *PREDICTED).stdout
    assert "It runs no operators itself" in text
    layers = told(invoke, "model.vision_model.transformer.layers", *PREDICTED)["children"]
    assert sum(child["predicted_ns"] for child in layers) == children[0]["predicted_ns"]
    assert [child["predicted_ns"] for child in layers] == sorted((c["predicted_ns"] for c in layers), reverse=True)


def test_a_module_that_is_never_called_says_so(invoke):
    text = invoke("explain", "model.vision_model.embeddings.patch_embedding", *PREDICTED).stdout
    assert "is never called here: no stage runs it" in text
    elsewhere = invoke("explain", ATTENTION, *PREDICTED, "--stage", "vision").stdout
    assert "never called here; it is in prefill and decode" in elsewhere


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.layer.3.self_attn", *PREDICTED], "model.layers.3.self_attn"),
        (["model"], "--workload"),
        (["model", "--workload", "dsocr-standard-v1"], "--hardware"),
        (["model", "--workload", "dsocr-standard-v1", "--hardware", "h2000"], "h200"),
        (["model", *PREDICTED, "--page", "0"], "--page goes with --run"),
        (["model", *PREDICTED, "--set", "batch=4"], "batch_size"),
        (["model", "--run", "nowhere"], "not a run directory"),
        (["model", "--run", "nowhere", "--workload", "dsocr-standard-v1"], "leave out --workload"),
        (["model", *PREDICTED, "--stage", "dreams"], "prefill"),
    ],
)
def test_bad_input_is_one_line(invoke, arguments, words):
    result = invoke("explain", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]


def test_a_run_is_explained_with_its_measured_routing(finished, invoke):
    run, _ = finished
    again = run_forecast(run, hardware="h200")
    assert again.forecast.prediction.work.routing.source == "measured"
    assert not any("balanced" in note for note in again.notes)
    stored = {(row["stage"], row["module_path"]): row for row in run.predictions.to_dict("records")}
    rows = module_rows(again.forecast.prediction)
    assert {(row.stage, row.module_path) for row in rows} == set(stored)
    for row in rows:
        mine = stored[row.stage, row.module_path]
        assert [getattr(row, name) for name in NUMBERS] == [mine[name] for name in NUMBERS], row.module_path
    text = invoke("explain", "model.layers.1.mlp", "--run", run.path, "--hardware", "h200").stdout
    assert text.count("The numbers equal the run's predictions table.") == 2
    assert "measured ones, read back" in text


def test_measured_times_are_those_of_the_ledger(finished, invoke):
    run, _ = finished
    found = told(invoke, ATTENTION.replace("3", "1"), "--run", run.path, "--hardware", "h200")
    ledger = run.attribution[run.attribution.module_path == ATTENTION.replace("3", "1")].set_index("stage")
    assert set(found["stages"]) == {"prefill", "decode"}
    for stage, entry in found["stages"].items():
        assert entry["measured"]["measured_ns"] == ledger.measured_self_ns[stage] > 0
        assert entry["measured"]["scaled_ns"] == ledger.scaled_self_ns[stage]
        assert entry["measured"]["event_count"] == ledger.event_count[stage]
        assert entry["differs_from_run"] == []


def changed(run, tmp_path, **keys):
    """A copy of the run with other keys in its manifest."""
    copy = shutil.copytree(run.path, tmp_path / "run")
    manifest = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    manifest = {
        name: value | keys.get(name, {}) if isinstance(value, dict) else value for name, value in manifest.items()
    }
    (copy / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    return load(copy)


def test_the_ceilings_of_a_run_are_read_from_its_manifest(finished, tmp_path):
    hardware = attrs.evolve(load_hardware("h200"), name="mine")
    run = changed(finished[0], tmp_path, hardware={"name": "mine", "figures": attrs.asdict(hardware)})
    found = run_forecast(run)
    assert found.forecast.device == from_datasheet(hardware)
    # What it stores of the prediction is of another device.
    assert not found.is_again


def test_a_run_of_another_version_is_refused(finished, invoke, tmp_path):
    copy = shutil.copytree(finished[0].path, tmp_path / "run")
    manifest = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    (copy / "run.json").write_text(json.dumps(manifest | {"schema_version": 1}), encoding="utf-8")
    for command in (("explain", "lm_head", "--run", copy), ("export", copy, "--format", "json")):
        refused = invoke(*command)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "has schema version 1, this dsocr-trace reads" in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_a_run_is_explained_from_its_calibration_as_long_as_that_is_there(finished, calibrated, invoke, tmp_path):
    path = save_calibration(calibrated, tmp_path / "mine.parquet")
    prediction = {name: getattr(calibrated, name) for name in ("device", "source", "measured_at")}
    figures = {"name": "cpu-generic", "figures": attrs.asdict(calibrated.hardware)}
    run = changed(finished[0], tmp_path, hardware=figures, prediction=prediction | {"file": str(path)})
    found = run_forecast(run)
    assert (found.forecast.device, found.is_again) == (calibrated, True)
    later = attrs.evolve(calibrated, measured_at="2027-01-02T03:04:05+00:00")
    save_calibration(later, path, force=True)
    texts = [invoke("explain", "lm_head", "--run", run.path).stdout]
    path.unlink()
    texts.append(invoke("explain", "lm_head", "--run", run.path).stdout)
    for text, why in zip(texts, ("was measured 2027", f"no calibration {path}"), strict=True):
        assert "the run's calibration is not found any more (" in text
        assert why in text
        assert "times are from estimated peaks of cpu-generic with default efficiencies" in text
    again = run_forecast(run)
    assert (again.forecast.device, again.is_again) == (from_datasheet(calibrated.hardware), False)


def test_a_page_of_several_is_chosen(two_pages, invoke):
    where = ("--run", two_pages.path, "--hardware", "h200")
    for wrong in ([], ["--page", "2"]):
        refused = invoke("explain", ATTENTION.replace("3", "1"), *where, *wrong)
        assert refused.exit_code == 2
        assert "from 0 to 1 with --page" in refused.stderr
    tall, small = (told(invoke, ATTENTION.replace("3", "1"), *where, "--page", page) for page in (0, 1))
    assert any("balanced" in note for note in tall["notes"])
    assert any(note.startswith("decode: ") and "measured" in note for note in tall["notes"])
    pages = two_pages.pages
    for page, found in enumerate((tall, small)):
        (row,) = pages[(pages.page_number == page) & (pages.stage == "prefill")].to_dict("records")
        (attention,) = (o for o in found["stages"]["prefill"]["operations"] if o["name"] == "fused_attention")
        assert attention["operators"][0]["arguments"]["queries"] == str(int(row["seq_len"]))
        assert found["stages"]["prefill"]["differs_from_run"] is None
    ledger = two_pages.attribution.set_index(["module_path", "stage"]).measured_self_ns
    both = sum(found["stages"]["decode"]["measured"]["measured_ns"] for found in (tall, small))
    assert both == ledger[ATTENTION.replace("3", "1"), "decode"]


def test_torch_is_not_needed(finished):
    run, _ = finished
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from dsocr_trace.cli import cli\n"
        f"cli({['explain', 'lm_head', *PREDICTED]!r}, standalone_mode=False)\n"
        f"cli({['explain', 'lm_head', '--run', str(run.path), '--hardware', 'h200']!r}, standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lm_head: Linear") == 2
