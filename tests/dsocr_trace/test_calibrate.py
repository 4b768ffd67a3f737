"""Calibration files, the command, and whether what a model runs is measured."""

from __future__ import annotations

import json
import subprocess
import sys

import attrs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analytic.config import DEFAULT_VARIANT, variant_config
from analytic.cost import DTYPES
from analytic.errors import InputError
from analytic.hardware import hardware_names, load_hardware
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr, operations
from analytic.operators import OPERATORS
from analytic.timing.calibration import Calibration, HostCosts, Sample
from analytic.timing.curves import Curves
from analytic.timing.datasheet import from_datasheet
from analytic.workload import load_workload, profile_names
from dsocr_trace.machine.calibrations import (
    SAMPLES,
    SCHEMA_VERSION,
    left_out,
    load_calibration,
    save_calibration,
    summary,
)
from dsocr_trace.machine.devices import load_device
from dsocr_trace.report.calibration import print_calibration
from stage_runners.calibration import calibrate, session
from stage_runners.calibration.executors import EXECUTORS
from stage_runners.calibration.grids import grid
from stage_runners.calibration.measure import Limits

#: What the host does without a kernel; measured as host costs.
HOST_OPERATORS = {"view", "host_loop", "to_host"}
HOST = HostCosts(
    module_call_ns=500.0,
    dispatch_ns=800.0,
    operator_ns=0.0,
    loop_turn_ns=15.0,
    launch_ns=0.0,
    kernel_floor_ns=700.0,
    synchronise_ns=90.0,
    fresh_byte_ns=0.7,
    fresh_from_bytes=1 << 25,
)


def silu(elements: int, device_ns: float) -> Sample:
    return Sample("silu", "bfloat16", {"elements": elements, "dtype": "bfloat16"}, device_ns, 0.0, 0.01, 25)


@pytest.fixture
def calibration() -> Calibration:
    linear = {"rows": 1, "in_features": 64, "out_features": 64, "dtype": "bfloat16", "bias": False}
    return Calibration(
        device="A processor",
        kind="cpu",
        hardware=load_hardware("cpu-generic"),
        samples=(silu(256, 1000.0), silu(1024, 1500.5), Sample("linear", "bfloat16", linear, 2e3, 0.0, 0.2, 5)),
        host=HOST,
        tensor_flops_per_s={"bfloat16": 1.5e11, "float32": 4e10},
        memory_bytes_per_s={4096: 2e10, 1 << 24: 1e11},
        measured_at="2026-01-02T03:04:05+00:00",
        state={"noisy": False, "seconds": 1.5, "median_spread": 0.1, "control_drift": 0.0, "cpu_share_of_others": 0.2},
        notes=("one note",),
    )


def test_every_operator_that_the_model_runs_is_measured() -> None:
    model = deepseek_ocr(variant_config(DEFAULT_VARIANT))
    run = {
        (call.operator.name, str(options(call.arguments)))
        for name in profile_names()
        for attention in ("sdpa", "eager")
        for operation in operations(
            model, attrs.evolve(load_workload(name), max_new_tokens=2), policy=Policy(attention=attention)
        ).operations
        for _, steps in operation.runs
        for call in steps.calls
    }
    names = {name for name, _ in run} - HOST_OPERATORS
    assert names <= set(EXECUTORS)
    measured = {(point.operator, str(options(point.arguments))) for point in grid("bfloat16")}
    assert {key for key in run if key[0] in names} <= measured | {("copy", str({"dtype": "int64"}))}


def options(arguments: dict) -> dict:
    """The dtypes among the arguments, by their names."""
    named = {name: getattr(value, "name", value) for name, value in arguments.items()}
    return {name: value for name, value in named.items() if isinstance(value, str) and value in DTYPES}


def test_a_calibration_is_read_back_as_it_was_written(calibration, tmp_path) -> None:
    path = save_calibration(calibration, tmp_path / "here.parquet")
    assert load_calibration(path) == calibration
    assert [entry.name for entry in tmp_path.iterdir()] == ["here.parquet"]
    assert pq.read_table(path)["operator"].to_pylist() == ["silu", "silu", "linear"]
    assert load_device(str(path)) == calibration


@pytest.mark.parametrize("name", hardware_names())
def test_the_entry_of_every_device_is_kept(tmp_path, name) -> None:
    device = from_datasheet(load_hardware(name))
    assert load_calibration(save_calibration(device, tmp_path / "here.parquet")) == device


def test_an_existing_file_is_replaced_only_by_force(calibration, tmp_path) -> None:
    path = save_calibration(calibration, tmp_path / "here.parquet")
    with pytest.raises(InputError, match="replace it with --force"):
        save_calibration(calibration, path)
    renamed = attrs.evolve(calibration, device="another")
    assert load_calibration(save_calibration(renamed, path, force=True)).device == "another"


def test_a_file_of_another_kind_is_not_written(calibration, tmp_path) -> None:
    with pytest.raises(InputError, match=r"must end in \.parquet"):
        save_calibration(calibration, tmp_path / "here.json")


