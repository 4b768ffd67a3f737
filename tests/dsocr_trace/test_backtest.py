"""Backtests: errors and parts by hand, trials on the small model, and predictions that nothing measured can change."""

from __future__ import annotations

import builtins
import io
import itertools
import json
import os
import tomllib
from pathlib import Path

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from analytic.config import DEFAULT_VARIANT, variant_config
from analytic.hardware import load_hardware
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr
from analytic.timing.calibration import Calibration, HostCosts, Sample
from analytic.timing.workload import SAMPLING
from analytic.workload import Workload
from dsocr_trace.backtests import backtest as backtest_module
from dsocr_trace.backtests.backtest import SCHEMAS
from dsocr_trace.backtests.errors import (
    ALL_TRIALS,
    DRIFT,
    PARTS,
    REST,
    bars,
    baselines,
    by_class,
    calibration_shift,
    drift,
    errors,
    gap,
    interval,
)
from dsocr_trace.backtests.evidence import load_evidence
from dsocr_trace.backtests.predictions import LEVELS, ROUTED, predict_trial
from dsocr_trace.backtests.trials import LEAST_WORKLOADS, TRIALS, draw_workloads, plan_trials
from dsocr_trace.machine.calibrations import load_calibration, save_calibration
from hooks.tables import CALLS
from hooks.tracer import wrapped_modules
from stage_runners.backtest import Trial, _Bench, own_times, run_trials
from stage_runners.devices import require_memory
from stage_runners.estimator import MODES, Estimate, estimate
from stage_runners.inputs import build_inputs
from stage_runners.loading import load_model
from stage_runners.pages import synthetic_page

TINY = "deepseek-ocr-v1-tiny"
SMALL = Workload("small", 600, 700, 9, 4, base_size=512, image_size=320, tile_grid=(1, 2))
CONTROL = {"product": 1000.0, "row": 1000.0, "copy": 1000.0}
PROCESSOR = Calibration(
    device="A processor",
    kind="cpu",
    hardware=load_hardware("cpu-generic"),
    samples=(),
    host=HostCosts(
        module_call_ns=500.0,
        dispatch_ns=800.0,
        operator_ns=0.0,
        loop_turn_ns=15.0,
        launch_ns=0.0,
        kernel_floor_ns=700.0,
        synchronise_ns=90.0,
    ),
    tensor_flops_per_s={"bfloat16": 1.5e11, "float32": 4e10},
    memory_bytes_per_s={4096: 2e10, 1 << 24: 1e11},
    measured_at="2026-01-02T03:04:05+00:00",
    state={"control_ns": {"bfloat16": CONTROL}},
)


@pytest.fixture(scope="module")
def tiny():
    return load_model("builtin", variant=TINY, dtype="bf16")


# Trials


def test_a_full_backtest_runs_every_workload_twice_in_an_order_of_its_own() -> None:
    trials = plan_trials(None, seed=0, quick=False)
    assert len(trials) == TRIALS
    assert {trial.workload for trial in trials} == set(draw_workloads(0))
    # No two trials are the same work: the second of a workload has another page and another prompt.
    assert len({(trial.workload, trial.seed) for trial in trials}) == TRIALS
    other = plan_trials(None, seed=1, quick=False)
    assert [trial.number for trial in other] != [trial.number for trial in trials]
    assert sorted(trial.number for trial in other) == sorted(trial.number for trial in trials) == list(range(TRIALS))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_every_draw_covers_the_ranges(seed) -> None:
    workloads = draw_workloads(seed)
    assert len({workload.id for workload in workloads}) == len(workloads) >= LEAST_WORKLOADS
    assert {workload.grid for workload in workloads} >= {None, (1, 2), (2, 1), (2, 2), (3, 2)}
    assert {workload.base_size for workload in workloads} == {512, 640, 1024}
    assert {workload.image_size for workload in workloads} == {512, 640}
    assert sorted(workload.batch_size for workload in workloads) == [1] * 9 + [2]
    for values, least, most in (
        ([workload.text_tokens for workload in workloads], 10, 700),
        ([workload.max_new_tokens for workload in workloads], 8, 48),
    ):
        edges = [least * (most / least) ** (place / 10) for place in range(11)]
        for value, low, high in zip(sorted(values), edges, edges[1:], strict=False):
            assert round(low) <= value <= round(high)


