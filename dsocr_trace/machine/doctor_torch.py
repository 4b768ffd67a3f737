"""The part of the examination that needs torch: devices, memory, hardware entry."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Final

import pynvml
import torch

from analytic.config import DEFAULT_VARIANT, variant_config
from analytic.errors import InputError
from analytic.workload import load_workload
from dsocr_trace.machine.doctor import Check
from dsocr_trace.machine.environment import device_properties, hardware_for
from stage_runners.devices import available_bytes, needed_bytes, resolve_device
from stage_runners.loading import parameter_count
from stage_runners.telemetry import nvml

_CUDA_TORCH: Final = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
_WORKLOAD: Final = "dsocr-standard-v1"


def examine_torch() -> list[Check]:
    """Look at torch, and at the device that ``--device auto`` takes."""
    device = resolve_device("auto")
    return [_torch(), _device(device), _hardware(device), _memory(device), _flash(device)]


def _torch() -> Check:
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Check("torch", f"{torch.__version__}, built {built}", required=True)


def _device(device: torch.device) -> Check:
    name = device_properties(device)["name"]
    if device.type == "cuda":
        return Check("device", f"{torch.cuda.device_count()} GPUs; {device} is {name}")
    unused = _driver_answers()
    return Check(
        "device",
        f"cpu, {name}" + ("; there is a GPU that torch does not see" if unused else ""),
        _CUDA_TORCH if unused else None,
    )


def _driver_answers() -> bool:
    try:
        with nvml():
            return True
    except pynvml.NVMLError:
        return False


def _hardware(device: torch.device) -> Check:
    try:
        hardware = hardware_for(None, device)
    except InputError as error:
        return Check("hardware", "no entry matches this device", str(error))
    return Check("hardware", f"predicts with {hardware.name}")


def _memory(device: torch.device) -> Check:
    config = variant_config(DEFAULT_VARIANT)
    needed = needed_bytes(config, load_workload(_WORKLOAD), parameter_count(config), torch.bfloat16)
    available = available_bytes(device)
    found = f"{available / 1e9:.1f} GB free on {device}, {_WORKLOAD} needs about {needed / 1e9:.1f} GB"
    return Check("memory", found, "use --workload dsocr-smoke-v1" if needed > available else None)


def _flash(device: torch.device) -> Check:
    if importlib.util.find_spec("flash_attn") is not None:
        return Check("flash-attn", metadata.version("flash-attn"))
    if device.type != "cuda":
        return Check("flash-attn", "not installed, and of no use without a GPU")
    return Check(
        "flash-attn",
        "not installed: no --attention flash_attention_2",
        "pip install --no-build-isolation flash-attn",
    )
