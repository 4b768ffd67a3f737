"""Many workloads at once give what each gives alone."""

from __future__ import annotations

from collections import defaultdict

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analytic.config import variant_config
from analytic.cost import COST_COLUMNS
from analytic.crops import candidate_grids
from analytic.errors import InputError
from analytic.hardware import Figure, load_hardware
from analytic.layers.base import Policy
from analytic.model import STAGES, deepseek_ocr
from analytic.predict import predict
from analytic.sweep import Points, evaluate
from analytic.timing.datasheet import from_datasheet
from analytic.workload import Workload

TINY = deepseek_ocr(variant_config("deepseek-ocr-v1-tiny"))
BASE = deepseek_ocr(variant_config("deepseek-ocr-v1-base"))
DEVICES = [load_hardware(name) for name in ("h200", "l4", "xeon-8480plus")]
PAGE = Workload("page", 640, 1280, text_tokens=19, max_new_tokens=4)


def points(workloads):
    pages = list(dict.fromkeys(workload.layout for workload in workloads))
    return Points(
        pages=pages,
        page=np.array([pages.index(workload.layout) for workload in workloads]),
        seq_len=np.array([workload.seq_len for workload in workloads]),
        new_tokens=np.array([workload.max_new_tokens for workload in workloads]),
        batch=np.array([workload.batch_size for workload in workloads]),
    )


def check(model, workloads, policy, routing, devices=DEVICES):
    """Costs are exactly those of `predict`; times are, but for its rounding of every operator."""
    found = evaluate(model, points(workloads), hardware=devices, policy=policy, routing=routing)
    for index, workload in enumerate(workloads):
        for device in devices:
            alone = predict(model, workload, device=from_datasheet(device), policy=policy, routing=routing)
            for stage in STAGES:
                mine = [each for each in alone.operations if each.operation.stage == stage]
                for column in COST_COLUMNS:
                    expected = sum(getattr(each.operation.cost, column) for each in mine)
                    assert found.costs[stage][column][index] == expected, (stage, column)
                flops, times = defaultdict(int), defaultdict(int)
                for each in mine:
                    part = model.family.part(each.operation.module_path)
                    flops[part] += each.operation.cost.tensor_flops
                    times[part] += each.times.datasheet_ns
                for part, expected in flops.items():
                    assert found.part_flops.get((stage, part), np.zeros(index + 1))[index] == expected
                for part, expected in times.items():
                    actual = found.part_times[device.name, stage, part][index]
                    assert actual == pytest.approx(expected, abs=len(mine) / 2 + 1e-3, rel=1e-9)
                assert found.compute_times[device.name, stage][index] <= found.time(device.name, stage)[index] + 1e-6
        peak = max(each.operation.activation_peak_bytes for each in alone.operations)
        assert found.activation_peak_bytes[index] == peak
        assert found.weight_bytes == sum(node.parameter_count for node in model.tree) * (
            4 if policy.dtype in {"fp32", "float32"} else 2
        )


sizes = st.sampled_from([320, 512, 640, 1024])
workloads = st.builds(
    lambda grid, base, image, text, new, batch: attrs.evolve(
        PAGE, crop_mode=grid is not None, tile_grid=grid, base_size=base, image_size=image, text_tokens=text,
        max_new_tokens=new, batch_size=batch,
    ),
    st.sampled_from([None, *candidate_grids(), (4, 4)]), sizes, sizes, st.integers(1, 300), st.integers(1, 40),
    st.integers(1, 40),
)  # fmt: skip