def test_another_seed_draws_other_workloads() -> None:
    assert draw_workloads(3) == draw_workloads(3)
    assert {workload.id for workload in draw_workloads(3)}.isdisjoint(workload.id for workload in draw_workloads(4))


@pytest.mark.parametrize("workload", draw_workloads(0), ids=lambda workload: workload.id)
def test_every_workload_fits_the_full_model(workload) -> None:
    config = variant_config(DEFAULT_VARIANT)
    inputs = build_inputs(synthetic_page(workload, seed=0), workload, config.decoder, seed=0)
    assert inputs.input_ids.shape == (workload.batch_size, workload.seq_len)
    require_memory(config, workload, parameters=0, dtype=torch.bfloat16, device=torch.device("cpu"))


def test_a_quick_one_takes_pages_without_tiles() -> None:
    trials = plan_trials(None, seed=0, quick=True)
    assert len({trial.workload for trial in trials}) == len(trials) > 1
    assert all(trial.workload.grid is None and trial.workload.max_new_tokens < 4 for trial in trials)


def test_what_modules_take_adds_up_to_the_walls_and_nothing_stays_behind(tiny) -> None:
    trials = [Trial(0, SMALL, 1), Trial(1, SMALL, 2)]
    told = []
    measured = list(run_trials(tiny, trials, tiny.config.decoder, lambda *phase: told.append(phase)))
    assert [one.trial for one in measured] == trials
    assert told[-1] == ("trials", 2, 2)
    for one in measured:
        assert len(one.plain.decode_ns) == len(one.traced.decode_ns) == SMALL.max_new_tokens - 1
        wall = one.traced.vision_ns + one.traced.prefill_ns + sum(one.traced.decode_ns)
        assert sum(one.own_ns.values()) + sum(one.between_ns.values()) == wall
        assert all(nanoseconds > 0 for nanoseconds in one.between_ns.values())
        assert min(one.plain.vision_ns, one.plain.prefill_ns, *one.plain.decode_ns) > 0
        inside = sum(ns for (stage, _), ns in one.own_ns.items() if stage == "vision")
        assert 0 < inside <= one.traced.vision_ns
        experts = tiny.config.decoder
        assert one.routing.prefill.keys() == one.routing.decode.keys() != set()
        for counts in one.routing.prefill.values():
            assert counts.sum() == SMALL.seq_len * experts.experts_per_token
        for counts in one.routing.decode.values():
            assert counts.sum(axis=1).tolist() == [experts.experts_per_token] * (SMALL.max_new_tokens - 1)
        assert min(one.control.values()) > 0
    assert not wrapped_modules(tiny)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


def test_what_the_device_runs_is_given_to_modules(tiny) -> None:
    bench = _Bench(tiny, tiny.config.decoder)
    inputs = build_inputs(synthetic_page(SMALL, seed=0), SMALL, tiny.config.decoder, seed=0)
    own, between = bench.device_times(inputs.to("cpu", torch.bfloat16))
    stages = {stage for stage, _ in own}
    assert stages == {"vision", "prefill", "decode"}
    assert {("vision", "model.projector.layers"), ("prefill", "lm_head"), ("decode", "lm_head")} <= set(own)
    assert set(between) == {"prefill", "decode"}
    assert min(*own.values(), *between.values()) > 0
    assert not wrapped_modules(tiny)


