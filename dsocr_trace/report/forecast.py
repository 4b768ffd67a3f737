"""What a prediction prints."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from rich.text import Text

from dsocr_trace.forecasts.basis import basis
from dsocr_trace.report.console import plain_table, result_console
from dsocr_trace.report.units import duration, percent, quantity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from analytic.predict import ModuleRow
    from dsocr_trace.forecasts.forecast import Forecast

_TOP: Final = 8
#: Which member of a list of layers a module is, or is in.
_NUMBER: Final = re.compile(r"\.\d+")
#: Columns of the table of work.
_WORK: Final = {
    "Matrix work": ("tensor_flops", "FLOP"),
    "Vector work": ("vector_flops", "FLOP"),
    "Read": ("bytes_read", "B"),
    "Written": ("bytes_written", "B"),
    "Cache": ("kv_cache_bytes", "B"),
}


def print_forecast(forecast: Forecast) -> None:
    """Print stages, the heaviest modules and what the figures rest on."""
    console = result_console()
    console.print(_stages(forecast), _work(forecast), _modules(forecast), sep="\n")
    for line in _lines(forecast):
        console.print(Text(line), soft_wrap=True)


def _stages(forecast: Forecast) -> Table:
    table = plain_table(f"{forecast.scenario.workload.id} on {forecast.device.device}", "Stage")
    for name in ("Wall", "Device busy", "Idle", "Per token"):
        table.add_column(name, justify="right")
    table.add_column("Bound by")
    table.add_column("Times from")
    for row in forecast.stage_rows:
        wall, busy = row.predicted_wall_ns, row.predicted_busy_ns
        step = duration(forecast.decode_step_ns) if row.stage == "decode" else "-"
        table.add_row(
            row.stage, duration(wall), duration(busy), duration(wall - busy), step, row.bound or "-", row.source
        )
    wall, busy = forecast.wall_ns, forecast.busy_ns
    table.add_row("all", duration(wall), duration(busy), duration(wall - busy), "-", "", "")
    return table


def _work(forecast: Forecast) -> Table:
    table = plain_table("Work", "Stage")
    for name in _WORK:
        table.add_column(name, justify="right")
    for row in forecast.stage_rows:
        table.add_row(row.stage, *(quantity(getattr(row, column), unit) for column, unit in _WORK.values()))
    return table


def _modules(forecast: Forecast) -> Table:
    """The heaviest modules, the members of a list of layers as one."""
    alike: defaultdict[tuple[str, str], list[ModuleRow]] = defaultdict(list)
    for row in forecast.module_rows:
        alike[row.stage, _NUMBER.sub(".*", row.module_path)].append(row)
    table = plain_table("Heaviest modules, by their own time", "Stage")
    table.add_column("Module", overflow="fold")
    table.add_column("Bound by")
    for name in ("Modules", "Wall", "Device busy", "Share"):
        table.add_column(name, justify="right")
    sums = {key: sum(row.predicted_ns for row in rows) for key, rows in alike.items()}
    for stage, path in sorted(sums, key=lambda key: -sums[key])[:_TOP]:
        rows, wall = alike[stage, path], sums[stage, path]
        table.add_row(
            stage,
            path or "(root)",
            max(rows, key=lambda row: row.predicted_ns).bound or "-",
            str(len(rows)),
            duration(wall),
            duration(sum(row.predicted_device_ns for row in rows)),
            percent(wall / forecast.wall_ns),
        )
    return table


def _lines(forecast: Forecast) -> Iterator[str]:
    workload, policy = forecast.scenario.workload, forecast.scenario.policy
    tiles = "no tiles" if workload.grid is None else f"{workload.grid[0]}x{workload.grid[1]} tiles"
    yield (
        f"{tiles}, prompt of {workload.seq_len} positions, {workload.max_new_tokens} new tokens, batch "
        f"{workload.batch_size}, {policy.dtype}, {policy.attention} attention, "
        f"{forecast.prediction.work.routing.source} routing"
    )
    yield from basis(forecast.prediction)
    found = forecast.evidence
    if found is not None:
        low, high = forecast.expected_ns(found)
        yield (
            f"expect {duration(low)} to {duration(high)} in all: measured was {found.low:.2f} to {found.high:.2f} "
            f"times predicted in the middle {found.share:.0%} of {found.trials} trials of {found.variant} in "
            f"{found.dtype}, {found.attention} attention ({found.path}; its verdict: {found.verdict})"
        )
