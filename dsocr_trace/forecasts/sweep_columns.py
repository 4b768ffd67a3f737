"""Columns of a sweep's table, from the sums that the analytic engine gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from analytic.crops import MAX_TILES
from analytic.errors import InputError
from analytic.model import STAGES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from analytic.crops import Grid
    from analytic.hardware import Hardware
    from analytic.sweep import Evaluated
    from analytic.workload import Workload

#: The largest result of one operator, and an operand as large as it, are alive at once.
WORKING_SET: Final = 2
#: Every whole number below this is exact in the arrays that costs are summed in.
_LARGEST: Final = 2**53
_NS_PER_S: Final = 1e9


def check_exact(found: Evaluated) -> None:
    """Refuse sums that are not exact any more.

    Raises
    ------
    InputError
        If there are any.
    """
    if max(column.max() for stage in found.costs.values() for column in stage.values()) >= _LARGEST:
        raise InputError("some workloads are too large to be counted exactly; choose smaller ones with --batch")


def parameters(workload: Workload, most: int) -> dict[str, Any]:
    """Columns that say what the workload is; `most` are the model's positions."""
    columns, rows = workload.grid or (0, 0)
    return {
        "workload": workload.id,
        "variant": workload.variant,
        "page_width_px": workload.page_width,
        "page_height_px": workload.page_height,
        "crop_grid": grid_name(workload.grid),
        "grid_columns": columns,
        "grid_rows": rows,
        "tiles": columns * rows,
        "base_size_px": workload.base_size,
        "image_size_px": workload.image_size,
        "image_tokens": workload.image_tokens,
        "text_tokens": workload.text_tokens,
        "seq_len": workload.seq_len,
        "max_new_tokens": workload.max_new_tokens,
        "batch_size": workload.batch_size,
        "positions": workload.positions,
        "beyond_crop_rule": columns * rows > MAX_TILES,
        "exceeds_max_positions": workload.positions > most,
    }


def grid_name(grid: Grid | None) -> str:
    """Columns x rows, or none."""
    return "none" if grid is None else f"{grid[0]}x{grid[1]}"


def _whole(values: Any) -> Any:
    return np.rint(values).astype(np.int64)


def costs(found: Evaluated) -> dict[str, Any]:
    """Columns that are the same on every device."""
    columns = {}
    for stage in STAGES:
        for name in ("tensor_flops", "vector_flops", "bytes_read", "bytes_written", "weight_bytes"):
            columns[f"{stage}_{name}"] = _whole(found.costs[stage][name])
    for (stage, part), values in found.part_flops.items():
        columns[f"{stage}_{_slug(part)}_tensor_flops"] = _whole(values)
    cache = np.sum([found.costs[stage]["kv_cache_bytes"] for stage in STAGES], axis=0)
    working_set = WORKING_SET * found.activation_peak_bytes
    return columns | {
        "weight_bytes": np.full(len(cache), found.weight_bytes, dtype=np.int64),
        "kv_cache_bytes": _whole(cache),
        "kv_traffic_bytes": _whole(found.cache_traffic),
        "activation_peak_bytes": _whole(found.activation_peak_bytes),
        "memory_needed_bytes": _whole(found.weight_bytes + cache + working_set),
    }


def times(found: Evaluated, hardware: str) -> dict[str, Any]:
    """Times on one device, and how much of them is bound by compute."""
    columns = {
        f"{stage}_{_slug(part)}_ns": _whole(times)
        for (name, stage, part), times in found.part_times.items()
        if name == hardware
    }
    for stage in STAGES:
        times = found.time(hardware, stage)
        columns[f"{stage}_ns"] = _whole(times)
        columns[f"{stage}_compute_bound_share"] = _ratio(found.compute_times[hardware, stage], times)
    return columns


def _slug(part: str) -> str:
    return part.lower().replace(" ", "_")


def _ratio(numerator: Any, denominator: Any) -> Any:
    """Quotient; not a number where nothing is divided by."""
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator != 0)


