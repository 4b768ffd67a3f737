"""Two runs side by side: on the terminal, as Markdown, as a page, and for machines."""

from __future__ import annotations

import io
import json
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import attrs
import jinja2
import pandas as pd
from markupsafe import Markup
from rich.console import Console

from dsocr_trace.comparison.compare import DRIFTED, FASTER, GONE, NEW, SLOWER, UNKNOWN
from dsocr_trace.report.console import plain_table, result_console
from dsocr_trace.report.pieces import page, table
from dsocr_trace.report.units import duration, quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dsocr_trace.comparison.compare import Comparison
    from dsocr_trace.runs.store import Run

_CLOCKS: Final = {"wall": "their own host time", "device": "their own device time"}
_COLUMNS: Final = {"wall": "wall_self_ns", "device": "scaled_self_ns"}
_HTML: Final = """{% macro row(section, cells, tag) %}
<tr>
{% for cell in cells %}
<{{ tag }}{% if loop.revindex > section.right %} class="text"{% endif %}>{{ cell }}</{{ tag }}>
{% endfor %}
</tr>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} · dsocr-trace</title>
<style>
{{ style }}
section { margin-top: 3rem; }
.scroll table .text { text-align: left; }
</style>
<script>
if (matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.dataset.theme = "dark";
</script>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<ul>
{% for line in lines %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
<div class="scroll"><table>
<thead>{{ row(section, section.head, "th") }}</thead>
<tbody>
{% for cells in section.rows %}
{{ row(section, cells, "td") }}
{% endfor %}
</tbody>
</table></div>
</section>
{% endfor %}
</main>
</body>
</html>
"""


@attrs.frozen
class Section:
    """A table of a comparison; the last `right` columns are numbers."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: int


def comparison_text(comparison: Comparison, *, limit: int = 8) -> str:
    """Render what fits a screen."""
    shown = io.StringIO()
    # Not the terminal itself: the text may also go to a file.
    console = Console(file=shown, width=result_console().width, highlight=False)
    console.print(*lines(comparison), sep="\n", markup=False)
    for section in sections(comparison, limit):
        texts = len(section.head) - section.right
        cells = plain_table(section.title)
        for place, name in enumerate(section.head):
            cells.add_column(name, justify="right" if place >= texts else "left", overflow="fold")
        for row in section.rows:
            cells.add_row(*row)
        console.print(cells)
    return shown.getvalue()


def comparison_markdown(comparison: Comparison, *, limit: int = 15) -> str:
    """Render for a pull request."""
    blocks = [f"## {_title(comparison)}", "\n".join(f"- {line}" for line in lines(comparison))]
    for section in sections(comparison, limit):
        rows = [[cell.replace("|", r"\|") for cell in row] for row in section.rows]
        blocks += [f"### {section.title}", table(section.head, rows, right=section.right)]
    return page(*blocks)


def comparison_html(comparison: Comparison, *, limit: int = 200) -> str:
    """Render as one page with all that it needs inside."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = (resources.files("dsocr_trace.report.page") / "style.css").read_text(encoding="utf-8")
    return environment.from_string(_HTML).render(
        title=_title(comparison),
        lines=lines(comparison),
        sections=sections(comparison, limit),
        style=Markup(style),  # noqa: S704  our own file
    )


#: How a comparison is rendered, by name of the format.
RENDERERS: Final[Mapping[str, Callable[[Comparison], str]]] = {
    "text": comparison_text,
    "md": comparison_markdown,
    "html": comparison_html,
}


def comparison_json(comparison: Comparison, failed: Sequence[str] | None) -> dict[str, Any]:
    """Everything that was compared, as one object.

    Parameters
    ----------
    failed
        Stages that are slower than allowed; None if nothing was asked.
    """
    return {
        "run_a": str(comparison.run_a.path),
        "run_b": str(comparison.run_b.path),
        "differs": {name: list(values) for name, values in comparison.differs.items()},
        "caveats": list(comparison.caveats),
        "clocks": list(comparison.clocks),
        "stages": _records(comparison.stages),
        "modules": _records(comparison.modules),
        "failed": None if failed is None else list(failed),
    }


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(rows.to_json(orient="records", double_precision=15))
    return found


