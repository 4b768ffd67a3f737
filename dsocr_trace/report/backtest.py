"""What a backtest writes and prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import attrs
import pandas as pd

from dsocr_trace.backtests.errors import CLASSES, DRIFT, MEDIAN, SHARE, WITHIN, bars, calibration_shift, interval
from dsocr_trace.backtests.predictions import ROUTED
from dsocr_trace.backtests.trials import LEAST_WORKLOADS, TRIALS
from dsocr_trace.report.console import plain_table, result_console
from dsocr_trace.report.units import duration, percent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from dsocr_trace.backtests.backtest import Backtest
    from dsocr_trace.runs.store import FolderWriter

_ERROR_COLUMNS: Final = ("median", "p90", "worst", "time_weighted", "bias")
_BAR_HEAD: Final = ("Bar", "Asked", "Reached", "Told routing", "")
_ERROR_NAMES: Final = ("Median", "90 %", "Worst", "Weighted", "Bias")
_PARTS: Final = {
    "datasheet_ns": "Datasheet",
    "ceilings_ns": "Ceilings",
    "shape_ns": "Shape",
    "host_ns": "Host",
    "predicted_ns": "Predicted",
    "unexplained_ns": "Unexplained",
    "measured_ns": "Measured",
}
#: Classes that the terminal shows.
_SHOWN: Final = 8


def write_backtest(found: Backtest, writer: FolderWriter) -> Path:
    """Write page and summary beside the tables, and give the directory its name."""
    try:
        writer.text("backtest.json", json.dumps(summary(found), indent=2) + "\n")
        writer.text("backtest.md", backtest_markdown(found))
        return writer.publish()
    finally:
        writer.discard()


def verdict(found: Backtest) -> str:
    """``met``, ``not met``, or ``not judged`` where there are too few trials to say."""
    trials = found.tables["trials"]
    enough = len(trials) >= TRIALS and trials["workload"].nunique() >= LEAST_WORKLOADS
    if found.setup.options.quick or not enough or found.accepted.empty:
        return "not judged"
    return "met" if all(bar.met for bar in bars(found.accepted, found.accepted_modules)) else "not met"


def summary(found: Backtest) -> dict[str, Any]:
    """Everything but the long tables, for ``--json``."""
    setup, trials, accepted = found.setup, found.tables["trials"], found.accepted
    short = ("trials", "stage_errors", "class_errors", "baselines", "gap")
    return {
        "verdict": verdict(found),
        "bars": [attrs.asdict(bar) for bar in bars(accepted, found.accepted_modules)],
        "bars_routed": [attrs.asdict(bar) for bar in bars(accepted, found.accepted_modules, ROUTED)],
        "trials_run": len(trials),
        "trials_accepted": len(accepted),
        "trials_set_aside": len(trials) - len(accepted),
        "workloads": int(trials["workload"].nunique()),
        "drift_rule": DRIFT,
        "quick": setup.options.quick,
        "variant": setup.options.variant,
        "dtype": setup.policy.dtype,
        "attention": setup.policy.attention,
        "seed": setup.options.seed,
        "started_at": setup.started_at.isoformat(timespec="seconds"),
        "hardware": {"name": setup.hardware.name, "provenance": setup.hardware.provenance},
        **found.properties,
        "control": dict(found.reference),
        "calibration": _calibrations(found),
        "tracer_overhead": _tracer_overhead(accepted),
        "interval": interval(accepted),
        **{name: _records(found.tables[name]) for name in short},
    }


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows in plain numbers, null where there is none."""
    told: list[dict[str, Any]] = json.loads(rows.to_json(orient="records", double_precision=15))
    return told


def _calibrations(found: Backtest) -> dict[str, Any]:
    given = found.setup.options.calibration
    return {
        "given": None if given is None else str(given),
        "measured_at": found.before.measured_at,
        "samples": len(found.before.samples),
        "notes": list(found.before.notes),
        "shift": None if found.after is None else calibration_shift(found.before, found.after),
        "notes_after": None if found.after is None else list(found.after.notes),
    }


def _tracer_overhead(trials: pd.DataFrame) -> float | None:
    if trials.empty:
        return None
    return float((trials["traced_ns"] / trials["measured_ns"]).median())


def backtest_markdown(found: Backtest) -> str:
    """The page."""
    tables = found.tables
    sections = [
        f"# Backtest on {found.properties['device']['name']}",
        "\n".join(_facts(found)),
        "## Verdict\n\n" + _markdown(_BAR_HEAD, _bar_rows(found)),
        "## What each part of the model is worth\n\nErrors of the total.\n\n"
        + _markdown(("Method", *_ERROR_NAMES), _error_rows(_estimated(tables["baselines"]), "method"))
        + "\n\n"
        + "\n".join(f"- {line}" for line in _gave_up(tables["baselines"])),
        "## Stages\n\n" + _markdown(("Stage", "Share", *_ERROR_NAMES), _error_rows(tables["stage_errors"], "stage")),
        "## Module classes\n\n"
        + _markdown(("Class", "Share", *_ERROR_NAMES), _error_rows(tables["class_errors"], "module_class")),
        "## The gap in parts\n\nSums over the accepted trials. Each row adds up to what was measured, the rows to the "
        "last one.\n\n" + _markdown(("Class", *_PARTS.values()), _gap_rows(tables["gap"])),
        "## Trials\n\n"
        + _markdown(("Trial", "Workload", "New tokens", "Predicted", "Measured", "Error", "Drift", ""), _trials(found)),
        _EXPLAINED,
    ]
    return "\n\n".join(sections) + "\n"


