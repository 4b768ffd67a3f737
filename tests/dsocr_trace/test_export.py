"""The analytic report: its sums, its folding, and what becomes of it in files."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import attrs
import jsonschema
import pytest

import dsocr_trace
from analytic.cost import COST_COLUMNS
from analytic.errors import InputError
from analytic.predict import TIME_COLUMNS
from analytic.timing.datasheet import HOST_COSTS
from analytic.workload import profile_names
from dsocr_trace.exports.analytic_report import SCHEMA_VERSION, ReportSummary, TopModule, walk
from dsocr_trace.exports.builder import forecast_report, run_report
from dsocr_trace.exports.files import REPORT_FORMATS, RUN_FORMATS, report_text

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"
SUMS = (*COST_COLUMNS, *TIME_COLUMNS)
#: Some modules of the full-size model with their repetition, its count, and how many instances there are in all.
FOLDED = {
    "model.layers.0": ("none", 1, 1),
    "model.layers.[1-11]": ("for", 11, 11),
    "model.layers.[1-11].mlp": ("none", 1, 11),
    "model.layers.[1-11].mlp.experts.[0-63]": ("parfor", 64, 704),
    "model.layers.[1-11].mlp.experts.[0-63].gate_proj": ("none", 1, 704),
    "model.sam_model.blocks.[0-1]": ("for", 2, 2),
    "model.sam_model.blocks.2": ("none", 1, 1),
    "model.sam_model.blocks.[9-10]": ("for", 2, 2),
    "model.sam_model.blocks.11": ("none", 1, 1),
    "model.sam_model.neck.0": ("none", 1, 1),
    "model.vision_model.transformer.layers.[0-23]": ("for", 24, 24),
}


@pytest.fixture(scope="module")
def forecasts():
    return {name: dsocr_trace.predict(name, "rtx-5090") for name in profile_names()}


@pytest.fixture(scope="module")
def reports(forecasts):
    return {name: forecast_report(forecast) for name, forecast in forecasts.items()}


@pytest.fixture(scope="module")
def standard(reports):
    return reports["dsocr-standard-v1"]


@pytest.fixture(scope="module")
def ran(finished):
    return run_report(finished[0])


@pytest.fixture(scope="module")
def generated():
    return runpy.run_path(str(SCHEMAS / "generate.py"))


@pytest.fixture(scope="module")
def every_report(reports, ran):
    return {**reports, "a run": ran}


def test_totals_of_the_root_are_the_sums_over_all_operators_and_calls(forecasts, reports):
    for name, forecast in forecasts.items():
        expected = Counter()
        for predicted in forecast.prediction.operations:
            stage = predicted.operation.stage
            expected.update({(stage, key): value for key, value in predicted.operation.cost.columns().items()})
            expected.update({(stage, key): getattr(predicted.times, key) for key in TIME_COLUMNS})
        for (stage, _), called in forecast.prediction.module_calls.items():
            expected.update({(stage, key): getattr(called.times, key) for key in TIME_COLUMNS})
        found = {(entry.stage, key): getattr(entry.total, key) for entry in reports[name].root.stages for key in SUMS}
        assert found == {key: expected[key] for key in found}
        assert {stage for stage, _ in found} == {stage for stage, _ in expected}


def test_every_total_is_the_sum_of_its_parts(every_report):
    nodes = [(name, module) for name, report in every_report.items() for module in walk(report.root)]
    for name, module in nodes:
        for entry in module.stages:
            below = [part.total for child in module.children for part in child.stages if part.stage == entry.stage]
            for key in SUMS:
                parts = [getattr(part, key) for part in (entry.own, *below)]
                assert getattr(entry.total, key) == sum(parts), (name, module.module_id, key)
            peaks = [part.activation_peak_bytes for part in (entry.own, *below)]
            assert entry.total.activation_peak_bytes == max(peaks)
            assert sum(entry.total.predicted_ns_by_bound.values()) == entry.total.predicted_ns
            assert entry.per_instance.predicted_ns * module.instances == pytest.approx(entry.total.predicted_ns)
            assert entry.per_instance.calls * module.instances == pytest.approx(entry.calls)


def test_operators_and_categories_add_up_to_what_a_module_runs_itself(every_report):
    for report in every_report.values():
        for entry in (entry for module in walk(report.root) for entry in module.stages):
            own = entry.own
            if report.run_id is None:
                rest = {key: getattr(own, key) - sum(getattr(op.cost, key) for op in entry.operators) for key in SUMS}
                # What is left is the call of the module itself, which only the host has to do with.
                call_ns = HOST_COSTS["cuda"].module_call_ns * entry.calls
                assert rest.pop("predicted_host_ns") == pytest.approx(call_ns)
                assert 0 <= rest.pop("predicted_ns") <= call_ns + 1
                assert set(rest.values()) == {0}
            assert sum(row.flops for row in entry.categories) == own.tensor_flops + own.vector_flops
            assert sum(row.bytes for row in entry.categories) == own.bytes_read + own.bytes_written
            assert sum(row.predicted_device_ns for row in entry.categories) == own.predicted_device_ns
            shares = [row.share_of_module_flops for row in entry.categories if row.share_of_module_flops is not None]
            assert not shares or sum(shares) == pytest.approx(1)


def test_equal_neighbours_are_folded_and_no_others(standard):
    found = {module.module_id: module for module in walk(standard.root)}
    assert {
        name: (found[name].repetition.kind, found[name].repetition.count, found[name].instances) for name in FOLDED
    } == FOLDED
    assert {module.repetition.kind for module in found.values() if "experts.[" not in module.module_id} == {
        "none",
        "for",
    }


def test_every_module_of_the_model_is_in_one_node(forecasts, reports):
    for name, report in reports.items():
        nodes, tree = list(walk(report.root)), forecasts[name].prediction.work.tree
        assert len({module.module_id for module in nodes}) == len(nodes)
        assert sum(module.instances for module in nodes) == len(tree)
        assert report.model.parameter_count == sum(node.parameter_count for node in tree)
        calls = forecasts[name].prediction.work.calls
        assert sum(entry.calls for module in nodes for entry in module.stages) == sum(calls.values())


def test_ids_of_modules_depend_on_the_model_only(reports, ran):
    ids = {name: [module.module_id for module in walk(report.root)] for name, report in reports.items()}
    assert ids["dsocr-a4-v1"] == ids["dsocr-nocrop-v1"] == ids["dsocr-standard-v1"]
    assert [module.module_id for module in walk(ran.root)] == ids["dsocr-smoke-v1"]


def test_the_id_of_a_report_follows_from_its_inputs(standard):
    first, again, *others = [
        forecast_report(dsocr_trace.predict("dsocr-smoke-v1", hardware, settings=settings))
        for hardware, settings in (
            ("h200", {}),
            ("h200", {}),
            ("rtx-5090", {}),
            ("h200", {"batch_size": 2}),
            ("h200", {"attention_flops": "executed"}),
            ("h200", {"routing": "worst"}),
        )
    ]
    assert first == again
    assert first.report_id == first.summary.report_id
    ids = {report.report_id for report in (first, standard, *others)}
    assert len(ids) == len(others) + 2


def test_the_report_says_what_was_predicted():
    forecast = dsocr_trace.predict(
        "dsocr-a4-v1", "h200", variant="deepseek-ocr-v1-tiny", settings={"batch_size": 4, "routing": "worst"}
    )
    report = forecast_report(forecast)
    assert report.model.family == "deepseek-ocr"
    assert report.model.variant == report.summary.model_variant == "deepseek-ocr-v1-tiny"
    assert (report.model.dtype, report.model.attention) == ("bfloat16", "sdpa")
    assert report.model.weight_bytes == 2 * report.model.parameter_count
    assert report.workload.batch_size == 4
    assert report.workload.crop_grid == report.workload.pages[0].crop_grid == (2, 3)
    assert (report.workload.image_tokens, report.workload.seq_len) == (903, 912)
    assert [(view.kind, view.count, view.repetition) for view in report.workload.pages[0].views] == [
        ("crops", 6, "parfor"),
        ("global", 1, "none"),
    ]
    assert (report.hardware.name, report.hardware.provenance) == ("h200", "datasheet")
    assert (report.hardware.device, report.hardware.source, report.hardware.measured_at) == ("h200", "datasheet", None)
    assert any("default efficiencies" in note for note in report.summary.notes)
    peaks = {(peak.name, peak.dtype): peak.value for peak in report.hardware.peaks}
    assert peaks["tensor_flops_per_s", "bfloat16"] == forecast.device.hardware.tensor_peak("bfloat16")
    assert peaks["memory_bytes_per_s", None] == forecast.device.hardware.memory_bytes_per_s.value
    assert report.routing_source == "worst"


def test_summary(forecasts, standard):
    summary = standard.summary
    assert [field.name for field in attrs.fields(ReportSummary)] == [
        "report_id",
        "model_variant",
        "workload_profile_id",
        "predicted_total_time_ms",
        "measured_total_time_ms",
        "predicted_vs_measured_ratio",
        "predicted_device_time_ms",
        "measured_device_time_ms",
        "top_modules",
        "notes",
    ]
    assert [field.name for field in attrs.fields(TopModule)] == [
        "module_id",
        "name",
        "stage",
        "share_of_model_time",
        "total_time_ms",
        "total_flops_tflops",
        "memory_activations_gb",
    ]
    assert summary.measured_total_time_ms is summary.predicted_vs_measured_ratio is None
    assert summary.measured_device_time_ms is None
    forecast = forecasts["dsocr-standard-v1"]
    assert (summary.predicted_total_time_ms, summary.predicted_device_time_ms) == (
        forecast.wall_ns / 1e6,
        forecast.busy_ns / 1e6,
    )
    modules = sum(entry.total.predicted_ns for entry in standard.root.stages)
    assert {part.stage for part in standard.sampling} == {"prefill", "decode"}
    assert modules + sum(part.predicted_ns for part in standard.sampling) == forecast.wall_ns
    times = [top.total_time_ms for top in summary.top_modules]
    own = [entry.own.predicted_ns for module in walk(standard.root) for entry in module.stages]
    assert times == [nanoseconds / 1e6 for nanoseconds in sorted(own, reverse=True)[: len(times)]]
    for top in summary.top_modules:
        assert top.share_of_model_time == pytest.approx(top.total_time_ms / summary.predicted_total_time_ms)


def test_a_run_adds_what_it_measured(finished, ran):
    run, _ = finished
    root = {entry.stage: entry for entry in ran.root.stages}
    predicted, ledger = run.predictions.groupby("stage"), run.attribution
    for column in SUMS:
        assert {stage: getattr(entry.total, column) for stage, entry in root.items()} == predicted[
            column
        ].sum().to_dict()
    scaled = ledger.groupby("stage").scaled_self_ns.sum()
    nowhere = Counter()
    for row in ran.unclassified:
        nowhere[row.stage] += row.scaled_ns
    assert {stage: entry.measured.scaled_total_ns + nowhere[stage] for stage, entry in root.items()} == scaled.to_dict()
    for entry in (entry for module in walk(ran.root) for entry in module.stages):
        assert sum(row.event_count or 0 for row in entry.categories) == entry.measured.event_count
    summary = ran.summary
    assert summary.measured_device_time_ms == pytest.approx(scaled.sum() / 1e6)
    totals = run.pages[run.pages.page_number.isna()].set_index("stage")
    assert summary.measured_total_time_ms == pytest.approx(totals.wall_ns.sum() / 1e6)
    assert summary.predicted_total_time_ms == pytest.approx(totals.predicted_ns.sum() / 1e6)
    assert summary.predicted_device_time_ms == pytest.approx(totals.predicted_device_ns.sum() / 1e6)
    outside = {part.stage: part.predicted_ns + root[part.stage].total.predicted_ns for part in ran.sampling}
    assert outside == totals.predicted_ns[list(outside)].to_dict()
    assert set(outside) == {"prefill", "decode"}
    assert summary.predicted_vs_measured_ratio == pytest.approx(
        summary.predicted_total_time_ms / summary.measured_total_time_ms
    )
    prediction = run.manifest["prediction"]
    assert (ran.hardware.device, ran.hardware.source) == (prediction["device"], prediction["source"])
    assert (ran.run_id, ran.routing_source, ran.workload.pages[0].new_tokens) == ("smoke", "measured", 8)
    assert any("scaled from 3 of 7 forwards" in note for note in summary.notes)


@pytest.mark.parametrize("ending", [".json", ".yaml"])
def test_a_report_read_back_is_equal(every_report, tmp_path, ending):
    for number, report in enumerate(every_report.values()):
        path = dsocr_trace.save_report(report, tmp_path / f"{number}{ending}")
        assert dsocr_trace.load_report(path) == report


def test_the_published_schema_is_that_of_the_classes(generated):
    assert generated["PATH"].name == f"analytic-model-report-v{SCHEMA_VERSION}.json"
    assert json.loads(generated["PATH"].read_text()) == generated["schema"]()


def test_exports_are_valid(every_report, generated):
    published = json.loads(generated["PATH"].read_text())
    jsonschema.Draft202012Validator.check_schema(published)
    validator = jsonschema.Draft202012Validator(published)
    for report in every_report.values():
        validator.validate(json.loads(report_text(report, "json")))
    wrong = json.loads(report_text(every_report["dsocr-smoke-v1"], "json"))
    wrong["root"]["stages"][0]["calls"] = "3"
    assert not validator.is_valid(wrong)


def test_commands_write_what_python_does(invoke, finished, ran, reports, tmp_path):
    run, _ = finished
    for name in REPORT_FORMATS:
        result = invoke("export", run.path, "--format", name)
        (tmp_path / f"shown.{name}").write_text(result.stdout)
        assert dsocr_trace.load_report(tmp_path / f"shown.{name}") == ran
        assert invoke("export", run.path, "--format", name, "--output", tmp_path / f"run.{name}").stdout == ""
        assert (tmp_path / f"run.{name}").read_text() == result.stdout
        path = tmp_path / f"prediction.{name}"
        plain = invoke("predict", "--workload", "dsocr-smoke-v1", "--hardware", "rtx-5090")
        exporting = invoke("predict", "--workload", "dsocr-smoke-v1", "--hardware", "rtx-5090", "--export", path)
        assert exporting.stdout == plain.stdout
        assert dsocr_trace.load_report(path) == reports["dsocr-smoke-v1"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("command", ["export", "predict"])
def test_an_existing_file_is_replaced_only_by_force(invoke, finished, tmp_path, command):
    path = tmp_path / "mine.json"
    path.write_text("mine")
    arguments = {
        "export": ("export", finished[0].path, "--format", "json", "--output", path),
        "predict": ("predict", "--workload", "dsocr-smoke-v1", "--hardware", "h200", "--export", path),
    }[command]
    refused = invoke(*arguments)
    assert (refused.exit_code, refused.stdout, path.read_text()) == (2, "", "mine")
    assert refused.stderr == (
        f"dsocr-trace: {path} exists and is left as it is; choose another name, or replace it with --force\n"
    )
    assert invoke(*arguments, "--force").exit_code == 0
    assert dsocr_trace.load_report(path).schema_version == SCHEMA_VERSION


PREDICT = ("predict", "--workload", "dsocr-smoke-v1", "--hardware", "h200", "--export")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((*PREDICT, "report.txt"), "report.txt must end in one of .json, .yaml, .yml"),
        ((*PREDICT, "nowhere/report.json"), "nowhere/report.json cannot be written: it must be a file in an existing"),
        (("export", ".", "--format", "json"), ". is not a run directory: it has no run.json"),
        (("export", ".", "--format", "xml"), f"no format 'xml'; choose one of {', '.join(RUN_FORMATS)} with --format"),
    ],
)
def test_bad_arguments(invoke, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert part in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_without_predictions_or_tables_is_refused(invoke, finished, tmp_path):
    run, _ = finished
    for path in run.path.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "predictions.parquet").unlink()
    missing = invoke("export", tmp_path, "--format", "json")
    assert missing.exit_code == 2
    assert "is incomplete" in missing.stderr
    run.predictions.iloc[:0].to_parquet(tmp_path / "predictions.parquet")
    empty = invoke("export", tmp_path, "--format", "json")
    assert empty.exit_code == 2
    assert "holds no predictions" in empty.stderr
    assert missing.stderr.count("\n") == empty.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("where", "value", "part"),
    [
        ("schema_version", 1, "has schema version 1, this dsocr-trace reads 2"),
        ("schema_version", "1", "has schema version '1'"),
        ("schema_version", None, "it has no schema_version"),
        ("model", None, "field 'model' is missing"),
        ("summary.notes", None, "field 'notes' is missing @ $.summary.notes"),
        ("root.surprise", 1, "unknown fields surprise @ $.root"),
        ("root.instances", "1", "'1' is not of type int @ $.root.instances"),
        ("root.instances", 1.5, "1.5 is not of type int @ $.root.instances"),
        ("root.instances", True, "True is not of type int @ $.root.instances"),
        ("root.repetition.kind", "while", "while not in literal"),
        ("root.children", 3, "not of type tuple"),
        ("workload.crop_grid", [1, 2, 3], "$.workload.crop_grid"),
        ("hardware", [], "not of type HardwareReport @ $.hardware"),
    ],
)
def test_what_is_no_report_is_refused_with_the_reason(reports, tmp_path, where, value, part):
    plain = json.loads(report_text(reports["dsocr-smoke-v1"], "json"))
    *parents, last = where.split(".")
    place = plain
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    path = tmp_path / "report.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(InputError) as refused:
        dsocr_trace.load_report(path)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ending", [".json", ".yaml"])
@pytest.mark.parametrize("text", ["{[", "[]", "", "\x00"])
def test_other_files_are_refused(tmp_path, ending, text):
    path = tmp_path / f"report{ending}"
    path.write_text(text)
    with pytest.raises(InputError, match=str(path)) as refused:
        dsocr_trace.load_report(path)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="cannot be read"):
        dsocr_trace.load_report(tmp_path / f"absent{ending}")


def test_predictions_are_exported_where_torch_is_not_installed(tmp_path):
    path = tmp_path / "report.json"
    code = f"""
import sys
sys.modules["torch"] = None
import dsocr_trace
from dsocr_trace.exports.builder import forecast_report
report = forecast_report(dsocr_trace.predict("dsocr-smoke-v1", "h200"))
assert dsocr_trace.load_report(dsocr_trace.save_report(report, {str(path)!r})) == report
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
    assert dsocr_trace.load_report(path).model.family == "deepseek-ocr"
