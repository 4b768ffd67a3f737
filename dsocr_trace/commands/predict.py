"""``dsocr-trace predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsocr_trace.commands.common import debug_option, reported

if TYPE_CHECKING:
    from dsocr_trace.forecasts.forecast import Forecast


@click.command()
@click.option("--workload", required=True, metavar="ID|FILE.toml", help="What to predict.")
@click.option(
    "--hardware",
    required=True,
    metavar="NAME|FILE.toml|FILE.parquet",
    help="For what: an entry of `dsocr-trace list hardware`, a file like one, or a calibration.",
)
@click.option(
    "--model",
    default="builtin",
    show_default=True,
    metavar="builtin|DIR",
    help="The built-in model, or a checkpoint directory of any installed family; its config.json is enough.",
)
@click.option(
    "--variant", metavar="ID", help="Size of the built-in model; not with a checkpoint.  [default: of the workload]"
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the workload, such as batch_size=4 or crop_grid=2x3; may be given several times.",
)
@click.option(
    "--backtest",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE.json",
    help="Backtest of the calibrated device: how far the answer may be off.",
)
@click.option("--json", "as_json", is_flag=True, help="Print stages and modules as one JSON object.")
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    metavar="FILE.json|FILE.yaml",
    help="Also write the analytic report, module by module.",
)
@click.option("--force", is_flag=True, help="Replace an existing file of --export.")
@debug_option
def predict(
    *,
    workload: str,
    hardware: str,
    model: str,
    variant: str | None,
    settings: tuple[str, ...],
    backtest: Path | None,
    as_json: bool,
    export: Path | None,
    force: bool,
    debug: bool,
) -> None:
    """Predict cost and time of a workload on a device, without running it."""
    with reported(debug=debug):
        import gc  # noqa: PLC0415
        import json  # noqa: PLC0415

        from dsocr_trace.forecasts.forecast import predict_words, without_collection  # noqa: PLC0415
        from dsocr_trace.report.forecast import print_forecast  # noqa: PLC0415

        if export is not None:
            _check_export(export, force=force)
        with without_collection():
            found = predict_words(
                workload, hardware, source=model, variant=variant, settings=settings, backtest=backtest
            )
            if export is not None:
                _export(found, export, force=force)
            if as_json:
                click.echo(json.dumps(found.summary()))
            else:
                print_forecast(found)
            # The process ends soon: it need not look through all of this once more.
            gc.freeze()


def _check_export(path: Path, *, force: bool) -> None:
    from dsocr_trace.exports.files import check_free, format_of  # noqa: PLC0415

    format_of(path)
    check_free(path, force=force)


def _export(found: Forecast, path: Path, *, force: bool) -> None:
    from dsocr_trace.exports.builder import forecast_report  # noqa: PLC0415
    from dsocr_trace.exports.files import save_report  # noqa: PLC0415

    save_report(forecast_report(found), path, force=force)
    click.echo(f"analytic report: {path}", err=True)
