"""Prediction without a run."""

from __future__ import annotations

import json

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
        assert sums["predicted_ns"] <= worst["stages"][stage]["predicted_ns"]
    assert balanced["stages"]["prefill"]["predicted_ns"] < worst["stages"]["prefill"]["predicted_ns"]


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
        (("--set", "attention_flop=full"), "did you mean attention_flops?"),
        (("--set", "attention_flops=some"), "must be one of full, executed, counter; change it with --set"),
        (("--set", "routing=measured"), "must be one of balanced, worst; change it with --set"),
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
