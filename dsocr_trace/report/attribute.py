"""An attributed trace on a terminal and as a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import pandas as pd

from dsocr_trace.report.console import plain_table, result_console
from dsocr_trace.report.pieces import count, page, table
from dsocr_trace.report.units import duration, percent
from hooks.attribution import REASONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsocr_trace.recordings.joined import Joined
    from dsocr_trace.recordings.reconciliation import Reconciliation

_TOP: Final = 15


@attrs.frozen
class Section:
    """A table of text.

    Attributes
    ----------
    right
        How many of the last columns are numbers.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: int


def sections(joined: Joined) -> list[Section]:
    """Tables of a trace, those without rows left out."""
    found = [_stages(joined), _modules(joined), _unclassified(joined)]
    if joined.calls is not None and not joined.attribution.events:
        found = [_calls(joined.calls)]
    return [section for section in found if section.rows]


def _stages(joined: Joined) -> Section:
    stages = joined.attribution.table.groupby("stage")[["event_count", "measured_self_ns"]].sum()
    rows = tuple(
        (str(stage), count(int(row["event_count"])), duration(int(row["measured_self_ns"])))
        for stage, row in stages.iterrows()
    )
    return Section("Stages", ("Stage", "Events", "Time"), rows if len(rows) > 1 else (), right=2)


def _modules(joined: Joined) -> Section:
    found = joined.attribution
    rows = tuple(
        (
            _name(row.module_path),
            count(row.event_count),
            duration(row.self_ns),
            percent(row.self_ns / found.total_ns),
            duration(None if pd.isna(row.total_ns) else row.total_ns),
        )
        for row in found.modules[found.modules["self_ns"] > 0].head(_TOP).itertuples()
    )
    head = ("Module", "Events", "Own time", "Share", "With all inside")
    return Section("Heaviest modules, by their own time on the device", head, rows, right=4)


def _unclassified(joined: Joined) -> Section:
    rows = tuple(
        (reason, REASONS[reason], count(entry["count"]), duration(entry["ns"]))
        for reason, entry in joined.attribution.unclassified.items()
    )
    return Section("Unclassified", ("Reason", "Meaning", "Events", "Time"), rows, right=2)


def _calls(calls: Reconciliation) -> Section:
    # Where all agree, those that are called most are shown.
    shown = calls.modules.sort_values(["agrees", "our_events"], ascending=[True, False], kind="stable")
    rows = tuple(
        (row.stage, _name(row.module_path), count(row.our_events), count(row.their_events))
        for row in shown.head(_TOP).itertuples()
    )
    return Section("Calls of modules", ("Stage", "Module", "Calls in the run", "Ranges in the trace"), rows, right=2)


def statements(joined: Joined) -> Iterator[str]:
    """What else is to be said, one line each."""
    found = joined.attribution
    version = f" {found.recording.version}" if found.recording.version else ""
    yield f"{found.recording.tool}{version}: {count(found.events)} events, {duration(found.total_ns)}"
    if found.events:
        yield f"{count(found.attributed_events)} of them in modules, coverage {percent(found.coverage)} of the time"
    for what, reconciliation in (("calls", joined.calls), ("events", joined.events)):
        if reconciliation is not None:
            yield _verdict(what, reconciliation)
    if found.recorded.unmatched:
        names = ", ".join(found.recorded.unmatched[:3])
        yield f"{count(len(found.recorded.unmatched))} names of ranges are no module and take no events: {names}"
    if joined.counters is not None:
        yield f"{count(len(found.recording.counters))} counters of each launch: in counters.parquet, with --output"
    for note in found.notes:
        yield f"note: {note}"


def _verdict(what: str, reconciliation: Reconciliation) -> str:
    rows = reconciliation.modules
    agreeing = f"{count(int(rows['agrees'].sum()))} of {count(len(rows))} (stage, module) have as many {what}"
    shares = f"{percent(reconciliation.event_share)} of the {what} in the same place"
    if reconciliation.time_share is not None:
        shares += f", {percent(reconciliation.time_share)} of the time"
    if reconciliation.withheld is not None:
        return f"{what} beside the run: no verdict, {reconciliation.withheld}; {agreeing}"
    return f"{what} beside the run: they agree, {shares}; {agreeing}"


def _name(path: str) -> str:
    return path or "(root)"


def print_attribution(joined: Joined) -> None:
    """Print an attributed trace."""
    console = result_console()
    for section in sections(joined):
        shown = plain_table(section.title)
        for number, name in enumerate(section.head):
            is_number = number >= len(section.head) - section.right
            shown.add_column(name, justify="right" if is_number else "left")
        for row in section.rows:
            shown.add_row(*row)
        console.print(shown, markup=False)
    for line in statements(joined):
        console.print(line, markup=False, soft_wrap=True)


def attribution_markdown(joined: Joined, source: str) -> str:
    """Render an attributed trace as a page.

    Parameters
    ----------
    joined
        What to show.
    source
        Name of the trace.
    """
    blocks = [f"# {source}", "\n".join(f"- {line}" for line in statements(joined))]
    for section in sections(joined):
        rows = [[_escaped(cell) for cell in row] for row in section.rows]
        blocks += [f"## {section.title}", table(section.head, rows, right=section.right)]
    return page(*blocks)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