def _title(comparison: Comparison) -> str:
    return f"Comparison: {comparison.run_a.path.resolve().name} and {comparison.run_b.path.resolve().name}"


def lines(comparison: Comparison) -> list[str]:
    """What was compared, the result, and what to know about it; a line each."""
    differs = [f"{name}: {left} in A, {right} in B" for name, (left, right) in comparison.differs.items()]
    return [
        f"A: {_described(comparison.run_a)}",
        f"B: {_described(comparison.run_b)}",
        *_findings(comparison),
        *comparison.caveats,
        *(f"differs: {line}" for line in differs),
    ]


def _described(run: Run) -> str:
    manifest = run.manifest
    repeats = len(manifest["pages"][0]["repeats"])
    return f"{run.path}: {manifest['workload']['id']} on {manifest['device']['name']}, {_counted(repeats, 'repeat')}"


def _findings(comparison: Comparison) -> list[str]:
    """The result in words."""
    stages = comparison.stages
    found = [
        f"{row['stage']} is {row['verdict']}: {_change(row['wall_ns_a'], row['wall_ns_b'])}"
        for row in stages[stages["verdict"].isin([SLOWER, FASTER])].to_dict("records")
    ]
    for clock in comparison.clocks:
        rows = comparison.changes(clock)
        sure = rows[rows[f"{clock}_verdict"].isin([SLOWER, FASTER])]
        if len(sure):
            first = sure.iloc[0]
            found.append(
                f"{_counted(len(sure), 'module')} changed by {_CLOCKS[clock]}, most {_name(first['module_path'])} in "
                f"{first['stage']}: {_signed(first[f'{clock}_difference_ns'])}"
            )
    drifted = stages.loc[stages["verdict"] == DRIFTED, "stage"]
    if len(drifted):
        found.append(
            f"{', '.join(drifted)} drifted: another time than the spread explains, but no module stands out; the "
            "machine was busier or faster, or a change concerns all modules"
        )
    if not found:
        found.append("no stage and no module is known to differ by more than its spread")
    unknown = stages.loc[stages["verdict"] == UNKNOWN, "stage"]
    if len(unknown):
        names = ", ".join(unknown)
        found.append(f"significance unknown for {names}: measured once in A or B; run both with --repeat 5")
    return found


