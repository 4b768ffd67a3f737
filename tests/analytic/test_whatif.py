from __future__ import annotations

import pytest

from analytic.errors import InputError
from analytic.layers.base import Policy
from analytic.whatif import KEYS, Scenario, apply_settings
from analytic.workload import load_workload

STANDARD = Scenario(load_workload("dsocr-standard-v1"), Policy())


def changed(*settings: str) -> Scenario:
    return apply_settings(STANDARD, settings)


def test_nothing_set_changes_nothing():
    assert changed() == STANDARD


@pytest.mark.parametrize(
    ("setting", "grid", "image_tokens", "seq_len"),
    [
        ("crop_grid=2x3", (2, 3), 903, 922),
        ("crop_grid=1x9", (1, 9), 1_263, 1_282),
        ("crop_grid=none", None, 273, 292),
        ("crop_mode=false", None, 273, 292),
        ("page_width=1280", (2, 2), 693, 712),
        ("base_size=1280", (1, 2), 641, 660),
        ("text_tokens=7", (1, 2), 493, 500),
        ("seq_len=600", (1, 2), 493, 600),
    ],
)
def test_the_prompt_follows_the_page(setting, grid, image_tokens, seq_len):
    workload = changed(setting).workload
    assert (workload.grid, workload.image_tokens, workload.seq_len) == (grid, image_tokens, seq_len)


def test_order_does_not_matter():
    one = changed("seq_len=1000", "crop_grid=2x3", "batch_size=4")
    assert one == changed("crop_grid=2x3", "batch_size=4", "seq_len=1000")
    assert (one.workload.seq_len, one.workload.text_tokens, one.workload.batch_size) == (1_000, 97, 4)


def test_a_grid_brings_tiles_back():
    nocrop = Scenario(load_workload("dsocr-nocrop-v1"), Policy())
    assert apply_settings(nocrop, ["crop_grid=2x1"]).workload.grid == (2, 1)


def test_how_the_model_runs():
    assert changed("dtype=fp32", "attention=eager").policy == Policy("float32", "eager", "full")
    scenario = changed("attention_flops=executed", "routing=worst")
    assert (scenario.policy, scenario.routing) == (Policy(attention_flops="executed"), "worst")
    assert scenario.workload == STANDARD.workload


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["batch_size"], r"setting 'batch_size' has no value; write KEY=VALUE.*--set"),
        (["batchsize=4"], r"no setting 'batchsize'; did you mean batch_size\?.*--set"),
        (["zzz=4"], r"no setting 'zzz'; choose one of page_width, .*--set"),
        (["batch_size=4", "batch_size=8"], r"given twice, as '4' and '8'.*--set"),
        (["batch_size=0"], r"batch_size is '0', it must be a positive whole number.*--set"),
        (["batch_size=-1"], r"batch_size is '-1'.*--set"),
        (["batch_size=4k"], r"without a unit.*--set"),
        (["base_size=1000"], r"base_size is 1000 px, it must be a multiple of the 16 px patch"),
        (["crop_grid=4x4"], r"crop_grid is '4x4', it must be none or one of 1x2, 2x1, .*--set"),
        (["crop_grid=2by3"], r"crop_grid is '2by3'"),
        (["crop_mode=yes"], r"crop_mode is 'yes', it must be one of true, false.*--set"),
        (["dtype=int8"], r"dtype is 'int8', it must be one of bf16, fp16, fp32.*--set"),
        (["attention=linear"], r"attention is 'linear', it must be one of sdpa, eager, flash_attention_2.*--set"),
        (["attention_flops=half"], r"attention_flops is 'half', it must be one of full, executed, counter.*--set"),
        (["attention_flop=full"], r"no setting 'attention_flop'; did you mean attention_flops\?.*--set"),
        (["routing=measured"], r"routing is 'measured', it must be one of balanced, worst.*--set"),
        (["rooting=worst"], r"no setting 'rooting'; did you mean routing\?.*--set"),
        (["seq_len=493"], r"seq_len is 493, the page alone takes 493 positions; give at least 494"),
        (["seq_len=600", "text_tokens=4"], r"both set the length of the prompt"),
    ],
)
def test_what_cannot_be(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        apply_settings(STANDARD, settings)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_key_does_something():
    values = {
        "crop_grid": "2x3", "crop_mode": "false", "dtype": "fp32", "attention": "eager", "seq_len": "600",
        "base_size": "640", "image_size": "320", "page_width": "2000", "page_height": "641",
        "attention_flops": "executed", "routing": "worst",
    }  # fmt: skip
    for key in KEYS:
        assert changed(f"{key}={values.get(key, '3')}") != STANDARD