def test_own_times_by_hand() -> None:
    calls = pa.table(
        {
            "call_id": [0, 1, 2, 3, 4],
            "parent_call_id": pa.array([None, 0, 1, 0, None], pa.int64()),
            "pass": ["traced"] * 5,
            "page": [0] * 5,
            "stage": ["prefill", "vision", "vision", "prefill", "decode"],
            "step": [0, 0, 0, 0, 1],
            "module_path": ["", "a", "a.b", "c", ""],
            "thread": [1] * 5,
            "start_ns": [0, 10, 20, 60, 200],
            "end_ns": [100, 50, 25, 70, 230],
        },
        schema=CALLS,
    )
    own, outermost = own_times(calls)
    assert own == {
        ("prefill", ""): 100 - 40 - 10,
        ("vision", "a"): 40 - 5,
        ("vision", "a.b"): 5,
        ("prefill", "c"): 10,
        ("decode", ""): 30,
    }
    assert outermost == {"prefill": 100, "decode": 30}
    assert sum(own.values()) == sum(outermost.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the estimator has what it needs")
@pytest.mark.parametrize("mode", MODES)
def test_without_a_gpu_the_estimator_says_why_it_gives_up(tiny, mode, capsys) -> None:
    inputs = build_inputs(synthetic_page(SMALL, seed=0), SMALL, tiny.config.decoder, seed=0)
    found = estimate(tiny, inputs.to("cpu", torch.bfloat16), mode)
    assert found.total_ns is None
    assert found.reason.startswith(("RuntimeError: ", "AssertionError: "))
    assert capsys.readouterr().out == ""


# Predictions


def predicted() -> pd.DataFrame:
    model = deepseek_ocr(variant_config(TINY))
    return predict_trial(model, SMALL, PROCESSOR, Policy())


def test_a_measured_run_nearby_does_not_change_a_prediction(finished, tmp_path, monkeypatch) -> None:
    run, _ = finished
    monkeypatch.chdir(tmp_path)
    alone = predicted()
    (tmp_path / "results").symlink_to(run.path.parent)
    pd.testing.assert_frame_equal(predicted(), alone)


def test_predicting_opens_no_file(monkeypatch) -> None:
    model = deepseek_ocr(variant_config(TINY))

    def refused(*arguments, **_):
        raise AssertionError(arguments)

    for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "listdir"), (os, "scandir")):
        monkeypatch.setattr(module, name, refused)
    for read in ("read_parquet", "read_csv", "read_json"):
        monkeypatch.setattr(pd, read, refused)
    assert len(predict_trial(model, SMALL, PROCESSOR, Policy()))


def test_an_import_contract_keeps_runs_away_from_the_model() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {each["name"]: each for each in project["tool"]["importlinter"]["contracts"]}
    contract = contracts["Calibration and the time model see no traced run"]
    assert {"analytic.timing", "stage_runners.calibration", "dsocr_trace.backtests.predictions"} <= set(
        contract["source_modules"]
    )
    assert {"hooks.tracer", "stage_runners.stage1", "dsocr_trace.runs.store"} <= set(contract["forbidden_modules"])


def test_predictions_have_every_level_of_every_module_that_runs() -> None:
    rows = predicted()
    assert list(rows) == [*SCHEMAS["modules"].names[:3], *LEVELS, "extrapolated_ns"]
    assert set(rows["stage"]) == {"vision", "prefill", "decode"}
    assert set(rows.loc[rows["module_class"] == SAMPLING, "stage"]) == {"prefill", "decode"}
    # No operator was measured: operators take the calibrated roof, and the host comes on top.
    assert (rows["device_ns"] == rows["roof_ns"]).all()
    assert (rows["extrapolated_ns"] == rows["device_ns"]).all()
    assert (rows["predicted_ns"] > rows["device_ns"]).all()


# Errors


def test_errors_by_hand() -> None:
    found = errors(pd.Series([110, 80, 100, 7]), pd.Series([100, 100, 50, 0]))
    assert found["count"] == 3
    assert found["median"] == pytest.approx(0.2)
    assert found["p90"] == pytest.approx(0.2 + 0.8 * (1.0 - 0.2))
    assert found["worst"] == pytest.approx(1.0)
    assert found["time_weighted"] == pytest.approx(80 / 250)
    assert found["bias"] == pytest.approx(40 / 250)


def test_the_worst_error_keeps_its_sign() -> None:
    assert errors(pd.Series([10, 110]), pd.Series([100, 100]))["worst"] == pytest.approx(-0.9)


def test_without_measurements_there_are_no_errors() -> None:
    assert errors(pd.Series([5]), pd.Series([0])) == {
        "count": 0, "median": None, "p90": None, "worst": None, "time_weighted": None, "bias": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ({"product": 100, "row": 100, "copy": 100}, 0.0),
        ({"product": 105, "row": 100, "copy": 80}, -0.2),
        ({"product": 100, "row": 130, "copy": 100}, 0.3),
        ({"product": 88, "row": 100, "copy": 111}, -0.12),
    ],
)
def test_drift_is_the_largest_change_of_any_control(control, expected) -> None:
    assert drift(dict.fromkeys(("product", "row", "copy"), 100.0), control) == pytest.approx(expected)


