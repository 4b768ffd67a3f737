"""What a sweep writes and prints: tables, pictures, a page that reads them."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from analytic.errors import DsocrTraceError, InputError
from dsocr_trace.report.console import plain_table, result_console
from dsocr_trace.report.findings import findings
from dsocr_trace.report.plots import save_plots
from dsocr_trace.report.units import duration, quantity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pandas as pd

    from dsocr_trace.forecasts.sweep import Sweep

#: What tells the points of a sweep apart, and those that the short table shows; prompts and generations of these sizes,
#: and the longest.
_VARIED: Final = {"vision": "Grid", "sequence": "Prompt", "decode": "New tokens", "profiles": "Profile"}
_GRIDS: Final = ("none", "1x2", "2x2", "2x3", "3x3", "4x4", "6x6")
_SIZES: Final = (512, 2048)
_MEASURES: Final = ("Batch", "TTFT", "TPOT", "Tokens/s", "Memory", "Fits", "Bound by")
_ASSUMPTIONS: Final = """\
- Times are a roofline per operator call: the longer of arithmetic at peak and traffic at full bandwidth. They are a
  lower bound; launches, the host and everything below peak come on top, which `dsocr-trace predict` adds for one
  workload.
- Memory needed is weights, the KV cache at the end, and twice the largest result of one operator (the result, and an
  operand as large as it). What a framework reserves comes on top.
- KV traffic is all that decode moves because positions are cached; the model copies the cache when it grows.
- Required TFLOP/s and GB/s are work and traffic over the target: what must be reached, not a peak.
"""


def default_output(sweep: Sweep) -> Path:
    """Directory of a sweep, unless another is asked for."""
    return Path("results") / "-".join(["sweep", sweep.kind, *(device.name for device in sweep.hardware)])


def write_sweep(sweep: Sweep, path: Path, *, force: bool) -> None:
    """Write the directory of a sweep: built aside, then renamed.

    Parameters
    ----------
    sweep
        What to write.
    path
        The directory.
    force
        Replace what stands there.

    Raises
    ------
    InputError
        If the directory exists and may not be replaced.
    DsocrTraceError
        If it cannot be written.
    """
    check_output(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            _write(sweep, aside)
            aside.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            aside.rename(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DsocrTraceError(f"cannot write {path}: {reason}; choose another place with --output") from error


def check_output(path: Path, *, force: bool) -> None:
    """Refuse a directory that may not be replaced.

    Raises
    ------
    InputError
        If it exists and `force` is not given, or is not a sweep's.
    """
    if not path.exists():
        return
    if not force:
        raise InputError(
            f"{path} exists and is left as it is; replace it with --force, or choose another with --output"
        )
    if not (path / "sweep.md").is_file():
        raise InputError(f"{path} is not the directory of a sweep and is left as it is; choose another with --output")


def _write(sweep: Sweep, folder: Path) -> None:
    sweep.table.to_parquet(folder / "table.parquet", index=False)
    sweep.table.to_csv(folder / "table.csv", index=False)
    pictures = save_plots(sweep, folder)
    (folder / "summary.json").write_text(json.dumps(summary(sweep), indent=2) + "\n", encoding="utf-8")
    (folder / "sweep.md").write_text(sweep_markdown(sweep, pictures), encoding="utf-8")


def summary(sweep: Sweep) -> dict[str, Any]:
    """What was swept and what the table says, for ``--json``."""
    workload = sweep.scenario.workload
    return {
        "kind": sweep.kind,
        "workload": None if sweep.kind == "profiles" else attrs.asdict(workload),
        "variant": sweep.table.variant.iloc[0],
        **attrs.asdict(sweep.scenario.policy),
        "routing": sweep.scenario.routing,
        "hardware": {device.name: device.provenance for device in sweep.hardware},
        "max_positions": sweep.max_positions,
        "ttft_target_ms": sweep.ttft_target_ms,
        "tpot_target_ms": sweep.tpot_target_ms,
        "rows": len(sweep.table),
        "columns": list(sweep.table.columns),
        "findings": findings(sweep),
        "regimes": {
            column: {
                str(name): {str(regime): int(count) for regime, count in frame[column].value_counts().items()}
                for name, frame in sweep.table.groupby("hardware", sort=False)
            }
            for column in ("vision_regime", "ttft_regime", "decode_regime", "dominant_stage")
        },
    }


def sweep_markdown(sweep: Sweep, pictures: Mapping[str, str]) -> str:
    """The page.

    Parameters
    ----------
    sweep
        What to describe.
    pictures
        Captions by name of the file.
    """
    names = ", ".join(device.name for device in sweep.hardware)
    shown = [f"![{caption}]({name}.svg)\n\n*{caption}.* [PNG]({name}.png)" for name, caption in pictures.items()]
    sections = [
        f"# Sweep of {_TITLES[sweep.kind]} on {names}",
        _what(sweep),
        "## What it says\n\n" + _bullets(findings(sweep)),
        "## Some of the points\n\n" + _markdown_table(sweep),
        "## Pictures\n\n" + "\n\n".join(shown),
        "## What it rests on\n\n" + _ASSUMPTIONS + _bullets(_peaks(sweep)),
        _FILES,
    ]
    return "\n\n".join(sections) + "\n"


_FILES: Final = """## Files

