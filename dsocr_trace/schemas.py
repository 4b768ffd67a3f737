"""Arrow schemas of a run directory's tables. Times are ns since the run's start; the unit stands in the name."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from hooks.tables import CALLGRAPH, CALLS, KERNELS
from hooks.tables import MODULES as TRACED_MODULES

#: Version of everything below and of the manifest; raised when a name or a meaning changes.
SCHEMA_VERSION: Final = 1


def _text(*names: str) -> list[pa.Field]:
    return [pa.field(name, pa.string()) for name in names]


def _whole(*names: str) -> list[pa.Field]:
    return [pa.field(name, pa.int64()) for name in names]


def _real(*names: str) -> list[pa.Field]:
    return [pa.field(name, pa.float64()) for name in names]


MODULES: Final = pa.schema(
    [
        *(TRACED_MODULES.field(name) for name in ("module_path", "module_class", "qualified_class")),
        pa.field("analytic_layer", pa.string()),
        *(
            TRACED_MODULES.field(name)
            for name in ("parent_path", "depth", "is_leaf", "parameter_count", "weight_bytes")
        ),
    ]
)

PREDICTIONS: Final = pa.schema(
    [
        *_text("stage", "module_path"),
        *_whole(
            "calls",
            "tensor_flops",
            "vector_flops",
            "bytes_read",
            "bytes_written",
            "weight_bytes",
            "activation_bytes",
            "kv_cache_bytes",
            "predicted_device_ns",
            "predicted_host_ns",
            "predicted_ns",
        ),
        *_text("bound", "source"),
    ]
)

#: ``measured_*_ns`` and ``event_count`` cover the profiled forwards only; ``scaled_*_ns`` estimates all forwards of
#: the stage, as ``calls``, ``wall_total_ns`` and ``predicted_*_ns`` do.
ATTRIBUTION: Final = pa.schema(
    [
        *_text("stage", "module_path", "module_class", "analytic_layer", "parent_path"),
        *_whole(
            "depth",
            "calls",
            "event_count",
            "measured_self_ns",
            "measured_total_ns",
            "scaled_self_ns",
            "scaled_total_ns",
            "wall_total_ns",
            "predicted_self_ns",
            "predicted_total_ns",
        ),
        *_real("ratio_predicted_to_measured"),
        *_whole("tensor_flops", "vector_flops", "bytes_total"),
        *_real("achieved_flops_per_s", "achieved_bytes_per_s", "share_of_time"),
        *_text("unclassified_reason"),
    ]
)

OPERATORS: Final = pa.schema(
    [
        *_text("stage", "module_path", "operator_category"),
        *_whole("event_count", "measured_ns", "scaled_ns", "predicted_ns", "flops", "bytes"),
        *_real("share_of_module_flops"),
    ]
)

MEMORY: Final = pa.schema(
    [
        *_text("stage", "module_path"),
        *_whole(
            "predicted_weight_bytes",
            "measured_weight_bytes",
            "predicted_activation_peak_bytes",
            "measured_activation_peak_bytes",
            "predicted_kv_cache_bytes",
            "measured_kv_cache_bytes",
        ),
    ]
)

#: One row per page and stage; and one per stage for all pages, with page "total" and no number.
PAGES: Final = pa.schema(
    [
        *_whole("page_number"),
        *_text("page", "source", "stage"),
        *_whole(
            "page_width_px",
            "page_height_px",
            "crop_columns",
            "crop_rows",
            "seq_len",
            "new_tokens",
            "forwards",
            "profiled_forwards",
            "wall_ns",
            "measured_ns",
            "scaled_ns",
            "predicted_ns",
            "tensor_flops",
        ),
    ]
)

#: One row per (stage, module): calls in Stage 1's traced pass, NVTX ranges in Stage 2's recording. The last four cover
#: the forwards that Stage 1 profiled, and are null where no device work was recorded.
STAGE2: Final = pa.schema(
    [
        *_text("stage", "module_path"),
        *_whole("calls", "ranges"),
        pa.field("agrees", pa.bool_()),
        *_whole("stage1_event_count", "stage2_event_count", "stage1_self_ns", "stage2_self_ns"),
    ]
)

#: One row per launch that Nsight Compute measured; shares are of 1.
COUNTERS: Final = pa.schema(
    [
        *_text("name"),
        *_whole("launch"),
        *_text("module_path"),
        *_whole("traced_ns", "duration_ns", "dram_read_bytes", "dram_written_bytes"),
        *_real("dram_share_of_peak", "sm_share_of_peak", "tensor_pipe_share_of_peak", "occupancy"),
    ]
)

#: ``kernels`` of a trace that another tool recorded: ``call_id`` is the range, ``pass`` always "recorded".
RECORDED_KERNELS: Final = pa.schema([*KERNELS, pa.field("attribution_note", pa.string())])

#: Tables that only Stage 2 writes, by their file's name.
STAGE2_TABLES: Final = {"stage2": STAGE2, "counters": COUNTERS}

#: Every table that each run directory has, by its file's name.
TABLES: Final = {
    "modules": MODULES,
    "calls": CALLS,
    "callgraph": CALLGRAPH,
    "kernels": KERNELS,
    "predictions": PREDICTIONS,
    "attribution": ATTRIBUTION,
    "operators": OPERATORS,
    "memory": MEMORY,
    "pages": PAGES,
}
