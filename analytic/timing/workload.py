"""Predicted time of a whole workload: its views, its prefill, and its decode forwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from analytic.generation import note_sampling
from analytic.layers.base import SequenceShape, Tape
from analytic.model import Stage, checked_policy
from analytic.routing import CountedLoad, Routing
from analytic.timing.clocks import Spent, Timeline, simulate
from analytic.timing.curves import Curves

if TYPE_CHECKING:
    from collections.abc import Mapping

    from analytic.layers.base import Policy
    from analytic.model import Model
    from analytic.routing import Counts, Plan
    from analytic.timing.calibration import Calibration
    from analytic.workload import Workload

#: Decode forwards that are simulated; between them a forward's time is taken as a straight line of its cached length.
_SIMULATED: Final = 5
#: Stands for a module where the next token is chosen, outside every module.
SAMPLING: Final = "(sampling)"


@attrs.frozen
class TimedStage:
    """Predicted times of one stage, all its forwards together.

    Attributes
    ----------
    wall_ns, busy_ns
        From beginning to end, and of that the device's work.
    modules
        What each module spends itself. The choice of a token, under `SAMPLING`, belongs to the forward before it.
    forwards
        For each simulated forward its number and its timeline; vision and prefill have one.
    """

    wall_ns: float
    busy_ns: float
    modules: Mapping[str, Spent]
    forwards: tuple[tuple[int, Timeline], ...]


def time_workload(
    model: Model,
    workload: Workload,
    calibration: Calibration,
    *,
    policy: Policy,
    routing: Routing | Plan = "balanced",
) -> dict[Stage, TimedStage]:
    """Simulate a workload on a calibrated device.

    Parameters
    ----------
    model
        Which model.
    workload
        Page, prompt and number of new tokens.
    calibration
        The device.
    policy
        How the model runs. Fused causal attention counts what it executes, whatever `Policy.attention_flops` says.
    routing
        Tokens per expert with a row for each decode forward, or how to plan them.

    Raises
    ------
    InputError
        If the policy is unknown, or routing does not fit the workload.
    """
    policy = attrs.evolve(checked_policy(policy), attention_flops="executed")
    bench = _Bench(model, workload, calibration, policy, routing)
    return {"vision": _once(bench.vision()), "prefill": _once(bench.prefill()), "decode": bench.decode()}


class _Bench:
    """A model, a workload and a device."""

    def __init__(
        self, model: Model, workload: Workload, calibration: Calibration, policy: Policy, routing: Routing | Plan
    ) -> None:
        self._family, self._root = model.family, model.family.build(model.config)
        self._vocab_size = model.config.vocab_size
        self._workload, self._policy = workload, policy
        self._curves, self._host = Curves(calibration), calibration.host
        self._steps = np.arange(1, workload.max_new_tokens, dtype=np.int64)
        if isinstance(routing, Routing):
            routing.check(
                model.config.experts,
                tokens=workload.seq_len,
                forwards=self._steps.size,
                batch_size=workload.batch_size,
            )
            self._routing = routing
        else:
            self._routing = Routing.planned(
                routing,
                model.config.experts,
                tokens=workload.seq_len,
                forwards=self._steps,
                batch_size=workload.batch_size,
            )

    def vision(self) -> Timeline:
        """All views of all pages."""
        tape = Tape(self._policy)
        self._family.encode_page(self._root, tape, self._workload.layout, self._workload.batch_size)
        return simulate(tape.sequence, self._curves, self._host)

    def prefill(self) -> Timeline:
        """Laying out the pages, and the decoder on the prompt."""
        workload, tape = self._workload, Tape(self._policy)
        self._family.place_page(self._root, tape, workload.layout, workload.batch_size)
        loads = {layer: CountedLoad(counts) for layer, counts in self._routing.prefill.items()}
        shape = SequenceShape(workload.batch_size, workload.seq_len, workload.seq_len, causal=True, loads=loads)
        self._family.prefill(self._root, tape, shape, workload.image_tokens)
        self._note_sampling(tape, workload.seq_len)
        return simulate(tape.sequence, self._curves, self._host)

    def decode(self) -> TimedStage:
        """All decode forwards, from a few that are simulated."""
        if not self._steps.size:
            return TimedStage(0.0, 0.0, {}, ())
        count = min(_SIMULATED, self._steps.size)
        chosen = np.unique(np.linspace(1, self._steps.size, count).round().astype(np.int64))
        timelines = [self._decode_forward(int(step)) for step in chosen]
        modules: dict[str, Spent] = {}
        for weight, timeline in zip(_weights(chosen, self._steps), timelines, strict=True):
            for path, spent in timeline.modules.items():
                modules.setdefault(path, Spent()).add(spent, weight)
        return TimedStage(
            wall_ns=sum(spent.wall_ns for spent in modules.values()),
            busy_ns=sum(spent.device_ns for spent in modules.values()),
            modules=modules,
            forwards=tuple(zip(chosen.tolist(), timelines, strict=True)),
        )

    def _decode_forward(self, step: int) -> Timeline:
        workload, tape = self._workload, Tape(self._policy)
        loads = {layer: CountedLoad(counts[step - 1 : step]) for layer, counts in self._routing.decode.items()}
        shape = SequenceShape(workload.batch_size, 1, workload.seq_len + step, causal=False, loads=loads)
        self._family.decode(self._root, tape, shape, 1)
        self._note_sampling(tape, workload.seq_len + step)
        return simulate(tape.sequence, self._curves, self._host)

    def _note_sampling(self, tape: Tape, length: int) -> None:
        """One prompt after the other: the formulas are for one."""
        for _ in range(self._workload.batch_size):
            note_sampling(
                tape.at(SAMPLING, 1),
                vocabulary=self._vocab_size,
                length=length,
                ngram=self._workload.no_repeat_ngram_size,
            )


def _weights(chosen: Counts, steps: Counts) -> list[float]:
    """How often each chosen forward counts, so that straight lines between them give the sum over all."""
    return [float(np.interp(steps, chosen, row).sum()) for row in np.eye(chosen.size)]


def _once(timeline: Timeline) -> TimedStage:
    return TimedStage(timeline.wall_ns, timeline.busy_ns, timeline.modules, ((0, timeline),))
