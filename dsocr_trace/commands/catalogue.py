"""``dsocr-trace list``."""

from __future__ import annotations

import sys

import click

from analytic.config import variant_names
from analytic.errors import InputError
from analytic.workload import profile_names
from dsocr_trace.commands.common import DIFFERENT, debug_option, reported


@click.command(name="list")
@click.argument("what", type=click.Choice(["workloads", "variants", "hardware", "operators", "layers"]))
@click.option("--variant", metavar="ID", help="Whose layers to list.  [default: deepseek-ocr-v1-base]")
@click.option(
    "--model",
    metavar="builtin|DIR",
    help="List the classes of the live model, built without weights, and what changed since its snapshot.",
)
@click.option(
    "--trust-remote-code", is_flag=True, help="Build the checkpoint's own code: it can do all that your account can."
)
@click.option("--refresh", is_flag=True, help="Write the snapshot anew; only with --model builtin, in a checkout.")
@debug_option
def list_command(
    *, what: str, variant: str | None, model: str | None, trust_remote_code: bool, refresh: bool, debug: bool
) -> None:
    """Print what is built in.

    Names of workloads, variants and hardware entries; operators, the formulas that costs are made of; layers, the
    module classes with the layers of the cost model that stand for them. For layers with --model, exit with 3 if they
    differ from the snapshot.
    """
    different = False
    live = model is not None or refresh or trust_remote_code
    with reported(debug=debug):
        if what != "layers" and (live or variant):
            raise InputError(f"{what} are the same for every model; leave out all options but --debug")
        if live:
            different = _print_live_layers(model, variant=variant, trust_remote_code=trust_remote_code, refresh=refresh)
        elif what == "layers":
            _print_layers(variant)
        elif what == "operators":
            from dsocr_trace.report.catalogue import print_operators  # noqa: PLC0415

            print_operators()
        else:
            from analytic.hardware import hardware_names  # noqa: PLC0415

            names = {"workloads": profile_names, "variants": variant_names, "hardware": hardware_names}[what]()
            click.echo("\n".join(names))
    if different:
        sys.exit(DIFFERENT)


def _print_layers(variant: str | None) -> None:
    from analytic.config import DEFAULT_VARIANT, variant_config  # noqa: PLC0415
    from analytic.model import deepseek_ocr  # noqa: PLC0415
    from dsocr_trace.report.catalogue import print_layers  # noqa: PLC0415

    print_layers(deepseek_ocr(variant_config(variant or DEFAULT_VARIANT)))


def _print_live_layers(model: str | None, *, variant: str | None, trust_remote_code: bool, refresh: bool) -> bool:
    from dsocr_trace.report.catalogue import print_live_layers  # noqa: PLC0415
    from dsocr_trace.verification.live_layers import check_refreshable, live_model, write_snapshot  # noqa: PLC0415
    from stage_runners.loading import BUILTIN  # noqa: PLC0415

    if refresh:
        check_refreshable(model)
    found = live_model(model or BUILTIN, variant=variant, trust_remote_code=trust_remote_code)
    if refresh and found.variant is not None:
        click.echo(f"snapshot: {write_snapshot(found.variant, found.shapes())}")
    differences = found.differences()
    print_live_layers(found, differences)
    return bool(differences)
