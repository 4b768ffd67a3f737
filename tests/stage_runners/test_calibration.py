"""Executors against formulas and the model's code; timing discipline with a clock that is played by a fake."""

from __future__ import annotations

import gc
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from analytic.cost import DTYPES
from analytic.operators import OPERATORS
from stage_runners.calibration import calibrate, measure
from stage_runners.calibration.executors import EXECUTORS, call_of
from stage_runners.calibration.grids import Point, grid
from stage_runners.calibration.host import host_costs
from stage_runners.calibration.measure import CpuStopwatch, CudaStopwatch, Limits, Reading, Task, Timing
from stage_runners.calibration.operands import Buffer, Operands, OperandsTooLargeError
from stage_runners.calibration.session import grid_of
from stage_runners.deepseek_ocr import ATTENTION_IMPLEMENTATIONS

CPU = torch.device("cpu")
LIMITS = Limits(look_s=60, budget_s=60, call_s=1.0, rounds=2)

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
        result = call_of(point.operator, point.arguments, buffer)()
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


def dispatched(*calls: Any) -> Counter[str]:
    with torch.no_grad(), Dispatched() as seen:
        for call in calls:
            call()
    return seen.names


@pytest.mark.parametrize("queries", [1, 16])
def test_eager_attention_runs_the_operators_of_the_model(queries, buffer) -> None:
    sizes = {"heads": 2, "queries": queries, "keys": 16, "dtype": "bfloat16"}
    ours = [call_of("attention_eager", sizes | {"head_dim": 8}, buffer)]
    if queries > 1:
        ours.append(call_of("causal_mask", sizes, buffer))
    query, key = (torch.zeros(1, length, 2, 8, dtype=torch.bfloat16).transpose(1, 2) for length in (queries, 16))
    attend, key = ATTENTION_IMPLEMENTATIONS["eager"], key.contiguous()
    assert dispatched(*ours) == dispatched(lambda: attend(query, key, key))


def test_the_cache_is_extended_as_transformers_does(buffer) -> None:
    old, new = torch.zeros(1, 1, 7, 64), torch.zeros(1, 1, 1, 64)
    cache = DynamicCache()
    cache.update(old, old, 0)
    ours = call_of("kv_cache_append", {"cached": 2 * 64 * 8, "added": 2 * 64, "dtype": "float32"}, buffer)
    assert dispatched(ours) == dispatched(lambda: cache.update(new, new, 0))


@pytest.mark.parametrize(("counted", "causal"), [("rectangle", False), ("triangle", True)])
def test_fused_attention_is_causal_where_the_triangle_counts(counted, causal, buffer) -> None:
    sizes = {"heads": 1, "queries": 4, "keys": 4, "head_dim": 64, "dtype": "float32", "counted": counted}
    out = call_of("sdpa", sizes, buffer)()
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

    max_calls = 10

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, call: Any, number: int, *, waits: bool) -> Reading:
        name, took = call()
        self.log.append(f"{name}x{number}")
        return Reading(took, float(waits))


def task(name: str, took: float, *, group: str = "a", **options: Any) -> Task:
    return Task(group, lambda: lambda: (name, took), **options)


def test_larger_points_are_not_even_prepared() -> None:
    def never() -> Any:
        raise AssertionError

    fast, slow = task("fast", 1e6), task("slow", 0.7e9)
    larger = Task("a", never, larger_than=lambda other: other is slow)
    too_slow = task("too slow", 1.5e9)
    needed = task("needed", 1.5e9, indispensable=True, larger_than=lambda other: other is slow)
    found = measure.first_look([fast, slow, larger, too_slow, needed], Clock(), LIMITS, silent)
    assert found == {fast: 1e6, slow: 0.7e9, needed: 1.5e9}


def test_what_does_not_fit_into_memory_is_left_out() -> None:
    def too_large() -> Any:
        raise OperandsTooLargeError

    assert measure.first_look([Task("a", too_large)], Clock(), LIMITS, silent) == {}


def test_the_budget_is_shared_between_groups() -> None:
    heavy = {task(f"heavy {number}", number * 1e9, group="heavy"): number * 1e9 for number in range(1, 8)}
    light = {task(f"light {number}", 1e6, group="light"): 1e6 for number in range(10)}
    kept = measure.affordable(heavy | light, Limits(look_s=9, budget_s=45, call_s=9, rounds=2))
    # Two rounds of 1 + 2 + ... + 6 s fit, 7 s more do not.
    assert kept == {t: took for t, took in heavy.items() if took < 7e9} | light


def test_a_group_keeps_its_smallest_and_what_is_indispensable() -> None:
    found = {task(str(number), 1e9): 1e9 + number for number in range(6)}
    kept = measure.affordable(found, Limits(look_s=9, budget_s=0, call_s=9))
    assert list(kept.values()) == [1e9, 1e9 + 1, 1e9 + 2]
    needed = {task("needed", 1e9, indispensable=True): 1e9 + number for number in range(6)}
    assert measure.affordable(needed, Limits(look_s=9, budget_s=0, call_s=9)) == needed