def tables(seed: int = 0, factor: float = 1.0, noise: float = 0.0, count: int = 20):
    """Trials and modules whose predictions are off by a factor, and by noise for each module."""
    random = np.random.default_rng(seed)
    modules = pd.DataFrame(
        [
            {"trial": trial, "module_class": name}
            | dict(zip(LEVELS, np.sort(random.integers(1, 10**9, 4)), strict=True))
            for trial, name in itertools.product(range(count), ("Linear", "RMSNorm", "MoE"))
        ]
    )
    off = factor * np.exp(noise * random.standard_normal(len(modules)))
    modules["measured_ns"] = (modules["predicted_ns"] / off).round().astype("int64")
    modules[ROUTED] = modules["measured_ns"]
    trials = modules.groupby("trial")[[*LEVELS, ROUTED, "measured_ns"]].sum().reset_index()
    trials["accepted"] = True
    return trials, modules


def test_parts_add_up_to_measured_to_the_nanosecond() -> None:
    trials, modules = tables(noise=0.5)
    trials["measured_ns"] -= 12_345  # without the tracer
    found = gap(modules, trials)
    assert (found[list(PARTS)].sum(axis="columns") == found["predicted_ns"]).all()
    assert (found["predicted_ns"] + found["unexplained_ns"] == found["measured_ns"]).all()
    classes, total = found.iloc[:-1], found.iloc[-1]
    for column in found.columns[1:]:
        assert classes[column].sum() == total[column]
    assert total["measured_ns"] == trials["measured_ns"].sum()
    assert total["predicted_ns"] == modules["predicted_ns"].sum()
    rest = found.set_index("module_class").loc[REST]
    assert (rest["measured_ns"], rest["predicted_ns"]) == (-12_345 * len(trials), 0)


def test_on_a_gpu_the_rest_is_the_time_that_the_device_is_idle() -> None:
    trials, modules = tables(count=3)
    idle = int(modules["predicted_ns"].sum() - modules["device_ns"].sum())
    modules["predicted_ns"] = modules["device_ns"]
    modules["measured_ns"] //= 2
    rest = gap(modules, trials).set_index("module_class").loc[REST]
    assert rest["predicted_ns"] == rest["host_ns"] == idle
    assert rest["measured_ns"] == trials["measured_ns"].sum() - modules["measured_ns"].sum()
    linear = gap(modules, trials).set_index("module_class").loc["Linear"]
    assert linear["host_ns"] == 0


def test_perfect_predictions_meet_every_bar() -> None:
    assert all(bar.met for bar in bars(*tables()))


def test_what_is_told_the_routing_has_bars_of_its_own() -> None:
    trials, modules = tables(factor=1.3)
    assert not any(bar.met for bar in bars(trials, modules))
    assert all(bar.met for bar in bars(trials, modules, ROUTED))


def test_bars_that_are_missed() -> None:
    assert [bar.met for bar in bars(*tables(factor=1.1))] == [True, False, True]
    assert [bar.met for bar in bars(*tables(factor=1.3))] == [False, False, False]
    trials, modules = tables()
    # Errors of the classes that cancel out in the total.
    largest = modules.groupby("trial")["measured_ns"].transform("max")
    modules["predicted_ns"] = np.where(modules["measured_ns"] == largest, 0, modules["measured_ns"])
    assert [bar.met for bar in bars(trials, modules)] == [True, True, False]


def test_nine_of_ten_trials_are_enough_and_eight_are_not() -> None:
    for bad, met in ((2, True), (3, False)):
        trials, modules = tables()
        trials.loc[: bad - 1, "predicted_ns"] *= 2
        assert bars(trials, modules)[0].met is met
        assert bars(trials, modules)[0].value == pytest.approx(1 - bad / 20)


def test_without_accepted_trials_no_bar_is_met() -> None:
    trials, modules = tables()
    found = bars(trials[:0], modules[:0])
    assert [(bar.value, bar.met) for bar in found] == [(None, False)] * 3
    assert interval(trials[:0]) is None


def test_classes_are_compared_as_sums_over_a_trial() -> None:
    modules = pd.DataFrame(
        [(0, "Linear", 150, 100), (0, "Linear", 50, 100), (0, "Norm", 30, 20), (1, "Linear", 300, 200)],
        columns=["trial", "module_class", "predicted_ns", "measured_ns"],
    )
    found = by_class(modules).set_index("module_class")
    assert list(found.index) == ["Linear", "Norm"]
    assert found.loc["Linear", "median"] == pytest.approx((0 + 0.5) / 2)
    assert found.loc["Linear", "time_weighted"] == pytest.approx(100 / 400)
    assert found.loc["Norm", "share_of_time"] == pytest.approx(20 / 420)


