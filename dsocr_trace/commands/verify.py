"""``dsocr-trace verify``."""

from __future__ import annotations

import sys
from typing import Any

import click

from dsocr_trace.commands.common import DIFFERENT, debug_option, reported


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@click.option(
    "--model",
    default="builtin",
    show_default=True,
    metavar="builtin|DIR",
    help="The built-in classes, or a checkpoint directory; its config.json is enough.",
)
@click.option("--variant", metavar="ID", help="Size of the built-in model.  [default: deepseek-ocr-v1-base]")
@click.option(
    "--trust-remote-code", is_flag=True, help="Count the checkpoint's own code: it can do all that your account can."
)
@click.option(
    "--attention",
    type=click.Choice(["sdpa", "eager"]),
    help="How the decoder attends.  [default: sdpa, for llama both; eager with --trust-remote-code]",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@debug_option
def verify(*, as_json: bool, debug: bool, **options: Any) -> None:
    """Compare the formulas with the FLOPs that torch counts; exit with 3 if any differ.

    Targets: vision, decoder, llama, core, prefill-decode, end2end-vision-nocrop, end2end-vision,
    end2end-prefill-decode, end2end, and all, the default.
    """
    with reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.report.terminal import ProgressDisplay  # noqa: PLC0415
        from dsocr_trace.report.verification import print_verification, verification_json  # noqa: PLC0415
        from dsocr_trace.verification.verify import VerifyOptions  # noqa: PLC0415
        from dsocr_trace.verification.verify import verify as compare  # noqa: PLC0415

        with ProgressDisplay() as progress:
            found = compare(VerifyOptions(**options), progress)
        if as_json:
            click.echo(json.dumps(verification_json(found)))
        else:
            print_verification(found)
    if not found.holds:
        sys.exit(DIFFERENT)
