"""report.html: the run as one page that needs no network."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import attrs
import jinja2
import pandas as pd

from dsocr_trace.report.centres import times
from dsocr_trace.report.kinds import ABOVE_ROOF, kind_rows, module_rows, targets
from dsocr_trace.report.page.data import main_source, page_data, roofs, scaled_events, source_shares, stage_totals
from dsocr_trace.report.page.findings import MINUS, findings, signed
from dsocr_trace.report.page.stage2 import stage2_facts
from dsocr_trace.report.rows import StageRow, stage_rows
from dsocr_trace.report.units import duration, percent, quantity
from dsocr_trace.runs.pages import TOTAL
from dsocr_trace.runs.schemas import SCHEMA_VERSION, STAGE2_TABLES, TABLES
from hooks.attribution import UNCLASSIFIED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsocr_trace.runs.store import Run

_SCRIPTS: Final = ("units.js", "theme.js", "icicle.js", "charts.js", "gap.js", "experts.js", "tables.js", "page.js")
_LICENSES: Final = ("NOTICE-echarts.txt", "LICENSE-echarts.txt", "LICENSE-d3.txt", "LICENSE-tabulator.txt")
#: Rows of the table of what to optimise first.
_TARGETS: Final = 12


@attrs.frozen
class Headline:
    """One number at the top of the page.

    Attributes
    ----------
    origin
        How it came to be: measured, scaled or modelled.
    """

    name: str
    value: str
    detail: str
    origin: str


def report_html(manifest: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> str:
    """Render a run as one HTML file with all that it needs inside.

    Parameters
    ----------
    manifest
        The run's manifest.
    tables
        The run's tables by name; ``kernels`` with ``scaled_ns``, as `stored_tables` gives them.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "percent": percent, "quantity": quantity}
    environment.globals.update(times=times, predicted=main_source(tables["predictions"]))
    stages, totals = stage_rows(manifest, tables), stage_totals(tables["pages"])
    modules = module_rows(tables["attribution"], tables["predictions"], tables["gap"])
    kinds = kind_rows(modules, tables["gap"])
    notes, summary = _notes(manifest), manifest.get("stage2")
    return environment.from_string(_asset("template.html")).render(
        manifest=manifest,
        title=f"{manifest['workload']['id']} on {manifest['device']['name']}",
        notes=notes,
        stages=[(row, _signed(row.wall_ns - row.scaled_ns)) for row in stages],
        headlines=headlines(manifest, tables, stages),
        findings=findings(manifest, tables["attribution"], totals, kinds, notes=len(notes)),
        origins=origins(manifest, tables["predictions"]),
        targets=_targets(kinds, totals),
        parts=ABOVE_ROOF,
        has_gap=bool(len(tables["gap"])),
        roofs=roofs(manifest),
        pages=_pages(tables["pages"]),
        stage2=stage2_facts(summary, tables) if summary else [],
        stage2_tables=[name for name in STAGE2_TABLES if name in tables],
        style=_asset("vendor/tabulator.min.css") + _asset("style.css"),
        libraries=[_asset(f"vendor/{name}.min.js") for name in ("echarts", "tabulator")],
        script="\n".join(_asset(name) for name in _SCRIPTS),
        licenses={name: _asset(f"vendor/{name}") for name in _LICENSES},
        data=_embedded(page_data(manifest, tables, modules, kinds)),
    )


def stored_tables(run: Run) -> dict[str, pd.DataFrame]:
    """Tables of a finished run as reports take them; what came after the run was written is empty."""
    older = run.manifest["schema_version"] < SCHEMA_VERSION
    schemas = {name: schema for name, schema in TABLES.items() if not older or _holds(run, name)}
    found = {name: getattr(run, name).reindex(columns=schema.names) for name, schema in schemas.items()}
    missing = {name: TABLES[name].empty_table().to_pandas() for name in TABLES if name not in found}
    stage2 = {name: getattr(run, name) for name in STAGE2_TABLES if _holds(run, name)}
    return found | missing | stage2 | {"kernels": scaled_events(found["kernels"], found["pages"])}


def _holds(run: Run, table: str) -> bool:
    return (run.path / f"{table}.parquet").is_file()


def _asset(name: str) -> str:
    return (resources.files("dsocr_trace.report.page") / name).read_text(encoding="utf-8")


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _notes(manifest: Mapping[str, Any]) -> list[str]:
    version = manifest["schema_version"]
    if version == SCHEMA_VERSION:
        return list(manifest["notes"])
    older = f"written as schema version {version}, this page shows {SCHEMA_VERSION}: some is missing; run it again"
    return [older, *manifest["notes"]]


def _signed(ns: int) -> str:
    """Duration with its sign: profiled device time can exceed a short wall time."""
    return f"{MINUS if ns < 0 else ''}{duration(abs(ns))}"


