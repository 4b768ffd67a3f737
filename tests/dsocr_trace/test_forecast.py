"""Prediction without a run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import dsocr_trace

COMMAND = ("predict", "--workload", "dsocr-standard-v1", "--hardware", "rtx-5090")


@pytest.fixture(scope="module")
def standard():
    return dsocr_trace.predict(workload="dsocr-standard-v1", hardware="rtx-5090")


def test_json_holds_stages_and_modules_that_add_up(invoke, standard):
    result = invoke(*COMMAND, "--json")
    found = json.loads(result.stdout)
    assert found == json.loads(json.dumps(standard.summary()))
    assert list(found["stages"]) == ["vision", "prefill", "decode"]
    for stage, sums in found["stages"].items():
        mine = [row for row in found["modules"] if row["stage"] == stage]
        for column, value in sums.items():
            assert sum(row[column] for row in mine) == value, column


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


def test_frames(standard):
    assert standard.modules.predicted_ns.sum() == standard.stages.predicted_ns.sum()
    assert standard.operators.flops.sum() == standard.stages[["tensor_flops", "vector_flops"]].sum().sum()


def test_text_names_what_it_rests_on(invoke):
    text = " ".join(invoke(*COMMAND).stdout.split())
    assert "1x2 tiles, prompt of 512 positions, 512 new tokens, batch 1, bfloat16, sdpa attention" in text
    assert "balanced routing, datasheet peaks" in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--set", "batchsize=4"), "did you mean batch_size?"),
        (
            ("--set", "max_new_tokens=9000"),
            "the sequence grows to 9511 positions (512 of the prompt), the model has 8192",
        ),
        (("--hardware", "gtx-1080"), "no hardware 'gtx-1080'"),
        (("--variant", "huge"), "no variant 'huge'"),
    ],
)
def test_bad_input(invoke, arguments, part):
    result = invoke(*COMMAND, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert part in result.stderr
    assert result.stderr.count("\n") == 1


def test_torch_is_not_needed():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from dsocr_trace.cli import cli\n"
        f"cli({[*COMMAND, '--json']!r}, standalone_mode=False)\n"
        "cli(['list', 'hardware'], standalone_mode=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "rtx-5090" in done.stdout.splitlines()
