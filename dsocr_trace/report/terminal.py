"""The summary that a run prints, and its progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsocr_trace.interrupt import check
from dsocr_trace.report.console import plain_table, result_console
from dsocr_trace.report.kinds import kind_rows, module_rows, targets
from dsocr_trace.report.rows import stage_rows, top_modules
from dsocr_trace.report.units import duration, percent, quantity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    import pandas as pd
    from rich.table import Table

#: A screen has room for that many modules of each kind.
_TOP: Final = 5


class ProgressDisplay:
    """Phases of a run on standard error: bars on a terminal, one line per phase elsewhere.

    Parameters
    ----------
    quiet
        Show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            # Two redraws a second: more would be felt by the decode steps that are being timed.
            refresh_per_second=2,
        )
        self._phase: str | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of `phase` are done. An interrupt that was dropped is raised here."""
        check()
        if phase != self._phase:
            if not self._console.is_terminal:
                self._console.print(f"{phase} ...", style=None, highlight=False)
            if self._task is not None:
                self._bars.update(self._task, completed=self._bars.tasks[self._task].total)
            self._phase, self._task = phase, self._bars.add_task(phase, total=total)
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)


def print_summary(run_dir: str, manifest: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> None:
    """Print stages, the heaviest modules, those furthest above their roof, trust and files on standard output.

    Parameters
    ----------
    run_dir
        The run's directory.
    manifest
        Its manifest.
    tables
        ``attribution``, ``pages``, ``predictions`` and ``gap``.
    """
    console = result_console()
    stages = plain_table(f"{manifest['workload']['id']} on {manifest['device']['name']}", "Stage")
    for name in ("Wall", "Predicted", "Device", "Predicted", "Matrix work", "MFU", "Calls"):
        stages.add_column(name, justify="right")
    for row in stage_rows(manifest, tables):
        stages.add_row(
            row.stage,
            duration(row.wall_ns),
            duration(row.predicted_ns),
            duration(row.scaled_ns),
            duration(row.predicted_device_ns),
            quantity(row.tensor_flops, "FLOP"),
            percent(row.mfu),
            f"{row.calls:,}",
        )
    modules = plain_table("Heaviest modules, by their own time on the device", "Stage", "Module")
    for name in ("Time", "Share", "Predicted"):
        modules.add_column(name, justify="right")
    for cost in top_modules(tables["attribution"], _TOP):
        modules.add_row(
            cost.stage, cost.name, duration(cost.scaled_ns), percent(cost.share), duration(cost.predicted_ns)
        )
    notes = [f"note: {note}" for note in manifest["notes"]]
    console.print(
        stages,
        modules,
        *_furthest(tables),
        _trust(manifest),
        *notes,
        f"run: {run_dir}",
        f"report: {run_dir}/report.html",
        sep="\n",
    )


def _furthest(tables: Mapping[str, pd.DataFrame]) -> list[Table]:
    """Kinds of modules by what they could give; no table where nothing is predicted."""
    kinds = kind_rows(module_rows(tables["attribution"], tables["predictions"], tables["gap"]), tables["gap"])
    found = targets(kinds, _TOP).to_dict("records")
    table = plain_table("Furthest above the roof", "Stage", "Modules")
    for name in ("Could give", "Roof"):
        table.add_column(name, justify="right")
    table.add_column("Mostly")
    for kind in found:
        table.add_row(
            kind["stage"],
            kind["kind"] or "(root)",
            duration(kind["excess_ns"]),
            duration(kind["roof_ns"]),
            kind["cause"] if isinstance(kind["cause"], str) else "-",
        )
    return [table] if found else []


def _trust(manifest: Mapping[str, Any]) -> str:
    cost = manifest["overhead"]["ratio"]
    parts = [f"coverage {manifest['coverage']['all']:.2%}"]
    if cost is not None:
        parts.append(f"tracing cost {cost - 1:+.2%} of a decode step")
    parts += [f"{reason} {duration(entry['ns'])}" for reason, entry in manifest["unclassified"].items()]
    return ", ".join(parts)
