"""Where a run can take place, and whether the model fits there."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
import torch

from analytic.errors import DsocrTraceError, InputError

if TYPE_CHECKING:
    from analytic.config import ModelConfig
    from analytic.workload import Workload

DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}

#: The control group that this process sees as its own; version 2.
_CGROUP: Final = Path("/sys/fs/cgroup")

#: What Python, torch and the tables of a run take besides the model.
_PROCESS_BYTES: Final = 1_500_000_000


def resolve_device(name: str) -> torch.device:
    """The device called ``auto``, ``cpu`` or ``cuda:N``.

    Raises
    ------
    InputError
        If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise InputError(f"no device {name!r}; choose auto, cpu or cuda:N with --device")
    if not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise InputError(
            f"device {name} is not here: torch {torch.__version__} {built} and sees no GPU; use --device cpu"
        )
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        raise InputError(
            f"device {name} is not here: this machine has cuda:0 to cuda:{count - 1}; choose with --device"
        )
    return torch.device("cuda", index)


def resolve_dtype(name: str) -> torch.dtype:
    """The type called ``bf16`` or ``fp32``.

    Raises
    ------
    InputError
        If it has another name.
    """
    if name not in DTYPES:
        raise InputError(f"no type {name!r}; choose one of {', '.join(DTYPES)} with --dtype")
    return DTYPES[name]


def needed_bytes(config: ModelConfig, workload: Workload, parameters: int, dtype: torch.dtype) -> int:
    """Estimate of a run's peak memory.

    Weights; and the larger of the two transients that dominate: one SAM block with global attention (its position
    bias, and the copy that scaled_dot_product_attention may take of it), or the logits of every prompt position in
    the model's type and in fp32.

    Parameters
    ----------
    config, workload
        What runs.
    parameters
        Number of the model's parameters.
    dtype
        Type of weights and activations.
    """
    size = dtype.itemsize
    positions = max(view.count * (view.size // config.sam.patch_size) ** 4 for view in workload.views)
    bias = 2 * config.sam.heads * positions * size
    logits = workload.seq_len * config.decoder.vocab_size * (size + torch.float32.itemsize)
    cache = (2 * config.decoder.layers * config.decoder.kv_heads * config.decoder.head_dim * size) * (
        workload.seq_len + workload.max_new_tokens
    )
    return parameters * size + max(bias, logits) + 2 * cache + _PROCESS_BYTES


def available_bytes(device: torch.device) -> int:
    """Memory that a new process may still take on `device`: free, and within the limits set for the process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [psutil.virtual_memory().available]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space - psutil.Process().memory_info().vms)
    limit = _CGROUP / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # The cache of files counts as used, and gives way.
        used = int((_CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
        limits.append(int(text) - used)
    return min(limits)


def require_memory(
    config: ModelConfig, workload: Workload, *, parameters: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a run that cannot fit, before anything is loaded.

    Raises
    ------
    DsocrTraceError
        If the estimate exceeds what is available; says how much is needed, and what would fit.
    """
    needed = needed_bytes(config, workload, parameters, dtype)
    available = available_bytes(device)
    if needed <= available:
        return
    fits = ["--workload dsocr-smoke-v1 (the small variant)"]
    if dtype is torch.float32 and needed_bytes(config, workload, parameters, torch.bfloat16) <= available:
        fits.insert(0, "--dtype bf16")
    raise DsocrTraceError(
        f"too little memory on {device}: the run needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are "
        f"available; what fits: {' or '.join(fits)}"
    )
