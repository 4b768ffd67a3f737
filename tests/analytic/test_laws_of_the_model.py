"""What must hold for every page, prompt, batch and policy."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analytic.config import variant_config
from analytic.cost import COST_COLUMNS, MODEL_DTYPES, ZERO, Cost, Size, total
from analytic.crops import candidate_grids
from analytic.hardware import Figure, Hardware, load_hardware
from analytic.layers.base import Policy, SequenceShape, Tape
from analytic.model import ATTENTION_FLOPS, ATTENTIONS, STAGES, Work, deepseek_ocr, operations
from analytic.predict import Prediction, predict, subtree_totals
from analytic.routing import PLANS, Counts, Plan, PlannedLoad, Routing
from analytic.timing.datasheet import from_datasheet
from analytic.workload import Workload

BASE = deepseek_ocr(variant_config("deepseek-ocr-v1-base"))
TINY = deepseek_ocr(variant_config("deepseek-ocr-v1-tiny"))
SIZES = TINY.config.experts
#: All bytes that one position keeps in the cache, in bf16: 12 layers of keys and values of 1,280 elements.
KV_BYTES = 61_440

policies = st.builds(
    Policy,
    dtype=st.sampled_from(["bfloat16", "float32"]),
    attention=st.sampled_from(ATTENTIONS),
    attention_flops=st.sampled_from(ATTENTION_FLOPS),
)
workloads = st.builds(
    Workload,
    id=st.just("drawn"),
    page_width=st.just(640),
    page_height=st.just(640),
    text_tokens=st.integers(1, 200),
    max_new_tokens=st.integers(1, 20),
    tile_grid=st.sampled_from(candidate_grids()),
    base_size=st.sampled_from([256, 512, 640, 1024]),
    image_size=st.sampled_from([128, 336, 640]),
    batch_size=st.integers(1, 4),
)


def by_stage(work: Work) -> dict[str, Cost]:
    return {stage: total(op.cost for op in work.operations if op.stage == stage) for stage in STAGES}


def no_column_shrinks(small: Cost, large: Cost) -> bool:
    return all(large.columns()[column] >= small.columns()[column] for column in COST_COLUMNS)


@given(workload=workloads, policy=policies, plan=st.sampled_from(PLANS))
def test_every_module_is_the_sum_of_its_parts(workload: Workload, policy: Policy, plan: Plan) -> None:
    work = operations(TINY, workload, policy=policy, routing=plan)
    for stage, everything in by_stage(work).items():
        own: dict[str, Cost] = defaultdict(Cost)
        for operation in work.operations:
            if operation.stage == stage:
                own[operation.module_path] = own[operation.module_path] + operation.cost
        totals = subtree_totals(work.tree, own, ZERO)
        assert totals[""] == everything
        parts: dict[str, Cost] = defaultdict(Cost)
        for node in work.tree:
            parts[node.module_path] = own[node.module_path] + parts[node.module_path]
            if node.parent_path is not None:
                parts[node.parent_path] = parts[node.parent_path] + totals[node.module_path]
        assert parts == totals


@given(workload=workloads, policy=policies, plan=st.sampled_from(PLANS), more=st.integers(1, 30))
def test_more_of_anything_costs_no_less(workload: Workload, policy: Policy, plan: Plan, more: int) -> None:
    before = by_stage(operations(TINY, workload, policy=policy, routing=plan))
    for size in ("text_tokens", "max_new_tokens", "batch_size"):
        larger = attrs.evolve(workload, **{size: getattr(workload, size) + more})
        after = by_stage(operations(TINY, larger, policy=policy, routing=plan))
        assert all(no_column_shrinks(before[stage], after[stage]) for stage in STAGES), size


@given(workload=workloads, policy=policies, extra=st.sampled_from([(0, 1), (1, 0), (1, 1)]))
def test_more_tiles_cost_no_less(workload: Workload, policy: Policy, extra: tuple[int, int]) -> None:
    columns, rows = workload.grid or (1, 1)
    larger = attrs.evolve(workload, tile_grid=(columns + extra[0], rows + extra[1]))
    before, after = (by_stage(operations(TINY, each, policy=policy)) for each in (workload, larger))
    assert all(no_column_shrinks(before[stage], after[stage]) for stage in STAGES)
    assert after["vision"].tensor_flops > before["vision"].tensor_flops


@given(workload=workloads, policy=policies)
def test_images_are_linear_in_the_pages(workload: Workload, policy: Policy) -> None:
    """Pages are encoded and laid out one by one: nothing is shared between them."""
    one = operations(TINY, attrs.evolve(workload, batch_size=1), policy=policy)
    work = operations(TINY, workload, policy=policy)
    pages = workload.batch_size
    assert by_stage(work)["vision"] == by_stage(one)["vision"] * pages
    # Positions are numbered once for all prompts.
    laid_out, laid_out_one = (
        [op for op in each.operations if op.module_path == "model" and op.name != "position_ids"]
        for each in (work, one)
    )
    assert {(op.name, op.calls) for op in laid_out} == {(op.name, op.calls * pages) for op in laid_out_one}
    assert [op.cost for op in laid_out] == [op.cost * pages for op in laid_out_one]
    for (stage, path), calls in one.calls.items():
        if stage == "vision":
            assert work.calls[stage, path] == pages * calls


@given(workload=workloads, policy=policies, plan=st.sampled_from(PLANS))
def test_a_call_in_the_decoder_reads_its_weights_once(workload: Workload, policy: Policy, plan: Plan) -> None:
    """However long the prompt and large the batch; of embeddings only the rows that are looked up are read."""
    work = operations(TINY, workload, policy=policy, routing=plan)
    read: Counter[tuple[str, str]] = Counter()
    for operation in work.operations:
        read[operation.stage, operation.module_path] += operation.cost.weight_bytes
    item = MODEL_DTYPES[policy.dtype].bytes
    for node in work.tree:
        for stage in ("prefill", "decode"):
            key = stage, node.module_path
            if key in work.calls and node.module_path not in {"model", "model.embed_tokens"}:
                assert read[key] == item * node.parameter_count * work.calls[key], key


@pytest.mark.parametrize(("batch", "dtype", "bytes_each"), [(1, "bfloat16", KV_BYTES), (3, "float32", 2 * KV_BYTES)])
def test_cache_bytes_of_every_position(batch: int, dtype: str, bytes_each: int) -> None:
    workload = Workload("whole", 640, 640, 6, 4, crop_mode=False, base_size=512, batch_size=batch)
    grown = by_stage(operations(BASE, workload, policy=Policy(dtype)))
    assert {stage: cost.kv_cache_bytes for stage, cost in grown.items()} == {
        "vision": 0,
        "prefill": workload.seq_len * batch * bytes_each,
        "decode": 3 * batch * bytes_each,
    }


def summed(tape: Tape, workloads: int) -> dict[str, list[int]]:
    """Cost of each of many workloads that were evaluated at once."""
    everything = total(steps.cost * calls for runs in tape.operators.values() for calls, steps in runs.runs)
    return {name: np.broadcast_to(value, workloads).tolist() for name, value in everything.columns().items()}


def loads(how: Plan, tokens: Size) -> dict[int, PlannedLoad]:
    return dict.fromkeys(SIZES.layers, PlannedLoad(how, tokens, SIZES))


@given(drawn=st.lists(workloads, min_size=1, max_size=4), policy=policies, plan=st.sampled_from(PLANS))
def test_many_workloads_at_once(drawn: list[Workload], policy: Policy, plan: Plan) -> None:
    """With like layers folded and like experts grouped, a row of workloads costs what each of them does."""
    family, root = TINY.family, TINY.family.build(TINY.config)
    prompts, batch, images = (
        np.array([getattr(each, name) for each in drawn], dtype=np.int64)
        for name in ("seq_len", "batch_size", "image_tokens")
    )
    tapes = {stage: Tape(policy, folded=True) for stage in ("prefill", "decode")}
    prefill = SequenceShape(batch, prompts, prompts, causal=True, loads=loads(plan, batch * prompts))
    family.prefill(root, tapes["prefill"], prefill, images)
    decode = SequenceShape(batch, 1, prompts + 1, causal=False, loads=loads(plan, batch))
    family.decode(root, tapes["decode"], decode, 1)
    found = {stage: summed(tape, len(drawn)) for stage, tape in tapes.items()}
    for index, workload in enumerate(drawn):
        work = operations(TINY, workload, policy=policy, routing=plan, kv_lengths=[workload.seq_len + 1])
        page = Tape(policy)
        family.place_page(root, page, workload.layout, workload.batch_size)
        placed = {name: column[0] for name, column in summed(page, 1).items()}
        for stage, columns in found.items():
            alone = by_stage(work)[stage].columns()
            # Pages are laid out one by one, never as arrays.
            rest = placed if stage == "prefill" else dict.fromkeys(placed, 0)
            assert {name: column[index] + rest[name] for name, column in columns.items()} == alone


def slow(hardware: Hardware) -> Hardware:
    """A thousandth as fast: times in whole nanoseconds are then exact to many digits."""

    def slower(figure: Figure) -> Figure:
        return Figure(figure.value / 1000, "a thousandth")

    return attrs.evolve(
        hardware,
        tensor_flops_per_s={name: slower(figure) for name, figure in hardware.tensor_flops_per_s.items()},
        vector_flops_per_s={name: slower(figure) for name, figure in hardware.vector_flops_per_s.items()},
        memory_bytes_per_s=slower(hardware.memory_bytes_per_s),
    )


SLOW = slow(load_hardware("rtx-5090"))


def some_routing(rng: np.random.Generator, tokens: int, rows: int, skew: float) -> Counts:
    """Every token chooses k different experts, some of which may be preferred."""
    preference = skew * rng.normal(size=SIZES.experts)
    noise = rng.gumbel(size=(rows, tokens, SIZES.experts))
    chosen = np.argsort(preference + noise, axis=2)[:, :, -SIZES.per_token :]
    return np.stack([np.bincount(row.ravel(), minlength=SIZES.experts) for row in chosen])


def decoder_totals(prediction: Prediction) -> tuple[Cost, int, int]:
    """Cost and nanoseconds of the decoder, and how many roundings are in them."""
    inside = [each for each in prediction.operations if each.operation.stage != "vision"]
    nanoseconds = sum(each.times.datasheet_ns for each in inside)
    return total(each.operation.cost for each in inside), nanoseconds, len(inside)


@given(
    text=st.integers(1, 300),
    batch=st.integers(1, 12),
    steps=st.integers(1, 5),
    skew=st.sampled_from([0.0, 0.5, 2.0, 50.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_routing_costs_more_than_the_worst(text: int, batch: int, steps: int, skew: float, seed: int) -> None:
    workload = Workload("drawn", 640, 640, text, steps + 1, crop_mode=False, base_size=256, batch_size=batch)
    rng = np.random.default_rng(seed)
    tokens = workload.seq_len * batch
    measured = Routing(
        {layer: some_routing(rng, tokens, 1, skew) for layer in SIZES.layers},
        {layer: some_routing(rng, batch, steps, skew) for layer in SIZES.layers},
        "measured",
    )
    arguments: dict[str, Any] = {"device": from_datasheet(SLOW), "policy": Policy()}
    worst, nanoseconds, roundings = decoder_totals(predict(TINY, workload, routing="worst", **arguments))
    for other in (measured, "balanced"):
        cost, ns, more_roundings = decoder_totals(predict(TINY, workload, routing=other, **arguments))
        # Each operator's time is rounded once, by half a nanosecond at most.
        assert ns <= nanoseconds + (roundings + more_roundings) / 2
        assert cost.bytes_total <= worst.bytes_total
        assert cost.weight_bytes <= worst.weight_bytes
        assert cost.tensor_flops == worst.tensor_flops
        assert cost.vector_flops == worst.vector_flops
