"""What the ranges of a foreign trace say of modules: which ranges are modules, who called whom, in which stage."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from analytic.errors import InputError
from dsocr_trace.recordings.reconciliation import module_names, recorded_calls
from hooks.attribution import ranges_of_modules
from hooks.columns import each_distinct, is_text, plain
from hooks.errors import TraceError
from hooks.intervals import NEVER
from hooks.modules import is_within, parent_of
from hooks.nvtx_ranges import DOMAIN
from stage_runners.stage1 import VISION_SUBTREES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hooks.recording import Recording

#: A trace is of another run if less than this share of its range names are modules of the run, and less than this share
#: of the run's modules are in it. One alone is normal: libraries have ranges too, and a short trace calls few experts.
_FEW: Final = 0.1
_EXAMPLES: Final = 3
#: What ``torch.autograd.profiler.emit_nvtx`` adds to an operator's name: each call's has other numbers.
_CALL_DETAILS: Final = re.compile(r", (seq|op_id|sizes|input_op_ids) = .*", re.DOTALL)


@attrs.frozen(eq=False)
class RecordedModules:
    """The modules that a trace's ranges stand for.

    Attributes
    ----------
    modules
        Columns of `dsocr_trace.runs.schemas.MODULES`, as far as they are known. Without a tree each label is a root.
    is_tree
        Whether paths say what contains what; else only the ranges do.
    ranges
        The ranges that count, named by path or label; schema `hooks.recording.RANGES`.
    calls
        One row for each, in the order of their start: ``range_id``, ``module_path``, ``parent_path``, ``page``,
        ``stage`` (``other`` where it cannot be told), ``step``, ``process``, ``thread``, ``start_ns``, ``end_ns``.
    unmatched
        Names of the other ranges, without numbers of single calls, sorted.
    notes
        What a reader must know, one sentence each.
    """

    modules: pd.DataFrame
    is_tree: bool
    ranges: pa.Table
    calls: pd.DataFrame
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]


def read_modules(recording: Recording, modules: pd.DataFrame | None = None) -> RecordedModules:
    """Find the calls of modules among a trace's ranges.

    Parameters
    ----------
    recording
        The trace.
    modules
        Table ``modules`` of the run that it is of: only ranges named by its paths count. Without it the trace's own
        ``nn.Module`` calls count; where it holds none, the ranges that this tool made; else all ranges.

    Raises
    ------
    InputError
        If none or few of the run's modules are in the trace.
    """
    if modules is not None:
        return _of_run(recording, modules)
    by_tool = is_text(recording.ranges["style"], "module")
    if pc.any(by_tool).as_py():
        return _labelled(recording, by_tool)
    ours = is_text(recording.ranges["domain"], DOMAIN)
    if pc.any(ours).as_py():
        return _in_tree(recording, _own_tree(recording.ranges.filter(ours)))
    return _labelled(recording, pa.repeat(pa.scalar(value=True), recording.ranges.num_rows))


def _of_run(recording: Recording, modules: pd.DataFrame) -> RecordedModules:
    found = _in_tree(recording, modules)
    in_trace = len(found.ranges["name"].unique())
    # Ranges that this tool made are modules, so each must be one of the run's.
    ours = recording.ranges["name"].filter(is_text(recording.ranges["domain"], DOMAIN))
    strangers = sorted({*ours.unique().to_pylist()} - module_names(modules).keys())
    if not strangers and in_trace < _FEW * min(len(found.unmatched) + in_trace, len(modules)):
        strangers = list(found.unmatched)
    if strangers:
        raise InputError(
            f"the trace is not of this run: {in_trace} of its {len(modules)} modules are named in it, "
            f"{len(strangers)} other ranges are not, such as {', '.join(map(repr, strangers[:_EXAMPLES]))}; "
            "give the run that was recorded with --run, or leave --run out"
        )
    return found


def _in_tree(recording: Recording, modules: pd.DataFrame) -> RecordedModules:
    ranges, others = ranges_of_modules(recording, module_names(modules))
    calls, notes = _staged(recording, ranges, list(modules["module_path"]))
    return RecordedModules(
        modules=modules,
        is_tree=True,
        ranges=ranges,
        calls=calls,
        unmatched=tuple(sorted({_label(name) for name in others})),
        notes=notes,
    )


def _labelled(recording: Recording, counts: pa.Array) -> RecordedModules:
    """Take each distinct name as a module of its own."""
    ranges, others = recording.ranges.filter(counts), recording.ranges.filter(pc.invert(counts))
    labels = each_distinct(lambda names: [_label(name) for name in names], ranges["name"])
    ranges = ranges.set_column(ranges.column_names.index("name"), ranges.schema.field("name"), labels)
    modules = pd.DataFrame({"module_path": labels.unique().to_pylist()}, dtype="str")
    return RecordedModules(
        modules=modules.assign(module_class=None, analytic_layer=None, parent_path=None, depth=0),
        is_tree=False,
        ranges=ranges,
        calls=_unstaged(recording, ranges),
        unmatched=tuple(sorted({_label(name) for name in others["name"].unique().to_pylist()})),
        notes=(),
    )


def _label(name: str) -> str:
    return _CALL_DETAILS.sub("", name)


def _own_tree(ranges: pa.Table) -> pd.DataFrame:
    """Modules that this tool's ranges name. Only the root's has a class for its name, and holds all others."""
    frame = plain(ranges.select(["name", "start_ns"])).to_pandas()
    frame["ns"] = pc.subtract(ranges["end_ns"].fill_null(NEVER), ranges["start_ns"]).to_numpy().astype(float)
    longest = list(frame.groupby("name")["ns"].max().sort_values(ascending=False, kind="stable").index)
    first_names = {name.partition(".")[0] for name in longest if "." in name}
    root = next((name for name in longest if "." not in name and name not in first_names), None)
    paths = {""}
    for path in (name for name in longest if name != root):
        above: str | None = path
        while above is not None and above not in paths:
            paths.add(above)
            above = parent_of(above)
    ordered = sorted(paths)
    return pd.DataFrame(
        {
            "module_path": ordered,
            "module_class": [None if path else root for path in ordered],
            "analytic_layer": None,
            "parent_path": [parent_of(path) for path in ordered],
            "depth": [path.count(".") + 1 if path else 0 for path in ordered],
        }
    )


def _staged(recording: Recording, ranges: pa.Table, paths: Iterable[str]) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Calls with stage and step, where the trace's order of forwards tells them."""
    calls = _unstaged(recording, ranges)
    by_path = calls.assign(stage=np.where(_is_vision(calls["module_path"]), "vision", "other"))
    if recording.counters or calls.empty:  # a tool that picks launches shows neither nesting nor order of the calls
        return by_path, ()
    try:
        told = recorded_calls(ranges, _generations(calls))
    except TraceError as error:
        return by_path, (f"prefill and decode are not told apart: {error}",)
    columns = ["page", "stage", "step", "parent_path"]
    calls[columns] = told.set_index("range_id").loc[calls["range_id"], columns].to_numpy()
    calls = calls.astype({"page": "Int64", "step": "Int64"})
    has_vision = any(is_within(path, one) for path in paths for one in VISION_SUBTREES)
    return _without_prefill(calls) if has_vision else (calls, ())