def test_baselines_name_what_was_set_aside_and_why_an_estimator_gave_up() -> None:
    trials, _ = tables(count=4)
    trials.loc[3, ["accepted", "predicted_ns"]] = (False, trials.loc[3, "measured_ns"] * 3)
    given = {
        "one": {0: Estimate(None, "RuntimeError: no GPU")},
        "two": {trial: Estimate(float(trials.loc[trial, "measured_ns"] * 2)) for trial in range(4)},
    }
    found = baselines(trials, given).set_index("method")
    assert found.loc["time model", "worst"] == 0
    assert found.loc[ALL_TRIALS, "worst"] == pytest.approx(2)
    assert found.loc["RuntimeEstimator, one", "reason"] == "RuntimeError: no GPU"
    assert np.isnan(found.loc["RuntimeEstimator, one", "median"])
    assert found.loc["RuntimeEstimator, two", "median"] == pytest.approx(1)
    assert found.loc["RuntimeEstimator, two", "count"] == 3


def test_the_interval_covers_the_middle_of_the_trials() -> None:
    trials, _ = tables(factor=1.25)
    assert interval(trials) == {"share": 0.9, "low": pytest.approx(0.8), "high": pytest.approx(0.8)}


def test_calibrations_are_compared_over_what_both_have() -> None:
    def calibration(**times: float) -> Calibration:
        return attrs.evolve(
            PROCESSOR,
            samples=tuple(
                Sample("silu", "bfloat16", {"elements": int(name[1:]), "dtype": "bfloat16"}, ns, 0.0, 0.0, 5)
                for name, ns in times.items()
            ),
        )

    found = calibration_shift(calibration(n1=100.0, n2=100.0, n3=100.0), calibration(n2=120.0, n3=90.0, n4=1.0))
    assert found["samples"] == 2
    assert found["median"] == pytest.approx((1.2 * 0.9) ** 0.5 - 1)
    assert found["median_size"] == pytest.approx((1.2 / 0.9) ** 0.5 - 1)
    assert calibration_shift(PROCESSOR, PROCESSOR)["samples"] == 0


# The command


@pytest.fixture
def steady(monkeypatch) -> None:
    """A machine whose control never changes, whatever else runs on it."""
    monkeypatch.setattr("stage_runners.backtest.ControlPoint.read", lambda _: dict(CONTROL))


@pytest.fixture
def given(tmp_path) -> Path:
    return save_calibration(PROCESSOR, tmp_path / "processor.parquet")


QUICK = ("backtest", "--device", "cpu", "--variant", TINY, "--quick", "--trials", 2)


@pytest.mark.usefixtures("steady")
def test_a_backtest_from_a_given_calibration(invoke, given, tmp_path) -> None:
    done = invoke(*QUICK, "--calibration", given, "--output", tmp_path / "here", "--json")
    assert done.exit_code == 0, done.output
    told, folder = json.loads(done.stdout), tmp_path / "here"
    assert told == {"output": str(folder)} | json.loads((folder / "backtest.json").read_text())
    assert {path.stem for path in folder.glob("*.parquet")} == {*SCHEMAS, "calibration-before"}
    assert load_calibration(folder / "calibration-before.parquet") == PROCESSOR
    assert (told["trials_run"], told["trials_accepted"], told["trials_set_aside"]) == (2, 2, 0)
    assert told["verdict"] == "not judged"
    assert told["calibration"]["shift"] is None
    assert told["hardware"] == {"name": "cpu-generic", "provenance": "estimated"}
    evidence = load_evidence(folder)
    assert (evidence.device, evidence.trials) == (told["device"]["name"], 2)
    assert told["interval"] == {name: getattr(evidence, name) for name in ("share", "low", "high")}
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in SCHEMAS}
    for name, schema in SCHEMAS.items():
        assert list(tables[name]) == schema.names
    assert len(told["class_errors"]) == len(tables["class_errors"])
    check_sums(tables)
    page = (folder / "backtest.md").read_text()
    for words in ("2 trials of 2 workloads", "RuntimeEstimator, operator-level-benchmark: gave up", "not judged"):
        assert words in page


