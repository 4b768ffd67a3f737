"""Backtest: many short generations of one loaded model, each measured plain and traced, between readings of a control.

A trial warms up with one prefill and one decode step. Then the same generation runs plain, which gives the walls of the
stages: three times, of which the middle one counts, since one of them may meet a slow moment of the machine. And it
runs traced, which gives the time of every module. Which of them goes first alternates from trial to trial. On a GPU the
host's clock does not tell what a module takes: there it is the kernels of another generation, under the profiler.
Around each of these the control is read (`stage_runners.calibration.control`): it tells whether the machine itself
changed.
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

from hooks.attribution import UNCLASSIFIED, attribute
from hooks.capture import EventCapture
from hooks.tracer import PositionStages, Tracer
from stage_runners.calibration.control import ControlPoint
from stage_runners.generate import Generation
from stage_runners.inputs import build_inputs
from stage_runners.measurement import Repeat
from stage_runners.pages import synthetic_page
from stage_runners.routing import RoutingRecorder
from stage_runners.stage1 import VISION_SUBTREES, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pyarrow as pa
    from torch import nn

    from analytic.config import DecoderConfig
    from analytic.workload import Workload
    from stage_runners.inputs import ModelInputs
    from stage_runners.measurement import RoutingCounts

_WARM_UP_TOKENS: Final = 2
#: Plain generations of a trial.
_PLAIN: Final = 3


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


@attrs.frozen(eq=False)
class MeasuredTrial:
    """What a trial took.

    Attributes
    ----------
    trial
        Which one.
    plain, traced
        Walls of the stages without and with the tracer; the choice of a token belongs to the forward before it. Of
        several plain generations the one whose total is in the middle.
    own_ns
        By stage and module path: time in the module's own forward, without the modules that it calls; under the tracer,
        or on a GPU the busy time of the device.
    between_ns
        The same by stage, outside every module.
    routing
        What the routers chose.
    control
        Each of its times in ns: the median over the points before, between and after the generations.
    """

    trial: Trial
    plain: Repeat
    traced: Repeat
    own_ns: Mapping[tuple[str, str], int]
    between_ns: Mapping[str, int]
    routing: RoutingCounts
    control: Mapping[str, float]


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
        self._control = ControlPoint(self._device, str(self._dtype).removeprefix("torch."))
        subtrees = dict.fromkeys(VISION_SUBTREES, "vision")
        self._routing = RoutingRecorder(model, decoder.routed_experts)
        self._tracer = Tracer(
            model, detector=PositionStages(), stage_of_subtree=subtrees, observers=self._routing.observers
        )

    def measure(self, trial: Trial, *, traced_first: bool) -> MeasuredTrial:
        page = synthetic_page(trial.workload, seed=trial.seed)
        inputs = build_inputs(page, trial.workload, self._decoder, seed=trial.seed).to(self._device, self._dtype)
        self._generate(inputs, min(_WARM_UP_TOKENS, trial.workload.max_new_tokens))
        gc.collect()
        controls, plain = [self._control.read()], []
        self._tracer.clear()
        self._routing.clear()
        for traces in sorted([False] * _PLAIN + [True], reverse=traced_first):
            with self._tracer if traces else contextlib.nullcontext():
                repeat = self._generate(inputs, trial.workload.max_new_tokens)
            if traces:
                traced = repeat
                own_ns, between_ns = module_times(self._tracer.calls(), traced)
            else:
                plain.append(repeat)
            controls.append(self._control.read())
        routing = self._routing.counts()
        if self._device.type == "cuda":
            own_ns, between_ns = self.device_times(inputs)
        plain.sort(key=_total_ns)
        control = {name: float(np.median([point[name] for point in controls])) for name in controls[0]}
        return MeasuredTrial(trial, plain[_PLAIN // 2], traced, own_ns, between_ns, routing, control)

    def device_times(self, inputs: ModelInputs) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
        """What the device runs in one more generation, in each module and outside of all, in ns."""
        self._tracer.clear()
        with self._tracer, EventCapture(self._device) as capture, capture.window():
            self._generate(inputs, inputs.workload.max_new_tokens)
        kernels = attribute(capture.events, self._tracer.calls())
        own: defaultdict[tuple[str, str], int] = defaultdict(int)
        between: defaultdict[str, int] = defaultdict(int)
        columns = (kernels[name].to_pylist() for name in ("stage", "module_path", "duration_ns"))
        for stage, path, duration in zip(*columns, strict=True):
            if path == UNCLASSIFIED:
                between[stage] += duration
            else:
                own[stage, path] += duration
        return dict(own), dict(between)

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


def module_times(calls: pa.Table, walls: Repeat) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """Time of each module without the modules that it calls, and by stage the time outside of all, in ns.

    Parameters
    ----------
    calls
        Of one generation.
    walls
        Of the same.
    """
    own, outermost = own_times(calls)
    stages = {"prefill": walls.vision_ns + walls.prefill_ns, "decode": sum(walls.decode_ns)}
    return own, {stage: wall - outermost.get(stage, 0) for stage, wall in stages.items()}


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


def _total_ns(repeat: Repeat) -> int:
    return repeat.vision_ns + repeat.prefill_ns + sum(repeat.decode_ns)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
