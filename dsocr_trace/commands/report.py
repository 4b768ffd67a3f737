"""``dsocr-trace report``."""

from __future__ import annotations

from pathlib import Path

import click

from dsocr_trace.commands.common import debug_option, reported


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--format",
    "report_format",
    type=click.Choice(["html", "md"]),
    default="html",
    show_default=True,
    help="A page for the browser, or Markdown for a pull request.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Where to write.  [default: in the run directory]"
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@debug_option
def report(*, run: Path, report_format: str, output: Path | None, force: bool, debug: bool) -> None:
    """Write the report of a run anew, as `run` does when it ends."""
    with reported(debug=debug):
        from dsocr_trace.exports.files import check_free, write_file  # noqa: PLC0415
        from dsocr_trace.report.html import report_html, stored_tables  # noqa: PLC0415
        from dsocr_trace.report.markdown import report_markdown  # noqa: PLC0415
        from dsocr_trace.runs.store import load  # noqa: PLC0415

        finished = load(run)
        path = output or run / f"report.{report_format}"
        check_free(path, force=force)
        render = report_html if report_format == "html" else report_markdown
        write_file(path, render(finished.manifest, stored_tables(finished)), force=force)
        click.echo(path)
