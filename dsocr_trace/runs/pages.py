"""What each page took in each stage, and how far its profiled part speaks for the whole."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stage_runners.measurement import PageMeasurement, Repeat

#: Name of the rows that add all pages up.
TOTAL: Final = "total"


def with_scaled(kernels: pd.DataFrame, pages: Sequence[PageMeasurement]) -> pd.DataFrame:
    """Add ``scaled_ns`` (float): each event's share of its whole stage, from what was profiled of its page's."""
    factors = {(number, stage): factor for number, page in enumerate(pages) for stage, factor in _factors(page).items()}
    known = pd.Series(factors)
    factor = known.reindex(pd.MultiIndex.from_frame(kernels[["page", "stage"]])).fillna(1.0)
    return kernels.assign(scaled_ns=kernels["duration_ns"] * factor.to_numpy())


def _factors(page: PageMeasurement) -> dict[str, float]:
    """Forwards run over forwards profiled, by stage; vision and prefill are profiled whole."""
    steps, profiled = len(page.tokens) - 1, len(page.profiled_steps)
    return {"vision": 1.0, "prefill": 1.0, "decode": steps / profiled if profiled else 1.0}


def stage_walls(page: PageMeasurement) -> dict[str, int]:
    """Wall time of each stage in ns, the median over the repeats."""
    repeats = [_walls(repeat) for repeat in page.repeats]
    return {stage: round(statistics.median(walls[stage] for walls in repeats)) for stage in repeats[0]}


def first_walls(pages: Sequence[PageMeasurement]) -> Mapping[str, int]:
    """Wall time of each stage in ns, the first traced generations of all pages together."""
    walls: Counter[str] = Counter()
    for page in pages:
        walls.update(_walls(page.repeats[0]))
    return walls


def _walls(repeat: Repeat) -> dict[str, int]:
    return {"vision": repeat.vision_ns, "prefill": repeat.prefill_ns, "decode": sum(repeat.decode_ns)}


def pages_table(pages: Sequence[PageMeasurement], kernels: pd.DataFrame, predicted: pd.DataFrame) -> pd.DataFrame:
    """List page by page, then in total, what each stage took.

    Parameters
    ----------
    pages
        What ran.
    kernels
        Attributed events with ``scaled_ns``.
    predicted
        Sums over the model by (page, stage), possibly empty.

    Returns
    -------
    pandas.DataFrame
        Columns of `dsocr_trace.runs.schemas.PAGES`.
    """
    rows = pd.DataFrame(row for number, page in enumerate(pages) for row in _rows(number, page))
    measured = kernels.groupby(["page", "stage"])[["duration_ns", "scaled_ns"]].sum().reset_index()
    measured = measured.rename(columns={"page": "page_number", "duration_ns": "measured_ns"})
    rows = rows.merge(measured, on=["page_number", "stage"], how="left")
    # With the choice of tokens, as wall and device time have it.
    whole = {"predicted_wall_ns": "predicted_ns", "predicted_busy_ns": "predicted_device_ns"}
    columns = ["page", "stage", *whole, "tensor_flops"]
    predicted = predicted[columns].rename(columns={"page": "page_number", **whole})
    rows = rows.merge(predicted, on=["page_number", "stage"], how="left")
    times = ["measured_ns", "scaled_ns"]
    rows[times] = rows[times].fillna(0).round().astype("int64")
    sums = ["new_tokens", "forwards", "profiled_forwards", "wall_ns", *times, *whole.values(), "tensor_flops"]
    total = rows.groupby("stage", sort=False)[sums].sum(min_count=1).reset_index().assign(page=TOTAL)
    return pd.concat([rows, total], ignore_index=True)


def _rows(number: int, page: PageMeasurement) -> list[dict[str, Any]]:
    grid, steps = page.workload.grid, len(page.tokens) - 1
    return [
        {
            "page_number": number,
            "page": page.name,
            "source": page.source,
            "stage": stage,
            "page_width_px": page.workload.page_width,
            "page_height_px": page.workload.page_height,
            "crop_columns": None if grid is None else grid[0],
            "crop_rows": None if grid is None else grid[1],
            "seq_len": page.workload.seq_len,
            "new_tokens": len(page.tokens),
            "forwards": steps if stage == "decode" else 1,
            "profiled_forwards": len(page.profiled_steps) if stage == "decode" else 1,
            "wall_ns": wall,
        }
        for stage, wall in stage_walls(page).items()
    ]
