"""``dsocr-trace backtest``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsocr_trace.commands.common import debug_option, reported


@click.command()
@click.option("--device", required=True, metavar="cpu|cuda:N", help="Where to run.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory to write.  [default: results/backtest-DEVICE-TIME]",
)
@click.option("--trials", type=click.IntRange(min=1), metavar="N", help="Generations to measure.  [default: 20]")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE.parquet",
    help="Predict from this one, instead of calibrating before and after.",
)
@click.option(
    "--variant", default="deepseek-ocr-v1-base", show_default=True, metavar="ID", help="Size of the built-in model."
)
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True, help="Of weights.")
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Of workloads, order, pages and prompts."
)
@click.option("--quick", is_flag=True, help="A short calibration, four small workloads, three tokens; no verdict.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@debug_option
def backtest(*, as_json: bool, debug: bool, **options: Any) -> None:
    """Predict many workloads from a calibration, run them, and say how far the predictions are off."""
    with reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.backtests.backtest import BacktestOptions  # noqa: PLC0415
        from dsocr_trace.backtests.backtest import backtest as run_backtest  # noqa: PLC0415
        from dsocr_trace.report.backtest import print_backtest, summary, write_backtest  # noqa: PLC0415
        from dsocr_trace.report.terminal import ProgressDisplay  # noqa: PLC0415

        with ProgressDisplay() as progress:
            found, writer = run_backtest(BacktestOptions(**options), progress)
        path = write_backtest(found, writer)
        if as_json:
            click.echo(json.dumps({"output": str(path)} | summary(found)))
        else:
            print_backtest(found, path)
