"""report.html: the run as one page that needs no network."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import attrs
import jinja2
import pandas as pd

from dsocr_trace.report.page.data import kind_rows, module_rows, page_data, scaled_events, stage_totals
from dsocr_trace.report.page.findings import MINUS, findings, signed, times
from dsocr_trace.report.rows import StageRow, stage_rows
from dsocr_trace.report.units import duration, percent, quantity
from dsocr_trace.runs.pages import TOTAL
from dsocr_trace.runs.schemas import TABLES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsocr_trace.runs.store import Run

_SCRIPTS: Final = ("units.js", "theme.js", "icicle.js", "charts.js", "tables.js", "page.js")
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
    environment.globals["times"] = times
    stages, totals = stage_rows(manifest, tables), stage_totals(tables["pages"])
    kinds = kind_rows(module_rows(tables["attribution"], tables["predictions"]))
    return environment.from_string(_asset("template.html")).render(
        manifest=manifest,
        title=f"{manifest['workload']['id']} on {manifest['device']['name']}",
        stages=[(row, gap) for row, gap in zip(stages, _gaps(stages), strict=True)],
        headlines=headlines(manifest, stages, totals),
        findings=findings(manifest, totals, kinds),
        targets=_targets(kinds),
        pages=_pages(tables["pages"]),
        style=_asset("vendor/tabulator.min.css") + _asset("style.css"),
        libraries=[_asset(f"vendor/{name}.min.js") for name in ("echarts", "tabulator")],
        script="\n".join(_asset(name) for name in _SCRIPTS),
        licenses={name: _asset(f"vendor/{name}") for name in _LICENSES},
        data=_embedded(page_data(manifest, tables)),
    )


def stored_tables(run: Run) -> dict[str, pd.DataFrame]:
    """Tables of a finished run as reports take them."""
    # Columns that came after the run was written are empty.
    tables = {name: getattr(run, name).reindex(columns=schema.names) for name, schema in TABLES.items()}
    return tables | {"kernels": scaled_events(tables["kernels"], tables["pages"])}


def _asset(name: str) -> str:
    return (resources.files("dsocr_trace.report.page") / name).read_text(encoding="utf-8")


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _gaps(stages: list[StageRow]) -> list[str]:
    """Wall time without work on the device, with its sign: profiled device time can exceed a short wall time."""
    return [
        f"{MINUS if row.wall_ns < row.scaled_ns else ''}{duration(abs(row.wall_ns - row.scaled_ns))}" for row in stages
    ]


def headlines(manifest: Mapping[str, Any], stages: list[StageRow], totals: pd.DataFrame) -> list[Headline]:
    """The numbers at the top of the page."""
    decode = totals.set_index("stage").loc["decode"]
    steps, decode_ns = int(decode["forwards"]), int(decode["wall_ns"])
    wall, device = sum(row.wall_ns for row in stages), sum(row.scaled_ns for row in stages)
    predicted = totals["predicted_ns"].sum(min_count=1)
    cost, hardware = manifest["overhead"], manifest["hardware"]
    found = [
        Headline(
            "Wall time",
            duration(wall),
            " · ".join(f"{row.stage} {duration(row.wall_ns)}" for row in stages),
            "measured",
        ),
        Headline("Device time", duration(device), f"{percent(device / wall)} of wall time", "scaled"),
        Headline("Coverage", f"{manifest['coverage']['all']:.2%}", "of device time in named modules", "measured"),
    ]
    if steps:
        rate = f"{steps * 1e9 / decode_ns:.3g} tokens/s"
        found.insert(1, Headline("Decode", rate, f"{steps:,} steps, {duration(decode_ns / steps)} each", "measured"))
    if pd.notna(predicted):
        detail = f"device time is {times(device, predicted)} that; {hardware['name']}, {hardware['provenance']}"
        found.insert(-1, Headline("Predicted", duration(predicted), detail, "modelled"))
    if cost["ratio"] is not None:
        low, high = cost["quartiles"]
        detail = f"per decode step; middle half of {cost['pairs']} pairs {signed(low - 1)} to {signed(high - 1)}"
        found.append(Headline("Tracing cost", signed(cost["ratio"] - 1), detail, "measured"))
    return found


def _targets(kinds: pd.DataFrame) -> list[dict[str, Any]]:
    """The kinds of module with most time beyond what is predicted."""
    rows = kinds.dropna(subset="excess_ns").nlargest(_TARGETS, "excess_ns")
    whole = kinds["scaled_self_ns"].sum()
    return [
        {str(name): value for name, value in row.items()} | {"share": row["excess_ns"] / whole}
        for row in rows.to_dict("records")
    ]


def _pages(pages: pd.DataFrame) -> list[dict[str, Any]]:
    """Single pages, where there are several."""
    single = pages[pages["page"] != TOTAL]
    return [] if single["page_number"].nunique() < 2 else [dict(row) for row in single.to_dict("records")]
