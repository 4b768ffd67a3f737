"""What the run ran on and with: versions, commit, device. Nothing of the user's environment or processes."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pynvml
import torch

from analytic.errors import InputError
from analytic.hardware import Hardware, cpu_hardware, hardware_names, load_hardware
from analytic.timing.datasheet import from_datasheet
from dsocr_trace.machine.devices import load_device
from stage_runners.telemetry import nvml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from analytic.timing.calibration import Calibration

_PACKAGES: Final = ("dsocr-trace", "torch", "transformers", "nvtx", "numpy", "pandas", "pyarrow", "safetensors")

#: What one core of a current server draws from memory, assumed: no operating system tells it.
_GB_PER_S_PER_CORE: Final = 25


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"  # run from a bare checkout
    return found


def git_commit() -> str | None:
    """Commit of the checkout that dsocr-trace runs from, with ``-dirty`` where it was changed; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603  fixed words
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def device_properties(device: torch.device) -> dict[str, Any]:
    """Name and size of the device, as its driver or the operating system tells it."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {
            "device": str(device),
            "name": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "cuda_version": torch.version.cuda,
            "driver_version": _driver_version(),
        }
    return {
        "device": "cpu",
        "name": _processor_field("model name") or platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _driver_version() -> str | None:
    try:
        with nvml():
            version: str = pynvml.nvmlSystemGetDriverVersion()
            return version
    except pynvml.NVMLError:
        return None


def _processor_field(field: str) -> str | None:
    path = Path("/proc/cpuinfo")
    lines: Iterable[str] = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)


def _this_processor() -> Hardware:
    """Ceilings of the processor that runs this, from its instruction set, cores and clock.

    Each rung of the ladder is the widest unit that processors with these instructions have: two 512-bit (256-bit)
    multiply-add units a core, with bf16 dot products at twice the fp32 rate where they exist, and AMX tiles at 1024
    multiply-adds a cycle (Intel Intrinsics Guide; AMD Zen 5 and Intel Sapphire Rapids optimisation guides).
    """
    flags = set((_processor_field("flags") or "").split())
    clock = psutil.cpu_freq()
    if clock is None or "avx2" not in flags:
        return load_hardware("cpu-generic")
    fp32 = 64 if "avx512f" in flags else 32
    bf16 = 2048 if "amx_bf16" in flags else 2 * fp32 if "avx512_bf16" in flags else fp32
    return cpu_hardware(
        "this-cpu",
        cores=torch.get_num_threads(),
        ghz=round((clock.max or clock.current) / 1000, 2),
        fp32_per_cycle=fp32,
        bf16_per_cycle=bf16,
        gb_per_s_per_core=_GB_PER_S_PER_CORE,
        memory_gb=psutil.virtual_memory().total / 1e9,
    )


def hardware_for(name: str | None, device: torch.device) -> Hardware:
    """The hardware entry to predict with: the one asked for, else the one that matches the device.

    Raises
    ------
    InputError
        If the entry is unknown, or none is asked for and none matches.
    """
    if name is not None:
        return load_hardware(name)
    if device.type == "cpu":
        return _this_processor()
    found = torch.cuda.get_device_name(device)
    for entry in map(load_hardware, hardware_names()):
        if found in entry.device_names:
            return entry
    raise InputError(
        f"no hardware entry is for {found!r}; choose one of {', '.join(hardware_names())}, or a .toml file, "
        "with --hardware"
    )


def calibration_for(name: str | None, device: torch.device) -> Calibration:
    """What times are predicted from: the device asked for, else the hardware entry that matches the live one.

    Parameters
    ----------
    name
        Hardware entry, its file, or a calibration's file (`dsocr_trace.machine.devices.load_device`).
    device
        The live one.

    Raises
    ------
    InputError
        If there is none, or the file cannot be used.
    """
    return from_datasheet(hardware_for(None, device)) if name is None else load_device(name)


def check_dtype(calibration: Calibration, dtype: str) -> None:
    """Refuse a device of which nothing is known in a model's dtype.

    Raises
    ------
    InputError
        If its entry has no peaks for it, or it was calibrated for models in others only.
    """
    calibration.hardware.tensor_peak(dtype)
    measured = sorted({sample.dtype for sample in calibration.samples})
    if measured and dtype not in measured:
        raise InputError(
            f"{calibration.device} was calibrated for models in {', '.join(measured)}, not in {dtype}; choose another "
            "with --dtype, or measure it with dsocr-trace calibrate --dtype"
        )


def other_device_note(calibration: Calibration, found: Mapping[str, Any]) -> list[str]:
    """What the reader must know where the prediction is not for the device that was measured.

    Parameters
    ----------
    calibration
        What was predicted from.
    found
        The live device (`device_properties`).
    """
    known = {calibration.device} if calibration.source == "calibrated" else {*calibration.hardware.device_names}
    same_kind = found["device"].startswith(calibration.kind)
    # An entry without names, such as a user's own, may be for any device of its kind.
    if same_kind and (not known or found["name"] in known):
        return []
    return [f"the prediction is for {calibration.device} ({calibration.source}), measured was {found['name']}"]
