"""Sampling of the device, on a driver that is played by a fake."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import attrs
import pynvml
import pytest
import torch

from stage_runners import telemetry
from stage_runners.telemetry import DeviceTelemetry, Sample, Spread

if TYPE_CHECKING:
    from collections.abc import Sequence

GPU = torch.device("cuda", 0)
UUID = "01234567-89ab-cdef-0123-456789abcdef"
SW_POWER_CAP, HW_THERMAL, GPU_IDLE = 0x4, 0x40, 0x1


class FakeNvml:
    """A driver whose power and reasons follow a script, one entry a sample; its last entry stays."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    NVMLError = pynvml.NVMLError

    def __init__(self, script: Sequence[tuple[int, int]]) -> None:
        self._script = script
        self.open = 0
        self.sampled = 0
        self.script_done = threading.Event()

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert self.open
        return uuid

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:  # noqa: N802
        assert self.open
        assert handle == f"GPU-{UUID}"
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 2619}[clock]

    def nvmlDeviceGetTemperature(self, _: str, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetMemoryInfo(self, _: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=7 << 30)

    def nvmlDeviceGetPowerUsage(self, _: str) -> int:  # noqa: N802
        return self._now()[0]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _: str) -> int:  # noqa: N802
        reasons = self._now()[1]
        self.sampled += 1
        if self.sampled >= len(self._script):
            self.script_done.set()
        return reasons

    def _now(self) -> tuple[int, int]:
        return self._script[min(self.sampled, len(self._script) - 1)]


@pytest.fixture(autouse=True)
def named_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=UUID))


def watched(monkeypatch: pytest.MonkeyPatch, script: Sequence[tuple[int, int]]) -> tuple[DeviceTelemetry, FakeNvml]:
    """A finished telemetry that saw the whole script, its last entry at least twice."""
    fake = FakeNvml([*script, script[-1]])
    monkeypatch.setattr(telemetry, "pynvml", fake)
    with DeviceTelemetry(GPU, period_s=0.001) as found:
        assert fake.script_done.wait(60)
    return found, fake


def test_samples_before_during_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    found, fake = watched(monkeypatch, [(90_000, GPU_IDLE), (300_000, 0), (700_000, 0), (500_000, 0)])
    state = found.state
    assert state is not None
    assert found.missing is None
    assert state.before == Sample(1980, 2619, 90_000, None, 7 << 30, ("gpu_idle",))
    assert state.after == Sample(1980, 2619, 500_000, None, 7 << 30, ())
    assert state.during["power_mw"] == Spread(300_000, 500_000, 700_000)
    assert state.during["sm_clock_mhz"] == Spread(1980, 1980, 1980)
    assert state.during["temperature_celsius"] is None
    # One sample before, one after.
    assert state.samples == fake.sampled - 2 >= 3
    assert state.median_sample_ns > 0
    assert fake.open == 0


def test_an_idle_device_was_not_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = watched(monkeypatch, [(90_000, GPU_IDLE), (300_000, 0x2 | 0x100)])
    assert found.state is not None
    assert found.state.throttle_reasons == ("gpu_idle", "applications_clocks_setting", "display_clock_setting")
    assert found.notes() == ()


def test_throttling_in_one_sample_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = watched(monkeypatch, [(1, GPU_IDLE), (1, 0), (1, SW_POWER_CAP | HW_THERMAL), (1, 0)])
    assert found.notes() == ("the device was throttled during the run: sw_power_cap, hw_thermal_slowdown",)


def test_a_reason_without_a_name_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = watched(monkeypatch, [(1, 0x400)])
    assert found.state is not None
    assert found.state.throttle_reasons == ("unknown_0x400",)


def test_the_state_goes_into_a_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = watched(monkeypatch, [(1, 0), (2, SW_POWER_CAP)])
    assert found.state is not None
    written = json.loads(json.dumps(attrs.asdict(found.state)))
    assert written["during"]["power_mw"] == {"minimum": 2, "median": 2, "maximum": 2}
    assert written["after"]["throttle_reasons"] == ["sw_power_cap"]


def test_a_short_run_has_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "pynvml", FakeNvml([(1, 0)]))
    with DeviceTelemetry(GPU, period_s=3600) as found:
        pass
    assert found.state is not None
    assert found.state.samples == 1


def test_nothing_is_asked_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "pynvml", None)
    with DeviceTelemetry(torch.device("cpu")) as found:
        assert not [thread for thread in threading.enumerate() if thread.name == "device telemetry"]
    assert (found.state, found.missing, found.notes()) == (None, "cpu is not a GPU", ())


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_a_gpu_without_its_driver_is_noted(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def absent(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    fake = FakeNvml([(1, 0)])
    monkeypatch.setattr(fake, call, absent)
    monkeypatch.setattr(telemetry, "pynvml", fake)
    with DeviceTelemetry(GPU) as found:
        pass
    assert found.state is None
    assert found.missing == "NVML: NVML Shared Library Not Found"
    assert found.notes() == (f"clocks and throttling of the device are unknown: {found.missing}",)
    assert fake.open == 0


def test_the_thread_ends_with_a_failing_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml([(1, 0)])
    monkeypatch.setattr(telemetry, "pynvml", fake)
    with pytest.raises(KeyError), DeviceTelemetry(GPU):
        raise KeyError
    assert fake.open == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "device telemetry"]


def test_names_of_the_reasons_are_the_drivers() -> None:
    """NVML calls them nvmlClocksEventReasonSwPowerCap and so on; ours are the same words."""
    theirs = {
        getattr(pynvml, name): name.removeprefix("nvmlClocksEventReason").lower()
        for name in dir(pynvml)
        if name.startswith("nvmlClocksEventReason") and not name.endswith(("All", "None", "UserDefinedClocks"))
    }
    assert {bit: name.replace("_", "") for bit, name in telemetry._REASONS.items()} == theirs
