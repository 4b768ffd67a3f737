"""What the driver says of the GPU around and during a run: clocks, power, temperature, memory, throttling."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import attrs
import pynvml
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

_PERIOD_S: Final = 0.1

#: Why clocks are not higher, by NVML's bit (nvml.h, ``nvmlClocksEventReason*``).
_REASONS: Final = {
    pynvml.nvmlClocksEventReasonGpuIdle: "gpu_idle",
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "applications_clocks_setting",
    pynvml.nvmlClocksEventReasonSwPowerCap: "sw_power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "sw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "hw_power_brake_slowdown",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display_clock_setting",
}

#: Those that slow the device down below the clocks that it was set to.
_THROTTLING: Final = {
    "sw_power_cap",
    "hw_slowdown",
    "sw_thermal_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
}


@attrs.frozen
class Sample:
    """State of the device at one moment; None for what the driver does not tell."""

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_mw: int | None
    temperature_celsius: int | None
    memory_used_bytes: int | None
    throttle_reasons: tuple[str, ...]


@attrs.frozen
class Spread:
    """Smallest, middle and largest value of some samples; of two middle ones the lower."""

    minimum: int
    median: int
    maximum: int


@attrs.frozen
class DeviceState:
    """State of the device before, during and after a run.

    Attributes
    ----------
    before, after
        One sample each.
    during
        Spread of each quantity over the samples; None for what the driver does not tell.
    throttle_reasons
        All that were seen, as NVML names them; being idle and being set to lower clocks count too.
    samples
        How many were taken during the run.
    median_sample_ns
        How long one took, waiting for the interpreter included. It is free for the run while the driver answers.
    """

    before: Sample
    after: Sample
    during: dict[str, Spread | None]
    throttle_reasons: tuple[str, ...]
    samples: int
    median_sample_ns: int


@contextlib.contextmanager
def nvml() -> Iterator[None]:
    """Keep the driver's library open.

    Raises
    ------
    pynvml.NVMLError
        If there is none.
    """
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


class DeviceTelemetry:
    """Samples the device while it is entered, in a thread of its own that sleeps between samples.

    Parameters
    ----------
    device
        Where the run takes place. Nothing is sampled unless it is a GPU whose driver answers.
    period_s
        Time between samples, in s.

    Attributes
    ----------
    state : DeviceState or None
        The result, once left; None if nothing was sampled.
    missing : str or None
        Why nothing was sampled.
    """

    def __init__(self, device: torch.device, period_s: float = _PERIOD_S) -> None:
        self.state: DeviceState | None = None
        self.missing: str | None = None
        self._device, self._period_s = device, period_s
        self._open = contextlib.ExitStack()
        self._stop = threading.Event()
        self._during: list[Sample] = []
        self._cost_ns: list[int] = []

    def __enter__(self) -> Self:
        if self._device.type != "cuda":
            self.missing = f"{self._device} is not a GPU"
            return self
        try:
            self._open.enter_context(nvml())
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid(self._device))
        except pynvml.NVMLError as error:
            self._open.close()
            self.missing = f"NVML: {error}"
            return self
        self._before = _sample(self._handle)
        self._thread = threading.Thread(target=self._watch, name="device telemetry", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.missing is not None:
            return
        self._stop.set()
        self._thread.join()
        with self._open:
            after = _sample(self._handle)
        self.state = DeviceState(
            before=self._before,
            after=after,
            during=_spreads(self._during),
            throttle_reasons=_seen([self._before, *self._during, after]),
            samples=len(self._during),
            median_sample_ns=statistics.median_low(self._cost_ns),
        )

    def notes(self) -> tuple[str, ...]:
        """What a reader of the run must know: a GPU that was slowed down, or of which nothing is known."""
        if self.state is None:
            unknown = self._device.type == "cuda"
            return (f"clocks and throttling of the device are unknown: {self.missing}",) if unknown else ()
        throttled = [reason for reason in self.state.throttle_reasons if reason in _THROTTLING]
        return (f"the device was throttled during the run: {', '.join(throttled)}",) if throttled else ()

    def _watch(self) -> None:
        while True:
            start = time.perf_counter_ns()
            self._during.append(_sample(self._handle))
            self._cost_ns.append(time.perf_counter_ns() - start)
            if self._stop.wait(self._period_s):
                return


def _uuid(device: torch.device) -> str:
    # Not the index: CUDA_VISIBLE_DEVICES renumbers devices for torch, not for NVML.
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _sample(handle: Any) -> Sample:
    memory = _told(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return Sample(
        sm_clock_mhz=_told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        memory_clock_mhz=_told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        power_mw=_told(pynvml.nvmlDeviceGetPowerUsage, handle),
        temperature_celsius=_told(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        memory_used_bytes=None if memory is None else int(memory.used),
        # The older of two names for one query: drivers before 535 know no other.
        throttle_reasons=_decoded(_told(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0),
    )


def _told(query: Callable[..., Any], *arguments: Any) -> Any:
    """What the driver answers; None where it does not support the query."""
    try:
        return query(*arguments)
    except pynvml.NVMLError:
        return None


def _decoded(reasons: int) -> tuple[str, ...]:
    bits = (1 << place for place in range(reasons.bit_length()))
    return tuple(_REASONS.get(bit, f"unknown_{bit:#x}") for bit in bits if reasons & bit)


def _seen(samples: Sequence[Sample]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(reason for sample in samples for reason in sample.throttle_reasons))


def _spreads(samples: Sequence[Sample]) -> dict[str, Spread | None]:
    names = [field.name for field in attrs.fields(Sample) if field.name != "throttle_reasons"]
    return {name: _spread([getattr(sample, name) for sample in samples]) for name in names}


def _spread(values: Sequence[int | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(min(known), statistics.median_low(known), max(known)) if known else None