_EXPLAINED: Final = f"""## How to read it

- Error: predicted over measured, less 1. Median and 90 % are of errors without their sign; worst has it. Weighted: the
  sum of all differences over the sum of measured. Bias: the same with signs.
- Ceilings: by how much the calibrated roof is above the datasheet's. Shape: what the operators take above that roof at
  their sizes. Host: what the host adds. Unexplained: what is left.
- A trial is set aside if the control, a product of many rows, one of a single row or a copy, was off by more than
  {DRIFT:.0%} from what it was in the calibration.
- Told routing: the same prediction, told how many tokens the routers gave each expert. It does not count for the
  verdict: before a run experts get equal shares.
- Asked is: the total within {WITHIN:.0%} in at least {SHARE:.0%} of the accepted trials, at most {MEDIAN:.0%} off at
  the median, and all module classes together, weighted by their time, at most {CLASSES:.0%} off."""


def _facts(found: Backtest) -> Iterator[str]:
    setup, trials = found.setup, found.tables["trials"]
    batches = " and ".join(map(str, sorted(trials["batch_size"].unique())))
    yield (
        f"- {setup.options.variant}, {setup.policy.dtype}, {setup.policy.attention} attention, batches of {batches}; "
        f"started {setup.started_at:%Y-%m-%d %H:%M} UTC, commit {found.properties['commit'] or 'unknown'}."
    )
    aside = len(trials) - len(found.accepted)
    yield (
        f"- {len(trials)} trials of {trials['workload'].nunique()} workloads, order shuffled; {len(found.accepted)} "
        f"accepted, {aside} set aside."
    )
    overhead = _tracer_overhead(found.accepted)
    if overhead is not None:
        yield f"- With the tracer, from which the classes are, a trial took {overhead:.3f} times as long."
    told = _calibrations(found)
    if told["given"]:
        yield f"- Calibration given: {told['given']}, measured {told['measured_at']}; none was made in this session."
    else:
        yield (
            f"- Calibrated before and after: the second one is {told['shift']['median']:+.1%} off at the median of "
            f"{told['shift']['samples']} samples, {told['shift']['median_size']:.1%} without the sign."
        )
    yield from (f"- Calibration: {note}." for note in dict.fromkeys((*told["notes"], *(told["notes_after"] or ()))))
    span = interval(found.accepted)
    if span is not None:
        yield (
            f"- Measured was {span['low']:.2f} to {span['high']:.2f} times predicted in the middle "
            f"{span['share']:.0%} of the trials: the interval for a what-if answer."
        )


def _bar_rows(found: Backtest) -> Iterator[Sequence[str]]:
    plain, routed = (bars(found.accepted, found.accepted_modules, level) for level in ("predicted_ns", ROUTED))
    for bar, told in zip(plain, routed, strict=True):
        yield bar.what, percent(bar.bar), percent(bar.value), percent(told.value), "met" if bar.met else "not met"
    yield "verdict", "", "", "", verdict(found)


def _estimated(baselines: pd.DataFrame) -> pd.DataFrame:
    return baselines[baselines["reason"].isna()]


def _gave_up(baselines: pd.DataFrame) -> Iterator[str]:
    for row in baselines[baselines["reason"].notna()].to_dict("records"):
        yield f"{row['method']}: gave up on this device ({row['reason']})."


def _error_rows(rows: pd.DataFrame, column: str) -> Iterator[Sequence[str]]:
    for row in rows.to_dict("records"):
        share = [percent(row["share_of_time"])] if "share_of_time" in row else []
        yield row[column], *share, *_errors(row)


def _errors(row: dict[str, Any]) -> Iterator[str]:
    for name in _ERROR_COLUMNS:
        signed = "+" if name in {"worst", "bias"} else ""
        yield "-" if pd.isna(row[name]) else f"{row[name]:{signed}.1%}"


def _gap_rows(rows: pd.DataFrame) -> Iterator[Sequence[str]]:
    for row in rows.to_dict("records"):
        yield row["module_class"], *(duration(row[name]) for name in _PARTS)


def _trials(found: Backtest) -> Iterator[Sequence[str]]:
    for row in found.tables["trials"].sort_values("order").to_dict("records"):
        yield (
            str(row["trial"]),
            row["workload"],
            str(row["max_new_tokens"]),
            duration(row["predicted_ns"]),
            duration(row["measured_ns"]),
            f"{row['error']:+.1%}",
            f"{row['drift']:+.1%}",
            "accepted" if row["accepted"] else "set aside",
        )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def print_backtest(found: Backtest, path: Path) -> None:
    """Print verdict, baselines, stages and the classes that take most, and where the files lie."""
    tables = found.tables
    console = result_console()
    shown = (
        ("Verdict", _BAR_HEAD, _bar_rows(found)),
        (
            "Errors of the total",
            ("Method", *_ERROR_NAMES),
            _error_rows(_estimated(tables["baselines"]), "method"),
        ),
        ("Stages", ("Stage", "Share", *_ERROR_NAMES), _error_rows(tables["stage_errors"], "stage")),
        (
            "Module classes",
            ("Class", "Share", *_ERROR_NAMES),
            _error_rows(tables["class_errors"].head(_SHOWN), "module_class"),
        ),
        ("From the datasheet to the clock", ("Class", *_PARTS.values()), _gap_rows(tables["gap"].tail(1))),
    )
    for title, (first, *others), rows in shown:
        table = plain_table(title, first)
        for name in others:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(
        "\n".join([*_facts(found), *(f"- {line}" for line in _gave_up(tables["baselines"])), f"backtest: {path}"]),
        soft_wrap=True,
        markup=False,
    )
