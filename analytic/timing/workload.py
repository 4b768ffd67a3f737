"""Predicted time of a whole workload: its views, its prefill, and its decode forwards."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from itertools import chain
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from analytic.generation import note_sampling
from analytic.layers.base import SequenceShape, Tape
from analytic.model import Stage, checked_policy
from analytic.operators import sdpa
from analytic.routing import CountedLoad
from analytic.timing.clocks import Spent, Timeline, simulate
from analytic.timing.curves import Curves

if TYPE_CHECKING:
    from collections.abc import Mapping

    from analytic.layers.base import Moment, Policy
    from analytic.model import Model, Work
    from analytic.routing import Counts
    from analytic.timing.calibration import Calibration
    from analytic.timing.clocks import Place
    from analytic.workload import Workload

#: Decode forwards that are simulated; between them a forward's time is taken as a straight line of its cached length.
_SIMULATED: Final = 3
#: Stands for a module where the next token is chosen, outside every module.
SAMPLING: Final = "(sampling)"
#: The last number in a path: which member of a list of layers it is.
_MEMBER: Final = re.compile(r"\.\d+(?!.*\.\d)")


@attrs.frozen
class TimedStage:
    """Predicted times of one stage, all its forwards together.

    Attributes
    ----------
    wall_ns, busy_ns
        From beginning to end, and of that the device's work.
    places
        What each operator of each module spends. The choice of a token, under `SAMPLING`, belongs to the forward before
        it.
    forwards
        For each simulated forward its number and its timeline; vision and prefill have one.
    """

    wall_ns: float
    busy_ns: float
    places: Mapping[Place, Spent]
    forwards: tuple[tuple[int, Timeline], ...]

    @property
    def samples(self) -> bool:
        """Whether tokens are chosen in it."""
        return any(path == SAMPLING for path, _ in self.places)

    def own(self, path: str) -> Spent:
        """What one module spends itself; nothing where it is not called."""
        found = Spent()
        for (where, _), spent in self.places.items():
            if where == path:
                found.add(spent)
        return found

    @property
    def modules(self) -> dict[str, Spent]:
        """What each module spends itself."""
        found: defaultdict[str, Spent] = defaultdict(Spent)
        for (path, _), spent in self.places.items():
            found[path].add(spent)
        return dict(found)


def time_workload(
    model: Model, workload: Workload, work: Work, calibration: Calibration, *, policy: Policy
) -> dict[Stage, TimedStage]:
    """Simulate a workload on a device.

    Parameters
    ----------
    model
        Which model.
    workload
        Page, prompt and number of new tokens.
    work
        What it runs, with the tokens of every expert (`analytic.model.operations`).
    calibration
        The device.
    policy
        How the model runs. Fused causal attention counts what it executes, whatever `Policy.attention_flops` says.

    Raises
    ------
    InputError
        If the policy is unknown, or the device has no figure for its dtype.
    """
    policy = attrs.evolve(checked_policy(policy), attention_flops="executed")
    bench = _Bench(model, workload, work, calibration, policy)
    return {"vision": _once(bench.vision()), "prefill": _once(bench.prefill()), "decode": bench.decode()}


class _Bench:
    """A model, a workload and a device."""

    def __init__(self, model: Model, workload: Workload, work: Work, calibration: Calibration, policy: Policy) -> None:
        self._family, self._root = model.family, model.family.build(model.config)
        self._vocab_size = model.config.vocab_size
        self._workload, self._work, self._policy = workload, work, policy
        self._curves, self._host = Curves(calibration), calibration.host

    def vision(self) -> Timeline:
        """All views of all pages."""
        return simulate(self._work.vision, self._curves, self._host)

    def prefill(self) -> Timeline:
        """Laying out the pages, and the decoder on the prompt."""
        tape = Tape(self._policy)
        self._note_sampling(tape, self._workload.seq_len)
        executed = map(_executed, self._work.prefill)
        return simulate(chain(executed, tape.sequence), self._curves, self._host)

    def decode(self) -> TimedStage:
        """All decode forwards, from a few that are simulated."""
        lengths = self._work.kv_lengths
        if not lengths.size:
            return TimedStage(0.0, 0.0, {}, ())
        chosen = np.linspace(0, lengths.size - 1, min(_SIMULATED, lengths.size)).round().astype(np.int64)
        timelines = [self._decode_forward(int(number)) for number in chosen]
        places: defaultdict[Place, Spent] = defaultdict(Spent)
        calls: defaultdict[str, float] = defaultdict(float)
        for weight, timeline in zip(_weights(lengths[chosen], lengths), timelines, strict=True):
            for place, spent in timeline.places.items():
                places[place].add(spent, weight)
            for path, count in timeline.calls.items():
                calls[path] += count * weight
        shared = _shared(places, calls, {path: n for (stage, path), n in self._work.calls.items() if stage == "decode"})
        return TimedStage(
            wall_ns=sum(spent.wall_ns for spent in shared.values()),
            busy_ns=sum(spent.device_ns for spent in shared.values()),
            places=shared,
            forwards=tuple(zip((chosen + 1).tolist(), timelines, strict=True)),
        )

    def _decode_forward(self, number: int) -> Timeline:
        workload, tape, length = self._workload, Tape(self._policy), int(self._work.kv_lengths[number])
        loads = {layer: CountedLoad(counts[number : number + 1]) for layer, counts in self._work.routing.decode.items()}
        shape = SequenceShape(workload.batch_size, 1, length, causal=False, loads=loads)
        self._family.decode(self._root, tape, shape, 1)
        self._note_sampling(tape, length)
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


def _executed(moment: Moment) -> Moment:
    """Causal attention of a prompt as its kernel runs it, whatever of it was counted."""
    if moment.steps is None or all(call.operator is not sdpa for call in moment.steps.calls):
        return moment
    calls = tuple(
        attrs.evolve(call, kwargs=call.kwargs | {"counted": "triangle"}) if call.operator is sdpa else call
        for call in moment.steps.calls
    )
    return moment._replace(steps=attrs.evolve(moment.steps, calls=calls))


def _weights(chosen: Counts, lengths: Counts) -> list[float]:
    """How often each chosen forward counts, so that straight lines between them give the sum over all."""
    return [float(np.interp(lengths, chosen, row).sum()) for row in np.eye(chosen.size)]


def _shared(
    places: Mapping[Place, Spent], simulated: Mapping[str, float], calls: Mapping[str, int]
) -> dict[Place, Spent]:
    """Spread what the simulated forwards spend over the modules that all forwards call.

    The router may choose an expert in none of the simulated forwards, or in all. So the members of a list that were not
    simulated as often as they are called share what all members spend, in proportion to their calls.
    """
    paths = {path for path, _ in places} | calls.keys()
    list_of = {path: _MEMBER.sub(".*", path) for path in paths}
    uneven = {list_of[path] for path, count in calls.items() if not math.isclose(simulated.get(path, 0.0), count)}
    together: defaultdict[Place, Spent] = defaultdict(Spent)
    called: defaultdict[str, float] = defaultdict(float)
    for (path, name), spent in places.items():
        if list_of[path] in uneven:
            together[list_of[path], name].add(spent)
    for path, count in simulated.items():
        called[list_of[path]] += count
    found = {place: spent for place, spent in places.items() if list_of[place[0]] not in uneven}
    names: defaultdict[str, list[str]] = defaultdict(list)
    for where, name in together:
        names[where].append(name)
    for path, count in calls.items():
        for name in names[list_of[path]]:
            found[path, name] = Spent()
            found[path, name].add(together[list_of[path], name], count / called[list_of[path]])
    return found


def _once(timeline: Timeline) -> TimedStage:
    return TimedStage(timeline.wall_ns, timeline.busy_ns, timeline.places, ((0, timeline),))
