"""What an examination of the machine prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from dsocr_trace.machine.doctor import is_ready
from dsocr_trace.report.console import plain_table, result_console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsocr_trace.machine.doctor import Check


def examination_json(checks: Sequence[Check]) -> dict[str, Any]:
    """Everything that was found."""
    return {"ready": is_ready(checks), "checks": [attrs.asdict(check) | {"state": check.state} for check in checks]}


def print_examination(checks: Sequence[Check]) -> None:
    """Print each part, and below the table, unshortened, what helps where something is missing."""
    console = result_console()
    table = plain_table("This machine", "Part", "State", "Found")
    for check in checks:
        table.add_row(check.part, check.state, check.found)
    fixes = [f"{check.part}: {check.fix}" for check in checks if check.fix is not None]
    console.print(table)
    console.print("\n".join(fixes), soft_wrap=True, markup=False)
    console.print("runs are possible" if is_ready(checks) else "no run is possible: see what is missing")
