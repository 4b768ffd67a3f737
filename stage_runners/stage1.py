"""Stage 1: trace and profile a model in this process.

Each page goes through three passes. *plain*: a prefill without wrappers or profiler, which also warms up. *traced*:
one unmodified greedy generation under the tracer; all wall times come from it. *profiled*: the prefill again, and
sampled decode steps again, with the profiler on; all events come from it. Sampled steps are also run in pairs,
plain and traced, which gives the tracer's overhead. On a GPU a prefill and the last decode steps run once more for the
memory of each module. Every repetition must choose the token that the generation chose.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hooks.attribution import attribute
from hooks.capture import EventCapture
from hooks.errors import TraceError
from hooks.tracer import Label, PositionStages, Tracer
from stage_runners.generate import Generation
from stage_runners.measurement import (
    ClockReport,
    MeasuredMemory,
    Measurement,
    PageMeasurement,
    Repeat,
    StepPair,
)
from stage_runners.memory import CacheRecorder, CudaAllocator, PeakClock, combined, module_peaks
from stage_runners.routing import RoutingRecorder
from stage_runners.telemetry import DeviceTelemetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from analytic.config import DecoderConfig
    from hooks.clock import ClockAlignment
    from stage_runners.inputs import ModelInputs

#: What each view of a page goes through last; and all subtrees whose calls are the vision stage.
_PROJECTOR: Final = "model.projector"
VISION_SUBTREES: Final = ("model.sam_model", "model.vision_model", _PROJECTOR)

#: Name of the pass that wall times, calls and routing come from.
TRACED: Final = "traced"

_OVERHEAD_PAIRS: Final = 40
#: The last ones: the longer the cache, the larger the copy that a step makes of it.
_MEMORY_STEPS: Final = 3
DEFAULT_PROFILED_STEPS: Final = 16


class Progress(Protocol):
    """Told where the run is."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Say that `done` of `total` steps of `phase` are done."""


@attrs.frozen
class Stage1Options:
    """How to measure.

    Attributes
    ----------
    profiled_steps
        How many decode steps to profile, spread evenly over the generation; None for all.
    repeats
        How many traced generations to run.
    stop_at_eos
        Whether the end-of-sequence token ends the generation; with random weights it means nothing.
    nvtx
        Whether to emit an NVTX range around every forward.
    """

    profiled_steps: int | None = DEFAULT_PROFILED_STEPS
    repeats: int = 1
    stop_at_eos: bool = False
    nvtx: bool = False


@attrs.frozen
class SourcedInputs:
    """Inputs and the page that they were made from."""

    name: str
    source: str
    inputs: ModelInputs


def run_stage1(
    model: nn.Module,
    pages: Sequence[SourcedInputs],
    decoder: DecoderConfig,
    options: Stage1Options,
    progress: Progress,
) -> Measurement:
    """Measure one generation for each page.

    Parameters
    ----------
    model
        Ready for inference on its device.
    pages
        Inputs on the model's device, in its type.
    decoder
        Sizes and special ids of the decoder.
    options
        How to measure.
    progress
        Called as the work goes on.

    Raises
    ------
    TraceError
        If a repetition chooses other tokens than the generation, or the clocks cannot be aligned.
    """
    runner = _Runner(model, decoder, options, progress)
    try:
        # Standard output is for the run's result; the published code prints shapes there.
        with contextlib.redirect_stdout(sys.stderr), DeviceTelemetry(runner.device) as telemetry:
            measured = tuple(runner.measure(index, page) for index, page in enumerate(pages))
    finally:
        runner.tracer.remove()
    return runner.result(measured, telemetry)