def headlines(
    manifest: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], stages: list[StageRow]
) -> list[Headline]:
    """The numbers at the top of the page."""
    totals = tables["pages"][tables["pages"]["page"] == TOTAL].set_index("stage")
    steps, decode_ns = int(totals.loc["decode", "forwards"]), int(totals.loc["decode", "wall_ns"])
    wall, device = sum(row.wall_ns for row in stages), sum(row.scaled_ns for row in stages)
    predicted, source = totals["predicted_ns"].sum(min_count=1), main_source(tables["predictions"])
    cost = manifest["overhead"]
    found = [
        Headline(
            "Wall time",
            duration(wall),
            " · ".join(f"{row.stage} {duration(row.wall_ns)}" for row in stages),
            "measured",
        ),
        Headline("Device time", duration(device), f"{percent(device / wall)} of wall time", "scaled"),
        Headline(
            "Coverage",
            f"{manifest['coverage']['all']:.2%}",
            f"of the profiled device time in named modules; {_coverage(tables['attribution'])} scaled to the run",
            "measured",
        ),
    ]
    if steps:
        rate = f"{steps * 1e9 / decode_ns:.3g} tokens/s"
        found.insert(1, Headline("Decode", rate, f"{steps:,} steps, {duration(decode_ns / steps)} each", "measured"))
    if pd.notna(predicted) and source:
        detail = f"the time model's wall time; measured is {times(wall, predicted)} that"
        found.insert(-1, Headline("Predicted", duration(predicted), detail, source))
    if cost["ratio"] is not None:
        low, high = cost["quartiles"]
        detail = f"per decode step; middle half of {cost['pairs']} pairs {signed(low - 1)} to {signed(high - 1)}"
        found.append(Headline("Tracing cost", signed(cost["ratio"] - 1), detail, "measured"))
    return found


def _coverage(attribution: pd.DataFrame) -> str:
    named_ns = attribution.loc[attribution["module_path"] != UNCLASSIFIED, "scaled_self_ns"].sum()
    whole = attribution["scaled_self_ns"].sum()
    return f"{named_ns / whole:.2%}" if whole else "nothing"


def origins(manifest: Mapping[str, Any], predictions: pd.DataFrame) -> list[tuple[str, str]]:
    """Every tag of the page's numbers with what it means here."""
    hardware = manifest["hardware"]
    shares = source_shares(predictions)
    measured_at = (manifest.get("prediction", {}).get("measured_at") or "")[:16].replace("T", " ")
    meanings = {
        "calibrated": f"from operators of these sizes that were measured, at {measured_at} UTC",
        "extrapolated": "from the same operators, beyond the sizes that were measured",
        "datasheet": f"from the published peaks of {hardware['name']}, and what such peaks are usually worth",
        "estimated": f"from estimated peaks of {hardware['name']}: no datasheet and no calibration was given",
    }
    times_of = [
        (source, f"predicted times {meanings[source]}; {percent(share)} of the predicted device time")
        for source, share in sorted(shares.items(), key=lambda entry: -entry[1])
    ]
    peaks = [] if hardware["provenance"] in shares else [(hardware["provenance"], f"peaks of {hardware['name']}")]
    return [
        ("measured", "read off clocks and counters"),
        ("scaled", "measured on the profiled forwards, scaled to all of the stage"),
        ("modelled", "computed by formulas: FLOPs, bytes, and what follows from them"),
        *times_of,
        *peaks,
    ]


def _targets(kinds: pd.DataFrame, stages: pd.DataFrame) -> list[dict[str, Any]]:
    """The kinds of module that could give most, each with the parts of its time as shares of the largest."""
    rows = targets(kinds, _TARGETS).to_dict("records")
    wall = stages["wall_ns"].sum()
    parts = [{part: row[part] for part in ("roof_ns", *ABOVE_ROOF) if row[part] > 0} for row in rows]
    if rows and not any(set(ABOVE_ROOF) & set(of_row) for of_row in parts):
        parts = [of_row | {"above_ns": row["excess_ns"]} for of_row, row in zip(parts, rows, strict=True)]
    longest = max((sum(of_row.values()) for of_row in parts), default=0)
    return [
        {str(name): value for name, value in row.items()}
        | {"share": row["excess_ns"] / wall, "bar": {part: ns / longest for part, ns in of_row.items()}}
        for row, of_row in zip(rows, parts, strict=True)
    ]


def _pages(pages: pd.DataFrame) -> list[dict[str, Any]]:
    """Single pages, where there are several."""
    single = pages[pages["page"] != TOTAL]
    return [] if single["page_number"].nunique() < 2 else [dict(row) for row in single.to_dict("records")]