def check_sums(tables: dict[str, pd.DataFrame]) -> None:
    """Modules give stages, stages give trials, trials give the total of the gap."""
    modules, stages, trials = (tables[name] for name in ("modules", "stages", "trials"))
    for level in (*LEVELS, ROUTED):
        sums = modules.groupby(["trial", "stage"])[level].sum()
        assert sums.to_dict() == stages.set_index(["trial", "stage"])[level].to_dict()
    for column in (*LEVELS, "measured_ns", "traced_ns"):
        assert stages.groupby("trial")[column].sum().to_dict() == trials.set_index("trial")[column].to_dict()
    assert modules.groupby("trial")["measured_ns"].sum().to_dict() == trials.set_index("trial")["traced_ns"].to_dict()
    total = tables["gap"].iloc[-1]
    assert (total["measured_ns"], total["predicted_ns"]) == tuple(trials[["measured_ns", "predicted_ns"]].sum())


@pytest.mark.usefixtures("steady")
def test_without_one_the_device_is_calibrated_before_and_after(invoke, monkeypatch, tmp_path) -> None:
    made = []

    def calibrated(device, dtypes, **_):
        assert (device.type, dtypes) == ("cpu", ["bfloat16"])
        made.append(attrs.evolve(PROCESSOR, device=f"number {len(made)}"))
        return made[-1]

    monkeypatch.setattr(backtest_module, "calibrate_apart", calibrated)
    done = invoke(*QUICK, "--output", tmp_path / "here")
    assert done.exit_code == 0, done.output
    assert len(made) == 2
    devices = [
        load_calibration(tmp_path / "here" / f"calibration-{name}.parquet").device for name in ("before", "after")
    ]
    assert devices == ["number 0", "number 1"]
    trials = pd.read_parquet(tmp_path / "here" / "trials.parquet")
    # Both say the same, so that both predict the same.
    assert (trials["predicted_after_ns"] == trials["predicted_ns"]).all()
    assert f"backtest: {tmp_path / 'here'}" in done.stdout


def test_trials_during_which_the_machine_changed_are_set_aside_and_counted(
    invoke, given, monkeypatch, tmp_path
) -> None:
    # Around the four generations of each of two trials: one reading was disturbed, then the machine has changed.
    changed = 1000 * (1 + 2 * DRIFT)
    readings = iter([1000, 9000, 1000, 1000, 1000, 1000, 1000, changed, changed, changed])
    monkeypatch.setattr("stage_runners.backtest.ControlPoint.read", lambda _: CONTROL | {"row": next(readings)})
    done = invoke(*QUICK, "--calibration", given, "--output", tmp_path / "here", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["trials_run"], told["trials_accepted"], told["trials_set_aside"]) == (2, 1, 1)
    counts = {row["method"]: row["count"] for row in told["baselines"]}
    assert (counts["time model"], counts[ALL_TRIALS]) == (1, 2)
    assert [row["accepted"] for row in sorted(told["trials"], key=lambda row: row["order"])] == [True, False]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "tpu"), "no device 'tpu'"),
        (("--device", "cpu", "--variant", "nope"), "no variant 'nope'"),
        (("--device", "cpu", "--calibration", "nowhere.parquet"), "no calibration nowhere.parquet"),
        (("--device", "cpu", "--calibration", "gpu.parquet"), "is of a cuda device"),
        (("--device", "cpu", "--calibration", "fp32.parquet"), "has no bfloat16, only float32"),
        (("--device", "cpu", "--calibration", "old.parquet"), "does not say how the control ran"),
        (("--device", "cpu", "--output", "there"), "there exists and is left as it is"),
    ],
)
def test_bad_input_is_told_before_anything_is_loaded(invoke, monkeypatch, tmp_path, words, said) -> None:
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(backtest_module, "load_model", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    save_calibration(attrs.evolve(PROCESSOR, kind="cuda"), tmp_path / "gpu.parquet")
    save_calibration(attrs.evolve(PROCESSOR, tensor_flops_per_s={"float32": 1e9}), tmp_path / "fp32.parquet")
    save_calibration(attrs.evolve(PROCESSOR, state={}), tmp_path / "old.parquet")
    before = sorted(tmp_path.iterdir())
    variant = () if "--variant" in words else ("--variant", TINY)
    done = invoke("backtest", *words, *variant)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_backtest_leaves_nothing_behind(invoke, given, monkeypatch, tmp_path) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(backtest_module, "run_trials", interrupted)
    done = invoke(*QUICK, "--calibration", given, "--output", tmp_path / "here")
    assert done.exit_code == 1
    assert list(tmp_path.iterdir()) == [given]
