"""``dsocr-trace predict``."""

from __future__ import annotations

import click

from dsocr_trace.commands.common import debug_option, reported


@click.command()
@click.option("--workload", required=True, metavar="ID|FILE.toml", help="What to predict.")
@click.option("--hardware", required=True, metavar="NAME|FILE.toml", help="For what; see `dsocr-trace list hardware`.")
@click.option("--variant", metavar="ID", help="Size of the model; the workload names the default.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the workload, such as batch_size=4 or crop_grid=2x3; may be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print stages and modules as one JSON object.")
@debug_option
def predict(
    *, workload: str, hardware: str, variant: str | None, settings: tuple[str, ...], as_json: bool, debug: bool
) -> None:
    """Predict cost and time of a workload on a device, without running it."""
    with reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.forecast import predict_words  # noqa: PLC0415
        from dsocr_trace.report.forecast import print_forecast  # noqa: PLC0415

        found = predict_words(workload, hardware, variant=variant, settings=settings)
        if as_json:
            click.echo(json.dumps(found.summary()))
        else:
            print_forecast(found)
