"""What Stage 2 of a run says, for the page: the same generation under NVIDIA's profilers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from dsocr_trace.report.units import duration, percent, quantity

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd


@attrs.frozen
class Fact:
    """One thing that Stage 2 found."""

    name: str
    text: str


def stage2_facts(summary: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> list[Fact]:
    """Say what was recorded and how far it agrees with Stage 1.

    Parameters
    ----------
    summary
        ``stage2`` of the manifest.
    tables
        The run's tables, with ``stage2`` and ``counters`` where it has them.
    """
    if "failure" in summary:
        return [Fact("Failed", summary["failure"])]
    return [
        Fact("Recorded by", ", ".join(f"{name} {version}" for name, version in summary["tools"].items())),
        Fact("Calls", _calls(summary["agreement"])),
        *_events(summary),
        Fact("Cost", _cost(summary["overhead"])),
        Fact("Recording", _recording(summary["captured"])),
        *_counters(tables),
    ]


def _calls(agreement: Mapping[str, Any]) -> str:
    same = agreement["modules"] - agreement["modules_differing"]
    return (
        f"{same:,} of {agreement['modules']:,} modules, by stage, were called equally often from every caller in every "
        f"step; {agreement['calls']:,} calls in Stage 1, {agreement['ranges']:,} ranges in the recording"
    )


def _events(summary: Mapping[str, Any]) -> list[Fact]:
    if "attribution" not in summary:
        return [Fact("Device work", "none was recorded: only calls are compared")]
    found, agreement = summary["attribution"], summary["events_agreement"]
    unclassified = [f"{reason} {duration(entry['ns'])}" for reason, entry in found["unclassified"].items()]
    text = (
        f"{found['events']:,} events of {duration(found['total_ns'])}, {found['coverage']:.2%} of it in named modules"
        + (f"; the rest: {', '.join(unclassified)}" if unclassified else "")
    )
    shares = {"events": agreement["event_share"], "time": agreement["time_share"]}
    same = " and ".join(f"{percent(share)} of the {what}" for what, share in shares.items() if share is not None)
    verdict = f"; neither speaks for the other: {agreement['withheld']}" if agreement["withheld"] else ""
    return [Fact("Device work", text), Fact("In the same module as in Stage 1", f"{same}{verdict}")]


def _cost(overhead: Mapping[str, Any]) -> str:
    return (
        f"{duration(overhead['captured_ns'])} under the profiler, {duration(overhead['traced_ns'])} without: "
        f"{overhead['ratio']:.2f} times"
    )


def _recording(captured: Mapping[str, Any]) -> str:
    kept = f"kept as {captured['report']}" if captured["report"] else "not kept"
    return (
        f"{captured['ranges_of_modules']:,} ranges of modules, {captured['other_ranges']:,} others, "
        f"{captured['events']:,} events; {quantity(captured['report_bytes'], 'B')}, {kept}"
    )


def _counters(tables: Mapping[str, pd.DataFrame]) -> list[Fact]:
    if "counters" not in tables:
        return []
    rows = tables["counters"]
    return [Fact("Counters", f"{len(rows):,} launches of {rows['name'].nunique():,} kernels, each measured alone")]
