"""``dsocr-trace export``."""

from __future__ import annotations

from pathlib import Path

import click

from dsocr_trace.commands.common import debug_option, reported


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--format", "run_format", required=True, metavar="json|yaml", help="Of the analytic report.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Where to write.  [default: standard output]"
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@debug_option
def export(*, run: Path, run_format: str, output: Path | None, force: bool, debug: bool) -> None:
    """Export a run directory for other tools: what was predicted of every module, beside what was measured."""
    with reported(debug=debug):
        from analytic.errors import InputError  # noqa: PLC0415
        from dsocr_trace.export import RUN_FORMATS, check_free, write_file  # noqa: PLC0415
        from dsocr_trace.store import load  # noqa: PLC0415

        if run_format not in RUN_FORMATS:
            raise InputError(f"no format {run_format!r}; choose one of {', '.join(RUN_FORMATS)} with --format")
        if output is not None:
            check_free(output, force=force)
        text = RUN_FORMATS[run_format](load(run))
        if output is None:
            click.echo(text, nl=False)
        else:
            write_file(output, text, force=force)
            click.echo(f"export: {output}", err=True)
