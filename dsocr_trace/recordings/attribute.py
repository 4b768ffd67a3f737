"""Which module each event of a foreign trace belongs to: by a run's module tree, or by what the trace itself names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dsocr_trace.recordings.modules import read_modules
from dsocr_trace.recordings.reconciliation import nesting
from dsocr_trace.runs.invariants import check_conservation, check_totals
from dsocr_trace.runs.ledger import attribution_table
from dsocr_trace.runs.schemas import ATTRIBUTION, PREDICTIONS, RECORDED_KERNELS
from hooks.attribution import UNCLASSIFIED, attribute_to_ranges
from hooks.categories import kernel_families, operator_categories, unknown_names
from hooks.columns import CODED, NONE, ints, plain
from hooks.errors import NothingRecordedError, TraceError
from hooks.intervals import NEVER, innermost, shared_codes

if TYPE_CHECKING:
    from dsocr_trace.recordings.modules import RecordedModules
    from hooks.recording import Recording

#: Name of the pass in tables of a foreign trace.
RECORDED: Final = "recorded"
#: Unknown names that are told one by one, and how many characters of each.
_LISTED: Final = 5
_SHOWN: Final = 100
#: Texts are written out in pieces of this many rows: Arrow's limit for one piece is 2 GiB.
_PIECE_ROWS: Final = 1 << 18
#: What an event takes from its call.
_CALLS: Final = pa.schema(
    {"range_id": pa.int64(), "module_path": CODED, "page": pa.int64(), "stage": CODED, "step": pa.int64()}
)


@attrs.frozen(eq=False)
class Attribution:
    """A trace, attributed; `table` adds up to all of its events.

    Attributes
    ----------
    recording
        The trace.
    recorded
        The modules and calls that its ranges stand for.
    kernels
        Every event with its module, or the reason why it has none: the columns of
        `dsocr_trace.runs.schemas.RECORDED_KERNELS`, those of texts of type `hooks.columns.CODED`.
    table
        The ledger; columns of `dsocr_trace.runs.schemas.ATTRIBUTION`.
    notes
        What a reader of the result must know.
    """

    recording: Recording
    recorded: RecordedModules
    kernels: pa.Table
    table: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def events(self) -> int:
        """How many events there are."""
        return int(self.kernels.num_rows)

    @property
    def total_ns(self) -> int:
        """Summed duration of all events."""
        return int(self.table["measured_self_ns"].sum())

    @property
    def modules(self) -> pd.DataFrame:
        """One row per module, over all stages, the longest own time first.

        Columns ``module_path``, ``calls``, ``event_count``, ``self_ns`` and ``total_ns``; the last is missing where
        ranges overlap without one holding the other.
        """
        named = self.table[self.table["module_path"] != UNCLASSIFIED]
        groups = named.groupby("module_path", sort=False)
        rows = groups[["calls", "event_count"]].sum()
        rows["self_ns"] = groups["measured_self_ns"].sum()
        rows["total_ns"] = groups["measured_total_ns"].sum(min_count=1)
        return rows.reset_index().sort_values("self_ns", ascending=False, kind="stable", ignore_index=True)

    @property
    def attributed_events(self) -> int:
        """How many events belong to a module."""
        return self.events - sum(entry["count"] for entry in self.unclassified.values())

    @property
    def attributed_ns(self) -> int:
        """Their summed duration."""
        return self.total_ns - sum(entry["ns"] for entry in self.unclassified.values())

    @property
    def unclassified(self) -> dict[str, dict[str, int]]:
        """Per reason: ``count`` and ``ns`` of the other events, the longest first."""
        rest = self.table[self.table["module_path"] == UNCLASSIFIED]
        sums = rest.groupby("unclassified_reason")[["event_count", "measured_self_ns"]].sum()
        sums = sums.sort_values("measured_self_ns", ascending=False)
        return {
            str(reason): {"count": int(row["event_count"]), "ns": int(row["measured_self_ns"])}
            for reason, row in sums.iterrows()
        }

    @property
    def coverage(self) -> float | None:
        """Share of the time that belongs to modules; None without any time."""
        return self.attributed_ns / self.total_ns if self.total_ns else None

    def beside(self, predictions: pd.DataFrame) -> Attribution:
        """The same with predictions of the same forwards (`dsocr_trace.runs.schemas.PREDICTIONS`) in the table."""
        return attrs.evolve(self, table=_table(self.recorded, self.kernels, predictions))


def attribute_recording(recording: Recording, modules: pd.DataFrame | None = None) -> Attribution:
    """Give each event of a trace the innermost module that was running when it was launched.

    Parameters
    ----------
    recording
        What another tool recorded.
    modules
        Table ``modules`` of the run that the trace is of; see `dsocr_trace.recordings.modules.read_modules` for what
        counts without it.

    Returns
    -------
    Attribution
        Without any event only if there are ranges to compare with the run's calls.

    Raises
    ------
    InputError
        If the trace is of another run.
    TraceError
        If it holds no event, or events and no range that could hold one.
    dsocr_trace.runs.invariants.BrokenInvariantError
        If the result does not add up to what was recorded.
    """
    if not recording.events.num_rows and (modules is None or not recording.ranges.num_rows):
        raise NothingRecordedError(_nothing(recording))
    recorded = read_modules(recording, modules)
    kernels = _kernels(recording, recorded)
    table = _table(recorded, kernels, pd.DataFrame(columns=PREDICTIONS.names))
    check_conservation(table, _sums(kernels).assign(call_id=kernels["call_id"].to_pandas()))
    notes = [*recording.notes, *recorded.notes, *_unknown(recording.events)]
    if recorded.is_tree:
        check_totals(table)
    elif table["measured_total_ns"].isna().any():
        notes.append("ranges overlap without one holding the other: only own times are told, no totals")
    return Attribution(recording, recorded, kernels, table, tuple(notes))


def _unknown(recorded: pa.Table) -> list[str]:
    """Say which names no rule knows, the longest time first."""
    unknown = unknown_names(recorded["name"], recorded["duration_ns"])
    if not unknown.num_rows:
        return []
    names = ", ".join(repr(name[:_SHOWN]) for name in unknown["name"][:_LISTED].to_pylist())
    rest = f" and {unknown.num_rows - _LISTED} more" if unknown.num_rows > _LISTED else ""
    events = pc.sum(unknown["event_count"])
    return [f"{events} events are of kernel family `other`, since no rule knows their names: {names}{rest}"]


def _nothing(recording: Recording) -> str:
    fix = "record it where there is a GPU (nsys profile --trace=cuda,nvtx)"
    if recording.ranges.num_rows:
        fix += f", or compare its {recording.ranges.num_rows:,} ranges with the calls of a run by --run"
    return f"this {recording.tool} trace holds no work of a device; {fix}"


def _kernels(recording: Recording, recorded: RecordedModules) -> pa.Table:
    attributed = attribute_to_ranges(recording, recorded.ranges)
    calls = pa.Table.from_pandas(recorded.calls, schema=_CALLS, preserve_index=False)
    own = pc.index_in(attributed["range_id"], calls["range_id"])
    context = pc.coalesce(own, _forward_before(attributed, recorded.calls))
    columns = {name: attributed[name] for name in attributed.column_names if name in RECORDED_KERNELS.names}
    columns |= {
        "operator_category": operator_categories(attributed["name"]),
        "kernel_family": kernel_families(attributed["name"]),
        "pass": pa.repeat(pa.scalar(RECORDED, CODED), attributed.num_rows),
        "page": calls["page"].take(context),
        "stage": calls["stage"].take(context).fill_null("other"),
        "step": calls["step"].take(context),
        "call_id": attributed["range_id"],
        "module_path": calls["module_path"].take(own).fill_null(UNCLASSIFIED),
    }
    kernels = pa.table({name: columns[name] for name in RECORDED_KERNELS.names})
    return pa.Table.from_batches(kernels.to_batches(max_chunksize=_PIECE_ROWS), kernels.schema)


def _forward_before(attributed: pa.Table, calls: pd.DataFrame) -> pa.Array:
    """Row of the forward that each event's launch follows on its thread: what follows a forward is its sampling."""
    forwards = np.flatnonzero(calls["step"].notna() & calls["parent_path"].isna())
    roots = calls.iloc[forwards]
    lane, at_lane = shared_codes(
        [roots["process"].to_numpy(), roots["thread"].to_numpy()],
        [ints(attributed["process"]), ints(attributed["launch_thread"])],
    )
    never = np.full(len(roots), NEVER)
    found = innermost(lane, roots["start_ns"].to_numpy(), never, at_lane, ints(attributed["launch_ns"]))
    rows = np.append(forwards, NONE)[found]
    return pa.array(rows.astype(np.int32), mask=rows == NONE)


