"""The first questions about a run, answered from its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
import pandas as pd

from dsocr_trace.report.units import duration, percent, quantity

if TYPE_CHECKING:
    from collections.abc import Mapping


MINUS: Final = "\N{MINUS SIGN}"
_TIMES: Final = "\N{MULTIPLICATION SIGN}"
#: What a bound means.
_LIMITS: Final = {"compute": "arithmetic", "memory": "memory bandwidth"}


@attrs.frozen
class Finding:
    """A question and its answer."""

    question: str
    answer: str


def findings(manifest: Mapping[str, Any], stages: pd.DataFrame, kinds: pd.DataFrame) -> list[Finding]:
    """Answer what a reader asks first.

    Parameters
    ----------
    manifest
        The run's manifest.
    stages, kinds
        Rows of `dsocr_trace.report.page.data.stage_totals` and `kind_rows`.
    """
    answers = {
        "Which stage dominates?": _dominant(stages),
        "What to optimise first?": _first(kinds),
        "How far from the roof, and why?": _roof(manifest, kinds),
        "How much is unclassified?": _unclassified(manifest),
        "Can the run be trusted?": _trust(manifest),
    }
    return [Finding(question, answer) for question, answer in answers.items() if answer]


def _dominant(stages: pd.DataFrame) -> str:
    wall = stages["wall_ns"].sum()
    top = stages.loc[stages["wall_ns"].idxmax()]
    answer = (
        f"{top['stage'].capitalize()}: {duration(top['wall_ns'])} of {duration(wall)} wall time "
        f"({percent(top['wall_ns'] / wall)}). "
    )
    if top["gap_ns"] < 0:
        return (
            answer + f"Its device time is {duration(top['scaled_ns'])}: under the profiler it ran longer than without."
        )
    return (
        f"{answer}The device worked for {duration(top['scaled_ns'])} of it; {duration(top['gap_ns'])} "
        f"({percent(top['gap_ns'] / top['wall_ns'])}) had no work on the device."
    )


def _target(kinds: pd.DataFrame) -> pd.Series | None:
    known = kinds.dropna(subset="excess_ns")
    return None if known.empty else known.loc[known["excess_ns"].idxmax()]


def _first(kinds: pd.DataFrame) -> str:
    top = _target(kinds)
    if top is None:
        return ""
    whole = kinds["scaled_self_ns"].sum()
    instances = f"{top['modules']:,} {_TIMES} " if top["modules"] > 1 else ""
    return (
        f"{instances}{top['module_class']} in {top['stage']} ({top['kind'] or 'the root'}): "
        f"{duration(top['scaled_self_ns'])} on the device, {percent(top['scaled_self_ns'] / whole)} of all. "
        f"The prediction is {duration(top['predicted_self_ns'])}, so it could give up to "
        f"{duration(top['excess_ns'])}, {percent(top['excess_ns'] / whole)} of the device time."
    )


def _roof(manifest: Mapping[str, Any], kinds: pd.DataFrame) -> str:
    top, hardware = _target(kinds), manifest["hardware"]
    if top is None or not top["predicted_self_ns"]:
        return ""
    rates = {
        "compute": (top["achieved_flops_per_s"], hardware["tensor_flops_per_s"], "FLOP/s"),
        "memory": (top["achieved_bytes_per_s"], hardware["memory_bytes_per_s"], "B/s"),
    }
    answer = f"It takes {times(top['scaled_self_ns'], top['predicted_self_ns'])} the predicted time"
    if top["bound"] not in rates:
        return f"{answer}, most of which the {top['bound']} sets."
    reached, ceiling, unit = rates[top["bound"]]
    return (
        f"{answer}. The limit is {_LIMITS[top['bound']]}, of which it reaches {quantity(reached, unit)} of "
        f"{quantity(ceiling, unit)} ({hardware['provenance']}): {percent(reached / ceiling)}."
    )


def _unclassified(manifest: Mapping[str, Any]) -> str:
    share = 1 - manifest["coverage"]["all"]
    reasons = [f"{duration(entry['ns'])} {entry['means']}" for entry in manifest["unclassified"].values()]
    return f"{share:.2%} of the measured device time" + (f": {'; '.join(reasons)}." if reasons else ".")


def _trust(manifest: Mapping[str, Any]) -> str:
    notes = len(manifest["notes"])
    return (
        f"{manifest['coverage']['all']:.2%} of the device time stands in named modules, and modules, stages and events "
        f"add up exactly. Tracing costs {overhead(manifest)}. Clocks agree within "
        f"{duration(manifest['clock']['residual_ns'])}. "
        + (f"Read the {notes} notes above." if notes > 1 else "Read the note above." if notes else "Nothing was noted.")
    )


def overhead(manifest: Mapping[str, Any]) -> str:
    """The tracer's cost with the middle half of its pairs, in words."""
    cost = manifest["overhead"]
    if cost["ratio"] is None:
        return "an unknown share: no decode step was run"
    low, high = cost["quartiles"]
    return (
        f"{signed(cost['ratio'] - 1)} of a decode step (median; middle half of {cost['pairs']} pairs "
        f"{signed(low - 1)} to {signed(high - 1)})"
    )


def signed(share: float) -> str:
    """Share as a percentage with its sign."""
    return f"{share:+.1%}".replace("-", MINUS)


def times(value: float | None, base: float | None) -> str:
    """How many times `base` a value is, with two digits; ``-`` where it cannot be said."""
    if value is None or not base or pd.isna(base):
        return "-"
    quotient = value / base
    return f"{quotient:,.0f}{_TIMES}" if quotient >= 10 else f"{quotient:.2g}{_TIMES}"
