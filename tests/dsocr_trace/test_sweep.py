"""Sweeps: tables, files and what they say."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import dsocr_trace
from analytic.errors import InputError
from dsocr_trace.forecasts.sweep import KINDS, sweep_words
from dsocr_trace.forecasts.sweep_columns import WORKING_SET, regimes
from dsocr_trace.report.findings import findings

DEVICES = ("h200", "l4")
FLOPS_AND_BYTES = ("tensor_flops", "vector_flops", "bytes_read", "bytes_written", "weight_bytes")


@pytest.fixture(scope="module")
def tables():
    """One table of each kind, for the small model so that each point can be predicted alone."""
    variant = "deepseek-ocr-v1-tiny"
    return {kind: dsocr_trace.sweep(kind, DEVICES, variant=variant, batch=[1, 5]) for kind in KINDS}


@pytest.fixture(scope="module")
def decode():
    return dsocr_trace.sweep("decode", ["h200", "cpu-generic"], batch=[1, 4, 64, 256])


def predicted(row):
    """The same point from `dsocr_trace.predict`; grids beyond the crop rule are not among its settings."""
    settings = {
        "crop_grid": row.crop_grid, "base_size": row.base_size_px, "image_size": row.image_size_px,
        "text_tokens": row.text_tokens, "max_new_tokens": row.max_new_tokens, "batch_size": row.batch_size,
    }  # fmt: skip
    return dsocr_trace.predict(row.workload, row.hardware, variant=row.variant, settings=settings)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_predict_says(kind, tables):
    table = tables[kind]
    possible = table[~table.beyond_crop_rule & ~table.exceeds_max_positions & (table.max_new_tokens <= 600)]
    for _, row in possible.sample(6, random_state=1).iterrows():
        forecast = predicted(row)
        stages = forecast.stages.set_index("stage")
        for stage, sums in stages.iterrows():
            for column in FLOPS_AND_BYTES:
                assert row[f"{stage}_{column}"] == sums[column], (stage, column)
            operators = sum(each.operation.stage == stage for each in forecast.prediction.operations)
            assert abs(row[f"{stage}_ns"] - sums.datasheet_ns) <= operators / 2 + 1
        assert row.kv_cache_bytes == stages.kv_cache_bytes.sum()
        peak = forecast.prediction.operations
        assert row.activation_peak_bytes == max(each.operation.activation_peak_bytes for each in peak)
        assert row.seq_len == forecast.scenario.workload.seq_len
        assert row.image_tokens == forecast.scenario.workload.image_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_stages(kind, tables):
    table = tables[kind]
    for stage in ("vision", "prefill", "decode"):
        flops = [name for name in table if name.startswith(f"{stage}_") and name.endswith("_tensor_flops")]
        parts = [name for name in flops if name != f"{stage}_tensor_flops"]
        assert (table[parts].sum(axis=1) == table[f"{stage}_tensor_flops"]).all()
        times = [
            name for name in table if name.startswith(f"{stage}_") and name.endswith("_ns") and name.count("_") > 1
        ]
        assert (abs(table[times].sum(axis=1) - table[f"{stage}_ns"]) <= len(times)).all()
    assert (table.ttft_ns == table.vision_ns + table.prefill_ns).all()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_are_whole(kind, tables):
    """A number with a unit that has no fractions is an int64; only rates, shares, means and crossings are not."""
    for name, dtype in tables[kind].dtypes.items():
        if (
            dtype.kind in "iuf"
            and name.endswith(("_bytes", "_flops", "_ns", "_px", "_len", "_tokens", "positions"))
            and name != "tpot_ns"
        ):
            expected = "float64" if name == "kv_overtakes_weights_at_positions" else "int64"
            assert dtype == expected, name


def test_vision_has_every_grid_and_more(tables):
    table = tables["vision"]
    assert len(table) == 2 * 2 * 5 * (1 + (22 + 8) * 4)
    assert table[~table.beyond_crop_rule].crop_grid.nunique() == 23
    assert set(table[table.beyond_crop_rule].tiles) == {10, 12, 15, 16, 20, 25, 30, 36}
    assert (table[table.beyond_crop_rule].tiles > 9).all()
    assert not table.duplicated().any()


def test_points_beyond_the_models_positions_are_kept_and_flagged(tables):
    for table in tables.values():
        assert (table.exceeds_max_positions == (table.positions > 8192)).all()
    assert tables["vision"].exceeds_max_positions.any()
    assert not tables["decode"].exceeds_max_positions.any()
    assert tables["decode"].positions.max() == 8192
    assert tables["sequence"].seq_len.max() == 8192
    assert tables["sequence"].text_tokens.min() == 1


def test_memory_is_weights_cache_and_working_set(decode):
    needed = decode.weight_bytes + decode.kv_cache_bytes + WORKING_SET * decode.activation_peak_bytes
    assert (decode.memory_needed_bytes == needed).all()
    assert (decode.weight_bytes == 2 * 3_336_106_240).all()
    assert (decode.kv_cache_bytes == 61_440 * decode.positions * decode.batch_size).all()
    assert (decode.fits_device_memory == (needed <= decode.device_memory_bytes)).all()
    h200 = decode[decode.hardware == "h200"].set_index(["batch_size", "max_new_tokens"])
    assert h200.loc[(1, 512), "fits_device_memory"]
    assert not h200.loc[(256, 7681), "fits_device_memory"]


def test_targets(decode):
    assert (decode.meets_tpot == (decode.tpot_ns <= 50e6)).all()
    assert (decode.meets_ttft == (decode.ttft_ns <= 1e9)).all()
    row = decode.iloc[0]
    work = row.vision_tensor_flops + row.vision_vector_flops + row.prefill_tensor_flops + row.prefill_vector_flops
    assert row.ttft_required_tflop_per_s == pytest.approx(work / 1e12)
    moved = (row.decode_bytes_read + row.decode_bytes_written) / (row.max_new_tokens - 1)
    assert row.tpot_required_gb_per_s == pytest.approx(moved / 0.050 / 1e9)
    assert row.tokens_per_second == pytest.approx(1e9 * row.max_new_tokens * row.batch_size / row.total_ns)


def test_one_token_has_no_time_per_token():
    table = dsocr_trace.sweep("profiles", ["h200"], settings={"max_new_tokens": 1}, batch=[1])
    assert table.tpot_ns.isna().all()
    assert table.meets_tpot.isna().all()
    assert (table.decode_regime == "none").all()
    assert (table.dominant_stage == "first token").all()


def test_decode_regimes(decode):
    gpu = decode[decode.hardware == "h200"].set_index(["batch_size", "max_new_tokens"]).decode_regime
    assert gpu[1, 2] == "weight-bound"
    assert gpu[256, 7681] == "KV-bound"
    weights, cache = decode.decode_weight_bytes, decode.kv_traffic_bytes
    memory = decode[decode.decode_compute_bound_share < 0.5]
    assert (memory.decode_regime[weights > cache] == "weight-bound").all()
    crossing = decode.kv_overtakes_weights_at_positions
    mean_cached = decode.seq_len + decode.max_new_tokens / 2
    assert ((mean_cached > crossing) == (cache > weights)).all()


@pytest.mark.parametrize(
    ("changes", "column", "expected"),
    [
        ({"decode_compute_bound_share": 0.5}, "decode_regime", "compute-bound"),
        ({"decode_compute_bound_share": 0.49}, "decode_regime", "weight-bound"),
        ({"kv_traffic_bytes": 600, "decode_bytes_read": 1100}, "decode_regime", "KV-bound"),
        ({"decode_bytes_written": 900}, "decode_regime", "activation-bound"),
        ({"max_new_tokens": 1}, "decode_regime", "none"),
        ({}, "vision_regime", "SAM"),
        ({"vision_clip_ns": 31}, "vision_regime", "CLIP"),
        ({"vision_projector_ns": 99}, "vision_regime", "projector"),
        ({}, "ttft_regime", "prefill"),
        ({"prefill_ns": 29}, "ttft_regime", "SAM"),
        ({}, "dominant_stage", "decode"),
        ({"decode_ns": 89}, "dominant_stage", "first token"),
    ],
)
def test_regimes_by_hand(changes, column, expected):
    row = {
        "vision_sam_ns": 30, "vision_clip_ns": 19, "vision_projector_ns": 1, "vision_ns": 50, "prefill_ns": 40,
        "decode_ns": 91, "decode_weight_bytes": 500, "kv_traffic_bytes": 100, "decode_bytes_read": 600,
        "decode_bytes_written": 50, "decode_compute_bound_share": 0.0, "max_new_tokens": 11, "seq_len": 100,
    }  # fmt: skip
    assert regimes(pd.DataFrame([row | changes]))[column][0] == expected


def test_a_grid_of_the_same_tiles_costs_vision_the_same(tables):
    same = tables["vision"].groupby(["hardware", "batch_size", "base_size_px", "image_size_px", "tiles"])
    assert (same.vision_tensor_flops.min() == same.vision_tensor_flops.max()).all()
    assert (same.seq_len.min() != same.seq_len.max()).any()


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, invoke, tmp_path):
    target = tmp_path / "out" / kind
    hardware = ("--hardware", "h200", "--hardware", "rtx-5090", "--hardware", "l4", "--hardware", "a100-40gb")
    result = invoke("sweep", kind, *hardware, "--variant", "deepseek-ocr-v1-tiny", "--output", target)
    assert result.exit_code == 0, result.output
    assert str(target) in result.stdout.replace("\n", "")
    table = pd.read_parquet(target / "table.parquet")
    as_text = pd.read_csv(target / "table.csv", dtype=str, keep_default_na=False)
    assert list(as_text) == list(table)
    for name, column in table.items():
        if column.dtype == "float64":
            np.testing.assert_array_equal([float(text or "nan") for text in as_text[name]], column)
        else:
            assert list(as_text[name]) == list(column.astype(str))
    page = (target / "sweep.md").read_text()
    pictures = sorted(target.glob("*.png"))
    assert len(pictures) >= 3
    for path in pictures:
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10
        assert ET.parse(path.with_suffix(".svg")).getroot().tag.endswith("svg")  # noqa: S314  written a moment ago
        assert f"({path.stem}.svg)" in page
        assert f"({path.name})" in page
    summary = json.loads((target / "summary.json").read_text())
    assert summary["rows"] == len(table)
    assert all(sentence in page for sentence in summary["findings"])
    assert not [path for path in target.parent.iterdir() if path.name.startswith(".")]


def test_json_and_an_existing_directory(invoke, tmp_path):
    command = ("sweep", "profiles", "--hardware", "h200", "--output", tmp_path / "mine")
    first = invoke(*command, "--json")
    assert json.loads(first.stdout)["kind"] == "profiles"
    again = invoke(*command)
    assert again.exit_code == 2
    assert "exists and is left as it is; replace it with --force" in again.stderr
    (tmp_path / "mine" / "old").touch()
    assert invoke(*command, "--force").exit_code == 0
    assert not (tmp_path / "mine" / "old").exists()


def test_only_a_sweep_is_replaced(invoke, tmp_path):
    (tmp_path / "precious").touch()
    result = invoke("sweep", "profiles", "--hardware", "h200", "--output", tmp_path, "--force")
    assert result.exit_code == 2
    assert "is not the directory of a sweep" in result.stderr
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("vision", "--hardware", "gtx-1080"), "no hardware 'gtx-1080'"),
        (("vision", "--hardware", "mine.parquet"), "mine.parquet is a calibration, and sweeps are rooflines"),
        (("vision", "--hardware", "h200", "--hardware", "h200"), "hardware h200 is given twice"),
        (("vision", "--hardware", "h200", "--set", "crop_grid=2x3"), "sweep vision itself decides on crop_grid"),
        (("sequence", "--hardware", "h200", "--set", "seq_len=600"), "sweep sequence itself decides on seq_len"),
        (("decode", "--hardware", "h200", "--set", "batch_size=2"), "give them with --batch"),
        (("decode", "--hardware", "h200", "--set", "nothing"), "has no value"),
        (("decode", "--hardware", "h200", "--set", "seq_len=8192"), "sweep decode has no room"),
        (("profiles", "--hardware", "h200", "--workload", "dsocr-a4-v1"), "leave --workload out"),
        (("vision", "--hardware", "h200", "--tpot-ms", "0"), "change it with --tpot-ms"),
        (("vision", "--hardware", "h200", "--ttft-ms", "nan"), "change it with --ttft-ms"),
        (("decode", "--hardware", "h200", "--batch", "10000000"), "too large to be counted exactly"),
        (("decode", "--hardware", "h200", "--set", "dtype=fp16", "--hardware", "cpu-generic"), "no peak for float16"),
    ],
)
def test_bad_input(invoke, tmp_path, arguments, part):
    result = invoke("sweep", *arguments, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert part in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bad_input_in_python():
    with pytest.raises(InputError, match="no sweep 'prefill'; choose one of vision, sequence, decode, profiles"):
        dsocr_trace.sweep("prefill", ["h200"])
    with pytest.raises(InputError, match="give one or several with --hardware"):
        dsocr_trace.sweep("vision", [])
    with pytest.raises(InputError, match="batch size is 0"):
        dsocr_trace.sweep("vision", ["h200"], batch=[0])


def test_sentences_follow_the_table():
    """What is said about limits changes with the targets and with the rows."""
    arguments = {"workload": None, "variant": None, "settings": [], "batch": [1, 256], "ttft_ms": 1000.0}
    wide = " ".join(findings(sweep_words("decode", ["h200"], tpot_ms=1e6, **arguments)))
    tight = " ".join(findings(sweep_words("decode", ["h200"], tpot_ms=1e-3, **arguments)))
    assert "a token stays within 1e+06 ms throughout; memory is enough up to batch 1" in wide
    assert "a token stays within 0.001 ms nowhere" in tight
    crossing = dsocr_trace.sweep("decode", ["h200"], batch=[1]).kv_overtakes_weights_at_positions.iloc[0]
    assert f"{crossing:,.0f} (batch 1)" in wide


def test_torch_is_not_needed(tmp_path):
    command = ["sweep", "sequence", "--hardware", "h200", "--output", str(tmp_path / "out"), "--json"]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from dsocr_trace.cli import cli\n"
        f"cli({command!r}, standalone_mode=False)\n"
        "assert not [name for name in sys.modules if name.startswith('torch.')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["output"]).is_dir()


def test_a_hardware_file(tmp_path):
    source = tmp_path / "mine.toml"
    source.write_text(
        "[cpu]\ncores = 8\nghz = 3.0\nfp32_per_cycle = 32\nbf16_per_cycle = 64\ngb_per_s_per_core = 10\n"
        'memory_gb = 16\nsource = "made up"\n'
    )
    table = dsocr_trace.sweep("profiles", [str(source)], batch=[1])
    assert set(table.hardware) == {"mine"}
    assert np.isclose(table.device_memory_bytes, 16e9).all()