def judged(frame: pd.DataFrame, device: Hardware, ttft_target: float, tpot_target: float) -> pd.DataFrame:
    """Add what follows from costs and times: latencies, what the targets need, what fits, and the regimes."""
    steps = frame.max_new_tokens.to_numpy() - 1
    ttft = frame.vision_ns + frame.prefill_ns
    total, tpot = ttft + frame.decode_ns, _ratio(frame.decode_ns.to_numpy(), steps)
    memory = int(device.memory_bytes.value)
    per_second = _NS_PER_S * frame.batch_size
    asked = {
        "ttft": (("vision", "prefill"), np.full(len(frame), ttft_target)),
        "tpot": (("decode",), tpot_target * np.where(steps > 0, steps, np.nan)),
    }
    required = {}
    for name, (stages, budget_ns) in asked.items():
        flops = sum(frame[f"{stage}_{kind}_flops"] for stage in stages for kind in ("tensor", "vector"))
        moved = sum(frame[f"{stage}_bytes_{way}"] for stage in stages for way in ("read", "written"))
        # FLOP per ns are GFLOP/s, and bytes per ns are GB/s.
        required[f"{name}_required_tflop_per_s"] = flops / budget_ns / 1e3
        required[f"{name}_required_gb_per_s"] = moved / budget_ns
    return frame.assign(
        ttft_ns=ttft,
        tpot_ns=tpot,
        total_ns=total,
        tokens_per_second=per_second * frame.max_new_tokens / total,
        decode_tokens_per_second=per_second / tpot,
        ttft_target_ns=int(ttft_target),
        tpot_target_ns=int(tpot_target),
        **required,
        meets_ttft=ttft <= ttft_target,
        meets_tpot=pd.array(np.where(steps > 0, tpot <= tpot_target, None), dtype="boolean"),
        device_memory_bytes=memory,
        fits_device_memory=frame.memory_needed_bytes <= memory,
        **regimes(frame),
    )


def regimes(frame: pd.DataFrame) -> dict[str, Any]:
    """Label each row by what dominates it.

    Returns
    -------
    dict
        ``vision_regime``: the part of the vision stage that takes longest. ``ttft_regime``: that, or prefill, whichever
        takes longest before the first token. ``decode_regime``: compute-bound where at least half of decode's time is;
        else by the largest traffic: weight-bound, KV-bound (all bytes that are moved because positions are cached) or
        activation-bound; none without decode. ``dominant_stage``: whether the first token or the others take longer.
        ``kv_overtakes_weights_at_positions``: cached positions at which KV traffic would equal weight traffic.
    """
    vision = {"SAM": frame.vision_sam_ns, "CLIP": frame.vision_clip_ns, "projector": frame.vision_projector_ns}
    weights, cache = frame.decode_weight_bytes, frame.kv_traffic_bytes
    rest = frame.decode_bytes_read + frame.decode_bytes_written - weights - cache
    traffic = _largest({"weight-bound": weights, "KV-bound": cache, "activation-bound": rest})
    steps = frame.max_new_tokens - 1
    decode = np.where(frame.decode_compute_bound_share >= 0.5, "compute-bound", traffic)
    mean_cached = frame.seq_len + (steps + 1) / 2
    return {
        "vision_regime": _largest(vision),
        "ttft_regime": _largest(vision | {"prefill": frame.prefill_ns}),
        "decode_regime": np.where(steps > 0, decode, "none"),
        "dominant_stage": _largest({"first token": frame.vision_ns + frame.prefill_ns, "decode": frame.decode_ns}),
        "kv_overtakes_weights_at_positions": _ratio((mean_cached * weights).to_numpy(), cache.to_numpy()),
    }


def _largest(named: Mapping[str, pd.Series]) -> Any:
    """Name of the largest value in each row; the first of equal ones."""
    return np.array(list(named))[np.argmax(np.stack(list(named.values())), axis=0)]
