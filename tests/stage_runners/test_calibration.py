"""Executors against formulas and the model's code; timing discipline with a clock that is played by a fake."""

from __future__ import annotations

import gc
import resource
import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from analytic.cost import DTYPES
from analytic.errors import DsocrTraceError
from analytic.hardware import load_hardware
from analytic.operators import OPERATORS
from stage_runners.calibration import calibrate, measure, operands, stopwatches
from stage_runners.calibration.apart import calibrate_apart
from stage_runners.calibration.control import ControlPoint
from stage_runners.calibration.executors import EXECUTORS, call_of
from stage_runners.calibration.grids import Point, grid
from stage_runners.calibration.host import host_costs
from stage_runners.calibration.measure import Limits, Looked, Task, Timing
from stage_runners.calibration.memory import fill_tasks, fresh_byte_ns, fresh_from_bytes, kept_memory
from stage_runners.calibration.operands import (
    Buffer,
    Eviction,
    Operands,
    OperandsTooLargeError,
    last_level_cache_bytes,
)
from stage_runners.calibration.session import grid_of
from stage_runners.calibration.stopwatches import Call, CpuStopwatch, CudaStopwatch, Reading
from stage_runners.deepseek_ocr import ATTENTION_IMPLEMENTATIONS

CPU = torch.device("cpu")
LIMITS = Limits(look_s=60, total_s=120, call_s=1.0, large_call_s=4.0, rounds=2)

#: Operators whose call returns something else than the formula's result, and why.
RETURNS_MORE_OR_LESS = {
    "sort": "argsort keeps the sorted keys to itself",
    "scatter": "in place: returns the whole target",
    "masked_scatter": "in place: returns the whole target",
}


def silent(*_: object) -> None:
    pass


def smallest_points() -> list[Point]:
    """The two smallest points of every operator with every combination of options."""
    seen: Counter[str] = Counter()
    points = []
    for point in grid_of(["bfloat16", "float32"]):
        key = f"{point.operator} {point.options}"
        seen[key] += 1
        if seen[key] <= 2:
            points.append(point)
    return points


def formula(point: Point) -> dict[str, Any]:
    return {
        name: DTYPES.get(value, value) if isinstance(value, str) else value for name, value in point.arguments.items()
    }


def held_bytes(result: Any) -> int:
    return result.nbytes if isinstance(result, torch.Tensor) else sum(held_bytes(part) for part in result)


@pytest.fixture(scope="module")
def buffer() -> Buffer:
    made = Buffer(CPU, 1 << 26)
    made.cold_bytes = 1 << 22
    return made


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_points_give_every_argument_of_the_formula(dtype) -> None:
    for point in grid(dtype):
        assert set(point.arguments) == set(OPERATORS[point.operator].signature.parameters), point


def test_every_operator_of_the_grids_has_an_executor_and_the_other_way_round() -> None:
    assert {point.operator for point in grid("bfloat16")} == set(EXECUTORS)


def test_points_are_distinct() -> None:
    keys = [(point.operator, str(sorted(point.arguments.items()))) for point in grid_of(["bfloat16", "float32"])]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("point", smallest_points(), ids=lambda point: f"{point.operator}-{point.arguments}")
def test_a_call_does_what_the_formula_says(point, buffer) -> None:
    cost = OPERATORS[point.operator](**formula(point)).cost
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = call_of(point.operator, point.arguments, buffer).run()
    if point.operator not in RETURNS_MORE_OR_LESS:
        assert held_bytes(result) == cost.activation_bytes
    if not point.operator.startswith("sdpa"):  # the counter does not know the CPU's fused kernel
        assert counter.get_total_flops() == cost.tensor_flops


