"""One calibration from beginning to end."""

from __future__ import annotations

import datetime as dt
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs
import numpy as np
import psutil
import torch

from analytic.timing.calibration import Calibration, Sample
from stage_runners.calibration.control import control_buffer, control_tasks
from stage_runners.calibration.executors import call_of
from stage_runners.calibration.grids import grid
from stage_runners.calibration.host import copy_tasks, host_costs, host_tasks, product_tasks
from stage_runners.calibration.measure import Limits, Task, affordable, collector_off, first_look, measure
from stage_runners.calibration.memory import fill_tasks, fresh_byte_ns, fresh_from_bytes, kept_memory
from stage_runners.calibration.operands import Buffer
from stage_runners.calibration.stopwatches import stopwatch_for
from stage_runners.devices import available_bytes
from stage_runners.telemetry import DeviceTelemetry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from analytic.hardware import Hardware
    from stage_runners.calibration.grids import Point
    from stage_runners.calibration.measure import Progress, Timing
    from stage_runners.calibration.stopwatches import Stopwatch

#: Least and most memory for operands, and its largest share of what is available.
_LEAST_BYTES: Final = 1 << 25
_OPERAND_BYTES: Final = 1 << 30
_SHARE: Final = 1 / 8
#: For each dtype of a model: its first look, that and all rounds, and its longest call.
_LOOK_S: Final = 30.0
_TOTAL_S: Final = 78.0
_CALL_S: Final = 0.08
#: The longest call of a large point, of which each operator has a few.
_LARGE_CALL_S: Final = 0.6
#: Noisy is what exceeds these: the median spread of all tasks, and the drift of a control from first to last round.
NOISY_SPREAD: Final = 0.15
NOISY_DRIFT: Final = 0.10
#: And what has had fewer rounds than these.
LEAST_ROUNDS: Final = 3
_FP32: Final = "float32"
_Key = TypeVar("_Key")


def calibrate(
    device: torch.device,
    dtypes: Sequence[str],
    *,
    hardware: Hardware,
    name: str,
    progress: Progress,
    points: Sequence[Point] | None = None,
    limits: Limits | None = None,
) -> Calibration:
    """Measure a device.

    Parameters
    ----------
    device
        Which one.
    dtypes
        Full names of the dtypes of models to measure for.
    hardware
        Its entry, to be kept with what is measured.
    name
        What the device is called.
    progress
        Told of phases.
    points
        Operators and sizes; default are the grids of the dtypes.
    limits
        What it may take; default is a budget for each dtype.
    """
    started, clock = dt.datetime.now(dt.UTC), time.monotonic()
    limits = limits or Limits(_LOOK_S * len(dtypes), _TOTAL_S * len(dtypes), _CALL_S, _LARGE_CALL_S)
    bench = _Bench(device, grid_of(dtypes) if points is None else points, dtypes)
    before = _machine()
    with DeviceTelemetry(device) as telemetry, torch.no_grad(), collector_off(), kept_memory():
        stopwatch = bench.stopwatch()
        found = first_look(bench.tasks, stopwatch, limits, progress)
        left_s = limits.total_s - (time.monotonic() - clock)
        timings = measure(affordable(found, limits, left_s), stopwatch, limits, left_s, progress)
    result = bench.read(timings)
    state = _state(before) | {
        "seconds": round(time.monotonic() - clock, 1),
        "points": len(bench.points),
        "points_left_out": len(bench.points) - len(result["samples"]),
        # Long calls are in fewer by design.
        "rounds": min(len(timing.rounds) for task, timing in timings.items() if not task.large),
        "gpu": attrs.asdict(telemetry.state) if telemetry.state else None,
        "control_ns": bench.control(timings),
    }
    noise = bench.noise(timings, state["rounds"])
    return Calibration(
        device=name,
        kind="cuda" if device.type == "cuda" else "cpu",
        hardware=hardware,
        measured_at=started.isoformat(timespec="seconds"),
        state=state | noise,
        notes=(*telemetry.notes(), *_notes(state, noise, limits)),
        **result,
    )


def grid_of(dtypes: Iterable[str]) -> tuple[Point, ...]:
    """The points for models of some dtypes; what two of them have in common is measured once."""
    found: dict[tuple[Any, ...], Point] = {}
    for dtype in dtypes:
        for point in grid(dtype):
            found.setdefault((point.operator, *sorted(point.arguments.items())), point)
    return tuple(found.values())