class _Runner:
    """What the passes over one page share."""

    def __init__(self, model: nn.Module, decoder: DecoderConfig, options: Stage1Options, progress: Progress) -> None:
        self._model, self._decoder, self._options, self._progress = model, decoder, options, progress
        self.device = next(model.parameters()).device
        self._routing = RoutingRecorder(model, decoder.routed_experts)
        self._cache = CacheRecorder(model)
        self._vision_ends: list[int] = []
        paths = {path for path, _ in model.named_modules()}
        observers = self._routing.observers | self._cache.observers
        if _PROJECTOR in paths:
            observers[_PROJECTOR] = self._note_vision_end
        self._stage_of_subtree = {path: "vision" for path in VISION_SUBTREES if path in paths}
        self.tracer = Tracer(
            model,
            detector=PositionStages(),
            stage_of_subtree=self._stage_of_subtree,
            nvtx=options.nvtx,
            observers=observers,
        )
        self._events: list[tuple[int, pa.Table]] = []
        self._clocks: list[ClockAlignment] = []
        self._memory: list[MeasuredMemory] = []
        self._peak_device_bytes = 0
        self._outside_windows = 0

    def _note_vision_end(self, _: object) -> None:
        """Note when a view's features are there; a GPU is waited for, else its vision work would count as prefill."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._vision_ends.append(time.perf_counter_ns())

    def measure(self, index: int, page: SourcedInputs) -> PageMeasurement:
        """Run all passes over one page."""
        self._progress("warm-up: plain prefill", 0, 1)
        plain = Generation(self._model, page.inputs)
        plain.start()
        first, walls = self._traced(index, 0, page.inputs)
        routing, cache_growth = self._routing.counts(), self._cache.growth()
        generations, repeats = [first], [walls]
        for repeat in range(1, self._options.repeats):
            generation, walls = self._traced(index, repeat, page.inputs)
            generations.append(generation)
            repeats.append(walls)
        tokens = tuple(first.tokens)
        self._check("without tracing", 0, plain.tokens[0], tokens)
        for generation in generations[1:]:
            for step, token in enumerate(generation.tokens):
                self._check("when repeated", step, token, tokens)
        pairs = self._paired_steps(first.fork(), index, tokens)
        self._memory.append(MeasuredMemory(cache_growth, self._activation_peaks(first, page.inputs, tokens)))
        profiled = self._profiled(first, index, page.inputs, tokens)
        return PageMeasurement(
            name=page.name,
            source=page.source,
            workload=page.inputs.workload,
            tokens=tokens,
            stopped_at_eos=self._is_end(tokens[-1]),
            repeats=tuple(repeats),
            routing=routing,
            profiled_steps=profiled,
            step_pairs=pairs,
        )

    def _is_end(self, token: int) -> bool:
        return self._options.stop_at_eos and token == self._decoder.eos_token_id

    def _traced(self, page: int, repeat: int, inputs: ModelInputs) -> tuple[Generation, Repeat]:
        """The generation itself: prefill and every decode step under the tracer."""
        self._routing.clear()
        self._cache.clear()
        self._vision_ends.clear()
        self.tracer.label = Label(TRACED if repeat == 0 else f"{TRACED}-{repeat + 1}", page)
        generation = Generation(self._model, inputs)
        total = inputs.workload.max_new_tokens
        decode = []
        with self.tracer:
            self._progress("vision and prefill", 0, 1)
            start = time.perf_counter_ns()
            token = generation.start()
            prefill = time.perf_counter_ns() - start
            self._progress("vision and prefill", 1, 1)
            while len(generation.tokens) < total and not self._is_end(token):
                start = time.perf_counter_ns()
                token = generation.advance()
                decode.append(time.perf_counter_ns() - start)
                self._progress("decode", len(generation.tokens) - 1, total - 1)
        vision = self._vision_wall()
        return generation, Repeat(vision, prefill - vision, tuple(decode))

    def _vision_wall(self) -> int:
        """Time from the first vision call of the current pass to the end of its last view, in ns."""
        calls, label = self.tracer.calls(), self.tracer.label
        mine = calls.filter(
            (pc.field("pass") == label.pass_name) & (pc.field("page") == label.page) & (pc.field("stage") == "vision")
        )
        if not mine.num_rows:
            return 0
        end = max([*self._vision_ends, pc.max(mine["end_ns"]).as_py()])
        return int(end - pc.min(mine["start_ns"]).as_py())

    def _paired_steps(self, generation: Generation, page: int, tokens: tuple[int, ...]) -> tuple[StepPair, ...]:
        """Sampled steps, each plain and traced in turn: the tracer's cost on the very same work."""
        self.tracer.label = Label("paired", page)
        steps = spread(len(tokens) - 1, _OVERHEAD_PAIRS)
        pairs = []
        # Later steps first: rewinding only ever goes back.
        for done, step in enumerate(reversed(steps)):
            self._progress("overhead: plain and traced steps", done, len(steps))
            wall = {}
            for traced in (True, False) if done % 2 else (False, True):
                generation.rewind(step)
                if traced:
                    self.tracer.install()
                start = time.perf_counter_ns()
                token = generation.advance()
                wall[traced] = time.perf_counter_ns() - start
                self.tracer.remove()
                self._check("with tracing" if traced else "without tracing", step, token, tokens)
            pairs.append(StepPair(step, plain_ns=wall[False], traced_ns=wall[True]))
        return tuple(pairs)

    def _profiled(
        self, generation: Generation, page: int, inputs: ModelInputs, tokens: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Prefill and sampled decode steps again, with the profiler on."""
        self.tracer.label = Label("profiled", page)
        self._progress("profile: vision and prefill", 0, 1)
        with self.tracer, EventCapture(self.device) as capture, capture.window():
            token = Generation(self._model, inputs).start()
        self._keep(page, capture)
        self._check("under the profiler", 0, token, tokens)
        steps = spread(len(tokens) - 1, self._options.profiled_steps)
        if not steps:
            return ()
        with self.tracer, EventCapture(self.device) as capture:
            for done, step in enumerate(reversed(steps)):
                self._progress("profile: decode steps", done, len(steps))
                generation.rewind(step)
                with capture.window():
                    token = generation.advance()
                self._check("under the profiler", step, token, tokens)
        self._keep(page, capture)
        return steps

    def _activation_peaks(
        self, generation: Generation, inputs: ModelInputs, tokens: tuple[int, ...]
    ) -> dict[tuple[str, str], int]:
        """Prefill and the last decode steps again, reading the allocator at both ends of every call; only on a GPU."""
        if self.device.type != "cuda":
            return {}
        self._progress("memory: prefill and decode steps", 0, 1)
        self._note_peak()
        clock = PeakClock(CudaAllocator(self.device))
        with Tracer(
            self._model, detector=PositionStages(), stage_of_subtree=self._stage_of_subtree, clock=clock
        ) as tracer:
            token = Generation(self._model, inputs).start()
            self._check("while memory was measured", 0, token, tokens)
            steps = range(1, len(tokens))[-_MEMORY_STEPS:]
            twin = generation.fork()
            if steps:
                twin.rewind(steps[0])
            for step in steps:
                self._check("while memory was measured", step, twin.advance(), tokens)
        return module_peaks(tracer.calls(), clock)

    def _note_peak(self) -> None:
        """Keep the allocator's peak, which the measuring of memory resets."""
        self._peak_device_bytes = max(self._peak_device_bytes, torch.cuda.max_memory_allocated(self.device))

    def _keep(self, page: int, capture: EventCapture) -> None:
        self._events.append((page, capture.events))
        self._clocks.append(capture.clock)
        self._outside_windows += capture.outside_windows

    def _check(self, how: str, step: int, token: int, tokens: tuple[int, ...]) -> None:
        if step >= len(tokens) or token != tokens[step]:
            chosen = tokens[step] if step < len(tokens) else "none"
            raise TraceError(
                f"the model chose token {token} at step {step} {how}, the traced generation chose {chosen}: "
                "the run is not repeatable on this device, so its passes cannot be joined; try --dtype fp32"
            )

    def result(self, pages: tuple[PageMeasurement, ...], telemetry: DeviceTelemetry) -> Measurement:
        """Join the passes into tables."""
        if self.device.type == "cuda":
            self._note_peak()
        calls = self.tracer.calls()
        profiled = calls.filter(pc.equal(calls["pass"], "profiled"))
        kernels = pa.concat_tables(
            attribute(events, profiled.filter(pc.equal(profiled["page"], page))) for page, events in self._events
        )
        numbered = kernels.set_column(0, kernels.schema.field(0), pa.array(np.arange(kernels.num_rows)))
        kept = pc.invert(pc.equal(calls["pass"], "paired"))
        return Measurement(
            modules=self.tracer.modules(),
            calls=calls.filter(kept),
            callgraph=self.tracer.callgraph(TRACED),
            kernels=numbered,
            pages=pages,
            clock=ClockReport(
                captures=len(self._clocks),
                residual_ns=max(clock.residual_ns for clock in self._clocks),
                drift_ns=max(clock.drift_ns for clock in self._clocks),
            ),
            outside_windows=self._outside_windows,
            notes=(*self.tracer.notes, *telemetry.notes()),
            memory=combined(self._memory),
            device_state=telemetry.state,
            peak_device_bytes=self._peak_device_bytes if self.device.type == "cuda" else None,
        )


def spread(steps: int, count: int | None) -> tuple[int, ...]:
    """At most `count` of the steps 1 to `steps`, evenly spread; all of them for None."""
    if count is None or count >= steps:
        return tuple(range(1, steps + 1))
    return tuple(int((index + 0.5) * steps / count) + 1 for index in range(count))