class Dispatched(TorchDispatchMode):
    """Names of the operators that run, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def dispatched(*runs: Any) -> Counter[str]:
    with torch.no_grad(), Dispatched() as seen:
        for run in runs:
            run()
    return seen.names


@pytest.mark.parametrize("queries", [1, 16])
def test_eager_attention_runs_the_operators_of_the_model(queries, buffer) -> None:
    sizes = {"heads": 2, "queries": queries, "keys": 16, "dtype": "bfloat16"}
    ours = [call_of("attention_eager", sizes | {"head_dim": 8}, buffer).run]
    if queries > 1:
        ours.append(call_of("causal_mask", sizes, buffer).run)
    query, key = (torch.zeros(1, length, 2, 8, dtype=torch.bfloat16).transpose(1, 2) for length in (queries, 16))
    attend, key = ATTENTION_IMPLEMENTATIONS["eager"], key.contiguous()
    assert dispatched(*ours) == dispatched(lambda: attend(query, key, key))


def test_the_cache_is_extended_as_transformers_does(buffer) -> None:
    old, new = torch.zeros(1, 1, 7, 64), torch.zeros(1, 1, 1, 64)
    cache = DynamicCache()
    cache.update(old, old, 0)
    ours = call_of("kv_cache_append", {"cached": 2 * 64 * 8, "added": 2 * 64, "dtype": "float32"}, buffer)
    assert dispatched(ours.run) == dispatched(lambda: cache.update(new, new, 0))


@pytest.mark.parametrize(("counted", "causal"), [("rectangle", False), ("triangle", True)])
def test_fused_attention_is_causal_where_the_triangle_counts(counted, causal, buffer) -> None:
    sizes = {"heads": 1, "queries": 4, "keys": 4, "head_dim": 64, "dtype": "float32", "counted": counted}
    out = call_of("sdpa", sizes, buffer).run()
    first_value = Operands(buffer)
    first_value.tensor(torch.float32, 1, 4, 1, 64)
    first_value.tensor(torch.float32, 1, 1, 4, 64)
    expected = first_value.tensor(torch.float32, 1, 1, 4, 64)[0, 0, 0]
    assert torch.equal(out[0, 0, 0], expected) is causal


def test_cold_operands_lie_apart_and_exceed_the_cache(buffer) -> None:
    found = Operands(buffer).cold(torch.bfloat16, 100, 1000)
    starts = [tensor.data_ptr() for tensor in found]
    assert all(second - first >= found[0].nbytes for first, second in pairwise(starts))
    assert sum(tensor.nbytes for tensor in found) >= 0.9 * buffer.cold_bytes


def test_warm_operands_do_not_overlap(buffer) -> None:
    make = Operands(buffer)
    first, second = make.tensor(torch.bfloat16, 3), make.tensor(torch.float32, 3)
    assert second.data_ptr() >= first.data_ptr() + first.nbytes
    assert torch.isfinite(second).all()
    assert second.abs().max() < 1


def test_what_exceeds_the_buffer_is_refused(buffer) -> None:
    with pytest.raises(OperandsTooLargeError):
        Operands(buffer).tensor(torch.float32, buffer.size)


class Clock:
    """A stopwatch that gives each call the time that the call itself names."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def once(self, _: Task, call: Call) -> Reading:
        name, took = call.run()
        self.log.append(name)
        return Reading(took, 0.0)

    def read(self, task: Task, call: Call, took_ns: float) -> Reading:
        del took_ns
        return self.once(task, call)


def task(name: str, took: float, *, group: str = "a", **options: Any) -> Task:
    return Task(group, lambda: Call(lambda: (name, took)), **options)


def looked(*tasks: Task) -> dict[Task, Looked]:
    return {one: Looked(one.prepare(), one.prepare().run()[1]) for one in tasks}


