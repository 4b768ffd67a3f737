"""Peaks of nested calls, and growth of the cache."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from analytic.config import variant_config
from hooks.tracer import PositionStages, Tracer
from stage_runners.generate import Generation
from stage_runners.measurement import MeasuredMemory
from stage_runners.memory import CacheRecorder, PeakClock, combined, module_peaks

if TYPE_CHECKING:
    from collections.abc import Callable

    from stage_runners.inputs import ModelInputs


class FakeAllocator:
    """Keeps a peak as torch's does, and beside it all that ever happened."""

    def __init__(self, held: int = 0) -> None:
        self._held = self._peak = held
        self.history = [held]

    def take(self, size: int) -> None:
        self._held += size
        self._peak = max(self._peak, self._held)
        self.history.append(self._held)

    def allocated(self) -> int:
        return self._held

    def peak(self) -> int:
        return self._peak

    def reset_peak(self) -> None:
        self._peak = self._held


def peaks(clock: PeakClock, *pairs: tuple[int, int]) -> list[int]:
    start, end = np.array(pairs, np.int64).T
    return clock.peaks_above_start(start, end).tolist()


def test_a_childs_peak_is_its_parents_too() -> None:
    """A parent holds 5, its child takes 100 for a moment, the parent then 20."""
    allocator = FakeAllocator(held=1000)
    clock = PeakClock(allocator)
    outer = clock()
    allocator.take(5)
    inner = clock()
    allocator.take(100)
    allocator.take(-100)
    inner_end = clock()
    allocator.take(20)
    outer_end = clock()
    assert peaks(clock, (outer, outer_end), (inner, inner_end)) == [105, 100]


def test_a_parents_own_peak_is_not_its_childs() -> None:
    allocator = FakeAllocator()
    clock = PeakClock(allocator)
    outer = clock()
    allocator.take(70)
    allocator.take(-70)
    inner = clock()
    allocator.take(3)
    inner_end = clock()
    allocator.take(50)
    assert peaks(clock, (outer, clock()), (inner, inner_end)) == [70, 3]


def test_a_call_that_only_frees_has_no_peak() -> None:
    allocator = FakeAllocator(held=10)
    clock = PeakClock(allocator)
    start = clock()
    allocator.take(-10)
    assert peaks(clock, (start, clock())) == [0]


def test_without_calls() -> None:
    none = np.empty(0, np.int64)
    assert PeakClock(FakeAllocator()).peaks_above_start(none, none).tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_nested_calls_against_the_whole_history(seed: int) -> None:
    """Random trees of calls that take and free: each peak is the largest of all that was held during the call."""
    chance = random.Random(seed)  # noqa: S311
    allocator = FakeAllocator(held=500)
    clock = PeakClock(allocator)
    calls: list[tuple[int, int]] = []
    expected: list[int] = []

    def call(depth: int) -> None:
        start, before = clock(), len(allocator.history) - 1
        for _ in range(chance.randrange(4)):
            allocator.take(chance.randint(-allocator.allocated(), 400))
            if depth < 5 and chance.random() < 0.6:
                call(depth + 1)
        calls.append((start, clock()))
        during = allocator.history[before:]
        expected.append(max(during) - during[0])

    for _ in range(5):
        call(0)
        allocator.take(chance.randint(-allocator.allocated(), 400))
    assert peaks(clock, *calls) == expected


class Doubling(nn.Module):
    """Takes twice of what it is told, gives half back, and calls its child in between."""

    def __init__(self, allocator: FakeAllocator, child: nn.Module | None = None) -> None:
        super().__init__()
        self.child = child
        self._allocator = allocator

    def forward(self, size: int) -> int:
        self._allocator.take(2 * size)
        if self.child is not None:
            self.child(10 * size)
        self._allocator.take(-size)
        return size


def test_the_largest_call_of_a_module_counts() -> None:
    allocator = FakeAllocator()
    model = Doubling(allocator, Doubling(allocator))
    clock = PeakClock(allocator)
    with Tracer(model, clock=clock) as tracer:
        model(1)
        model(3)
        model(2)
    # Own 2 x 3, and 20 x 3 of the child on top of it.
    assert module_peaks(tracer.calls(), clock) == {("other", ""): 66, ("other", "child"): 60}


def test_every_call_of_the_model_has_a_peak(
    tiny_model: Callable[..., nn.Module], inputs_of: Callable[..., ModelInputs]
) -> None:
    """On the model itself, whose operators do not reach the fake: all peaks are there, and zero."""
    model, clock = tiny_model(), PeakClock(FakeAllocator())
    stages = {"model.sam_model": "vision", "model.vision_model": "vision", "model.projector": "vision"}
    with Tracer(model, detector=PositionStages(), stage_of_subtree=stages, clock=clock) as tracer:
        generation = Generation(model, inputs_of())
        generation.start()
        generation.advance()
    calls = tracer.calls()
    found = module_peaks(calls, clock)
    assert set(found) == set(zip(calls["stage"].to_pylist(), calls["module_path"].to_pylist(), strict=True))
    assert {stage for stage, _ in found} == {"vision", "prefill", "decode"}
    assert set(found.values()) == {0}


# --- cache ---


def test_growth_of_the_cache_by_stage(
    tiny_model: Callable[..., nn.Module], inputs_of: Callable[..., ModelInputs]
) -> None:
    """Keys and values of every position: fp32, so four bytes a number."""
    model, inputs = tiny_model(), inputs_of()
    decoder = variant_config("deepseek-ocr-v1-tiny").decoder
    recorder = CacheRecorder(model)
    with Tracer(model, observers=recorder.observers):
        generation = Generation(model, inputs)
        generation.start()
        for _ in range(3):
            generation.advance()
    position = 2 * decoder.kv_heads * decoder.head_dim * 4
    expected = {}
    for layer in range(decoder.layers):
        path = f"model.layers.{layer}.self_attn"
        expected |= {("prefill", path): inputs.workload.seq_len * position, ("decode", path): 3 * position}
    assert recorder.growth() == expected


def test_a_cleared_recorder_starts_anew(tiny_model: Callable[..., nn.Module]) -> None:
    recorder = CacheRecorder(tiny_model())
    assert recorder.growth() == {}
    observe = recorder.observers[""]
    path = "model.layers.0.self_attn"
    for positions in (5, 2):
        recorder.clear()
        observe(output_of(positions))
        assert recorder.growth() == {("prefill", path): 2 * positions * 8 * 4, ("decode", path): 0}


def output_of(positions: int) -> object:
    """A model's output with a cache of one layer: one head of eight numbers."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, positions, 8), torch.zeros(1, 1, positions, 8), 0)

    @attrs.frozen
    class Output:
        past_key_values: DynamicCache

    return Output(cache)


def test_pages_together() -> None:
    key, other = ("prefill", "a"), ("decode", "b")
    pages = [MeasuredMemory({key: 3}, {key: 10, other: 1}), MeasuredMemory({key: 4}, {key: 7, other: 2})]
    assert combined(pages) == MeasuredMemory({key: 7}, {key: 10, other: 2})
    assert combined([MeasuredMemory({}, {}), MeasuredMemory({key: 0}, {key: 0})]) == MeasuredMemory({key: 0}, {key: 0})