def test_what_is_no_calibration_is_refused(calibration, tmp_path) -> None:
    path = tmp_path / "here.parquet"
    with pytest.raises(InputError, match="no calibration"):
        load_calibration(path)
    path.write_text("text")
    with pytest.raises(InputError, match="cannot be read"):
        load_calibration(path)
    pq.write_table(pa.table({"operator": ["silu"]}), path)
    with pytest.raises(InputError, match="is no calibration: its metadata"):
        load_calibration(path)
    written = pq.read_table(save_calibration(calibration, path, force=True))
    told = json.loads(written.schema.metadata[b"dsocr_trace.calibration"])
    for changed, words in (
        (told | {"schema_version": 1}, f"schema version 1, this dsocr-trace reads {SCHEMA_VERSION}; make one with"),
        ({name: value for name, value in told.items() if name != "hardware"}, "missing or unknown"),
        (told | {"source": "guessed"}, "missing or unknown"),
        (told | {"more": 1}, "missing or unknown"),
        ({name: value for name, value in told.items() if name != "host"}, "missing or unknown"),
    ):
        metadata = {b"dsocr_trace.calibration": json.dumps(changed).encode()}
        pq.write_table(written.replace_schema_metadata(metadata), path)
        with pytest.raises(InputError, match=words):
            load_calibration(path)
    pq.write_table(written.drop_columns(["spread"]), path)
    with pytest.raises(InputError, match="missing or unknown"):
        load_calibration(path)


def test_a_calibration_is_read_without_torch() -> None:
    code = "import sys, dsocr_trace.machine.calibrations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def along_the_roof(calibration: Calibration, factor: dict[int, float]) -> Calibration:
    """Samples of one operator that take `factor` times what the ceilings allow."""
    roofs = Curves(attrs.evolve(calibration, samples=()))
    sizes = (1 << exponent for exponent in range(8, 22, 2))
    calls = {size: OPERATORS["silu"](size, DTYPES["bfloat16"]).calls[0] for size in sizes}
    samples = (silu(size, roofs.time(call).device_ns * factor.get(size, 3.0)) for size, call in calls.items())
    return attrs.evolve(calibration, samples=tuple(samples))


def test_samples_along_a_smooth_curve_predict_each_other(calibration) -> None:
    (entry,) = left_out(along_the_roof(calibration, {}))
    assert (entry.operator, entry.dtype, entry.samples) == ("silu", "bfloat16", 7)
    assert entry.median_error == pytest.approx(0, abs=1e-9)


def test_samples_that_jump_do_not(calibration) -> None:
    jumping = {1 << exponent: 1.0 + 5 * (exponent % 4) for exponent in range(8, 22, 2)}
    (entry,) = left_out(along_the_roof(calibration, jumping))
    assert entry.median_error > 1


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """The command measures three points, in a folder of its own."""
    points = [point for point in grid("bfloat16") if point.operator == "silu"][:3]

    def small(*arguments, **options):
        return calibrate(*arguments, points=points, limits=Limits(5, 60, 0.01, 0.01, rounds=3), **options)

    monkeypatch.setattr(session, "_OPERAND_BYTES", 1 << 26)
    monkeypatch.setattr("stage_runners.calibration.calibrate", small)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small_grid")
def test_the_command_writes_a_file_with_its_provenance(invoke, tmp_path) -> None:
    done = invoke("calibrate", "--device", "cpu", "--output", "here.parquet", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    found = load_calibration(tmp_path / "here.parquet")
    assert told["calibration"] == "here.parquet"
    assert told["sample_count"] == len(found.samples) == 3
    assert told["host"] == attrs.asdict(found.host)
    assert told["state"] == found.state
    assert {"device", "versions", "commit", "noisy", "torch_threads"} <= set(found.state)
    assert [entry["operator"] for entry in told["left_out"]] == ["silu"]


@pytest.mark.usefixtures("small_grid")
def test_the_command_prints_where_the_file_lies(invoke, tmp_path) -> None:
    done = invoke("calibrate", "--device", "cpu")
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "calibrations").iterdir()
    found = load_calibration(path)
    stamp = found.measured_at.partition("+")[0].replace("-", "").replace(":", "").replace("T", "-")
    assert path.name.endswith(f"-{stamp}.parquet")
    assert f"calibration: calibrations/{path.name}" in done.stdout
    for words in ("fastest matrix product, bfloat16", "shortest operator", "3 samples in", "median spread"):
        assert words in done.stdout


def test_every_host_cost_is_printed_where_it_is_one(calibration, capsys, tmp_path) -> None:
    def printed(found: Calibration) -> str:
        print_calibration(tmp_path / "here.parquet", found, ())
        return " ".join(capsys.readouterr().out.split())

    processor = printed(calibration)
    assert "1 MB of new memory, results of 33.6 MB and more 700 µs" in processor
    assert "until it is launched" not in processor
    kept = attrs.evolve(HOST, operator_ns=6_500.0, launch_ns=4_000.0, fresh_byte_ns=0.0)
    card = printed(attrs.evolve(calibration, kind="cuda", host=kept))
    assert "operator, until it is launched 6.5 µs" in card
    assert "new memory" not in card
    assert summary(tmp_path / "here.parquet", calibration, ())["host"] == attrs.asdict(HOST)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "tpu"), "no device 'tpu'; choose auto, cpu or cuda:N"),
        (("--device", "cpu", "--output", "here.json"), "must end in .parquet"),
        (("--device", "cpu", "--output", "nowhere/here.parquet"), "existing directory"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(invoke, monkeypatch, tmp_path, words, said) -> None:
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("stage_runners.calibration.calibrate", never)
    monkeypatch.chdir(tmp_path)
    done = invoke("calibrate", *words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_columns_are_those_of_a_sample() -> None:
    assert SAMPLES.names == [field.name for field in attrs.fields(Sample)]
