"""report.md: the run as a page for a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsocr_trace.report.rows import (
    CostRow,
    memory_by_stage,
    stage_rows,
    top_classes,
    top_events,
    top_modules,
    top_operators,
)
from dsocr_trace.report.units import duration, percent, quantity, ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd

_LIMIT = 15


def report_markdown(manifest: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> str:
    """Render a run.

    Parameters
    ----------
    manifest
        The run's manifest.
    tables
        The run's tables by name.
    """
    sections = [
        f"# {manifest['workload']['id']} on {manifest['device']['name']}",
        _environment(manifest),
        _trust(manifest),
        _stages(manifest, tables),
        _pages(tables["pages"]),
        _costs("Top modules", "Module", top_modules(tables["attribution"], _LIMIT)),
        _costs("Top module classes", "Class", top_classes(tables["attribution"], _LIMIT)),
        _costs("Top operators", "Category", top_operators(tables["operators"], _LIMIT)),
        _costs("Top kernels", "Event", top_events(tables["kernels"], _LIMIT)),
        _memory(tables["memory"]),
        _unclassified(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _environment(manifest: Mapping[str, Any]) -> str:
    device, versions = manifest["device"], manifest["versions"]
    size = quantity(device["memory_bytes"], "B")
    rows = [
        ("Command", f"`{manifest['command']}`"),
        ("Started", manifest["started_at"]),
        ("Device", f"{device['device']}: {device['name']}, {size}"),
        ("Model", f"{manifest['variant'] or manifest['model']}, {manifest['weights']} weights, {manifest['dtype']}"),
        ("Attention", manifest["attention"]),
        ("Predicted for", f"{manifest['hardware']['name']} ({manifest['hardware']['provenance']} roofline)"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Commit", manifest["git_commit"] or "not from a checkout"),
    ]
    return "## Environment\n\n" + _table(("", ""), rows)


def _trust(manifest: Mapping[str, Any]) -> str:
    cover, cost, clock = manifest["coverage"], manifest["overhead"], manifest["clock"]
    profiled = sum(len(page["profiled_steps"]) for page in manifest["pages"])
    steps = sum(page["decode_steps"] for page in manifest["pages"])
    lines = [
        f"- Coverage: {cover['all']:.2%} of the measured device time stands in named modules.",
        "- Tracing cost: not measured, there was no decode step."
        if cost["ratio"] is None
        else f"- Tracing cost: {cost['ratio'] - 1:+.2%} of a decode step, median of {cost['pairs']} interleaved pairs.",
        f"- Clocks: profiler and tracer agree within {duration(clock['residual_ns'])}.",
        f"- Decode: {profiled} of {steps} steps were profiled; their times are scaled to all steps.",
        "- Tokens: every repetition, plain, traced or profiled, chose the token that the traced generation chose.",
        *(f"- Note: {note}" for note in manifest["notes"]),
    ]
    return "## Can it be trusted\n\n" + "\n".join(lines)


def _stages(manifest: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> str:
    rows = [
        (
            row.stage,
            duration(row.wall_ns),
            duration(row.scaled_ns),
            duration(row.predicted_ns),
            ratio(row.predicted_ns, row.scaled_ns),
            quantity(row.tensor_flops, "FLOP"),
            percent(row.mfu),
            f"{row.calls:,}",
            f"{row.event_count:,}",
        )
        for row in stage_rows(manifest, tables)
    ]
    head = ("Stage", "Wall", "Device", "Predicted", "Pred./dev.", "Matrix work", "MFU", "Calls", "Events")
    note = (
        "Wall is with the tracer but without a profiler, device time is the sum over events scaled to the whole "
        "stage, predicted is the roofline of the hardware entry, MFU is matrix work over wall time and that entry's "
        "peak. Vision runs inside the first forward but is counted once, as vision."
    )
    return "## Per-stage timings and MFU\n\n" + _table(head, rows) + "\n\n" + note


def _pages(pages: pd.DataFrame) -> str:
    rows = [
        (row["page"], row["stage"], f"{row['forwards']:,}", duration(row["wall_ns"]), duration(row["scaled_ns"]))
        for _, row in pages.iterrows()
    ]
    return "## Pages\n\n" + _table(("Page", "Stage", "Forwards", "Wall", "Device"), rows)


def _costs(title: str, what: str, rows: Sequence[CostRow]) -> str:
    cells = [
        (
            row.stage,
            f"`{row.name}`",
            row.kind,
            f"{row.count:,}",
            duration(row.scaled_ns),
            percent(row.share),
            duration(row.predicted_ns),
        )
        for row in rows
    ]
    return f"## {title}\n\n" + _table(("Stage", what, "Kind", "Count", "Own time", "Share", "Predicted"), cells)


def _memory(memory: pd.DataFrame) -> str:
    rows = [
        (stage, quantity(weights, "B"), quantity(activation, "B"), quantity(cache, "B"))
        for stage, weights, activation, cache in memory_by_stage(memory)
    ]
    head = ("Stage", "Weights of called modules", "Largest output of one operator", "Cache written")
    return "## Memory (predicted)\n\n" + _table(head, rows)


def _unclassified(manifest: Mapping[str, Any]) -> str:
    rows = [
        (f"`{reason}`", f"{entry['count']:,}", duration(entry["ns"]), entry["means"])
        for reason, entry in manifest["unclassified"].items()
    ]
    return "## Unclassified\n\n" + (
        _table(("Reason", "Events", "Measured", "Meaning"), rows) if rows else "Every event belongs to a module."
    )
