"""What a verification found, on the terminal and for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dsocr_trace.verification.verify import Status, Verification

_PIPED_WIDTH: Final = 160
_STYLES: Final[dict[Status, str]] = {"equal": "green", "different": "bold red", "no reference": "yellow"}


def print_verification(found: Verification) -> None:
    """Print a table per target, what differs, and what no reference exists for, on standard output."""
    console = Console(highlight=False, width=None if Console().is_terminal else _PIPED_WIDTH)
    for name in found.workloads:
        console.print(_table(found, name))
    for figure in found.differences:
        console.print(
            f"different: {figure.stage} {figure.module_path or '(model)'} at {figure.workload}, {figure.attention}: "
            f"formulas {figure.analytic:,} in {figure.analytic_calls} calls, "
            f"counted {figure.reference:,} in {figure.reference_calls}",
            markup=False,
        )
    for name, flops in found.other_flops.items():
        console.print(
            f"other: no formula stands for {name}; counted in it {flops:,} FLOP, {found.other_shares[name]:.2%} of all",
            style=_STYLES["different"] if flops else None,
            markup=False,
        )
    console.print(
        f"no reference for {len(found.operators_without_reference)} operators without tensor FLOPs: "
        f"{', '.join(found.operators_without_reference)}"
    )
    for name in found.workloads:
        console.print(
            f"{name}: {_sum(found, name)}", style=_STYLES["different"] if found.counts(name)["different"] else None
        )


def _table(found: Verification, name: str) -> Table:
    table = Table(
        title=f"{name}: {_sum(found, name)}", title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("Stage")
    table.add_column("Module", overflow="fold")
    table.add_column("Class")
    for column in ("Figures", "Analytic FLOP", "Reference FLOP", "Difference"):
        table.add_column(column, justify="right")
    table.add_column("Status", no_wrap=True)
    for row in found.rows:
        if row.target == name:
            unseen = row.status == "no reference"
            table.add_row(
                row.stage,
                row.module,
                row.module_class,
                f"{row.figures:,}",
                f"{row.analytic:,}",
                "-" if unseen else f"{row.reference:,}",
                "-" if unseen else f"{row.difference:+,}" if row.difference else "0",
                row.status,
                style=None if row.status == "equal" else _STYLES[row.status],
            )
    return table


def _sum(found: Verification, name: str) -> str:
    counts = found.counts(name)
    return (
        f"{found.workloads[name]} workloads, {counts['equal']:,} figures equal, {counts['different']:,} different, "
        f"{counts['no_reference']:,} without reference"
    )


def verification_json(found: Verification) -> dict[str, Any]:
    """Everything that was compared, as one object."""
    return {
        "holds": found.holds,
        "targets": {name: {"workloads": count} | found.counts(name) for name, count in found.workloads.items()},
        "rows": [attrs.asdict(row) | {"difference": row.difference, "status": row.status} for row in found.rows],
        "differences": [attrs.asdict(figure) for figure in found.differences],
        "operators_without_reference": list(found.operators_without_reference),
        "other": {
            name: {"flops": flops, "share": found.other_shares[name]} for name, flops in found.other_flops.items()
        },
    }
