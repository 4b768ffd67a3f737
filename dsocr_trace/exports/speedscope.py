"""A run's measured time as profiles of speedscope (https://www.speedscope.app): stacks of modules, kernels on top."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from analytic.errors import InputError
from dsocr_trace.exports.folding import STAGES
from dsocr_trace.exports.tables import rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsocr_trace.runs.store import Run

    Stack = tuple[str, ...]

_SCHEMA: Final = "https://www.speedscope.app/file-format-schema.json"


def speedscope_profiles(run: Run) -> str:
    """Write the measured time as speedscope's JSON, one profile per stage.

    A sample is a module with those above it and a kernel or operator that it ran; its weight is their summed time. The
    weights of a profile add up to the stage's measured time in the ledger. What belongs to no module stands under
    ``unclassified`` and its reason.

    Parameters
    ----------
    run
        What to export.

    Raises
    ------
    InputError
        If the run measured no event.
    """
    weights: dict[str, Counter[Stack]] = {stage: Counter() for stage in STAGES}
    stacks = _stacks(run)
    for row in rows(run, "kernels"):
        reason = row["unclassified_reason"]
        above = stacks[row["module_path"]] if reason is None else (row["module_path"], reason)
        weights[row["stage"]][*above, row["name"]] += row["duration_ns"]
    frames: dict[str, int] = {}
    profiles = [_profile(stage, samples, stacks, frames) for stage, samples in weights.items() if samples]
    if not profiles:
        raise InputError(f"{run.path} holds no measured event, so there is no profile; give another run")
    content = {
        "$schema": _SCHEMA,
        "exporter": "dsocr-trace",
        "name": run.path.resolve().name,
        "activeProfileIndex": 0,
        "shared": {"frames": [{"name": name} for name in frames]},
        "profiles": profiles,
    }
    return json.dumps(content, separators=(",", ":")) + "\n"


def _stacks(run: Run) -> dict[str, Stack]:
    """Names of each module and those above it, by module path and in the order of the module tree."""
    stacks: dict[str, Stack] = {}
    for row in rows(run, "modules"):
        above = () if row["parent_path"] is None else stacks[row["parent_path"]]
        stacks[row["module_path"]] = (*above, row["module_path"] or row["module_class"])
    return stacks


def _profile(
    stage: str, samples: Mapping[Stack, int], stacks: Mapping[str, Stack], frames: dict[str, int]
) -> dict[str, Any]:
    """One stage, in the order of the module tree; `frames` grows by the names that it does not have."""
    place = {stack: number for number, stack in enumerate(stacks.values())}
    ordered = sorted(samples.items(), key=lambda sample: (place.get(sample[0][:-1], len(place)), -sample[1]))
    return {
        "type": "sampled",
        "name": stage,
        "unit": "nanoseconds",
        "startValue": 0,
        "endValue": sum(samples.values()),
        "samples": [[frames.setdefault(name, len(frames)) for name in stack] for stack, _ in ordered],
        "weights": [weight for _, weight in ordered],
    }
