"""Arrow schemas of a run directory's tables. Times are ns since the run's start; the unit stands in the name."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from hooks.tables import CALLGRAPH, CALLS, KERNELS, column
from hooks.tables import MODULES as TRACED_MODULES

#: Version of everything below and of the manifest; raised when a name or a meaning changes.
SCHEMA_VERSION: Final = 2


def _text(name: str, meaning: str) -> pa.Field:
    return column(name, pa.string(), meaning)


def _whole(name: str, meaning: str) -> pa.Field:
    return column(name, pa.int64(), meaning)


def _real(name: str, meaning: str) -> pa.Field:
    return column(name, pa.float64(), meaning)


_STAGE: Final = _text("stage", "stage")
_MODULE: Final = _text("module_path", "dotted name in the model")
_MODULE_OR_REST: Final = _text("module_path", "dotted name in the model, or `unclassified`")
_LAYER: Final = _text(
    "analytic_layer",
    "layer of the cost model that stands for it; `other` for a class that has none: its predicted columns are null, "
    "never 0; null where nothing is predicted",
)

MODULES: Final = pa.schema(
    [
        *(TRACED_MODULES.field(name) for name in ("module_path", "module_class", "qualified_class")),
        _LAYER,
        *(
            TRACED_MODULES.field(name)
            for name in ("parent_path", "depth", "is_leaf", "parameter_count", "weight_bytes")
        ),
    ]
)

PREDICTIONS: Final = pa.schema(
    [
        _STAGE,
        _MODULE,
        _whole("calls", "predicted forward calls"),
        _whole("tensor_flops", "matrix products, convolutions and attention; one multiply-accumulate is 2"),
        _whole("vector_flops", "all other arithmetic"),
        _whole("bytes_read", "operands, each read once per operator"),
        _whole("bytes_written", "results, each written once"),
        _whole("weight_bytes", "share of `bytes_read` that is parameters, over all calls"),
        _whole("activation_bytes", "results that operators hand on, over all calls"),
        _whole("kv_cache_bytes", "growth of the key-value cache"),
        _whole("predicted_device_ns", "how long the module keeps the device busy"),
        _whole("predicted_host_ns", "how long it keeps the host busy, waiting for the device not counted"),
        _whole(
            "predicted_ns",
            "its wall time: by how much it moves the end of everything, on the clocks of host and device",
        ),
        _text(
            "bound",
            "`compute`, `memory`, `launch` or `host`: what most of `predicted_ns` waits for; of several pages on the "
            "one that takes longest",
        ),
        _text(
            "source",
            "`calibrated`, or `extrapolated` where most of `predicted_device_ns` is; without a calibration where the "
            "ceilings come from: `datasheet` for a hardware entry, `estimated` for a processor; of several pages on "
            "the one that takes longest",
        ),
        _whole("datasheet_ns", "roofline with the peaks of the hardware entry"),
        _whole("roof_ns", "the same with the ceilings that the time model takes, and `floor_ns`"),
        _whole("floor_ns", "the shortest time that anything takes on the device, for each launch"),
        _whole(
            "extrapolated_ns",
            "part of `predicted_device_ns` beyond the calibrated sizes; without a calibration all of it",
        ),
    ]
)

#: ``measured_*_ns`` and ``event_count`` cover the profiled forwards only; ``scaled_*_ns`` estimates all forwards of
#: the stage, as ``calls``, ``wall_total_ns`` and ``predicted_*_ns`` do.
ATTRIBUTION: Final = pa.schema(
    [
        _STAGE,
        _text("module_path", "dotted name in the model; `unclassified` for the rest"),
        _text("module_class", "class of the module"),
        _LAYER,
        _text("parent_path", "path of the parent; null for the root"),
        _whole("depth", "names in the path; 0 for the root"),
        _whole("calls", "forward calls in the first traced generation of each page; whole stage"),
        _whole("event_count", "events attributed to the module itself; profiled forwards only"),
        _whole("measured_self_ns", "summed duration of those events"),
        _whole("measured_total_ns", "the same with all modules below"),
        _whole("scaled_self_ns", "`measured_self_ns` scaled to all forwards of the stage"),
        _whole("scaled_total_ns", "`scaled_self_ns` with all modules below"),
        _whole(
            "wall_total_ns",
            "host time inside the module's calls, children included; first traced generation, no profiler",
        ),
        _whole(
            "predicted_self_ns",
            "predicted device time (`predictions.predicted_device_ns`) of the module's own operators; whole stage",
        ),
        _whole("predicted_total_ns", "the same with all modules below"),
        _real(
            "ratio_predicted_to_measured",
            "`predicted_self_ns / scaled_self_ns`; null where nothing was measured",
        ),
        _whole("tensor_flops", "predicted matrix work of the module itself; whole stage"),
        _whole("vector_flops", "predicted other arithmetic"),
        _whole("bytes_total", "predicted bytes read and written"),
        _real("achieved_flops_per_s", "tensor and vector FLOPs over `scaled_self_ns`"),
        _real("achieved_bytes_per_s", "`bytes_total` over `scaled_self_ns`"),
        _real("share_of_time", "`measured_self_ns` over the stage's sum"),
        _text("unclassified_reason", "why these events belong to no module; null for modules"),
    ]
)

OPERATORS: Final = pa.schema(
    [
        _STAGE,
        _MODULE_OR_REST,
        _text("operator_category", "category"),
        _whole("event_count", "events; profiled forwards only"),
        _whole("measured_ns", "their summed duration"),
        _whole("scaled_ns", "the same, scaled to all forwards of the stage"),
        _whole("predicted_ns", "predicted time on the device, not the clock's; whole stage"),
        _whole("flops", "predicted tensor and vector FLOPs"),
        _whole("bytes", "predicted bytes read and written"),
        _real("share_of_module_flops", "`flops` over all FLOPs of the module in this stage; null where it has none"),
    ]
)

MEMORY: Final = pa.schema(
    [
        _STAGE,
        _MODULE,
        _whole("predicted_weight_bytes", "parameters that the module owns, held once however often they are read"),
        _whole("measured_weight_bytes", "parameters that the live module owns; once, not per call"),
        _whole(
            "predicted_activation_peak_bytes", "output of the largest single run of one of the module's own operators"
        ),
        _whole(
            "measured_activation_peak_bytes",
            "most that torch's allocator held during one call beyond what it held at its start: temporaries and "
            "outputs of the module and all below it; largest over the calls of a prefill and the last three decode "
            "steps of each page; null on a CPU",
        ),
        _whole("predicted_kv_cache_bytes", "growth of the key-value cache; whole stage"),
        _whole(
            "measured_kv_cache_bytes",
            "the same, read off the cache's tensors in the first traced generation of each page; 0 for modules that "
            "fill none",
        ),
    ]
)

#: One row per page and stage; and one per stage for all pages, with page "total" and no number.
PAGES: Final = pa.schema(
    [
        _whole("page_number", "number of the page, as in `calls.page` and `kernels.page`; null in totals"),
        _text("page", "name of the page (`scan.pdf#2` is the second of a PDF), or `total`"),
        _text(
            "source",
            "file, or the seed of the drawing; null in totals, as are page size, tile grid and `seq_len`",
        ),
        _STAGE,
        _whole("page_width_px", "width of the page"),
        _whole("page_height_px", "height of the page"),
        _whole("crop_columns", "columns of the tile grid; null without tiles"),
        _whole("crop_rows", "rows of the tile grid"),
        _whole("seq_len", "prompt positions"),
        _whole("new_tokens", "generated tokens"),
        _whole("forwards", "forwards of the stage: 1, or the decode steps"),
        _whole("profiled_forwards", "how many of them were profiled"),
        _whole("wall_ns", "host time, no profiler; median over the repeats"),
        _whole("measured_ns", "device time of the profiled forwards, `unclassified` included"),
        _whole("scaled_ns", "the same, scaled to all forwards of the page's stage"),
        _whole("predicted_ns", "predicted wall time, the choice of tokens included"),
        _whole("predicted_device_ns", "predicted device time, the choice of tokens included"),
        _whole("tensor_flops", "predicted matrix work"),
    ]
)

#: One row per (stage, module) of `ATTRIBUTION`, and one per stage for what is outside of modules. Whole stages.
GAP: Final = pa.schema(
    [
        _STAGE,
        _MODULE_OR_REST,
        _whole(
            "datasheet_ns",
            "roofline with the peaks of the hardware entry; 0 for the choice of tokens, which has none",
        ),
        _whole(
            "ceilings_ns", "what the ceilings that the time model takes add to that; negative where they are higher"
        ),
        _whole("launch_ns", "what the shortest time of each launch adds"),
        _whole("shape_ns", "what the operators' own curves at their sizes add, or save; 0 without a calibration"),
        _whole("predicted_device_ns", "predicted device time: the sum of the four before it"),
        _whole("unexplained_ns", "`measured_ns - predicted_device_ns`"),
        _whole("measured_ns", "device time of its events, scaled to all forwards of the stage"),
        _whole("host_gap_ns", "`wall_self_ns - measured_ns`; negative where the device works on after a call's return"),
        _whole(
            "wall_self_ns",
            "host time of the module's calls without the calls inside them; first traced generation, no profiler. In "
            "`unclassified` rows what remains of the stage's wall time in that generation",
        ),
    ]
)

#: One row per (stage, module): calls in Stage 1's traced pass, NVTX ranges in Stage 2's recording. The last four cover
#: the forwards that Stage 1 profiled, and are null where no device work was recorded.
STAGE2: Final = pa.schema(
    [
        _STAGE,
        _MODULE,
        _whole("calls", "forward calls in the traced pass of Stage 1"),
        _whole("ranges", "ranges in the recording"),
        column("agrees", pa.bool_(), "whether both are equal from every caller, in every page and step"),
        _whole("stage1_event_count", "events attributed to the module itself in Stage 1"),
        _whole("stage2_event_count", "the same in the recording, in the same forwards"),
        _whole("stage1_self_ns", "their summed duration in Stage 1"),
        _whole("stage2_self_ns", "the same in the recording"),
    ]
)

#: One row per launch that Nsight Compute measured; shares are of 1.
COUNTERS: Final = pa.schema(
    [
        _text("name", "kernel"),
        _whole("launch", "number among the launches of that name in the generation, from 0"),
        _text("module_path", "module around the launch; null outside every module"),
        _whole("traced_ns", "the same launch in Nsight Systems' recording"),
        _whole("duration_ns", "`gpu__time_duration.sum`"),
        _whole("dram_read_bytes", "`dram__bytes_read.sum`"),
        _whole("dram_written_bytes", "`dram__bytes_write.sum`"),
        _real("dram_share_of_peak", "`dram__throughput.avg.pct_of_peak_sustained_elapsed`"),
        _real("sm_share_of_peak", "`sm__throughput.avg.pct_of_peak_sustained_elapsed`"),
        _real("tensor_pipe_share_of_peak", "`sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active`"),
        _real("occupancy", "`sm__warps_active.avg.pct_of_peak_sustained_active`"),
    ]
)

#: ``kernels`` of a trace that another tool recorded: ``call_id`` is the range, ``pass`` always "recorded".
RECORDED_KERNELS: Final = pa.schema(
    [*KERNELS, _text("attribution_note", "`graph_not_expanded` where a whole CUDA graph was recorded as one row")]
)

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
    "gap": GAP,
}
