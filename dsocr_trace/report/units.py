"""Numbers as people read them; ``-`` where there is none."""

from __future__ import annotations

from typing import Final

_TIMES: Final = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))
_PREFIXES: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def duration(ns: float | None) -> str:
    """Time with three digits, such as ``5.12 s`` or ``80.3 ms``; ``-`` for none."""
    if ns is None:
        return "-"
    scale, unit = next((pair for pair in _TIMES if abs(ns) >= pair[0]), _TIMES[-1])
    return f"{ns / scale:.3g} {unit}" if ns / scale < 1000 else f"{ns / scale:.0f} {unit}"


def quantity(value: float | None, unit: str) -> str:
    """Value with three digits and a decimal prefix, such as ``1.2 TFLOP``; ``-`` for none."""
    if value is None:
        return "-"
    scale, prefix = next((pair for pair in _PREFIXES if abs(value) >= pair[0]), _PREFIXES[-1])
    return f"{value / scale:.3g} {prefix}{unit}"


def percent(share: float | None) -> str:
    """Share as a percentage; ``-`` for none."""
    return "-" if share is None else f"{share:.1%}"


def ratio(numerator: float | None, denominator: float | None) -> str:
    """Quotient with two digits; ``-`` where there is none."""
    return "-" if numerator is None or not denominator else f"{numerator / denominator:.2g}"
