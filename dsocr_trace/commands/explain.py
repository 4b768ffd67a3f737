"""``dsocr-trace explain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from analytic.errors import InputError
from dsocr_trace.commands.common import debug_option, reported

if TYPE_CHECKING:
    from dsocr_trace.report.explanation import Subject


@click.command()
@click.argument("module_path")
@click.option("--workload", metavar="ID|FILE.toml", help="Explain a prediction of this workload; needs --hardware.")
@click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Explain what is predicted of this run, beside what it measured.",
)
@click.option(
    "--page", type=click.IntRange(min=0), metavar="N", help="Page of the run, counted from 0.  [default: the only one]"
)
@click.option("--stage", type=click.Choice(["vision", "prefill", "decode"]), help="Only this stage.  [default: all]")
@click.option(
    "--hardware",
    metavar="NAME|FILE.toml|FILE.parquet",
    help="Predict for this; needed with --workload.  [default: of the run]",
)
@click.option("--variant", metavar="ID", help="Size of the model.  [default: of the workload]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the workload, as in predict; may be given several times; not with --run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@debug_option
def explain(*, module_path: str, run_dir: Path | None, as_json: bool, debug: bool, **options: Any) -> None:
    """Say why the numbers of a module are what they are: formulas, arguments, results, ceilings.

    MODULE_PATH is a dotted name such as model.layers.3.self_attn, or (root).
    """
    with reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.report.explanation import explanation_json, print_explanation  # noqa: PLC0415

        told = _of_workload(module_path, **options) if run_dir is None else _of_run(module_path, run_dir, **options)
        if as_json:
            click.echo(json.dumps(explanation_json(told)))
        else:
            print_explanation(told)


def _of_workload(
    module_path: str,
    *,
    workload: str | None,
    hardware: str | None,
    variant: str | None,
    settings: tuple[str, ...],
    stage: Any,
    page: int | None,
) -> Subject:
    from analytic.hardware import hardware_names  # noqa: PLC0415
    from analytic.model import STAGES  # noqa: PLC0415
    from dsocr_trace.forecasts.forecast import predict_words  # noqa: PLC0415
    from dsocr_trace.report.explanation import subject  # noqa: PLC0415

    if workload is None:
        raise InputError("nothing to explain; give a workload with --workload, or a run with --run")
    if page is not None:
        raise InputError("a workload has no numbered pages; --page goes with --run")
    if hardware is None:
        choices = ", ".join(hardware_names())
        raise InputError(
            f"times need a device; choose one of {choices}, a .toml file or a calibration, with --hardware"
        )
    found = predict_words(workload, hardware, variant=variant, settings=settings)
    return subject(found, module_path, STAGES if stage is None else (stage,))


def _of_run(
    module_path: str,
    run_dir: Path,
    *,
    workload: str | None,
    hardware: str | None,
    variant: str | None,
    settings: tuple[str, ...],
    stage: Any,
    page: int | None,
) -> Subject:
    from analytic.model import STAGES  # noqa: PLC0415
    from dsocr_trace.forecasts.of_run import run_forecast  # noqa: PLC0415
    from dsocr_trace.report.explanation import subject  # noqa: PLC0415
    from dsocr_trace.runs.store import load  # noqa: PLC0415

    for option, given in (("--workload", workload), ("--variant", variant), ("--set", settings)):
        if given:
            raise InputError(f"a run has its own workload and model; leave out {option}, or --run")
    found = run_forecast(load(run_dir), page=page, hardware=hardware)
    return subject(found.forecast, module_path, STAGES if stage is None else (stage,), found)
