"""The time model against devices that are made by hand: their laws are known, so their times are."""

from __future__ import annotations

import math

import attrs
import numpy as np
import pytest

from analytic.config import variant_config
from analytic.cost import FP32, MODEL_DTYPES
from analytic.generation import note_sampling
from analytic.hardware import load_hardware
from analytic.layers.base import Moment, Policy, Tape
from analytic.model import STAGES, deepseek_ocr, operations
from analytic.operators import OPERATORS, host_loop, to_host, view
from analytic.routing import Routing
from analytic.timing.calibration import Calibration, HostCosts, Sample
from analytic.timing.clocks import Spent, simulate
from analytic.timing.curves import Curves
from analytic.timing.workload import SAMPLING, time_workload
from analytic.workload import Workload

BF16 = MODEL_DTYPES["bfloat16"]
#: A call takes 1 us, and then 1 ns for every 1,000 FLOPs or 10 bytes.
FLOOR_NS, FLOPS_PER_NS, BYTES_PER_NS = 1000.0, 1000.0, 10.0
ONE_CLOCK = HostCosts(
    module_call_ns=500.0,
    dispatch_ns=700.0,
    operator_ns=0.0,
    loop_turn_ns=10.0,
    launch_ns=0.0,
    kernel_floor_ns=FLOOR_NS,
    synchronise_ns=90.0,
)
TWO_CLOCKS = attrs.evolve(ONE_CLOCK, launch_ns=3000.0)
DEVICE = Calibration(
    device="made by hand",
    kind="cpu",
    hardware=load_hardware("cpu-generic"),
    samples=(),
    host=ONE_CLOCK,
    tensor_flops_per_s={"bfloat16": FLOPS_PER_NS * 1e9, "float32": FLOPS_PER_NS * 1e9 / 4},
    memory_bytes_per_s={1 << 12: BYTES_PER_NS * 1e9, 1 << 28: BYTES_PER_NS * 1e9},
    measured_at="2026-01-01T00:00:00+00:00",
)
TINY = deepseek_ocr(variant_config("deepseek-ocr-v1-tiny"))
PAGE = Workload("page", 700, 1300, 7, 4, base_size=512, image_size=320, tile_grid=(1, 2))


def call_of(operator, *arguments, **options):
    (call,) = OPERATORS[operator](*arguments, **options).calls
    return call


def linear(rows, width=256):
    return call_of("linear", rows, width, width, BF16, bias=False)


def by_law(call, factor=1.0):
    """Roof of a call on the device made by hand, times a factor."""
    cost = call.operator(*call.args, **call.kwargs).cost
    return factor * (FLOOR_NS + max(cost.tensor_flops / FLOPS_PER_NS, cost.bytes_total / BYTES_PER_NS))


def sample(call, device_ns, host_ns=0.0):
    arguments = {name: getattr(value, "name", value) for name, value in call.arguments.items()}
    return Sample(call.operator.name, "bfloat16", arguments, device_ns, host_ns, 0.0, 5)


def with_samples(*samples, **changes):
    return attrs.evolve(DEVICE, samples=samples, **changes)


# Curves


@pytest.mark.parametrize("rows", [1, 3, 100, 5000])
def test_without_samples_a_time_is_the_roof(rows) -> None:
    found = Curves(DEVICE).time(linear(rows))
    assert found.source == "roof"
    assert found.device_ns == found.roof_ns == pytest.approx(by_law(linear(rows)), rel=1e-12)
    # 2 x rows x 256 x 256 FLOPs against 256 x 256 weights of two bytes: the ridge lies at 200 FLOPs per byte.
    assert found.compute_bound == (rows == 5000)


@pytest.mark.parametrize("factor", [1.0, 2.5, 0.4])
def test_a_device_that_is_slower_by_a_factor_is_predicted_exactly(factor) -> None:
    grid = [linear(rows, width) for rows in (1, 16, 256) for width in (64, 512)]
    curves = Curves(with_samples(*(sample(call, by_law(call, factor)) for call in grid)))
    found = curves.time(linear(40, 200))
    assert found.device_ns == pytest.approx(by_law(linear(40, 200), factor), rel=1e-9)
    assert found.source == "calibrated"


