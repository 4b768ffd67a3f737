"""The first questions about a run, answered from its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from dsocr_trace.report.centres import could_give, distance, named
from dsocr_trace.report.kinds import targets
from dsocr_trace.report.units import duration, percent
from hooks.attribution import UNCLASSIFIED

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd


MINUS: Final = "\N{MINUS SIGN}"


@attrs.frozen
class Finding:
    """A question and its answer, and the section of the page that shows more."""

    question: str
    answer: str
    section: str


def findings(
    manifest: Mapping[str, Any], attribution: pd.DataFrame, stages: pd.DataFrame, kinds: pd.DataFrame, *, notes: int
) -> list[Finding]:
    """Answer what a reader asks first.

    Parameters
    ----------
    manifest
        The run's manifest.
    attribution
        The ledger.
    stages, kinds
        Rows of `dsocr_trace.report.page.data.stage_totals` and `dsocr_trace.report.kinds.kind_rows`.
    notes
        How many stand above the answers.
    """
    wall = stages["wall_ns"].sum()
    first, roof = "", ""
    for top in targets(kinds, 1).to_dict("records"):
        first, roof = f"{named(top)}: {could_give(top, wall)}", distance(top, manifest["hardware"])
    answers = (
        Finding("Which stage dominates?", _dominant(stages), "stages"),
        Finding("What to optimise first?", first, "first"),
        Finding("How far from the roof, and why?", roof, "gap"),
        Finding("How much is unclassified?", _unclassified(manifest, attribution), "unclassified"),
        Finding("Can the run be trusted?", _trust(manifest, notes), "about"),
    )
    return [finding for finding in answers if finding.answer]


def _dominant(stages: pd.DataFrame) -> str:
    wall = stages["wall_ns"].sum()
    top = stages.loc[stages["wall_ns"].idxmax()]
    answer = (
        f"{top['stage'].capitalize()}: {duration(top['wall_ns'])} of {duration(wall)} wall time "
        f"({percent(top['wall_ns'] / wall)}). "
    )
    if top["idle_ns"] < 0:
        return (
            answer + f"Its device time is {duration(top['scaled_ns'])}: under the profiler it ran longer than without."
        )
    return (
        f"{answer}The device worked for {duration(top['scaled_ns'])} of it; {duration(top['idle_ns'])} "
        f"({percent(top['idle_ns'] / top['wall_ns'])}) had no work on the device."
    )


def _unclassified(manifest: Mapping[str, Any], attribution: pd.DataFrame) -> str:
    rest = attribution[attribution["module_path"] == UNCLASSIFIED]
    of_reason, whole = rest.groupby("unclassified_reason")["scaled_self_ns"].sum(), attribution["scaled_self_ns"].sum()
    if not whole:
        return ""
    reasons = [f"{duration(ns)} {manifest['unclassified'][reason]['means']}" for reason, ns in of_reason.items()]
    share = of_reason.sum() / whole
    return f"{share:.2%} of the device time, scaled to the whole run" + (f": {'; '.join(reasons)}." if reasons else ".")


def _trust(manifest: Mapping[str, Any], notes: int) -> str:
    parts = [
        f"{manifest['coverage']['all']:.2%} of the profiled device time stands in named modules.",
        "Modules, stages and events add up exactly.",
        f"Tracing costs {overhead(manifest)}.",
        f"Clocks agree within {duration(manifest['clock']['residual_ns'])}.",
        *_repeats(manifest),
        *_recorded(manifest.get("stage2")),
        f"Read the {notes} notes above." if notes > 1 else "Read the note above." if notes else "Nothing was noted.",
    ]
    return " ".join(parts)


def _repeats(manifest: Mapping[str, Any]) -> list[str]:
    """How far the wall time of all stages varied."""
    walls = [
        sum(sum(repeat.values()) for repeat in of_pages)
        for of_pages in zip(*(page["repeats"] for page in manifest["pages"]), strict=True)
    ]
    if len(walls) < 2:
        return ["It was timed once; --repeat 5 tells how far the times vary."]
    return [f"Of {len(walls)} repeats the slowest took {signed(max(walls) / min(walls) - 1)} over the fastest."]


def _recorded(stage2: Mapping[str, Any] | None) -> list[str]:
    if not stage2 or "agreement" not in stage2:
        return []
    agreement = stage2["agreement"]
    same = agreement["modules"] - agreement["modules_differing"]
    return [f"Nsight Systems saw the same calls in {same:,} of {agreement['modules']:,} modules and stages."]


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
