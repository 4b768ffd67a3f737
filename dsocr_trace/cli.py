"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import contextlib
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from analytic.config import variant_names
from analytic.errors import DsocrTraceError
from analytic.workload import profile_names

if TYPE_CHECKING:
    from collections.abc import Iterator


#: Exit code of a check that found a difference.
_DIFFERENT: Final = 3


class _StepCount(click.ParamType[int | None]):
    """A positive number, or ``all`` as None."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "all":
            return None
        return int(click.IntRange(min=1).convert(value, param, ctx))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dsocr-trace")
def cli() -> None:
    """Trace DeepSeek-OCR: where time and memory go, beside what every module should cost."""


@cli.command()
@click.option(
    "--workload", required=True, metavar="ID|FILE.toml", help="What to run; see `dsocr-trace list workloads`."
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda:N", help="Where to run.")
@click.option(
    "--model",
    default="builtin",
    show_default=True,
    metavar="builtin|DIR",
    help="The built-in model with seeded weights, or a checkpoint directory (safetensors).",
)
@click.option("--variant", metavar="ID", help="Size of the built-in model; the workload names the default.")
@click.option(
    "--attention",
    metavar="sdpa|eager|flash_attention_2",
    help="How the decoder attends.  [default: sdpa; eager with --trust-remote-code]",
)
@click.option("--stage", "stage", type=click.Choice(["1"]), default="1", show_default=True, help="1: in this process.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="PNG, JPEG or PDF page to run instead of a synthetic one; may be given several times.",
)
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), help="Type of weights; default is the configuration's.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Tokens to generate.")
@click.option(
    "--profile-steps",
    type=_StepCount(),
    default="16",
    show_default=True,
    metavar="N|all",
    help="Decode steps to profile.",
)
@click.option("--hardware", metavar="NAME|FILE.toml", help="Predict for this; default is the entry of the device.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    metavar="DIR",
    help="Where run directories are made.",
)
@click.option("--run-id", metavar="NAME", help="Name of the run directory.  [default: workload, device and time]")
@click.option(
    "--repeat", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Traced generations to run."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of page, prompt and random weights.",
)
@click.option("--nvtx/--no-nvtx", default=None, help="NVTX range around every forward.  [default: if a tool listens]")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run the checkpoint's own code: it can do all that your account can."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def run(
    *, stage: str, profile_steps: int | None, nvtx: bool | None, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> None:
    """Trace, profile and predict one workload, and write its run directory."""
    del stage
    with _reported(debug=debug):
        from dsocr_trace.pipeline import RunOptions  # noqa: PLC0415
        from dsocr_trace.pipeline import run as run_pipeline  # noqa: PLC0415
        from dsocr_trace.report.terminal import ProgressDisplay  # noqa: PLC0415
        from hooks.nvtx_ranges import nvtx_attached  # noqa: PLC0415

        resolved = RunOptions(profile_steps=profile_steps, nvtx=nvtx_attached() if nvtx is None else nvtx, **options)
        with ProgressDisplay(quiet=quiet) as progress:
            path = run_pipeline(resolved, progress)
        _print_run(path, as_json=as_json)


def _print_run(path: Path, *, as_json: bool) -> None:
    import json  # noqa: PLC0415

    from dsocr_trace.report.rows import summary  # noqa: PLC0415
    from dsocr_trace.report.terminal import print_summary  # noqa: PLC0415
    from dsocr_trace.store import load  # noqa: PLC0415

    finished = load(path)
    tables = {name: finished.table(name) for name in ("attribution", "pages")}
    if as_json:
        click.echo(json.dumps(summary(str(path), finished.manifest, tables)))
    else:
        print_summary(str(path), finished.manifest, tables)


@cli.command()
@click.option("--workload", required=True, metavar="ID|FILE.toml", help="What to predict.")
@click.option("--hardware", required=True, metavar="NAME|FILE.toml", help="For what; see `dsocr-trace list hardware`.")
@click.option("--variant", metavar="ID", help="Size of the model; the workload names the default.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the workload, such as batch_size=4 or crop_grid=2x3; may be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print stages and modules as one JSON object.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def predict(
    *, workload: str, hardware: str, variant: str | None, settings: tuple[str, ...], as_json: bool, debug: bool
) -> None:
    """Predict cost and time of a workload on a device, without running it."""
    with _reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.forecast import predict_words  # noqa: PLC0415
        from dsocr_trace.report.forecast import print_forecast  # noqa: PLC0415

        found = predict_words(workload, hardware, variant=variant, settings=settings)
        if as_json:
            click.echo(json.dumps(found.summary()))
        else:
            print_forecast(found)


@cli.command(name="list")
@click.argument("what", type=click.Choice(["workloads", "variants", "hardware", "operators", "layers"]))
@click.option("--variant", metavar="ID", help="Whose layers to list.  [default: deepseek-ocr-v1-base]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def list_command(*, what: str, variant: str | None, debug: bool) -> None:
    """Print what is built in."""
    with _reported(debug=debug):
        if what in {"operators", "layers"}:
            from analytic.config import DEFAULT_VARIANT, variant_config  # noqa: PLC0415
            from dsocr_trace.report.catalogue import print_layers, print_operators  # noqa: PLC0415

            if what == "layers":
                print_layers(variant_config(variant or DEFAULT_VARIANT))
            else:
                print_operators()
            return
        from analytic.hardware import hardware_names  # noqa: PLC0415

        names = {"workloads": profile_names, "variants": variant_names, "hardware": hardware_names}[what]()
        click.echo("\n".join(names))


@cli.command()
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
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def verify(*, as_json: bool, debug: bool, **options: Any) -> None:
    """Compare the formulas with the FLOPs that torch counts; exit with 3 if any differ.

    Targets: vision, decoder, llama, core, prefill-decode, end2end-vision-nocrop, end2end-vision,
    end2end-prefill-decode, end2end, and all, the default.
    """
    with _reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.report.terminal import ProgressDisplay  # noqa: PLC0415
        from dsocr_trace.report.verification import print_verification, verification_json  # noqa: PLC0415
        from dsocr_trace.verify import VerifyOptions  # noqa: PLC0415
        from dsocr_trace.verify import verify as compare  # noqa: PLC0415

        with ProgressDisplay() as progress:
            found = compare(VerifyOptions(**options), progress)
        if as_json:
            click.echo(json.dumps(verification_json(found)))
        else:
            print_verification(found)
    if not found.holds:
        sys.exit(_DIFFERENT)


@contextlib.contextmanager
def _reported(*, debug: bool) -> Iterator[None]:
    """End with one line and the right exit code on every error that the user can do something about."""
    from hooks.errors import TraceError  # noqa: PLC0415

    try:
        yield
    except (DsocrTraceError, TraceError) as error:
        if debug:
            traceback.print_exc()
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"dsocr-trace: {message}", err=True)
    sys.exit(exit_code)


def main() -> None:
    """Entry point of the ``dsocr-trace`` command."""
    cli(prog_name="dsocr-trace")