def sections(comparison: Comparison, limit: int) -> list[Section]:
    """Tables of the comparison, of at most `limit` modules by time, and half as many of other kinds."""
    modules = comparison.modules
    by_module = [_changes(comparison, clock, limit) for clock in comparison.clocks]
    other = modules[modules["work_changed"]]
    found = [
        _walls(comparison.stages),
        _costs(comparison.stages),
        *by_module,
        _one_sided(modules[modules["presence"] == NEW], "New in B", "b", limit // 2),
        _one_sided(modules[modules["presence"] == GONE], "Gone in B", "a", limit // 2),
        _other_work(other[other["presence"] == "both"], limit // 2),
    ]
    return [section for section in found if section.rows]


def _walls(stages: pd.DataFrame) -> Section:
    rows = [
        (
            row["stage"],
            row["verdict"],
            duration(row["wall_ns_a"]),
            duration(row["wall_ns_b"]),
            _change(row["wall_ns_a"], row["wall_ns_b"]),
            _interval(row["low"], row["high"]),
            "-" if pd.isna(row["drift"]) else f"{row['drift'] - 1:+.1%}",
        )
        for row in stages.to_dict("records")
    ]
    head = ("Stage", "Verdict", "A", "B", "Change", "99 % interval", "Drift")
    return Section("Wall time, median of the repeats", head, rows, 5)


def _costs(stages: pd.DataFrame) -> Section:
    rows = [
        (
            row["stage"],
            _pair(row, "device_ns", "ns"),
            _pair(row, "predicted_ns", "ns"),
            _pair(row, "tensor_flops", "FLOP"),
            _pair(row, "bytes_total", "B"),
            _pair(row, "calls", ""),
        )
        for row in stages.to_dict("records")
    ]
    return Section("Work, A → B", ("Stage", "Device", "Predicted", "Matrix work", "Bytes", "Calls"), rows, 5)


def _changes(comparison: Comparison, clock: str, limit: int) -> Section:
    column = _COLUMNS[clock]
    rows = [
        (
            row["stage"],
            _name(row["module_path"]),
            row[f"{clock}_verdict"],
            duration(row[f"{column}_a"]),
            duration(row[f"{column}_b"]),
            _signed(row[f"{clock}_difference_ns"]),
            _interval(row[f"{clock}_low"], row[f"{clock}_high"]),
        )
        for row in comparison.changes(clock).head(limit).to_dict("records")
        if row[f"{clock}_difference_ns"]
    ]
    head = ("Stage", "Module", "Verdict", "A", "B", "Change", "99 % interval")
    drifted = "" if comparison.modules[f"{clock}_drift"].isna().all() else "; change without the stage's drift"
    return Section(f"Modules by {_CLOCKS[clock]}{drifted}", head, rows, 4)


def _one_sided(rows: pd.DataFrame, title: str, side: str, limit: int) -> Section:
    top = rows.nlargest(limit, f"scaled_total_ns_{side}")
    cells = [
        (
            row["stage"],
            _name(row["module_path"]),
            row[f"module_class_{side}"],
            f"{row[f'calls_{side}']:,.0f}",
            duration(row[f"scaled_total_ns_{side}"]),
        )
        for row in top.to_dict("records")
    ]
    head = ("Stage", "Module", "Class", "Calls", "Device, with all below")
    return Section(f"{title}: {_counted(len(rows), 'module')}", head, cells, 2)


def _other_work(rows: pd.DataFrame, limit: int) -> Section:
    by_bytes = (rows["bytes_total_b"] - rows["bytes_total_a"]).abs().sort_values(ascending=False)
    cells = [
        (
            row["stage"],
            _name(row["module_path"]),
            _pair(row, "calls", ""),
            _pair(row, "tensor_flops", "FLOP"),
            _pair(row, "bytes_total", "B"),
        )
        for row in rows.loc[by_bytes.index].head(limit).to_dict("records")
    ]
    head = ("Stage", "Module", "Calls", "Matrix work", "Bytes")
    return Section(f"Other work than before, A → B: {_counted(len(rows), 'module')}", head, cells, 3)


def _name(module_path: str) -> str:
    return module_path or "(root)"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _known(value: float) -> float | None:
    return None if pd.isna(value) else value


def _pair(row: Mapping[str, Any], name: str, unit: str) -> str:
    """Figures of A and B; one where they are the same."""
    values = [_known(row[f"{name}_{side}"]) for side in ("a", "b")]
    texts = [duration(value) if unit == "ns" else quantity(value, unit).strip() for value in values]
    return texts[0] if values[0] == values[1] else " → ".join(texts)


def _signed(ns: float) -> str:
    return f"{'+' if ns >= 0 else ''}{duration(ns)}"


def _change(a: float, b: float) -> str:
    return f"{_signed(b - a)} ({b / a - 1:+.1%})" if a else _signed(b - a)


def _interval(low: float, high: float) -> str:
    """Bounds of a ratio as changes; as factors where they are large."""
    if pd.isna(low):
        return "unknown"
    return f"{low - 1:+.1%} … {high - 1:+.1%}" if high < 3 else f"{low:.3g} … {high:.3g} times"
