"""Backtest: many short generations of one loaded model, each measured plain and traced, between two control points.

A trial warms up with one prefill and one decode step. Then the same generation runs twice: plain, which gives the walls
of the stages, and traced, which gives the time of every module. Which of them goes first alternates from trial to
trial. A control, a fixed matrix product and a fixed copy, is timed before and after: it tells whether the machine
itself changed.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import torch

from hooks.tracer import PositionStages, Tracer
from stage_runners.generate import Generation
from stage_runners.inputs import build_inputs
from stage_runners.measurement import Repeat
from stage_runners.pages import synthetic_page
from stage_runners.stage1 import VISION_SUBTREES, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pyarrow as pa
    from torch import nn

    from analytic.config import DecoderConfig
    from analytic.workload import Workload
    from stage_runners.inputs import ModelInputs

#: The control: a product of this side in fp32, a copy that moves these bytes, and how often each is timed.
CONTROL_SIDE: Final = 512
CONTROL_BYTES: Final = 1 << 24
_CONTROL_READINGS: Final = 41
_WARM_UP_TOKENS: Final = 2


@attrs.frozen
class Trial:
    """One generation to measure.

    Attributes
    ----------
    number
        Place in the list, before the list is shuffled.
    workload
        What to run.
    seed
        Of the page that is drawn, and of the prompt's text.
    """

    number: int
    workload: Workload
    seed: int


@attrs.frozen
class Control:
    """Median times of the control, in ns."""

    product_ns: int
    copy_ns: int


@attrs.frozen(eq=False)
class MeasuredTrial:
    """What a trial took.

    Attributes
    ----------
    trial
        Which one.
    plain, traced
        Walls of the stages without and with the tracer; the choice of a token belongs to the forward before it.
    own_ns
        Under the tracer, by stage and module path: time in the module's own forward, without the modules that it calls.
    between_ns
        Under the tracer, by stage: time outside every module.
    before, after
        The control.
    """

    trial: Trial
    plain: Repeat
    traced: Repeat
    own_ns: Mapping[tuple[str, str], int]
    between_ns: Mapping[str, int]
    before: Control
    after: Control


class ControlPoint:
    """Work of which only the machine decides how long it takes.

    Parameters
    ----------
    device
        Where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._left, self._right = (torch.ones(CONTROL_SIDE, CONTROL_SIDE, device=device) for _ in range(2))
        self._source, self._target = (torch.ones(CONTROL_BYTES // 8, device=device) for _ in range(2))

    def read(self) -> Control:
        """Time it now."""
        return Control(
            product_ns=self._median(lambda: torch.mm(self._left, self._right)),
            copy_ns=self._median(lambda: self._target.copy_(self._source)),
        )

    def _median(self, call: Callable[[], object]) -> int:
        times = []
        for _ in range(_CONTROL_READINGS):
            start = time.perf_counter_ns()
            call()
            _wait(self._device)
            times.append(time.perf_counter_ns() - start)
        # The first few wake up threads and fill caches.
        return int(np.median(times[_CONTROL_READINGS // 4 :]))


def run_trials(
    model: nn.Module, trials: Sequence[Trial], decoder: DecoderConfig, progress: Progress
) -> Iterator[MeasuredTrial]:
    """Measure trials, one after the other in the order given.

    Parameters
    ----------
    model
        Ready for inference on its device.
    trials
        What to run.
    decoder
        Sizes and special ids of the decoder.
    progress
        Called as the work goes on.
    """
    bench = _Bench(model, decoder)
    for done, trial in enumerate(trials):
        progress("trials", done, len(trials))
        # Standard output is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            measured = bench.measure(trial, traced_first=bool(done % 2))
        yield measured
    progress("trials", len(trials), len(trials))


class _Bench:
    """The model, its tracer and the control."""

    def __init__(self, model: nn.Module, decoder: DecoderConfig) -> None:
        self._model, self._decoder = model, decoder
        weights = next(model.parameters())
        self._device, self._dtype = weights.device, weights.dtype
        self._control = ControlPoint(self._device)
        subtrees = dict.fromkeys(VISION_SUBTREES, "vision")
        self._tracer = Tracer(model, detector=PositionStages(), stage_of_subtree=subtrees)

    def measure(self, trial: Trial, *, traced_first: bool) -> MeasuredTrial:
        page = synthetic_page(trial.workload, seed=trial.seed)
        inputs = build_inputs(page, trial.workload, self._decoder, seed=trial.seed).to(self._device, self._dtype)
        self._generate(inputs, min(_WARM_UP_TOKENS, trial.workload.max_new_tokens))
        gc.collect()
        before, repeats = self._control.read(), {}
        for traced in (traced_first, not traced_first):
            self._tracer.clear()
            with self._tracer if traced else contextlib.nullcontext():
                repeats[traced] = self._generate(inputs, trial.workload.max_new_tokens)
            if traced:
                calls = self._tracer.calls()
        after = self._control.read()
        own_ns, inside_ns = own_times(calls)
        walls = {
            "prefill": repeats[True].vision_ns + repeats[True].prefill_ns,
            "decode": sum(repeats[True].decode_ns),
        }
        between_ns = {stage: wall - inside_ns.get(stage, 0) for stage, wall in walls.items()}
        return MeasuredTrial(trial, repeats[False], repeats[True], own_ns, between_ns, before, after)

    def _generate(self, inputs: ModelInputs, tokens: int) -> Repeat:
        """One generation; two hooks tell vision from prefill."""
        generation, decode = Generation(self._model, inputs), []
        with self._vision_marks() as marks:
            start = time.perf_counter_ns()
            generation.start()
            prefill = time.perf_counter_ns() - start
        for _ in range(tokens - 1):
            start = time.perf_counter_ns()
            generation.advance()
            decode.append(time.perf_counter_ns() - start)
        vision = marks[-1] - marks[0]
        return Repeat(vision, prefill - vision, tuple(decode))

    @contextlib.contextmanager
    def _vision_marks(self) -> Iterator[list[int]]:
        """Times of the first vision call's beginning, and of the end of each view; a GPU is waited for there."""
        marks: list[int] = []
        first, *_, last = (self._model.get_submodule(path) for path in VISION_SUBTREES)

        def begin(*_: object) -> None:
            if not marks:
                marks.append(time.perf_counter_ns())

        def end(*_: object) -> None:
            _wait(self._device)
            marks.append(time.perf_counter_ns())

        hooks = (first.register_forward_pre_hook(begin), last.register_forward_hook(end))
        try:
            yield marks
        finally:
            for hook in hooks:
                hook.remove()


def own_times(calls: pa.Table) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """Time that modules spend in their own forwards.

    Parameters
    ----------
    calls
        With the schema `hooks.tables.CALLS`.

    Returns
    -------
    tuple of dict and dict
        By stage and module path, the duration of all calls less that of the calls which they make, in ns; and by stage
        of the outermost calls, their duration. Both add up to the same.
    """
    numbers = {name: calls[name].to_numpy() for name in ("start_ns", "end_ns")}
    parents = calls["parent_call_id"].fill_null(-1).to_numpy()
    duration = numbers["end_ns"] - numbers["start_ns"]
    own = duration.copy()
    inner = parents >= 0
    # Rows are in the order of call_id, which counts from 0.
    np.subtract.at(own, parents[inner], duration[inner])
    by_module: defaultdict[tuple[str, str], int] = defaultdict(int)
    outermost: defaultdict[str, int] = defaultdict(int)
    stages, paths = calls["stage"].to_pylist(), calls["module_path"].to_pylist()
    for row, key in enumerate(zip(stages, paths, strict=True)):
        by_module[key] += int(own[row])
        if not inner[row]:
            outermost[key[0]] += int(duration[row])
    return dict(by_module), dict(outermost)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
