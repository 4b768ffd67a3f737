"""What a prediction prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analytic.predict import module_rows, stage_rows
from dsocr_trace.report.console import plain_table, result_console
from dsocr_trace.report.units import duration, percent, quantity

if TYPE_CHECKING:
    from dsocr_trace.forecasts.forecast import Forecast

_TOP = 8


def print_forecast(forecast: Forecast) -> None:
    """Print stages, the heaviest modules and what the figures rest on."""
    workload = forecast.scenario.workload
    stages = plain_table(f"{workload.id} on {forecast.hardware.name}: a lower bound of device time", "Stage")
    for name in ("Time", "Matrix work", "Vector work", "Read", "Written", "Cache"):
        stages.add_column(name, justify="right")
    for row in stage_rows(forecast.prediction):
        stages.add_row(
            row.stage,
            duration(row.predicted_ns),
            quantity(row.tensor_flops, "FLOP"),
            quantity(row.vector_flops, "FLOP"),
            quantity(row.bytes_read, "B"),
            quantity(row.bytes_written, "B"),
            quantity(row.kv_cache_bytes, "B"),
        )
    modules = plain_table("Heaviest modules, by their own time", "Stage", "Module", "Bound by")
    for name in ("Time", "Share"):
        modules.add_column(name, justify="right")
    rows = module_rows(forecast.prediction)
    whole = sum(row.predicted_ns for row in rows)
    for module in sorted(rows, key=lambda row: -row.predicted_ns)[:_TOP]:
        modules.add_row(
            module.stage,
            module.module_path or "(root)",
            module.bound or "-",
            duration(module.predicted_ns),
            percent(module.predicted_ns / whole),
        )
    grid, policy = workload.grid, forecast.scenario.policy
    tiles = "no tiles" if grid is None else f"{grid[0]}x{grid[1]} tiles"
    text = (
        f"{tiles}, prompt of {workload.seq_len} positions, {workload.max_new_tokens} new tokens, batch "
        f"{workload.batch_size}, {policy.dtype}, {policy.attention} attention, "
        f"{forecast.prediction.work.routing.source} routing, {forecast.hardware.provenance} peaks"
    )
    result_console().print(stages, modules, text, sep="\n")