def test_rounds_are_interleaved_and_short_calls_come_in_blocks() -> None:
    clock, quick, slow = Clock(), task("quick", 100.0), task("slow", 1e9)
    found = measure.measure([quick, slow], clock, LIMITS, silent)
    one_round = ["quickx1", *["quickx10"] * 5, "slowx1"]
    assert clock.log == one_round * 2
    assert (found[quick].repeats, found[slow].repeats) == (10, 2)
    assert (found[quick].device_ns, found[slow].device_ns) == (100.0, 1e9)


def test_rounds_end_with_the_budget_but_not_the_first() -> None:
    tasks = [task("one", 1e9), task("two", 1e9)]
    found = measure.measure(tasks, Clock(), Limits(look_s=9, budget_s=0, call_s=1, rounds=9), silent)
    assert [found[one].repeats for one in tasks] == [1, 1]


def test_a_late_first_look_is_left_out() -> None:
    needed = task("needed", 1.0, indispensable=True)
    found = measure.first_look([task("late", 1.0), needed], Clock(), Limits(look_s=-1, budget_s=9, call_s=1), silent)
    assert found == {needed: 1.0}


def test_statistics_of_a_timing() -> None:
    timing = Timing((tuple(Reading(ns, 2 * ns) for ns in (10.0, 20.0, 30.0)), tuple(Reading(40.0, 0.0) for _ in "ab")))
    assert (timing.device_ns, timing.host_ns, timing.repeats) == (30.0, 20.0, 5)
    assert timing.spread == pytest.approx((40 - 20) / 30)
    assert timing.drift == pytest.approx(40 / 20 - 1)


def test_nothing_is_collected_while_the_clock_runs() -> None:
    seen = []
    CpuStopwatch()(lambda: seen.append(gc.isenabled()), 3, waits=False)
    assert seen == [False] * 3
    assert gc.isenabled()


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
    monkeypatch.setattr(measure.torch, "cuda", fake)
    reading = CudaStopwatch(torch.device("cuda", 0))(lambda: fake.log.append("call"), 4, waits=waits)
    hold = [] if waits else ["hold"]
    assert fake.log == ["synchronize", *hold, "event", *["call"] * 4, "event", "synchronize"]
    assert reading.device_ns == pytest.approx(3000)
    assert reading.host_ns > 0
    # The host may take as long for every call at a clock of 2 GHz.
    assert waits or fake.held == 4 * 200_000 * 2


def timing(device_ns: float, host_ns: float) -> Timing:
    return Timing(((Reading(device_ns, host_ns),),))


@pytest.mark.parametrize(("kind", "launch"), [("cpu", 0.0), ("cuda", 20_000 - 5_000 - 6_000 - 2_000)])
def test_host_costs(kind, launch) -> None:
    on_host = {"modules": 60_000.0, "functions": 10_000.0, "views": 3_000.0, "turns": 640.0, "read_back": 9_000.0}
    on_host |= {"wait": 6_000.0, "launch_and_wait": 20_000.0, "shortest": 5_000.0}
    timings = {name: timing(ns, 0.0) if kind == "cpu" else timing(1.0, ns) for name, ns in on_host.items()}
    timings["shortest"] = timing(2_000.0, 5_000.0)
    found = host_costs(timings, kind)
    assert (found.module_call_ns, found.dispatch_ns, found.loop_turn_ns) == (1_000, 1_000, 10)
    assert (found.launch_ns, found.kernel_floor_ns, found.synchronise_ns) == (launch, 2_000, 9_000)


def test_a_small_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage_runners.calibration.session._OPERAND_BYTES", 1 << 26)
    points = [point for point in grid("bfloat16") if point.operator == "silu"][:3]
    phases = []
    found = calibrate(
        CPU,
        ["bfloat16"],
        name="here",
        points=points,
        limits=Limits(5, 60, 0.01, rounds=3),
        progress=lambda *p: phases.append(p),
    )
    assert (found.device, found.kind) == ("here", "cpu")
    assert [dict(sample.arguments) for sample in found.samples] == [dict(point.arguments) for point in points]
    assert all(sample.device_ns > 0 and sample.host_ns == 0 and sample.repeats >= 3 for sample in found.samples)
    assert set(found.tensor_flops_per_s) == {"bfloat16", "float32"}
    assert min(found.memory_bytes_per_s) == 4096
    assert found.host.module_call_ns > 0
    assert found.host.launch_ns == 0
    assert found.state["points_left_out"] == 0
    assert any(note.startswith("noisy") for note in found.notes) == found.state["noisy"]
    assert [phase for phase, done, total in phases if done == total] == ["rounds"]


@pytest.mark.parametrize(("spread", "drift", "noisy"), [(0.1, 0.05, False), (0.2, 0.05, True), (0.1, -0.2, True)])
def test_a_noisy_calibration_says_so(monkeypatch: pytest.MonkeyPatch, spread, drift, noisy) -> None:
    monkeypatch.setattr("stage_runners.calibration.session._OPERAND_BYTES", 1 << 26)
    monkeypatch.setattr(Timing, "spread", spread)
    monkeypatch.setattr(Timing, "drift", drift)
    found = calibrate(CPU, [], name="here", points=[], limits=Limits(5, 60, 0.01, rounds=3), progress=silent)
    assert found.state["noisy"] is noisy
    assert any(note.startswith("noisy: the median spread is 20%") for note in found.notes) == (spread > 0.15)