def test_larger_points_are_not_even_prepared() -> None:
    def never() -> Any:
        raise AssertionError

    fast, slow = task("fast", 1e6), task("slow", 0.7e9)
    larger = Task("a", never, larger_than=lambda other: other is slow)
    too_slow = task("too slow", 1.5e9)
    needed = task("needed", 1.5e9, indispensable=True, larger_than=lambda other: other is slow)
    large = task("large", 1.5e9, large=True, larger_than=lambda other: other is slow)
    larger_still = Task("a", never, larger_than=lambda other: other is huge, large=True)
    huge = task("huge", 4.5e9, large=True)
    tasks = [fast, slow, larger, too_slow, needed, large, huge, larger_still]
    found = measure.first_look(tasks, Clock(), LIMITS, silent)
    assert {one: look.took_ns for one, look in found.items()} == {fast: 1e6, slow: 0.7e9, needed: 1.5e9, large: 1.5e9}


def test_what_does_not_fit_into_memory_is_left_out() -> None:
    def too_large() -> Any:
        raise OperandsTooLargeError

    assert measure.first_look([Task("a", too_large)], Clock(), LIMITS, silent) == {}


def test_the_budget_is_shared_between_groups() -> None:
    heavy = [task(f"heavy {number}", number * 1e9, group="heavy") for number in range(1, 8)]
    light = [task(f"light {number}", 1e6, group="light") for number in range(10)]
    limits = Limits(look_s=9, total_s=54, call_s=9, large_call_s=9, rounds=2)
    # Two rounds of 1 + 2 + ... + 6 s fit, 7 s more do not.
    assert list(measure.affordable(looked(*heavy, *light), limits, budget_s=45)) == [*heavy[:6], *light]


@pytest.mark.parametrize(("option", "kept"), [({}, 3), ({"indispensable": True}, 6), ({"large": True}, 6)])
def test_a_group_keeps_its_smallest_and_what_tells_most(option, kept) -> None:
    tasks = [task(str(number), 1e9 + number, **option) for number in range(6)]
    limits = Limits(look_s=9, total_s=9, call_s=9, large_call_s=9)
    assert list(measure.affordable(looked(*tasks), limits, budget_s=0)) == tasks[:kept]


def test_short_calls_are_dealt_in_hands_and_long_ones_come_alone() -> None:
    clock = Clock()
    quick = [task(f"quick {number}", 100.0) for number in range(8)]
    slow, longest = task("slow", 0.5e9), task("longest", 2e9, large=True)
    limits = attrs.evolve(LIMITS, rounds=3)
    found = measure.measure(looked(*quick, slow, longest), clock, limits, 60, silent)
    assert [found[one].repeats for one in (quick[0], slow, longest)] == [18, 3, 2]
    assert (found[quick[0]].device_ns, found[slow].device_ns) == (100.0, 0.5e9)
    short = [name for name in clock.log if name.startswith("quick")]
    hands = [short[start : start + 24] for start in range(0, len(short), 24)]
    assert [set(Counter(hand).values()) for hand in hands] == [{6}] * 6
    assert len({tuple(sorted(set(hand))) for hand in hands}) > 2
    repeats = sum(first == second for first, second in pairwise(short))
    assert repeats < len(short) / 4


def test_a_call_that_was_slow_by_accident_counts_as_short_later() -> None:
    one = task("one", 100.0)
    delayed = {one: Looked(one.prepare(), 9e6)}
    assert [len(readings) for readings in measure.measure(delayed, Clock(), LIMITS, 60, silent)[one].rounds] == [1, 6]


def test_rounds_end_with_the_budget_but_everything_is_read_once() -> None:
    tasks = [task("one", 1e6), task("two", 1e9)]
    limits = Limits(look_s=9, total_s=9, call_s=1, large_call_s=1, rounds=9)
    found = measure.measure(looked(*tasks), Clock(), limits, 0, silent)
    assert [found[one].repeats for one in tasks] == [1, 1]


def test_a_late_first_look_is_left_out() -> None:
    needed = task("needed", 1.0, indispensable=True)
    late = attrs.evolve(LIMITS, look_s=-1)
    assert list(measure.first_look([task("late", 1.0), needed], Clock(), late, silent)) == [needed]