class _Bench:
    """Everything that is measured of a device, and what its times say."""

    def __init__(self, device: torch.device, points: Sequence[Point], dtypes: Sequence[str]) -> None:
        size = max(_LEAST_BYTES, min(_OPERAND_BYTES, int(available_bytes(device) * _SHARE)))
        self._buffer = Buffer(device, size)
        self._device, self._dtype = device, getattr(torch, (*dtypes, _FP32)[0])
        self._host = host_tasks(device)
        self._fresh_from = fresh_from_bytes() if device.type == "cpu" else None
        self._fills = {} if self._fresh_from is None else fill_tasks()
        control = control_buffer(device)
        self._control = {dtype: control_tasks(control, dtype) for dtype in dtypes}
        self._products = product_tasks(self._buffer, tuple(dict.fromkeys((*dtypes, _FP32))))
        self._copies = copy_tasks(self._buffer)
        self.points: dict[Task, Point] = {}
        for point in points:
            make = partial(call_of, point.operator, point.arguments, self._buffer)
            self.points[Task(point.operator, make, self._larger(point), large=point.large)] = point

    def _larger(self, point: Point) -> Any:
        return lambda other: other in self.points and point.exceeds(self.points[other])

    @property
    def tasks(self) -> list[Task]:
        """All of them, small ones first."""
        controls = [task for tasks in self._control.values() for task in tasks.values()]
        device = (*self._host.values(), *self._fills.values(), *self._copies.values(), *self._products.values())
        return [*controls, *device, *self.points]

    def stopwatch(self) -> Stopwatch:
        """What takes the times on this device."""
        return stopwatch_for(self._device, self._buffer, self._dtype)

    def read(self, timings: Mapping[Task, Timing]) -> dict[str, Any]:
        """Samples, host costs and ceilings."""
        samples = tuple(
            _sample(point, timings[task], self._device.type) for task, point in self.points.items() if task in timings
        )
        products: dict[str, float] = {}
        for (dtype, side), timing in _known(self._products, timings).items():
            products[dtype] = max(products.get(dtype, 0.0), 2e9 * side**3 / timing.fastest_ns)
        return {
            "samples": samples,
            "host": attrs.evolve(host_costs(_known(self._host, timings), self._device.type), **self._fresh(timings)),
            "tensor_flops_per_s": products,
            "memory_bytes_per_s": {
                moved: 1e9 * moved / timing.fastest_ns for moved, timing in _known(self._copies, timings).items()
            },
        }

    def _fresh(self, timings: Mapping[Task, Timing]) -> dict[str, Any]:
        if self._fresh_from is None:
            return {}
        fills = _known(self._fills, timings)
        return {"fresh_byte_ns": fresh_byte_ns(fills), "fresh_from_bytes": self._fresh_from}

    def control(self, timings: Mapping[Task, Timing]) -> dict[str, dict[str, float]]:
        """Times of the control over the whole calibration, in ns, by dtype and task."""
        return {
            dtype: {name: timings[task].device_ns for name, task in tasks.items()}
            for dtype, tasks in self._control.items()
        }

    def noise(self, timings: Mapping[Task, Timing], rounds: int) -> dict[str, Any]:
        """How far the readings of so many rounds can be trusted."""
        control = [task for tasks in self._control.values() for task in tasks.values()]
        drift = max((timings[task].drift for task in control), key=abs)
        spread = float(np.median([timing.spread for timing in timings.values()]))
        noisy = spread > NOISY_SPREAD or abs(drift) > NOISY_DRIFT or rounds < LEAST_ROUNDS
        return {"noisy": noisy, "median_spread": round(spread, 4), "control_drift": round(drift, 4)}


def _known(tasks: Mapping[_Key, Task], timings: Mapping[Task, Timing]) -> dict[_Key, Timing]:
    return {key: timings[task] for key, task in tasks.items() if task in timings}


def _sample(point: Point, timing: Timing, kind: str) -> Sample:
    return Sample(
        operator=point.operator,
        dtype=point.dtype,
        arguments=dict(point.arguments),
        device_ns=timing.device_ns,
        host_ns=0.0 if kind == "cpu" else timing.host_ns,
        spread=timing.spread,
        repeats=timing.repeats,
    )


def _machine() -> dict[str, Any]:
    """What the operating system tells now; times since it started, in s."""
    clock, times, own = psutil.cpu_freq(), psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    return {
        "load_1min": psutil.getloadavg()[0],
        "cpu_mhz": None if clock is None else round(clock.current),
        "all_s": sum(times),
        "busy_s": sum(times) - idle,
        "own_s": own.user + own.system,
    }


def _state(before: Mapping[str, Any]) -> dict[str, Any]:
    after = _machine()
    passed = {key: after[key] - before[key] for key in ("all_s", "busy_s", "own_s")}
    shown = ("load_1min", "cpu_mhz")
    return {
        "before": {key: before[key] for key in shown},
        "after": {key: after[key] for key in shown},
        "cpu_share_of_others": round(max(passed["busy_s"] - passed["own_s"], 0.0) / max(passed["all_s"], 1e-9), 3),
        "torch_threads": torch.get_num_threads(),
        "onednn": next((line.strip(" -") for line in torch.__config__.show().splitlines() if "MKL-DNN" in line), None),
    }


def _notes(state: Mapping[str, Any], noise: Mapping[str, Any], limits: Limits) -> list[str]:
    notes = []
    if noise["noisy"]:
        notes.append(
            f"noisy: the median spread is {noise['median_spread']:.0%} (at most {NOISY_SPREAD:.0%}), a control drifted "
            f"by {noise['control_drift']:+.0%} (at most {NOISY_DRIFT:.0%}), there were {state['rounds']} whole rounds "
            f"(at least {LEAST_ROUNDS}), other programs took "
            f"{state['cpu_share_of_others']:.0%} of the CPU; calibrate again on a quiet machine"
        )
    if state["points_left_out"]:
        notes.append(
            f"{state['points_left_out']} of {state['points']} points were left out: a call took longer than "
            f"{limits.call_s * 1000:.0f} ms, or memory or time did not suffice"
        )
    return notes
