"""``dsocr-trace run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsocr_trace.commands.common import debug_option, reported


class _StepCount(click.ParamType[int | None]):
    """A positive number, or ``all`` as None."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "all":
            return None
        return int(click.IntRange(min=1).convert(value, param, ctx))


@click.command()
@click.option(
    "--workload", required=True, metavar="ID|FILE.toml", help="What to run; see `dsocr-trace list workloads`."
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda:N",
    help="Where to run; auto takes cuda:0 if torch sees a GPU, else the CPU.",
)
@click.option(
    "--model",
    default="builtin",
    show_default=True,
    metavar="builtin|DIR",
    help="The built-in model with seeded weights, or a checkpoint directory (safetensors).",
)
@click.option(
    "--variant", metavar="ID", help="Size of the built-in model; not with a checkpoint.  [default: of the workload]"
)
@click.option(
    "--attention",
    metavar="sdpa|eager|flash_attention_2",
    help="How the decoder attends.  [default: sdpa; eager with --trust-remote-code]",
)
@click.option(
    "--stage",
    type=click.Choice(["1", "2", "all"]),
    default="1",
    show_default=True,
    help="1: in this process. 2: the same, then again under Nsight Systems, which must succeed. all: as far as it can.",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="PNG, JPEG or PDF to run instead of a synthetic page, every page of it; may be given several times.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp32"]),
    help="Type of weights and activations.  [default: of the configuration]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens to generate; 1 runs no decode step.  [default: of the workload]",
)
@click.option(
    "--profile-steps",
    type=_StepCount(),
    default="16",
    show_default=True,
    metavar="N|all",
    help="Decode steps to profile per page; the rest is scaled.",
)
@click.option(
    "--hardware",
    metavar="NAME|FILE.toml|FILE.parquet",
    help="What to predict with: a hardware entry, or a calibration.  [default: the entry of the device]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    metavar="DIR",
    help="Where run directories are made.",
)
@click.option(
    "--run-id",
    metavar="NAME",
    help="Name of the run directory; none is overwritten.  [default: workload, device and time]",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Traced generations per page; wall times are their median.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of the synthetic page, the prompt's text ids and the random weights.",
)
@click.option(
    "--keep-capture/--no-keep-capture",
    default=None,
    help="Keep the recording of stage 2.  [default: unless it holds other processes' environments]",
)
@click.option("--nvtx/--no-nvtx", default=None, help="NVTX range around every forward.  [default: if a tool listens]")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run the checkpoint's own code: it can do all that your account can."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
@debug_option
def run(
    *, profile_steps: int | None, nvtx: bool | None, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> None:
    """Trace, profile and predict one workload, and write its run directory."""
    with reported(debug=debug):
        from dsocr_trace.report.terminal import ProgressDisplay  # noqa: PLC0415
        from dsocr_trace.runs.pipeline import RunOptions  # noqa: PLC0415
        from dsocr_trace.runs.pipeline import run as run_pipeline  # noqa: PLC0415
        from hooks.nvtx_ranges import nvtx_attached  # noqa: PLC0415

        resolved = RunOptions(profile_steps=profile_steps, nvtx=nvtx_attached() if nvtx is None else nvtx, **options)
        with ProgressDisplay(quiet=quiet) as progress:
            path = run_pipeline(resolved, progress)
        _print_run(path, as_json=as_json)
        require_stage2(path, options["stage"])


def _print_run(path: Path, *, as_json: bool) -> None:
    import json  # noqa: PLC0415

    from dsocr_trace.report.rows import summary  # noqa: PLC0415
    from dsocr_trace.report.terminal import print_summary  # noqa: PLC0415
    from dsocr_trace.runs.store import load  # noqa: PLC0415

    finished = load(path)
    stage2 = finished.manifest["stage2"]
    tables = {name: finished.table(name) for name in ("attribution", "pages", "predictions", "gap")}
    if as_json:
        click.echo(json.dumps(summary(str(path), finished.manifest, tables) | {"stage2": stage2}))
        return
    print_summary(str(path), finished.manifest, tables)
    if stage2 and "failure" not in stage2:
        found = stage2["agreement"]
        click.echo(
            f"stage 2: {found['ranges']:,} ranges for {found['calls']:,} calls, "
            f"{found['modules'] - found['modules_differing']:,} of {found['modules']:,} modules agree"
        )


def require_stage2(path: Path, stage: str) -> None:
    """Say why Stage 2 has no result; the run stays.

    Parameters
    ----------
    path
        The run's directory.
    stage
        What was asked for.

    Raises
    ------
    DsocrTraceError
        If there is none, and it was asked for by its number.
    """
    from analytic.errors import DsocrTraceError  # noqa: PLC0415
    from dsocr_trace.runs.store import load  # noqa: PLC0415

    failure = (load(path).manifest["stage2"] or {}).get("failure")
    if failure is None:
        return
    if stage == "2":
        raise DsocrTraceError(f"no stage 2: {failure}; all else is in {path}")
    click.echo(f"dsocr-trace: no stage 2: {failure}", err=True)