def _generations(calls: pd.DataFrame) -> list[int]:
    """Number of forwards in each generation: one begins with the forward that runs the vision part, and at first.

    Raises
    ------
    TraceError
        If forwards overlap.
    """
    roots = calls[calls["module_path"] == ""]
    forwards = roots["start_ns"].to_numpy()
    if (forwards[1:] < np.maximum.accumulate(roots["end_ns"].to_numpy())[:-1]).any():
        raise TraceError("forwards overlap in time, as those of several processes or threads do")
    vision = calls.loc[_is_vision(calls["module_path"]), "start_ns"].to_numpy()
    first = np.union1d([0], np.searchsorted(forwards, vision, side="right") - 1)
    return [int(count) for count in np.diff([*first[first >= 0], len(forwards)])]


def _without_prefill(calls: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Correct what was taken for a prefill although it does not run the model's vision part."""
    with_vision = set(calls.loc[calls["stage"] == "vision", "page"])
    cut = ~calls["page"].isin(with_vision)
    if not cut.any():
        return calls, ()
    stages = calls["stage"].mask(cut, "decode")
    steps = calls["step"].mask(cut)
    return calls.assign(stage=stages, step=steps), (
        "the trace begins after a prefill: the steps of its first forwards are not known",
    )


def _unstaged(recording: Recording, ranges: pa.Table) -> pd.DataFrame:
    """Calls in the order of their start."""
    frame = plain(ranges.select(["range_id", "name", "process", "thread", "start_ns"])).to_pandas()
    frame["end_ns"] = ranges["end_ns"].fill_null(NEVER).to_numpy()
    frame = frame.sort_values(["start_ns", "end_ns"], ascending=[True, False], kind="stable", ignore_index=True)
    frame["end_ns"] = frame["end_ns"].where(frame["end_ns"] != NEVER, _last_ns(recording))
    frame = frame.rename(columns={"name": "module_path"}).assign(parent_path=None, page=None, stage="other", step=None)
    return frame.astype({"page": "Int64", "step": "Int64"})


def _last_ns(recording: Recording) -> int:
    moments = [*(recording.ranges[name] for name in ("start_ns", "end_ns")), recording.events["start_ns"]]
    return max((pc.max(column).as_py() or 0 for column in moments), default=0)


def _is_vision(paths: pd.Series) -> pd.Series:
    return paths.isin([path for path in paths.unique() if any(is_within(path, one) for one in VISION_SUBTREES)])
