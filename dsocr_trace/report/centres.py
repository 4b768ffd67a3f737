"""Cost centres in words: what a kind of module takes, what it could give, and why it is not there yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from dsocr_trace.report.units import duration, percent, quantity
from hooks.attribution import UNCLASSIFIED

if TYPE_CHECKING:
    from collections.abc import Mapping

_TIMES: Final = "\N{MULTIPLICATION SIGN}"
#: What a bound means.
_LIMITS: Final = {
    "compute": "arithmetic",
    "memory": "memory bandwidth",
    "launch": "the shortest time that a launch takes",
    "host": "the host, which is slower than the device",
}
#: What stands between the roof of a module and its time.
_REASONS: Final = {
    "shape_ns": "because operators of these sizes run slower",
    "unexplained_ns": "that the time model does not explain",
    "idle_ns": "in which the device had no work",
    "launch_ns": "of launches",
}


def named(kind: Mapping[str, Any]) -> str:
    """Name a kind of module (`dsocr_trace.report.kinds.kind_rows`): how many, class, stage and path."""
    if kind["kind"] == UNCLASSIFIED:
        return f"What is outside every module in {kind['stage']}"
    instances = f"{kind['modules']:,} {_TIMES} " if kind["modules"] > 1 else ""
    return f"{instances}{kind['module_class']} in {kind['stage']} ({kind['kind'] or 'the root'})"


def could_give(kind: Mapping[str, Any], wall_ns: float) -> str:
    """Say what it takes of a run of `wall_ns`, and what it could give at the most."""
    idle = 0 if pd.isna(kind["idle_ns"]) else kind["idle_ns"]
    return (
        f"it takes {duration(kind['scaled_self_ns'] + idle)} of {duration(wall_ns)}, where the ceilings of the device "
        f"allow {duration(kind['roof_ns'])}. So it could give up to {duration(kind['excess_ns'])}, "
        f"{percent(kind['excess_ns'] / wall_ns)} of the wall time."
    )


def distance(kind: Mapping[str, Any], hardware: Mapping[str, Any]) -> str:
    """Say how far it is from its roof, and why; empty where it has none.

    Parameters
    ----------
    kind
        Of `dsocr_trace.report.kinds.targets`.
    hardware
        ``hardware`` of the manifest.
    """
    if not kind["roof_ns"]:
        return ""
    subject = "It" if kind["kind"] == UNCLASSIFIED else kind["module_class"]
    answer = f"{subject} takes {times(kind['scaled_self_ns'], kind['roof_ns'])} its roof on the device."
    parts = {reason: kind[column] for column, reason in _REASONS.items() if kind[column] > 0}
    if parts:
        causes = [f"{duration(ns)} {reason}" for reason, ns in sorted(parts.items(), key=lambda part: -part[1])]
        answer += f" Above it are {', '.join(causes)}."
    return answer + _limit(kind, hardware)


def _limit(kind: Mapping[str, Any], hardware: Mapping[str, Any]) -> str:
    if kind["bound"] not in _LIMITS:
        return ""
    limit = f" Its limit is {_LIMITS[kind['bound']]}"
    rates = {
        "compute": (kind["achieved_flops_per_s"], hardware["tensor_flops_per_s"], "FLOP/s"),
        "memory": (kind["achieved_bytes_per_s"], hardware["memory_bytes_per_s"], "B/s"),
    }
    if kind["bound"] not in rates:
        return f"{limit}."
    reached, peak, unit = rates[kind["bound"]]
    return (
        f"{limit}, of which it reaches {quantity(reached, unit)} of {quantity(peak, unit)} "
        f"({hardware['provenance']}): {percent(reached / peak)}."
    )


def times(value: float | None, base: float | None) -> str:
    """How many times `base` a value is, with two digits; ``-`` where it cannot be said."""
    if value is None or not base or pd.isna(base) or pd.isna(value):
        return "-"
    quotient = value / base
    return f"{quotient:,.0f}{_TIMES}" if quotient >= 10 else f"{quotient:.2g}{_TIMES}"
