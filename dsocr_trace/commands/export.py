"""``dsocr-trace export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from dsocr_trace.commands.common import debug_option, reported

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Options that only one format has, with the name of its parameter.
_OPTIONS: Final = {"--pass": ("perfetto", "pass_name"), "--stage": ("dot", "stage")}
#: The format that is no text.
_ARCHIVE: Final = "csv"


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--format",
    "run_format",
    required=True,
    metavar="json|yaml|perfetto|speedscope|dot|csv",
    help="Analytic report (json, yaml), timeline, flame graph, call graph, or every table in a zip archive.",
)
@click.option(
    "--pass",
    "pass_name",
    metavar="NAME",
    help="Pass that perfetto shows: profiled, traced, traced-2, ...  [default: profiled]",
)
@click.option("--stage", metavar="NAME", help="The only stage that dot draws.  [default: all]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to write; gzipped if it ends in .gz; required for csv.  [default: standard output]",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@debug_option
def export(
    *,
    run: Path,
    run_format: str,
    pass_name: str | None,
    stage: str | None,
    output: Path | None,
    force: bool,
    debug: bool,
) -> None:
    """Export a run directory for other tools.

    json and yaml hold what was predicted of every module, beside what was measured; perfetto is a timeline, speedscope
    a flame graph, dot the call graph for Graphviz; csv holds every table.
    """
    with reported(debug=debug):
        from analytic.errors import InputError  # noqa: PLC0415
        from dsocr_trace.exports.files import RUN_FORMATS, check_free, write_file  # noqa: PLC0415
        from dsocr_trace.runs.store import load  # noqa: PLC0415

        if run_format not in RUN_FORMATS:
            raise InputError(f"no format {run_format!r}; choose one of {', '.join(RUN_FORMATS)} with --format")
        options = _checked(run_format, {"--pass": pass_name, "--stage": stage})
        if output is not None:
            check_free(output, force=force)
        elif run_format == _ARCHIVE:
            raise InputError("csv is a zip archive, which is not shown; name it with --output FILE.zip")
        content = RUN_FORMATS[run_format](load(run), **options)
        if output is None:
            click.echo(content, nl=False)
        else:
            write_file(output, _packed(content) if output.suffix == ".gz" else content, force=force)
            click.echo(f"export: {output}", err=True)


def _checked(run_format: str, given: Mapping[str, str | None]) -> dict[str, str]:
    """Arguments of the format's function, from the options that are given."""
    from analytic.errors import InputError  # noqa: PLC0415

    arguments = {}
    for option, value in given.items():
        if value is not None:
            owner, parameter = _OPTIONS[option]
            if run_format != owner:
                raise InputError(f"{option} belongs to --format {owner}; leave it out with --format {run_format}")
            arguments[parameter] = value
    return arguments


def _packed(content: str | bytes) -> bytes:
    """Gzip that does not depend on when it is made."""
    import gzip  # noqa: PLC0415

    return gzip.compress(content.encode() if isinstance(content, str) else content, mtime=0)
