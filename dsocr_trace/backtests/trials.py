"""What a backtest runs: workloads of many shapes, small enough that a CPU gets through them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import attrs

from analytic.workload import Workload
from stage_runners.backtest import Trial

if TYPE_CHECKING:
    from analytic.crops import Grid

#: Trials unless told otherwise, and what a verdict needs.
TRIALS: Final = 20
LEAST_WORKLOADS: Final = 8
_QUICK_WORKLOADS: Final = 4
_QUICK_TOKENS: Final = 3


def _workload(grid: Grid | None, base: int, image: int, *, text: int, tokens: int, batch: int = 1) -> Workload:
    shape = "whole" if grid is None else f"{grid[0]}x{grid[1]}-{image}"
    return Workload(
        id=f"{shape}-{base}-text{text}" + (f"-batch{batch}" if batch > 1 else ""),
        page_width=900,
        page_height=1200,
        crop_mode=grid is not None,
        tile_grid=grid,
        base_size=base,
        image_size=image,
        text_tokens=text,
        max_new_tokens=tokens,
        batch_size=batch,
    )


#: Short and long prompts, short and long generations, one view and seven, a batch; cheap ones first.
WORKLOADS: Final = (
    _workload(None, 512, 640, text=40, tokens=20),
    _workload(None, 640, 640, text=300, tokens=16),
    _workload(None, 512, 640, text=700, tokens=10),
    _workload((1, 2), 640, 512, text=30, tokens=12),
    _workload(None, 512, 640, text=15, tokens=48),
    _workload(None, 512, 640, text=25, tokens=16, batch=2),
    _workload((2, 2), 512, 512, text=60, tokens=10),
    _workload(None, 1024, 640, text=10, tokens=12),
    _workload((1, 2), 1024, 640, text=30, tokens=24),
    _workload((3, 2), 640, 640, text=15, tokens=10),
)


def plan_trials(count: int | None, *, seed: int, quick: bool) -> list[Trial]:
    """The trials in the order in which they run: every workload as often as any other, give or take one.

    Parameters
    ----------
    count
        How many; None for as many as a verdict needs, or, if quick, one for each workload.
    seed
        Of the order; pages and prompts differ from one trial of a workload to the next.
    quick
        Whether to take only the cheapest workloads, with very few new tokens.
    """
    workloads: tuple[Workload, ...] = WORKLOADS
    if quick:
        workloads = tuple(attrs.evolve(each, max_new_tokens=_QUICK_TOKENS) for each in WORKLOADS[:_QUICK_WORKLOADS])
    if count is None:
        count = len(workloads) if quick else TRIALS
    numbers = (divmod(number, len(workloads)) for number in range(count))
    trials = [Trial(number, workloads[which], seed + repetition) for number, (repetition, which) in enumerate(numbers)]
    random.Random(seed).shuffle(trials)  # noqa: S311  an order, no secret
    return trials
