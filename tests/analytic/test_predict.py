"""Predictions per module, and the time model."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from analytic.config import variant_config
from analytic.cost import FP32, Cost, Dtype
from analytic.errors import InputError
from analytic.hardware import load_hardware
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr
from analytic.predict import Prediction, category_rows, module_rows, predict, stage_rows, subtree_totals
from analytic.roofline import device_time
from analytic.timing.datasheet import from_datasheet
from analytic.workload import load_workload

TINY = deepseek_ocr(variant_config("deepseek-ocr-v1-tiny"))
BASE = deepseek_ocr(variant_config("deepseek-ocr-v1-base"))
POLICY = Policy()
SMOKE = load_workload("dsocr-smoke-v1")
RTX = from_datasheet(load_hardware("rtx-5090"))

#: Columns of the table that predictions are written to, beside stage and module_path.
COLUMNS = [
    "calls",
    "tensor_flops",
    "vector_flops",
    "bytes_read",
    "bytes_written",
    "weight_bytes",
    "activation_bytes",
    "kv_cache_bytes",
    "predicted_ns",
    "predicted_device_ns",
    "predicted_host_ns",
    "datasheet_ns",
    "roof_ns",
    "floor_ns",
    "extrapolated_ns",
    "bound",
    "source",
]


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    return predict(TINY, SMOKE, device=RTX, policy=POLICY)


def test_rows_add_up_to_the_stages(prediction: Prediction) -> None:
    modules, stages = module_rows(prediction), stage_rows(prediction)
    assert [row.stage for row in stages] == ["vision", "prefill", "decode"]
    summed = [column for column in COLUMNS if column not in {"bound", "source"}]
    for stage in stages:
        inside = [row for row in modules if row.stage == stage.stage]
        for column in summed:
            assert sum(getattr(row, column) for row in inside) == getattr(stage, column), column


def test_rows_have_the_columns_of_the_table(prediction: Prediction) -> None:
    row = attrs.asdict(module_rows(prediction)[0])
    assert set(COLUMNS) | {"stage", "module_path", "activation_peak_bytes"} == set(row)
    for value in (row[column] for column in COLUMNS[:-2]):
        assert type(value) is int


def test_categories_add_up_to_the_modules(prediction: Prediction) -> None:
    categories = category_rows(prediction)
    for row in module_rows(prediction):
        mine = [c for c in categories if (c.stage, c.module_path) == (row.stage, row.module_path)]
        assert sum(c.predicted_ns for c in mine) == row.predicted_device_ns
        assert sum(c.flops for c in mine) == row.tensor_flops + row.vector_flops
        assert sum(c.bytes for c in mine) == row.bytes_read + row.bytes_written
        shares = [c.share_of_module_flops for c in mine if c.share_of_module_flops is not None]
        assert not shares or sum(shares) == pytest.approx(1)


def test_called_modules_without_operators_have_a_row(prediction: Prediction) -> None:
    row = next(row for row in module_rows(prediction) if row.module_path == "model.sam_model.blocks.0.mlp")
    assert row.calls == 2
    assert row.predicted_device_ns == row.tensor_flops == 0
    # Its calls keep the host busy.
    assert row.predicted_host_ns == 2 * RTX.host.module_call_ns


def test_subtree_totals_of_the_root(prediction: Prediction) -> None:
    own = {}
    for row in module_rows(prediction):
        own[row.module_path] = own.get(row.module_path, 0) + row.predicted_ns
    totals = subtree_totals(prediction.work.tree, own, 0)
    assert totals[""] == sum(row.predicted_ns for row in stage_rows(prediction))
    assert totals["model.layers"] == sum(totals[f"model.layers.{i}"] for i in range(3))


def test_sampled_decode_steps() -> None:
    lengths = SMOKE.seq_len + np.array([1, 4])
    sampled = predict(TINY, SMOKE, device=RTX, policy=POLICY, kv_lengths=lengths)
    assert sampled.work.calls["decode", "lm_head"] == 2


def test_new_tokens_replace_those_of_the_workload() -> None:
    ended_early = predict(TINY, SMOKE, device=RTX, policy=POLICY, new_tokens=3)
    assert ended_early.work.calls["decode", "lm_head"] == 2


def test_decode_is_bound_by_memory_and_large_products_by_arithmetic() -> None:
    workload = load_workload("dsocr-a4-v1")
    rows = {
        (row.stage, row.module_path): row
        for row in module_rows(predict(BASE, workload, device=RTX, policy=POLICY, new_tokens=3))
    }
    assert rows["decode", "lm_head"].bound == "memory"
    assert rows["prefill", "lm_head"].bound == "compute"


def test_fp32_doubles_the_weights() -> None:
    half = stage_rows(predict(TINY, SMOKE, device=RTX, policy=Policy("bf16")))
    full = stage_rows(predict(TINY, SMOKE, device=RTX, policy=Policy("fp32")))
    assert [row.kv_cache_bytes * 2 for row in half] == [row.kv_cache_bytes for row in full]
    assert [row.tensor_flops for row in half] == [row.tensor_flops for row in full]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"policy": Policy(attention="flash")},
            "no attention 'flash'; choose one of sdpa, eager, flash_attention_2 with --attention",
        ),
        ({"policy": Policy("int8")}, "no dtype 'int8'"),
        ({"kv_lengths": [5]}, "kv_lengths of workload dsocr-smoke-v1"),
        ({"new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        predict(TINY, SMOKE, **{"device": RTX, "policy": POLICY, **arguments})


def test_a_dtype_without_a_peak_is_refused() -> None:
    with pytest.raises(
        InputError, match="cpu-generic was not measured in float16; choose one of bfloat16, float32 with --dtype"
    ):
        predict(TINY, SMOKE, device=from_datasheet(load_hardware("cpu-generic")), policy=Policy("fp16"))


BYTE = Dtype("uint8", 1)


def test_roofline_by_hand() -> None:
    compute = Cost(tensor_flops=209_500_000, vector_flops=104_800_000, read=BYTE.traffic(1))
    assert device_time([(3, compute)], RTX.hardware, "bfloat16") == 3 * 2_000
    memory = Cost(tensor_flops=1, read=FP32.traffic(250_000), written=BYTE.traffic(792_000))
    assert device_time([(1, memory)], RTX.hardware, "bfloat16") == 1_000
    per_call = Cost(read=BYTE.traffic(np.array([1_792_000, 3_584_000])))
    assert device_time([(2, per_call)], RTX.hardware, "bfloat16") == 3_000
