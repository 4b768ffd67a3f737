"""``dsocr-trace compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsocr_trace.commands.common import DIFFERENT, debug_option, reported

if TYPE_CHECKING:
    from click import Context, Parameter


class Percentage(click.ParamType[float]):
    """A percentage from 0 on, with or without its sign."""

    name = "percentage"

    def convert(self, value: Any, param: Parameter | None, ctx: Context | None) -> float:
        """Read it."""
        try:
            percent = float(str(value).removesuffix("%"))
        except ValueError:
            percent = -1.0
        # Also refuses what is no number.
        if not 0 <= percent < float("inf"):
            self.fail(f"{value!r} is no percentage; give one like 5 or 5%", param, ctx)
        return percent


@click.command()
@click.argument("run_a", type=click.Path(path_type=Path), metavar="RUN_A")
@click.argument("run_b", type=click.Path(path_type=Path), metavar="RUN_B")
@click.option(
    "--format",
    "text_format",
    type=click.Choice(["text", "md", "html"]),
    default="text",
    show_default=True,
    help="For the terminal, a pull request, or the browser.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Where to write.  [default: standard output]"
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option(
    "--fail-over",
    type=Percentage(),
    metavar="PERCENT",
    help="Exit with 3 if a stage, or the total, is slower by more than this, and not by chance as far as is known.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@debug_option
def compare(
    *,
    run_a: Path,
    run_b: Path,
    text_format: str,
    output: Path | None,
    force: bool,
    fail_over: float | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Lay run B beside run A: what is new, gone or changed, and what is more than the spread of the repeats."""
    with reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.comparison.compare import compare as compared  # noqa: PLC0415
        from dsocr_trace.exports.files import check_free, write_file  # noqa: PLC0415
        from dsocr_trace.report.comparison import RENDERERS, comparison_json  # noqa: PLC0415
        from dsocr_trace.runs.store import load  # noqa: PLC0415

        if output is not None:
            check_free(output, force=force)
        found = compared(load(run_a), load(run_b))
        failed = None if fail_over is None else found.slower(fail_over)
        if output is not None:
            write_file(output, RENDERERS[text_format](found), force=force)
            click.echo(f"comparison: {output}", err=True)
        if as_json:
            click.echo(json.dumps(comparison_json(found, failed)))
        elif output is None:
            click.echo(RENDERERS[text_format](found), nl=False)
    if failed:
        click.echo(f"slower by more than {fail_over:g}%: {', '.join(failed)}", err=True)
        sys.exit(DIFFERENT)
