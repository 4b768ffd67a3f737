"""``dsocr-trace attribute``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from dsocr_trace.commands.common import debug_option, reported

if TYPE_CHECKING:
    from dsocr_trace.recordings.joined import Joined

#: The file that marks a directory as written by this command.
_SUMMARY: Final = "attribution.json"


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Join with this run's module tree, and compare with its calls.",
)
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Write tables and a page there.")
@click.option("--force", is_flag=True, help="Replace what an earlier attribution wrote to --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@debug_option
def attribute(
    *, trace: Path, run_dir: Path | None, output: Path | None, force: bool, as_json: bool, debug: bool
) -> None:
    """Say which module each event of a trace belongs to that another tool recorded.

    TRACE is an Nsight Systems export (.sqlite) or report (.nsys-rep), an Nsight Compute CSV or report (.ncu-rep), or a
    torch.profiler trace (.json, .json.gz). Without --run, its own nn.Module calls or ranges are the modules.
    """
    with reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.recordings.joined import join  # noqa: PLC0415
        from dsocr_trace.recordings.read import read_recording  # noqa: PLC0415
        from dsocr_trace.report.attribute import print_attribution  # noqa: PLC0415
        from dsocr_trace.runs.store import load  # noqa: PLC0415

        if output is not None:
            _check_free(output, force=force)
        run = None if run_dir is None else load(run_dir)
        joined = join(read_recording(trace), run)
        if output is not None:
            _write(joined, trace, output, force=force)
        if as_json:
            click.echo(json.dumps(joined.summary()))
        else:
            print_attribution(joined)
        if output is not None:
            click.echo(f"attribution: {output}", err=True)


def _check_free(output: Path, *, force: bool) -> None:
    from analytic.errors import InputError  # noqa: PLC0415

    if not output.exists():
        return
    if not force:
        raise InputError(f"{output} exists and is left as it is; choose another --output, or replace it with --force")
    if not (output / _SUMMARY).is_file():
        raise InputError(
            f"{output} is not replaced: it holds no {_SUMMARY}, so it is no attribution; choose another --output"
        )


def _write(joined: Joined, trace: Path, output: Path, *, force: bool) -> None:
    import json  # noqa: PLC0415

    from dsocr_trace.report.attribute import attribution_markdown  # noqa: PLC0415
    from dsocr_trace.runs.schemas import ATTRIBUTION, RECORDED_KERNELS  # noqa: PLC0415
    from dsocr_trace.runs.store import FolderWriter  # noqa: PLC0415

    tables = {"kernels": joined.attribution.kernels, "attribution": joined.attribution.table}
    schemas = {"kernels": RECORDED_KERNELS, "attribution": ATTRIBUTION}
    if joined.counters is not None:
        tables["counters"] = joined.counters
        schemas["counters"] = joined.counters.schema
    writer = FolderWriter(output, schemas)
    try:
        for name, rows in tables.items():
            writer.table(name, rows)
        writer.text(_SUMMARY, json.dumps(joined.summary(), indent=1) + "\n")
        writer.text("attribution.md", attribution_markdown(joined, trace.name))
        writer.publish(replace=force)
    finally:
        writer.discard()
