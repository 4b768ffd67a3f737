"""What a backtest runs: workloads of many shapes, drawn from a seed, small enough that a CPU gets through them."""

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

#: One workload has each of these grids; pages without tiles come first.
_GRIDS: Final[tuple[Grid | None, ...]] = (None, None, None, None, (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 2))
#: Sizes of global views and tiles in px, in equal shares.
_BASES: Final = (512, 640, 1024)
_TILES: Final = (512, 640)
#: Least and most tokens of the text, and new ones: each tenth of these ranges, in logarithms, has one workload.
_TEXT: Final = (10, 700)
_NEW: Final = (8, 48)
_BATCH: Final = 2


def draw_workloads(seed: int) -> tuple[Workload, ...]:
    """Draw ten workloads: each seed has others, and each set covers the ranges.

    Parameters
    ----------
    seed
        Of the draw.
    """
    draw = random.Random(seed)  # noqa: S311  a plan, no secret
    count = len(_GRIDS)
    bases, tiles = (
        _shuffled(draw, [sizes[number % len(sizes)] for number in range(count)]) for sizes in (_BASES, _TILES)
    )
    texts, new = _strata(draw, *_TEXT), _strata(draw, *_NEW)
    # One page at a time but once, and that one without tiles, whose time a batch would double.
    twice = draw.randrange(_GRIDS.count(None))
    return tuple(
        _workload(grid, bases[number], tiles[number], texts[number], new[number], _BATCH if number == twice else 1)
        for number, grid in enumerate(_GRIDS)
    )


def _shuffled(draw: random.Random, values: list[int]) -> list[int]:
    return draw.sample(values, len(values))


def _strata(draw: random.Random, least: int, most: int) -> list[int]:
    """One number from each part of a range whose parts are equal in logarithms, in random order."""
    count = len(_GRIDS)
    places = [(number + draw.random()) / count for number in range(count)]
    return _shuffled(draw, [round(least * (most / least) ** place) for place in places])


def _workload(grid: Grid | None, base: int, tile: int, text: int, new: int, batch: int) -> Workload:  # noqa: PLR0917
    shape = "whole" if grid is None else f"{grid[0]}x{grid[1]}-{tile}"
    return Workload(
        id=f"{shape}-{base}-text{text}-new{new}" + (f"-batch{batch}" if batch > 1 else ""),
        page_width=900,
        page_height=1200,
        crop_mode=grid is not None,
        tile_grid=grid,
        base_size=base,
        image_size=tile,
        text_tokens=text,
        max_new_tokens=new,
        batch_size=batch,
    )


def plan_trials(count: int | None, *, seed: int, quick: bool) -> list[Trial]:
    """The trials in the order in which they run: every workload as often as any other, give or take one.

    Parameters
    ----------
    count
        How many; None for as many as a verdict needs, or, if quick, one for each workload.
    seed
        Of workloads and their order; pages and prompts differ from one trial of a workload to the next.
    quick
        Whether to take only pages without tiles, with very few new tokens.
    """
    workloads = draw_workloads(seed)
    if quick:
        workloads = tuple(attrs.evolve(each, max_new_tokens=_QUICK_TOKENS) for each in workloads[:_QUICK_WORKLOADS])
    if count is None:
        count = len(workloads) if quick else TRIALS
    numbers = (divmod(number, len(workloads)) for number in range(count))
    trials = [Trial(number, workloads[which], seed + repetition) for number, (repetition, which) in enumerate(numbers)]
    random.Random(seed).shuffle(trials)  # noqa: S311  an order, no secret
    return trials
