"""What any tool recorded of a run: device events, host ranges, and captured graph nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import pyarrow as pa

from hooks.columns import CODED
from hooks.tables import EVENTS

if TYPE_CHECKING:
    from collections.abc import Mapping

#: One row per host range. ``style`` is ``push_pop`` (nested on its thread), ``start_end`` (may overlap others, and end
#: on another thread) or ``module`` (a module call that the tool itself recorded). ``end_ns`` is null for a range that
#: was still open when the recording ended.
RANGES: Final = pa.schema(
    [
        pa.field("range_id", pa.int64(), nullable=False),
        pa.field("name", CODED, nullable=False),
        pa.field("domain", CODED),
        pa.field("style", CODED, nullable=False),
        pa.field("process", pa.int64(), nullable=False),
        pa.field("thread", pa.int64(), nullable=False),
        pa.field("start_ns", pa.int64(), nullable=False),
        pa.field("end_ns", pa.int64()),
    ]
)

#: One row per node of a CUDA graph, with the moment and thread of its capture. ``original_node_id`` is the node that it
#: was cloned from, null for one that was captured itself.
GRAPH_NODES: Final = pa.schema(
    [
        pa.field("process", pa.int64(), nullable=False),
        pa.field("graph_node_id", pa.int64(), nullable=False),
        pa.field("original_node_id", pa.int64()),
        pa.field("thread", pa.int64(), nullable=False),
        pa.field("start_ns", pa.int64(), nullable=False),
        pa.field("end_ns", pa.int64(), nullable=False),
    ]
)

#: `hooks.tables.EVENTS` with the range that each row belongs to. Exactly one of ``range_id`` and
#: ``unclassified_reason`` is set; ``attribution_note`` is what must be known of a row nevertheless.
ATTRIBUTED: Final = pa.schema(
    [
        *EVENTS,
        pa.field("range_id", pa.int64()),
        pa.field("range_name", CODED),
        pa.field("unclassified_reason", CODED),
        pa.field("attribution_note", CODED),
    ]
)


@attrs.frozen(eq=False)
class Recording:
    """One recorded file, read.

    Attributes
    ----------
    tool, version
        What recorded it, such as ``nsys`` and ``2024.2.3``; the version is None where the file does not say.
    events
        Schema `hooks.tables.EVENTS`, times on the tool's clock.
    ranges
        Schema `RANGES`, on the same clock.
    graph_nodes
        Schema `GRAPH_NODES`, on the same clock.
    untimed
        ``event_id`` of the events whose end the file does not give, or gives as before their start: their
        ``duration_ns`` is 0.
    counters
        For each counter that the tool measured, by ``event_id``; empty for tools that measure none.
    notes
        What a reader of the result must know, one sentence each: ranges never closed, rows that were refused and why.
    """

    tool: str
    version: str | None
    events: pa.Table
    ranges: pa.Table = attrs.field(factory=RANGES.empty_table)
    graph_nodes: pa.Table = attrs.field(factory=GRAPH_NODES.empty_table)
    untimed: pa.Array = attrs.field(factory=lambda: pa.array([], pa.int64()))
    counters: Mapping[str, pa.Array] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()
