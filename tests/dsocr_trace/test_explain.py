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

from analytic.hardware import load_hardware
from analytic.predict import module_rows
from dsocr_trace.forecasts.explain import explain, summarised
from dsocr_trace.forecasts.forecast import predict_words
from dsocr_trace.forecasts.of_run import run_forecast
from dsocr_trace.runs.store import load

PREDICTED = ("--workload", "dsocr-standard-v1", "--hardware", "h200")
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
    found = explain(standard.prediction, path)
    assert [stage.row for stage in found.stages] == list(rows.values())
    for stage in found.stages:
        for column in NUMBERS:
            lines = [line for operation in stage.operations for line in operation.lines]
            assert sum(getattr(line.cost, column) for line in lines) == getattr(stage.row, column)
        times = sum(operation.predicted.predicted_device_ns for operation in stage.operations)
        assert times == stage.row.predicted_ns


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
    assert sum(operation["predicted_device_ns"] for operation in prefill["operations"]) == prefill["predicted_ns"]


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
    assert operation["predicted_device_ns"] == round(seconds * 1e9)
    text = invoke("explain", "lm_head", *PREDICTED).stdout
    assert h200.tensor_flops_per_s["bfloat16"].source in text
    assert "linear(rows=512, in_features=1280, out_features=129280, dtype=bfloat16 (b = 2), bias=False)" in text
    assert f"2*rows*in_features*out_features = {line['tensor_flops']:,}" in text


def test_sizes_that_grow_are_summarised(invoke, standard):
    text = invoke("explain", ATTENTION, *PREDICTED, "--stage", "decode").stdout
    assert "keys=513..1023" in text
    assert "prefill" not in text
    decode = explain(standard.prediction, ATTENTION, ["decode"]).stages[0]
    keys = [
        line.arguments["keys"]
        for operation in decode.operations
        for line in operation.lines
        if line.name == "fused_attention"
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


def test_the_ceilings_of_a_run_are_read_from_its_manifest(finished, tmp_path):
    run, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    manifest = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    hardware = attrs.evolve(load_hardware("h200"), name="mine")
    manifest["hardware"] |= {"name": "mine", "figures": attrs.asdict(hardware)}
    (copy / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert run_forecast(load(copy)).forecast.hardware == hardware


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
