"""What recording a forward call costs: the tracer beside a pair of forward hooks that keeps the same record.

Both are measured in one run, in turn, on many small modules whose forward does nothing, so that only the recording is
left. Run it as ``python benchmarks/tracer_overhead.py``.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from torch import nn

from hooks.tracer import Tracer

MODULES = 500
PASSES = 10
ROUNDS = 40


class Nothing(nn.Module):
    """Returns its input."""

    def forward(self, value: Any) -> Any:
        """Return ``value``."""
        return value


def small_modules() -> nn.Sequential:
    """Build a root that calls each of `MODULES` modules."""
    return nn.Sequential(*(Nothing() for _ in range(MODULES)))


def hook(root: nn.Module) -> None:
    """Register a pair of hooks on each module: a stack, a dict and two clock reads per call."""
    stack: list[tuple[nn.Module, int]] = []
    records: dict[nn.Module, tuple[int, int]] = {}

    def enter(module: nn.Module, _args: Any) -> None:
        stack.append((module, time.perf_counter_ns()))

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        module, start = stack.pop()
        records[module] = start, time.perf_counter_ns()

    for module in root.modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def time_call(root: nn.Module) -> float:
    """Time `PASSES` passes through the tree, in ns per module call."""
    start = time.perf_counter_ns()
    for _ in range(PASSES):
        root(None)
    return (time.perf_counter_ns() - start) / (PASSES * (MODULES + 1))


def measure() -> dict[str, float]:
    """Measure what each way of recording adds to a call.

    Returns
    -------
    dict of str to float
        ns per call over a plain one, median over rounds; "plain" is the plain call itself.
    """
    plain, hooked, traced = small_modules(), small_modules(), small_modules()
    hook(hooked)
    added: dict[str, list[float]] = {"plain": [], "hooks": [], "tracer": []}
    with Tracer(traced) as tracer:
        for _ in range(ROUNDS):
            base = time_call(plain)
            added["plain"].append(base)
            added["hooks"].append(time_call(hooked) - base)
            added["tracer"].append(time_call(traced) - base)
            tracer.clear()
    return {name: statistics.median(rounds) for name, rounds in added.items()}


def main() -> None:
    """Print the table."""
    cost = measure()
    print(f"{MODULES + 1} modules, {PASSES} passes, median of {ROUNDS} rounds")
    print(f"{'plain call':<28}{cost['plain']:>8.0f} ns")
    print(f"{'added by a pair of hooks':<28}{cost['hooks']:>8.0f} ns")
    print(f"{'added by the tracer':<28}{cost['tracer']:>8.0f} ns")
    print(f"{'tracer / hooks':<28}{cost['tracer'] / cost['hooks']:>8.3f}")


if __name__ == "__main__":
    main()
