"""Arrow schemas of what tracing yields. Times are ns of the clock `time.perf_counter_ns`."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from hooks.columns import CODED

#: Stages of a generation. Vision is nested in prefill in time, but its calls and events are counted once, as vision.
STAGES: Final = ("vision", "prefill", "decode", "other")


def column(name: str, kind: pa.DataType, meaning: str, *, nullable: bool = True) -> pa.Field:
    """A column that says what it holds: the documentation and every Parquet file take the meaning from here.

    Parameters
    ----------
    name
        With the unit at its end.
    kind
        Arrow's type.
    meaning
        A line of Markdown.
    nullable
        Whether a value may be missing.
    """
    return pa.field(name, kind, nullable, {"description": meaning})


def _text(name: str, meaning: str, *, nullable: bool = False) -> pa.Field:
    return column(name, pa.string(), meaning, nullable=nullable)


def _coded(name: str, meaning: str) -> pa.Field:
    return column(name, CODED, meaning, nullable=False)


def _whole(name: str, meaning: str, *, nullable: bool = False) -> pa.Field:
    return column(name, pa.int64(), meaning, nullable=nullable)


#: One row per module of the traced tree.
MODULES: Final = pa.schema(
    [
        _text("module_path", "dotted name in the model; empty for the root"),
        _text("module_class", "class"),
        _text("qualified_class", "class with its Python module"),
        _text("parent_path", "path of the parent; null for the root", nullable=True),
        _whole("depth", "names in the path; 0 for the root"),
        column("is_leaf", pa.bool_(), "whether it has no children", nullable=False),
        _whole("parameter_count", "elements of the parameters that it owns itself; shared ones count once"),
        _whole("weight_bytes", "size of those parameters"),
    ]
)

#: One row per forward call.
CALLS: Final = pa.schema(
    [
        _whole("call_id", "id; unique in the run, not without gaps"),
        _whole("parent_call_id", "the call around it; null for the outermost", nullable=True),
        _text("pass", "`traced`, `traced-2`, ... for repeats, or `profiled`"),
        _whole("page", "number of the page, from 0"),
        _text("stage", "stage"),
        _whole("step", "forward of the generation: 0 is the prefill, then the decode steps", nullable=True),
        _text("module_path", "module"),
        _whole("thread", "operating system's id of the thread"),
        _whole("start_ns", "when `forward` was entered"),
        _whole("end_ns", "when it was left"),
    ]
)

#: One row per (stage, parent, child).
CALLGRAPH: Final = pa.schema(
    [
        _text("stage", "stage of the child"),
        _text("parent_path", "caller; null for calls from outside every module", nullable=True),
        _text("child_path", "callee"),
        _text("parent_class", "class of the caller", nullable=True),
        _text("child_class", "class of the callee"),
        _whole("call_count", "calls"),
    ]
)

#: One row per thing that the device did. On a CPU (``cpu_op``) the operator's children are rows of their own.
EVENTS: Final = pa.schema(
    [
        _whole("event_id", "number of the row"),
        _coded("kind", "`kernel`, `memcpy`, `memset` or `cpu_op`"),
        _coded("name", "as the profiler names it"),
        _whole("start_ns", "when it began on the device"),
        _whole("duration_ns", "how long it took; for a `cpu_op` its self time"),
        _coded("device", "`cpu` or `cuda:N`"),
        _whole("stream", "CUDA stream; null on a CPU", nullable=True),
        _whole("launch_ns", "when the host call that launched it began; null without a launch record", nullable=True),
        _whole("launch_thread", "operating system's id of the thread of that call", nullable=True),
        _whole("process", "operating system's id of the process of that call", nullable=True),
        _whole("correlation_id", "the profiler's id that joins launch and event", nullable=True),
        _whole("graph_node_id", "node of a CUDA graph; always null in an in-process run", nullable=True),
    ]
)

#: `EVENTS`, its texts plain, with the call that each row belongs to. Exactly one of ``call_id`` and
#: ``unclassified_reason`` is set.
KERNELS: Final = pa.schema(
    [
        *(field.with_type(pa.string()) if field.type == CODED else field for field in EVENTS),
        _text("operator_category", "kind of work, read off the name; see `operators`"),
        _text(
            "kernel_family",
            "sort of kernel or operator, read off the name, such as `GEMM` or `flash attention`; `other` for an "
            "unknown name",
        ),
        _text("pass", "`profiled`; `recorded` in the recording of another tool"),
        _whole("page", "number of the page, from 0; null if no forward preceded the event", nullable=True),
        _text("stage", "stage of its call; outside modules, of the forward before it"),
        _whole("step", "forward of the generation: 0 is the prefill, then the decode steps", nullable=True),
        _whole("call_id", "the call in `calls` that it belongs to", nullable=True),
        _text("module_path", "module of that call, or `unclassified`"),
        _text("unclassified_reason", "why it has no call", nullable=True),
    ]
)
