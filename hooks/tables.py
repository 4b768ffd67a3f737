"""Arrow schemas of what tracing yields. Times are ns of the clock `time.perf_counter_ns`."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

#: Stages of a generation. Vision is nested in prefill in time, but its calls and events are counted once, as vision.
STAGES: Final = ("vision", "prefill", "decode", "other")

#: One row per module of the traced tree; ``parent_path`` is null for the root, whose ``module_path`` is "".
MODULES: Final = pa.schema(
    [
        pa.field("module_path", pa.string(), nullable=False),
        pa.field("module_class", pa.string(), nullable=False),
        pa.field("qualified_class", pa.string(), nullable=False),
        pa.field("parent_path", pa.string()),
        pa.field("depth", pa.int64(), nullable=False),
        pa.field("is_leaf", pa.bool_(), nullable=False),
        pa.field("parameter_count", pa.int64(), nullable=False),
        pa.field("weight_bytes", pa.int64(), nullable=False),
    ]
)

#: One row per forward call. ``thread`` is the operating system's thread id; ``step`` counts the forwards of a
#: generation, 0 is the prefill.
CALLS: Final = pa.schema(
    [
        pa.field("call_id", pa.int64(), nullable=False),
        pa.field("parent_call_id", pa.int64()),
        pa.field("pass", pa.string(), nullable=False),
        pa.field("page", pa.int64(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("step", pa.int64()),
        pa.field("module_path", pa.string(), nullable=False),
        pa.field("thread", pa.int64(), nullable=False),
        pa.field("start_ns", pa.int64(), nullable=False),
        pa.field("end_ns", pa.int64(), nullable=False),
    ]
)

#: One row per (stage, parent, child); ``parent_path`` is null where the child was called from outside every module.
CALLGRAPH: Final = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("parent_path", pa.string()),
        pa.field("child_path", pa.string(), nullable=False),
        pa.field("parent_class", pa.string()),
        pa.field("child_class", pa.string(), nullable=False),
        pa.field("call_count", pa.int64(), nullable=False),
    ]
)

#: One row per thing that the device did. On a CPU (``cpu_op``) ``duration_ns`` is the operator's self time: its
#: children are rows of their own. ``launch_ns``, ``launch_thread`` and ``process`` are the host call that caused the
#: row; the last two by the operating system's ids.
EVENTS: Final = pa.schema(
    [
        pa.field("event_id", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("start_ns", pa.int64(), nullable=False),
        pa.field("duration_ns", pa.int64(), nullable=False),
        pa.field("device", pa.string(), nullable=False),
        pa.field("stream", pa.int64()),
        pa.field("launch_ns", pa.int64()),
        pa.field("launch_thread", pa.int64()),
        pa.field("process", pa.int64()),
        pa.field("correlation_id", pa.int64()),
        pa.field("graph_node_id", pa.int64()),
    ]
)

#: `EVENTS` with the call that each row belongs to. Exactly one of ``call_id`` and ``unclassified_reason`` is set.
KERNELS: Final = pa.schema(
    [
        *EVENTS,
        pa.field("operator_category", pa.string(), nullable=False),
        pa.field("kernel_family", pa.string(), nullable=False),
        pa.field("pass", pa.string(), nullable=False),
        pa.field("page", pa.int64()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("step", pa.int64()),
        pa.field("call_id", pa.int64()),
        pa.field("module_path", pa.string(), nullable=False),
        pa.field("unclassified_reason", pa.string()),
    ]
)
