"""What a calibration prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dsocr_trace.report.console import plain_table, result_console
from dsocr_trace.report.units import duration, percent, quantity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from analytic.timing.calibration import Calibration
    from dsocr_trace.machine.calibrations import LeftOut

#: Operators with the largest errors that are named.
_WORST: Final = 5
#: Copies of this size stand for each level of memory: about a first cache, a last cache, and beyond.
_SHOWN_BYTES: Final = (1 << 14, 1 << 20, 1 << 24, 1 << 28)
_MB: Final = 10**6


def print_calibration(path: Path, calibration: Calibration, errors: Sequence[LeftOut]) -> None:
    """Print ceilings, host costs, how far they can be trusted, and where the file lies."""
    console, state, host = result_console(), calibration.state, calibration.host
    table = plain_table(f"{calibration.device} ({calibration.kind})", "What")
    table.add_column("Measured", justify="right")
    for dtype, peak in calibration.tensor_flops_per_s.items():
        table.add_row(f"fastest matrix product, {dtype}", quantity(peak, "FLOP/s"))
    for size, bandwidth in calibration.memory_bytes_per_s.items():
        if size in _SHOWN_BYTES:
            table.add_row(f"copy that moves {quantity(size, 'B')}", quantity(bandwidth, "B/s"))
    table.add_row("shortest operator", duration(host.kernel_floor_ns))
    table.add_row("call of a module", duration(host.module_call_ns))
    table.add_row("view", duration(host.dispatch_ns))
    table.add_row("turn of a loop", duration(host.loop_turn_ns))
    table.add_row("reading a number back", duration(host.synchronise_ns))
    if calibration.kind == "cuda":
        table.add_row("operator, until it is launched", duration(host.operator_ns))
        table.add_row("launch on an idle device", duration(host.launch_ns))
    if host.fresh_byte_ns:
        large = quantity(host.fresh_from_bytes, "B")
        table.add_row(f"1 MB of new memory, results of {large} and more", duration(host.fresh_byte_ns * _MB))
    trust = plain_table("Curves: error where a sample is left out", "Operator", "Dtype")
    for name in ("Samples", "Median error"):
        trust.add_column(name, justify="right")
    for entry in errors[:_WORST]:
        trust.add_row(entry.operator, entry.dtype, str(entry.samples), percent(entry.median_error))
    console.print(table, trust, sep="\n")
    facts = (
        f"{len(calibration.samples)} samples in {state['seconds']:.0f} s, "
        f"median spread {percent(state['median_spread'])}, "
        f"drift of the control {percent(state['control_drift'])}, "
        f"other programs took {percent(state['cpu_share_of_others'])} of the CPU"
    )
    notes = [f"note: {note}" for note in calibration.notes]
    console.print("\n".join([facts, *notes, f"calibration: {path}"]), soft_wrap=True, markup=False)