@settings(max_examples=25)
@given(
    chosen=st.lists(workloads, min_size=1, max_size=3),
    attention=st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
    counted=st.sampled_from(["full", "executed", "counter"]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    routing=st.sampled_from(["balanced", "worst"]),
)
def test_it_is_what_every_workload_gives_alone(chosen, attention, counted, dtype, routing):
    check(TINY, chosen, Policy(dtype, attention, counted), routing)


@pytest.mark.parametrize(("attention", "routing"), [("sdpa", "balanced"), ("eager", "worst")])
def test_of_the_full_size_too(attention, routing):
    chosen = [
        attrs.evolve(PAGE, max_new_tokens=1),
        attrs.evolve(PAGE, max_new_tokens=700, batch_size=13, text_tokens=900),
        attrs.evolve(PAGE, tile_grid=(3, 3), base_size=1280, image_size=1024, batch_size=3),
    ]
    check(BASE, chosen, Policy(attention=attention), routing, DEVICES[:1])


def test_a_bound_that_changes_within_a_generation():
    """On a device whose attention is bound by arithmetic at first and by traffic later, every forward counts."""
    workload = attrs.evolve(PAGE, max_new_tokens=300, batch_size=5)
    in_compute = []
    for flops in (1e9, 3e9, 1e10, 3e10, 1e11):
        peaks = {"bfloat16": Figure(flops, "made up"), "float32": Figure(flops, "made up")}
        device = attrs.evolve(DEVICES[0], tensor_flops_per_s=peaks, vector_flops_per_s=peaks)
        check(TINY, [workload], Policy(attention="eager"), "balanced", [device])
        found = evaluate(TINY, points([workload]), hardware=[device], policy=Policy(attention="eager"))
        in_compute.append(found.compute_times["h200", "decode"][0] / found.time("h200", "decode")[0])
    assert in_compute[0] > in_compute[-1]


@given(st.integers(1, 64), st.integers(1, 3000), st.sampled_from(["sdpa", "eager"]))
@settings(max_examples=10)
def test_costs_of_decode_are_affine_in_the_cached_positions(batch, text, attention):
    """Second differences vanish: one more token costs as much more each time."""
    runs = [attrs.evolve(PAGE, text_tokens=text, batch_size=batch, max_new_tokens=count) for count in (1, 2, 3, 4)]
    found = evaluate(TINY, points(runs), hardware=DEVICES[:1], policy=Policy(attention=attention))
    for column in COST_COLUMNS:
        assert not np.diff(found.costs["decode"][column], 3).any(), column
    assert np.diff(found.cache_traffic)[0] > 0


def test_costs_do_not_depend_on_what_else_is_evaluated(monkeypatch):
    chosen = [attrs.evolve(PAGE, text_tokens=1 + 7 * number, batch_size=1 + number % 3) for number in range(20)]
    together = evaluate(TINY, points(chosen), hardware=DEVICES, policy=Policy())
    monkeypatch.setattr("analytic.sweep._CHUNK", 9)
    chunked = evaluate(TINY, points(chosen), hardware=DEVICES, policy=Policy())
    for stage in STAGES:
        for column in COST_COLUMNS:
            assert (together.costs[stage][column] == chunked.costs[stage][column]).all()
        for device in DEVICES:
            np.testing.assert_allclose(together.time(device.name, stage), chunked.time(device.name, stage), rtol=1e-12)


def test_traffic_of_the_cache_is_that_of_its_copy_and_of_attention():
    """Keys and values are read and written to be extended, and read to attend; each step finds one position more."""
    decoder = TINY.config.decoder
    assert decoder.kv_heads == decoder.heads  # else they would be copied once more
    found = evaluate(TINY, points([attrs.evolve(PAGE, max_new_tokens=3)]), hardware=DEVICES[:1], policy=Policy())
    position_bytes = 2 * 2 * decoder.kv_heads * decoder.head_dim * decoder.layers
    cached = (PAGE.seq_len + 1) + (PAGE.seq_len + 2)
    assert found.cache_traffic[0] == 3 * position_bytes * cached


@pytest.mark.parametrize(
    ("policy", "message"),
    [(Policy(dtype="int8"), "no dtype 'int8'"), (Policy(attention="linear"), "no attention 'linear'")],
)
def test_what_cannot_be(policy, message):
    with pytest.raises(InputError, match=message):
        evaluate(TINY, points([PAGE]), hardware=DEVICES, policy=policy)
