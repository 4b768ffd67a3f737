"""``dsocr-trace list``."""

from __future__ import annotations

import click

from analytic.config import variant_names
from analytic.workload import profile_names
from dsocr_trace.commands.common import debug_option, reported


@click.command(name="list")
@click.argument("what", type=click.Choice(["workloads", "variants", "hardware", "operators", "layers"]))
@click.option("--variant", metavar="ID", help="Whose layers to list.  [default: deepseek-ocr-v1-base]")
@debug_option
def list_command(*, what: str, variant: str | None, debug: bool) -> None:
    """Print what is built in."""
    with reported(debug=debug):
        if what in {"operators", "layers"}:
            from analytic.config import DEFAULT_VARIANT, variant_config  # noqa: PLC0415
            from analytic.model import deepseek_ocr  # noqa: PLC0415
            from dsocr_trace.report.catalogue import print_layers, print_operators  # noqa: PLC0415

            if what == "layers":
                print_layers(deepseek_ocr(variant_config(variant or DEFAULT_VARIANT)))
            else:
                print_operators()
            return
        from analytic.hardware import hardware_names  # noqa: PLC0415

        names = {"workloads": profile_names, "variants": variant_names, "hardware": hardware_names}[what]()
        click.echo("\n".join(names))