def test_statistics_of_a_timing() -> None:
    timing = Timing((tuple(Reading(ns, 2 * ns) for ns in (10.0, 20.0, 30.0)), tuple(Reading(40.0, 0.0) for _ in "ab")))
    assert (timing.device_ns, timing.host_ns, timing.repeats) == (30.0, 20.0, 5)
    assert timing.fastest_ns == 10.0
    # The medians of the rounds are 20 and 40, their quartiles 25 and 35.
    assert timing.spread == pytest.approx((35 - 25) / 30)
    assert timing.drift == pytest.approx(40 / 20 - 1)


def test_nothing_is_collected_while_the_clock_runs() -> None:
    with measure.collector_off():
        assert not gc.isenabled()
    assert gc.isenabled()


class Log:
    """Notes what is done, on a clock where reading memory takes 1,000 ns and anything else 10 ns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.now = 0
        monkeypatch.setattr(stopwatches.time, "perf_counter_ns", self.read_clock)

    def read_clock(self) -> int:
        self.now += 10
        return self.now

    def evict(self) -> None:
        self.done.append("evict")
        self.now += 1000

    def call(self) -> None:
        self.done.append("call")
        self.now += 500

    def touch(self) -> None:
        self.done.append("touch")


def test_a_short_call_is_timed_with_cold_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(monkeypatch)
    stopwatch = CpuStopwatch(log.evict)
    log.done.clear()
    call = Call(log.call, (SimpleNamespace(sum=log.touch),))
    assert stopwatch.read(task("short", 0), call, 1e3) == Reading(500, 0)
    assert log.done == ["touch", "evict", "call"]


def test_a_long_call_is_timed_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(monkeypatch)
    stopwatch = CpuStopwatch(log.evict)
    log.done.clear()
    call = Call(log.call, (SimpleNamespace(sum=log.touch),))
    assert stopwatch.read(task("long", 0), call, 3e6) == stopwatch.once(task("long", 0), call) == Reading(500, 0)
    assert log.done == ["call", "call"]


def test_a_ceiling_is_timed_in_a_tight_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(monkeypatch)
    stopwatch = CpuStopwatch(log.evict)
    log.done.clear()
    reading = stopwatch.read(task("ceiling", 0, ceiling=True), Call(log.call), 100_000)
    assert log.done == ["call"] * (1 + 5)
    assert reading.device_ns == pytest.approx(500, abs=10)


def test_what_is_evicted_by_differs_and_exceeds_the_second_cache(monkeypatch: pytest.MonkeyPatch, buffer) -> None:
    monkeypatch.setattr(operands, "_caches", lambda: {1: 1 << 14, 2: 1 << 20})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(operands.F, "linear", lambda _, weight: seen.append(weight))
    evict = Eviction(buffer, torch.bfloat16)
    evict()
    evict()
    assert [weight.nbytes for weight in seen] == [4 << 20] * 2
    assert seen[1].data_ptr() >= seen[0].data_ptr() + (4 << 20)


def test_caches_are_read_from_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(operands, "_CACHES_OF_A_CPU", tmp_path)
    unknown = last_level_cache_bytes(CPU)
    for number, (level, size) in enumerate([(1, "48K"), (2, "1024K"), (3, "999424K")]):
        entry = tmp_path / f"index{number}"
        entry.mkdir()
        (entry / "level").write_text(f"{level}\n")
        (entry / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(CPU) == 999_424 << 10 > unknown > 0


def test_inputs_are_told_and_cold_operands_are_not(buffer) -> None:
    sizes = {"rows": 4, "in_features": 256, "out_features": 512, "dtype": "bfloat16"}
    plain, biased = (call_of("linear", sizes | {"bias": bias}, buffer).inputs for bias in (False, True))
    assert [tensor.numel() for tensor in plain] == [4 * 256]
    assert [tensor.numel() for tensor in biased] == [4 * 256, 512]
    assert [tensor.dtype for tensor in call_of("sort", {"elements": 6}, buffer).inputs] == [torch.int64]


class FakeCuda:
    """A GPU of which each call takes 3 µs, and that notes what it is told."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def synchronize(self, _: torch.device) -> None:
        self.log.append("synchronize")

    def _sleep(self, cycles: int) -> None:
        self.log.append("hold")
        self.held = cycles

    def Event(self, *, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        return SimpleNamespace(record=lambda: self.log.append("event"), elapsed_time=lambda _: 0.012)


@pytest.mark.parametrize("waits", [False, True])
def test_a_gpu_is_held_back_while_the_host_launches(monkeypatch: pytest.MonkeyPatch, waits) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(stopwatches.torch, "cuda", fake)
    stopwatch, call = CudaStopwatch(torch.device("cuda", 0)), Call(lambda: fake.log.append("call"))
    reading = stopwatch.read(task("a", 0, waits=waits), call, 125_000)
    hold = [] if waits else ["hold"]
    assert fake.log == ["call", "synchronize", *hold, "event", *["call"] * 4, "event", "synchronize"]
    assert reading.device_ns == pytest.approx(3000)
    assert reading.host_ns > 0
    # The host may take as long for every call at a clock of 2 GHz.
    assert waits or fake.held == 4 * 200_000 * 2


def test_blocks_on_a_gpu_fit_into_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(stopwatches.torch, "cuda", fake)
    call = Call(lambda: fake.log.append("call"))
    CudaStopwatch(torch.device("cuda", 0)).read(task("a", 0), call, 1.0)
    assert Counter(fake.log)["call"] == 1 + 16


def timing(device_ns: float, host_ns: float) -> Timing:
    return Timing(((Reading(device_ns, host_ns),),))


@pytest.mark.parametrize(("kind", "launch"), [("cpu", 0.0), ("cuda", 20_000 - 5_000 - 6_000 - 2_000)])
def test_host_costs(kind, launch) -> None:
    on_host = {"module": 1_200.0, "function": 200.0, "view": 3_200.0, "turns": 640.0, "read_back": 9_000.0}
    on_host |= {"wait": 6_000.0, "launch_and_wait": 20_000.0, "shortest": 5_000.0}
    timings = {name: timing(ns, 0.0) if kind == "cpu" else timing(1.0, ns) for name, ns in on_host.items()}
    timings["shortest"] = timing(2_000.0, 5_000.0)
    found = host_costs(timings, kind)
    assert (found.module_call_ns, found.dispatch_ns, found.loop_turn_ns) == (1_000, 3_000, 10)
    assert found.operator_ns == (0 if kind == "cpu" else 5_000)
    assert (found.launch_ns, found.kernel_floor_ns, found.synchronise_ns) == (launch, 2_000, 9_000)
    assert (found.fresh_byte_ns, found.fresh_from_bytes) == (0.0, 1 << 62)


def test_a_byte_of_new_memory_costs_what_it_takes_above_a_kept_one() -> None:
    fresh, kept = {100: 80.0, 200: 60.0, 400: 130.0}, {100: 10.0, 200: 20.0, 400: 30.0}
    timings = {("fresh", size): timing(nanoseconds, 0) for size, nanoseconds in fresh.items()}
    timings |= {("kept", size): timing(nanoseconds, 0) for size, nanoseconds in kept.items()}
    assert fresh_byte_ns(timings) == pytest.approx((130 - 30) / 400)
    assert fresh_byte_ns(timings | {("kept", 200): timing(90.0, 0), ("kept", 400): timing(900.0, 0)}) == 0


def faults(run) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(fresh_from_bytes() is None, reason="the C library is not glibc")
def test_kept_memory_is_not_made_again() -> None:
    size = 96 << 20
    with kept_memory():
        # The heap grows at first.
        *_, last = (faults(lambda: torch.empty(size, dtype=torch.uint8).fill_(1)) for _ in range(16))
    assert last < size >> 21
    assert 8 << 20 < fresh_from_bytes() <= 48 << 20


def test_new_memory_is_new_each_time() -> None:
    calls = {key: task.prepare() for key, task in fill_tasks().items()}
    for (kind, size), call in calls.items():
        call.run()
        # A large page is 2 MB.
        assert (faults(call.run) >= size >> 21) == (kind == "fresh")


def test_a_calibration_apart_tells_its_phases_and_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [point for point in grid("bfloat16") if point.operator == "silu"][:2]
    phases = []
    limits = Limits(5, 30, 0.01, 0.01, rounds=1)
    known = {"hardware": load_hardware("cpu-generic"), "name": "there", "points": points, "limits": limits}
    found = calibrate_apart(CPU, ["bfloat16"], progress=lambda *phase: phases.append(phase), **known)
    assert (found.device, len(found.samples)) == ("there", 2)
    assert phases[-1][0] == "rounds"
    with pytest.raises(AttributeError, match="nonsense"):
        calibrate_apart(CPU, ["nonsense"], progress=lambda *_: None, **known)
    monkeypatch.setattr("stage_runners.calibration.apart._calibrate", sys.exit)
    with pytest.raises(DsocrTraceError, match="ended with exit code 1; run it again"):
        calibrate_apart(CPU, ["bfloat16"], progress=lambda *_: None, **known)


def test_the_control_reads_what_a_calibration_reads() -> None:
    point = ControlPoint(CPU, "bfloat16").read()
    assert point.keys() == {"product", "row", "copy"}
    # A product of one row reads its weights; one of 768 does as many times the arithmetic.
    assert 0 < point["row"] < point["product"]


def test_a_small_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage_runners.calibration.session._OPERAND_BYTES", 1 << 26)
    points = [point for point in grid("bfloat16") if point.operator == "silu"][:3]
    phases = []
    found = calibrate(
        CPU,
        ["bfloat16"],
        hardware=load_hardware("cpu-generic"),
        name="here",
        points=points,
        limits=Limits(5, 65, 0.01, 0.01, rounds=3),
        progress=lambda *p: phases.append(p),
    )
    assert (found.device, found.kind) == ("here", "cpu")
    assert [dict(sample.arguments) for sample in found.samples] == [dict(point.arguments) for point in points]
    assert all(sample.device_ns > 0 and sample.host_ns == 0 and sample.repeats >= 3 for sample in found.samples)
    assert set(found.tensor_flops_per_s) == {"bfloat16", "float32"}
    assert min(found.memory_bytes_per_s) == 4096
    assert found.host.module_call_ns > 0
    assert found.host.launch_ns == 0
    assert found.host.fresh_byte_ns > 0
    assert set(found.state["control_ns"]["bfloat16"]) == {"product", "row", "copy"}
    assert found.state["points_left_out"] == 0
    assert any(note.startswith("noisy") for note in found.notes) == found.state["noisy"]
    assert [phase for phase, done, total in phases if done == total] == ["rounds"]


@pytest.mark.parametrize(("spread", "drift", "noisy"), [(0.1, 0.05, False), (0.2, 0.05, True), (0.1, -0.2, True)])
def test_a_noisy_calibration_says_so(monkeypatch: pytest.MonkeyPatch, spread, drift, noisy) -> None:
    monkeypatch.setattr("stage_runners.calibration.session._OPERAND_BYTES", 1 << 26)
    monkeypatch.setattr(Timing, "spread", spread)
    monkeypatch.setattr(Timing, "drift", drift)
    found = calibrate(
        CPU,
        ["bfloat16"],
        hardware=load_hardware("cpu-generic"),
        name="here",
        points=[],
        limits=Limits(5, 65, 0.01, 0.01, rounds=3),
        progress=silent,
    )
    assert found.state["noisy"] is noisy
    assert any(note.startswith("noisy: the median spread is 20%") for note in found.notes) == (spread > 0.15)