def _sums(kernels: pa.Table) -> pd.DataFrame:
    """What the ledger needs of the events; all were recorded, so nothing is scaled."""
    columns = ["event_id", "stage", "module_path", "duration_ns", "unclassified_reason"]
    frame = plain(kernels.select(columns)).to_pandas()
    return frame.assign(scaled_ns=frame["duration_ns"])


def _table(recorded: RecordedModules, kernels: pa.Table, predictions: pd.DataFrame) -> pd.DataFrame:
    table = attribution_table(recorded.modules, recorded.calls, _sums(kernels), predictions)
    if not recorded.is_tree:
        named = table["module_path"] != UNCLASSIFIED
        totals = table["module_path"].map(_totals_by_nesting(recorded.calls, kernels))
        for column in ("measured_total_ns", "scaled_total_ns"):
            table[column] = table[column].where(~named, totals)
    return table[ATTRIBUTION.names]


def _totals_by_nesting(calls: pd.DataFrame, kernels: pa.Table) -> pd.Series:
    """Time of each label: all events inside its ranges, those of ranges inside them included, each counted once."""
    try:
        parents, _ = nesting(calls.rename(columns={"module_path": "name"}))
    except TraceError:
        return pd.Series(dtype="float64")
    owned = kernels.select(["call_id", "duration_ns"]).to_pandas().groupby("call_id")["duration_ns"].sum()
    own = owned.reindex(calls["range_id"]).fillna(0).astype("int64").to_numpy()
    paths = calls["module_path"].to_numpy()
    totals: dict[str, int] = dict.fromkeys(paths, 0)
    for row in np.flatnonzero(own).tolist():
        for path in _labels_around(row, parents, paths):
            totals[path] += int(own[row])
    return pd.Series(totals)


def _labels_around(row: int, parents: np.ndarray, paths: np.ndarray) -> set[str]:
    found = set()
    while row >= 0:
        found.add(paths[row])
        row = parents[row]
    return found
