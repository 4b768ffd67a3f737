"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import click

from dsocr_trace.commands.attribute import attribute
from dsocr_trace.commands.backtest import backtest
from dsocr_trace.commands.calibrate import calibrate
from dsocr_trace.commands.catalogue import list_command
from dsocr_trace.commands.compare import compare
from dsocr_trace.commands.doctor import doctor
from dsocr_trace.commands.explain import explain
from dsocr_trace.commands.export import export
from dsocr_trace.commands.predict import predict
from dsocr_trace.commands.report import report
from dsocr_trace.commands.run import run
from dsocr_trace.commands.sweep import sweep
from dsocr_trace.commands.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dsocr-trace")
def cli() -> None:
    """Trace DeepSeek-OCR: where time and memory go, beside what every module should cost."""


for command in (
    run,
    attribute,
    predict,
    list_command,
    verify,
    doctor,
    report,
    compare,
    export,
    explain,
    sweep,
    calibrate,
    backtest,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of the ``dsocr-trace`` command."""
    cli(prog_name="dsocr-trace")