def test_efficiency_that_follows_a_power_of_the_size_is_predicted_between_the_samples() -> None:
    def slow(call):
        return by_law(call, call.arguments["elements"] ** -0.25 * 8)

    def silu(elements):
        return call_of("silu", elements, BF16)

    curves = Curves(with_samples(*(sample(silu(1 << power), slow(silu(1 << power))) for power in range(6, 20, 2))))
    for elements in (100, 3000, 70_000):
        assert curves.time(silu(elements)).device_ns == pytest.approx(slow(silu(elements)), rel=2e-3)


def test_beyond_the_samples_the_efficiency_of_the_edge_meets_the_ceilings() -> None:
    def silu(elements):
        return call_of("silu", elements, BF16)

    grid = [silu(1 << power) for power in (8, 10, 12)]
    curves = Curves(with_samples(*(sample(call, by_law(call, 3.0)) for call in grid)))
    far = curves.time(silu(1 << 20))
    assert far.source == "extrapolated"
    assert far.device_ns == pytest.approx(by_law(silu(1 << 20), 3.0), rel=1e-9)


def test_bandwidth_between_two_sizes_lies_on_a_line_of_logarithms() -> None:
    curves = Curves(attrs.evolve(DEVICE, memory_bytes_per_s={1 << 10: 4e9, 1 << 20: 1e9}))
    moved = 1 << 15  # half of them read, half of them written
    copy = call_of("copy", moved // 4, BF16)
    assert copy.operator(*copy.args).cost.bytes_total == moved
    assert curves.time(copy).device_ns == pytest.approx(FLOOR_NS + moved / math.sqrt(4 * 1), rel=1e-12)


def test_large_results_pay_for_new_memory() -> None:
    host = attrs.evolve(ONE_CLOCK, fresh_byte_ns=0.5, fresh_from_bytes=1 << 20)
    curves = Curves(attrs.evolve(DEVICE, host=host))
    for elements, results in ((1 << 18, 0), (1 << 19, 1 << 20), (1 << 20, 1 << 21)):
        call = call_of("silu", elements, BF16)
        assert curves.time(call).device_ns == pytest.approx(by_law(call) + 0.5 * results, rel=1e-12)
    # A slow operator does not make its memory dearer.
    small, large = (call_of("silu", elements, BF16) for elements in (1 << 18, 1 << 20))
    slow = Curves(with_samples(sample(small, by_law(small, 5.0)), host=host))
    assert slow.time(large).device_ns == pytest.approx(by_law(large, 5.0) + 0.5 * (1 << 21), rel=1e-9)


def test_host_times_are_interpolated_too() -> None:
    calls = [call_of("silu", size, BF16) for size in (256, 4096)]
    curves = Curves(with_samples(*(sample(call, by_law(call), host_ns=4000.0) for call in calls)))
    assert curves.time(call_of("silu", 1000, BF16)).host_ns == pytest.approx(4000.0, rel=1e-9)


def test_a_dtype_that_was_not_measured_takes_the_curve_of_fp32() -> None:
    call = call_of("silu", 1024, FP32)
    curves = Curves(with_samples(sample(call, by_law(call, 2.0))))
    assert curves.time(call_of("silu", 1024, BF16)).device_ns == pytest.approx(
        by_law(call_of("silu", 1024, BF16), 2.0), rel=1e-9
    )


def test_causal_attention_has_a_curve_of_its_own() -> None:
    def attention(counted):
        return call_of("sdpa", 8, 256, 256, 64, BF16, counted=counted)

    factors = {"rectangle": 2.0, "triangle": 5.0}
    curves = Curves(with_samples(*(sample(attention(name), by_law(attention(name), f)) for name, f in factors.items())))
    for name, factor in factors.items():
        assert curves.time(attention(name)).device_ns == pytest.approx(by_law(attention(name), factor), rel=1e-9)


def test_a_kernel_without_samples_takes_those_of_its_operator() -> None:
    def added(operands, **options):
        return call_of("elementwise", 1 << 16, BF16, operands=operands, **options)

    known = {2: 3.0, 1: 7.0}
    samples = [sample(added(operands), by_law(added(operands), factor)) for operands, factor in known.items()]
    curves = Curves(with_samples(*samples))
    for operands, factor in known.items():
        assert curves.time(added(operands)).device_ns == pytest.approx(by_law(added(operands), factor), rel=1e-9)
    pooled = curves.time(added(2, permuted=True))
    assert 3.0 < pooled.device_ns / by_law(added(2)) < 7.0
    own = Curves(with_samples(*samples, sample(added(2, permuted=True), by_law(added(2), 20.0))))
    assert own.time(added(2, permuted=True)).device_ns == pytest.approx(by_law(added(2), 20.0), rel=1e-9)


def test_weights_come_from_memory_however_small_they_are() -> None:
    """A copy of as many bytes stays in a cache; the weights that a model reads once per forward do not."""
    cached = attrs.evolve(DEVICE, memory_bytes_per_s={1 << 12: 100 * BYTES_PER_NS * 1e9, 1 << 28: BYTES_PER_NS * 1e9})
    activations, weights = 2 * 256 * 2, 256 * 256 * 2
    copy_ns = Curves(cached).time(call_of("copy", activations // 4, BF16)).roof_ns - FLOOR_NS
    expected = FLOOR_NS + copy_ns + weights / BYTES_PER_NS
    assert Curves(cached).time(linear(1)).roof_ns == pytest.approx(expected, rel=1e-9)


def test_what_runs_as_several_operators_is_their_sum_unless_it_was_measured_whole() -> None:
    norm = call_of("rms_norm", 64, 256, BF16)
    apart = Curves(DEVICE).time(norm)
    parts = [(Curves(DEVICE).time(part), part.times) for part in norm.parts.calls]
    assert apart.device_ns == pytest.approx(sum(time.device_ns * times for time, times in parts), rel=1e-12)
    whole = Curves(with_samples(sample(norm, 12_345.0))).time(norm)
    assert whole.device_ns == pytest.approx(12_345.0, rel=1e-9)


def test_the_example_of_the_documentation() -> None:
    """docs/time-model.md, "By hand": one row by a weight of 1280 x 1280, between two samples."""
    device = attrs.evolve(DEVICE, tensor_flops_per_s={"bfloat16": 5e11}, memory_bytes_per_s={1 << 12: 2e10})

    def roof(width):
        return 1000 + 2 * (width**2 + 2 * width) / 20

    samples = tuple(sample(linear(1, width), ratio * roof(width)) for width, ratio in ((1024, 1.3), (2048, 1.2)))
    found = Curves(attrs.evolve(device, samples=samples)).time(linear(1, 1280))
    assert found.roof_ns == pytest.approx(165e3, rel=2e-3)
    assert found.device_ns / found.roof_ns == pytest.approx(1.267, rel=1e-3)
    assert found.device_ns == pytest.approx(209e3, rel=2e-3)


# Clocks


def moment(path, steps=None, *, times=1):
    """A call of a module, or an operator that it runs."""
    return Moment(path, "" if steps is None else "work", times, steps)


def own(timeline, path):
    """What a module spends itself."""
    total = Spent()
    for (where, _), spent in timeline.places.items():
        if where == path:
            total.add(spent)
    return total


def kernels(device_ns, host_ns):
    """One operator that takes these times, whatever the device's ceilings are."""
    call = call_of("silu", 1024, BF16)
    return OPERATORS["silu"](1024, BF16), Curves(with_samples(sample(call, device_ns, host_ns)))


def test_a_processor_takes_everything_in_turn() -> None:
    steps, curves = kernels(5000.0, 0.0)
    sequence = [moment(""), moment("a"), moment("a", steps), moment("a", steps), moment("", view() * 3)]
    found = simulate(sequence, curves, ONE_CLOCK)
    assert found.wall_ns == pytest.approx(2 * 500 + 2 * 5000 + 3 * 700)
    assert found.busy_ns == pytest.approx(10_000)
    assert own(found, "a").wall_ns == pytest.approx(500 + 10_000)
    assert own(found, "").by_cause == {"host": pytest.approx(500 + 3 * 700)}


def test_a_slow_host_leaves_gaps_on_the_device() -> None:
    # Launched at 8, 16, 24 us; each arrives 3 us later and is done 2 us after that, before the next one arrives.
    steps, curves = kernels(2000.0, 8000.0)
    found = simulate([moment("a", steps)] * 3, curves, TWO_CLOCKS)
    assert found.wall_ns == pytest.approx(3 * 8000 + 3000 + 2000)
    assert found.busy_ns == pytest.approx(3 * 2000)
    assert found.idle_ns == pytest.approx(found.wall_ns - 6000)
    # Every gap waits for the host: the first launch and its way, and then 8 us less the 2 us of the kernel before.
    assert own(found, "a").by_cause["host"] == pytest.approx(11_000 + 2 * 6000)


def test_a_slow_device_is_always_busy() -> None:
    steps, curves = kernels(8000.0, 2000.0)
    found = simulate([moment("a", steps)] * 3, curves, TWO_CLOCKS)
    assert found.wall_ns == pytest.approx(2000 + 3000 + 3 * 8000)
    assert found.idle_ns == pytest.approx(5000)


def test_reading_back_waits_for_the_device_and_the_next_launch_waits_for_the_host() -> None:
    steps, curves = kernels(8000.0, 2000.0)
    # Done at 13 us, read back at 13.09; then launched at 15.09, arrived at 18.09, done at 26.09.
    found = simulate([moment("a", steps), moment("b", to_host(1, BF16)), moment("a", steps)], curves, TWO_CLOCKS)
    assert found.wall_ns == pytest.approx(26_090)
    assert own(found, "b").wall_ns == pytest.approx(90)
    without = simulate([moment("a", steps)] * 2, curves, TWO_CLOCKS)
    assert found.wall_ns - without.wall_ns == pytest.approx(90 + 2000 + 3000)


def test_host_work_hides_behind_a_busy_device_and_shows_on_an_idle_one() -> None:
    steps, curves = kernels(8000.0, 2000.0)
    hidden = simulate([moment("a", steps), moment("b", host_loop(100))], curves, TWO_CLOCKS)
    assert own(hidden, "b").wall_ns == 0
    assert own(hidden, "b").host_ns == pytest.approx(1000)
    shown = simulate([moment("a", steps), moment("b", host_loop(5000))], curves, TWO_CLOCKS)
    assert shown.wall_ns == pytest.approx(2000 + 50_000)
    assert own(shown, "b").wall_ns == pytest.approx(2000 + 50_000 - 13_000)


def test_an_operator_noted_several_times_runs_as_often() -> None:
    steps, curves = kernels(5000.0, 0.0)
    assert simulate([moment("a", steps * 3, times=2)], curves, ONE_CLOCK).wall_ns == pytest.approx(6 * 5000)


# Workloads


def time_of(workload, device=DEVICE, *, policy=None, routing="balanced"):
    """Simulate a workload of the tiny model."""
    policy = policy or Policy()
    work = operations(TINY, workload, policy=policy, routing=routing)
    return time_workload(TINY, workload, work, device, policy=policy)


@pytest.fixture(params=[ONE_CLOCK, TWO_CLOCKS], ids=["one clock", "two clocks"])
def timed(request):
    return time_of(PAGE, attrs.evolve(DEVICE, host=request.param))


def test_what_the_modules_spend_adds_up_to_every_stage(timed) -> None:
    assert tuple(timed) == STAGES
    for stage in timed.values():
        assert stage.wall_ns == pytest.approx(sum(spent.wall_ns for spent in stage.modules.values()), rel=1e-9)
        assert stage.busy_ns == pytest.approx(sum(spent.device_ns for spent in stage.modules.values()), rel=1e-9)
        for spent in stage.modules.values():
            assert spent.wall_ns == pytest.approx(sum(spent.by_cause.values()), rel=1e-9, abs=1e-6)


def leaves(steps):
    """Primitive calls with their number; what is made of several is measured in none of these tests."""
    for call in steps.calls:
        if call.parts is None:
            yield call, call.times
        else:
            yield from ((leaf, times * call.times) for leaf, times in leaves(call.parts))


def host_and_device(steps):
    device = host = 0.0
    for call, times in leaves(steps):
        if call.operator.name == "view":
            host += ONE_CLOCK.dispatch_ns * times
        elif call.operator.name == "host_loop":
            host += ONE_CLOCK.loop_turn_ns * call.arguments["turns"]
        elif call.operator.name == "to_host":
            host += ONE_CLOCK.synchronise_ns * times
        else:
            dtype = {"bfloat16": 1.0, "float32": 0.25}[dtype_of(call)]
            cost = call.operator(*call.args, **call.kwargs).cost
            compute = cost.tensor_flops / (FLOPS_PER_NS * dtype)
            device += float(np.sum((FLOOR_NS + np.maximum(compute, cost.bytes_total / BYTES_PER_NS)) * times))
    return host + device


def dtype_of(call):
    names = {getattr(value, "name", None) for value in call.arguments.values()} & {"bfloat16", "float32"}
    return names.pop() if len(names) == 1 else "float32"


def test_on_one_clock_a_workload_takes_what_its_calls_take() -> None:
    policy = Policy(attention_flops="executed")
    work = operations(TINY, PAGE, policy=policy)
    expected = dict.fromkeys(STAGES, 0.0)
    for operation in work.operations:
        for calls, steps in operation.runs:
            # Each decode forward has its own sizes, the others are called with one.
            sizes = max((np.size(v) for call, _ in leaves(steps) for v in (*call.args, call.times)), default=1)
            expected[operation.stage] += host_and_device(steps) * (1 if sizes == calls else calls)
    for (stage, _), calls in work.calls.items():
        expected[stage] += calls * ONE_CLOCK.module_call_ns
    timed = time_of(PAGE)
    assert SAMPLING not in timed["vision"].modules
    for stage in STAGES:
        sampling = timed[stage].modules[SAMPLING].wall_ns if stage != "vision" else 0.0
        assert timed[stage].wall_ns - sampling == pytest.approx(expected[stage], rel=1e-9)


def test_choosing_a_token_is_charged_after_every_forward_but_vision() -> None:
    timed = time_of(PAGE)

    def chosen(length):
        tape = Tape(Policy())
        note_sampling(tape.at("", 1), vocabulary=TINY.config.vocab_size, length=length, ngram=20)
        return simulate(tape.sequence, Curves(DEVICE), ONE_CLOCK).wall_ns

    lengths = [PAGE.seq_len + step for step in range(PAGE.max_new_tokens)]
    assert timed["prefill"].modules[SAMPLING].wall_ns == pytest.approx(chosen(lengths[0]), rel=1e-9)
    decoded = sum(chosen(length) for length in lengths[1:])
    assert timed["decode"].modules[SAMPLING].wall_ns == pytest.approx(decoded, rel=1e-9)


def test_decode_forwards_between_the_simulated_ones_lie_on_straight_lines() -> None:
    long = attrs.evolve(PAGE, max_new_tokens=60)
    timed = time_of(long)["decode"]
    assert len(timed.forwards) < 59
    every = time_of(attrs.evolve(long, max_new_tokens=2))["decode"].wall_ns
    one_by_one = sum(
        time_of(shifted)["decode"].wall_ns
        for shifted in (attrs.evolve(long, max_new_tokens=2, text_tokens=7 + step) for step in range(59))
    )
    assert every < timed.wall_ns
    assert timed.wall_ns == pytest.approx(one_by_one, rel=1e-3)


def test_experts_that_no_simulated_forward_chose_are_charged_for_their_calls() -> None:
    """One expert has a token in the second forward alone, which is not simulated."""
    long = attrs.evolve(PAGE, max_new_tokens=9)
    sizes, forwards = TINY.config.experts, long.max_new_tokens - 1
    usual = np.zeros((forwards, sizes.experts), np.int64)
    usual[:, : sizes.per_token] = 1
    rare = usual.copy()
    rare[1, 0], rare[1, -1] = 0, 1
    planned = Routing.planned("balanced", sizes, tokens=long.seq_len, forwards=range(1, 9), batch_size=1)
    found = {
        name: time_of(long, routing=attrs.evolve(planned, decode=dict.fromkeys(sizes.layers, counts)))["decode"]
        for name, counts in (("usual", usual), ("rare", rare))
    }
    layer = f"model.layers.{sizes.layers[0]}.mlp.experts"
    spent = {name: stage.modules for name, stage in found.items()}
    each = spent["usual"][f"{layer}.0.gate_proj"].wall_ns / forwards
    assert f"{layer}.{sizes.experts - 1}.gate_proj" not in spent["usual"]
    assert spent["rare"][f"{layer}.{sizes.experts - 1}.gate_proj"].wall_ns == pytest.approx(each, rel=1e-9)
    assert spent["rare"][f"{layer}.0.gate_proj"].wall_ns == pytest.approx(each * (forwards - 1), rel=1e-9)
    assert found["rare"].wall_ns == pytest.approx(found["usual"].wall_ns, rel=1e-9)


def test_fused_causal_attention_is_charged_for_what_it_computes() -> None:
    slow = attrs.evolve(DEVICE, tensor_flops_per_s={"bfloat16": 1e9, "float32": 1e9})
    walls = {
        name: time_of(PAGE, slow, policy=Policy(attention_flops=name))["prefill"].wall_ns
        for name in ("full", "executed", "counter")
    }
    assert len(set(walls.values())) == 1


def test_without_a_decode_forward_decode_takes_no_time() -> None:
    timed = time_of(attrs.evolve(PAGE, max_new_tokens=1))["decode"]
    assert (timed.wall_ns, timed.busy_ns, timed.forwards) == (0, 0, ())