All points with all columns: [table.parquet](table.parquet), [table.csv](table.csv).
What was swept, and the sentences above: [summary.json](summary.json)."""
_TITLES: Final = {
    "vision": "crop grids and view sizes",
    "sequence": "prompt lengths",
    "decode": "new tokens",
    "profiles": "workload profiles",
}


def _what(sweep: Sweep) -> str:
    policy, table = sweep.scenario.policy, sweep.table
    base = "every built-in profile" if sweep.kind == "profiles" else f"profile {sweep.scenario.workload.id}"
    batches = ", ".join(str(batch) for batch in sorted(table.batch_size.unique()))
    return (
        f"{len(table):,} predictions: {len(table) // len(sweep.hardware):,} workloads on each device, from {base} with "
        f"{table.variant.iloc[0]}, {policy.dtype}, {policy.attention} attention, {sweep.scenario.routing} routing, "
        f"batches of {batches}. Targets: first token within {sweep.ttft_target_ms:g} ms, every further one within "
        f"{sweep.tpot_target_ms:g} ms."
    )


def _peaks(sweep: Sweep) -> Iterator[str]:
    dtype = sweep.scenario.policy.dtype
    for device in sweep.hardware:
        peak = quantity(device.tensor_peak(dtype), "FLOP/s")
        yield (
            f"{device.name} ({device.provenance}): {peak} of {dtype} matrix work, "
            f"{quantity(device.memory_bytes_per_s.value, 'B/s')}, {quantity(device.memory_bytes.value, 'B')}."
        )


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _markdown_table(sweep: Sweep) -> str:
    head = ("Device", _VARIED[sweep.kind], *_MEASURES)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *_rows(sweep)))


def _chosen(sweep: Sweep) -> pd.DataFrame:
    """The points that the short table shows."""
    table, workload = sweep.table, sweep.scenario.workload
    if sweep.kind == "vision":
        tiles = (table.image_size_px == workload.image_size) | (table.tiles == 0)
        return table[tiles & (table.base_size_px == workload.base_size) & table.crop_grid.isin(_GRIDS)]
    if sweep.kind in {"sequence", "decode"}:
        sizes = table.seq_len if sweep.kind == "sequence" else table.max_new_tokens
        return table[sizes.isin([*_SIZES, sizes.max()])]
    return table


def _rows(sweep: Sweep) -> Iterator[Sequence[str]]:
    for row in _chosen(sweep).itertuples():
        varied = {
            "vision": row.crop_grid,
            "sequence": f"{row.seq_len:,}",
            "decode": f"{row.max_new_tokens:,}",
            "profiles": row.workload,
        }
        yield (
            row.hardware,
            varied[sweep.kind],
            f"{row.batch_size}",
            duration(row.ttft_ns),
            duration(row.tpot_ns) if row.max_new_tokens > 1 else "-",
            f"{row.tokens_per_second:,.0f}",
            quantity(row.memory_needed_bytes, "B"),
            "yes" if row.fits_device_memory else "no",
            row.decode_regime.removesuffix("-bound"),
        )


def print_sweep(sweep: Sweep, path: Path) -> None:
    """Print some of the points, what the sweep says, and where its files lie."""
    shown = list(_rows(sweep))
    which = "" if len(shown) == len(sweep.table) else f"{len(shown)} of "
    title = f"Sweep of {_TITLES[sweep.kind]}: {which}{len(sweep.table):,} predictions"
    table = plain_table(title, "Device")
    for name in (_VARIED[sweep.kind], *_MEASURES):
        table.add_column(name, justify="left" if name in {"Grid", "Profile", "Fits", "Bound by"} else "right")
    for row in shown:
        table.add_row(*row)
    result_console().print(
        table, *(f"- {line}" for line in findings(sweep)), "", f"Page, pictures and tables: {path}", sep="\n"
    )
