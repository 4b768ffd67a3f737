"""report.md: the run as a page for a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dsocr_trace.report.centres import could_give, distance, named
from dsocr_trace.report.kinds import kind_rows, module_rows, targets
from dsocr_trace.report.rows import (
    STAGES,
    CostRow,
    StageRow,
    memory_by_stage,
    stage_rows,
    top_classes,
    top_events,
    top_modules,
    top_operators,
)
from dsocr_trace.report.units import duration, percent, quantity, ratio
from dsocr_trace.runs.pages import TOTAL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd

_LIMIT: Final = 15
_CENTRES: Final = 3


def report_markdown(manifest: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> str:
    """Render a run.

    Parameters
    ----------
    manifest
        The run's manifest.
    tables
        The run's tables by name.
    """
    kinds = kind_rows(module_rows(tables["attribution"], tables["predictions"], tables["gap"]), tables["gap"])
    stages = stage_rows(manifest, tables)
    sections = [
        f"# {manifest['workload']['id']} on {manifest['device']['name']}",
        _environment(manifest),
        _aggregates(manifest, tables["pages"], stages),
        _trust(manifest),
        _stages(stages),
        _gap(tables["gap"]),
        _pages(tables["pages"]),
        _costs("Top modules", "Module", top_modules(tables["attribution"], _LIMIT)),
        _costs("Top module classes", "Class", top_classes(tables["attribution"], _LIMIT)),
        _costs("Top operators", "Category", top_operators(tables["operators"], _LIMIT)),
        _costs("Top kernels", "Event", top_events(tables["kernels"], _LIMIT)),
        _memory(tables["memory"]),
        _unclassified(manifest),
        _centres(manifest, kinds, sum(row.wall_ns for row in stages)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


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
        ("Predicted for", _predicted_for(manifest)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Commit", manifest["git_commit"] or "not from a checkout"),
    ]
    return "## Environment\n\n" + _table(("", ""), rows)


def _predicted_for(manifest: Mapping[str, Any]) -> str:
    hardware, prediction = manifest["hardware"], manifest.get("prediction", {})
    if prediction.get("source") == "calibrated":
        return f"{prediction['device']}, calibrated at {prediction['measured_at']}"
    return f"{hardware['name']}, from {hardware['provenance']} peaks"


def _aggregates(manifest: Mapping[str, Any], pages: pd.DataFrame, stages: Sequence[StageRow]) -> str:
    decode = pages[pages["page"] == TOTAL].set_index("stage").loc["decode"]
    wall, device = sum(row.wall_ns for row in stages), sum(row.scaled_ns for row in stages)
    predicted = [row.predicted_ns for row in stages if row.predicted_ns is not None]
    flops = [row.tensor_flops for row in stages if row.tensor_flops is not None]
    rows = [
        ("Wall time", duration(wall), "measured"),
        ("Device time", f"{duration(device)}, {percent(device / wall)} of wall time", "scaled"),
        ("Predicted wall time", duration(sum(predicted)) if predicted else "-", "modelled"),
        ("Matrix work", quantity(sum(flops), "FLOP") if flops else "-", "modelled"),
        ("Calls of modules", f"{sum(row.calls for row in stages):,}", "measured"),
        ("Events", f"{sum(row.event_count for row in stages):,} in the profiled forwards", "measured"),
        ("Pages", f"{len(manifest['pages']):,}", ""),
    ]
    if decode["forwards"]:
        rate, step = decode["forwards"] * 1e9 / decode["wall_ns"], decode["wall_ns"] / decode["forwards"]
        text = f"{rate:.3g} tokens/s, {duration(step)} per step, {decode['forwards']:,.0f} steps"
        rows.insert(1, ("Decode", text, "measured"))
    return "## Aggregates\n\n" + _table(("", "", "From"), rows)


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
        *_recorded(manifest.get("stage2")),
        *(f"- Note: {note}" for note in manifest["notes"]),
    ]
    return "## Can it be trusted\n\n" + "\n".join(lines)


def _recorded(stage2: Mapping[str, Any] | None) -> list[str]:
    if not stage2 or "agreement" not in stage2:
        return []
    agreement = stage2["agreement"]
    same = agreement["modules"] - agreement["modules_differing"]
    return [f"- Stage 2: Nsight Systems saw the same calls in {same:,} of {agreement['modules']:,} modules and stages."]


def _stages(stages: Sequence[StageRow]) -> str:
    rows = [
        (
            row.stage,
            duration(row.wall_ns),
            duration(row.predicted_ns),
            duration(row.scaled_ns),
            duration(row.predicted_device_ns),
            ratio(row.scaled_ns, row.predicted_device_ns),
            quantity(row.tensor_flops, "FLOP"),
            percent(row.mfu),
            f"{row.calls:,}",
            f"{row.event_count:,}",
        )
        for row in stages
    ]
    head = ("Stage", "Wall", "Predicted", "Device", "Predicted", "Dev./pred.", "Matrix work", "MFU", "Calls", "Events")
    note = (
        "Wall is with the tracer but without a profiler, device time is the sum over events scaled to the whole "
        "stage. Each stands before what the time model predicts for it. MFU is matrix work over wall time and the peak "
        "of the hardware entry. Vision runs inside the first forward but is counted once, as vision."
    )
    return "## Per-stage timings and MFU\n\n" + _table(head, rows) + "\n\n" + note


def _gap(gap: pd.DataFrame) -> str:
    if gap["predicted_device_ns"].isna().all():
        return ""
    parts = {
        "datasheet_ns": "Datasheet", "ceilings_ns": "Ceilings", "launch_ns": "Launches", "shape_ns": "Shapes",
        "predicted_device_ns": "= Predicted", "unexplained_ns": "Unexplained", "measured_ns": "= Device",
        "host_gap_ns": "Host gap", "wall_self_ns": "= Wall",
    }  # fmt: skip
    sums = gap.groupby("stage")[list(parts)].sum().reindex([stage for stage in STAGES if stage in set(gap["stage"])])
    rows = [(str(stage), *(duration(row[name]) for name in parts)) for stage, row in sums.iterrows()]
    return "## From the datasheet to the clock\n\n" + _table(("Stage", *parts.values()), rows)


def _pages(pages: pd.DataFrame) -> str:
    if pages["page_number"].nunique() < 2:
        return ""
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


def _centres(manifest: Mapping[str, Any], kinds: pd.DataFrame, wall_ns: int) -> str:
    """The kinds of module that could give most, in words."""
    found = targets(kinds, _CENTRES).to_dict("records")
    lines = [
        f"{place}. **{named(kind).replace('*', chr(92) + '*')}**: {could_give(kind, wall_ns)} "
        f"{distance(kind, manifest['hardware'])}".rstrip()
        for place, kind in enumerate(found, 1)
    ]
    return "## What to optimise first\n\n" + "\n".join(lines) if lines else ""
