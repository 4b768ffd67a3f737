"""How far a time varies within a run, and whether two runs differ by more than that."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import pandas as pd
from scipy import stats

from dsocr_trace.report.rows import STAGES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

#: Of the intervals; a difference counts when less than one in 20 named ones is expected to be chance.
CONFIDENCE: Final = 0.95

#: Steps in a row resemble each other, so means over blocks of them are compared. Between 10 and 30 blocks are enough:
#: Schmeiser, "Batch size effects in the analysis of simulation output", Operations Research 30(3), 1982.
_BLOCKS: Final = 10
#: Fewer steps than this say nothing about their spread.
_FEWEST_STEPS: Final = 5

#: What a spread was read off: "repeats" of the generation, "steps" of the decoding, or nothing.
REPEATS: Final = "repeats"
STEPS: Final = "steps"


@attrs.frozen(eq=False)
class Samples:
    """One kind of time of a run, by module, taken several times.

    Attributes
    ----------
    repeats
        ns of the whole stage; rows (stage, module_path), one column per repeat.
    steps
        ns of one decode step; rows (stage, module_path), one column per page and step.
    forwards
        Decode steps that the run made in all.
    """

    repeats: pd.DataFrame
    steps: pd.DataFrame
    forwards: int

    def of(self, stage: str, evidence: str) -> pd.DataFrame:
        """Samples of the whole stage's time, one row per module."""
        if evidence == REPEATS:
            return self.repeats[self.repeats.index.get_level_values("stage") == stage]
        blocks = np.array_split(self.steps.to_numpy(dtype=float), min(_BLOCKS, self.steps.shape[1]), axis=1)
        means = np.column_stack([block.mean(axis=1) for block in blocks])
        return pd.DataFrame(means * self.forwards, index=self.steps.index)


def evidence(first: Samples, second: Samples, stage: str) -> str | None:
    """What both runs have to tell a difference from chance; None if a stage was measured only once."""
    if min(first.repeats.shape[1], second.repeats.shape[1]) > 1:
        return REPEATS
    if stage == "decode" and min(first.steps.shape[1], second.steps.shape[1]) >= _FEWEST_STEPS:
        return STEPS
    return None


def own_walls(calls: pd.DataFrame) -> pd.DataFrame:
    """Calls of the traced generations with ``wall_self_ns``: host time in a call without the calls that it made.

    Parameters
    ----------
    calls
        The run's ``calls``.
    """
    traced = calls[calls["pass"].str.startswith("traced")]
    wall = traced["end_ns"] - traced["start_ns"]
    inside = wall.groupby(traced["parent_call_id"]).sum()
    return traced.assign(wall_self_ns=wall - traced["call_id"].map(inside).fillna(0).astype("int64"))


def wall_samples(walls: pd.DataFrame, forwards: int) -> Samples:
    """Own host time of each module, from `own_walls`."""
    first = walls[(walls["pass"] == "traced") & (walls["stage"] == "decode")]
    return Samples(_by(walls, ["pass"], "wall_self_ns"), _by(first, ["page", "step"], "wall_self_ns"), forwards)


def device_samples(kernels: pd.DataFrame, forwards: int) -> Samples:
    """Own device time of each module, from the run's ``kernels``: profiled once, so only its steps vary."""
    decode = kernels[kernels["stage"] == "decode"]
    return Samples(pd.DataFrame(), _by(decode, ["page", "step"], "duration_ns"), forwards)


def stage_samples(repeats: Mapping[str, list[int]], walls: Samples) -> Samples:
    """Wall time of each stage and of all, from the wall of each repeat; a step's is that of its modules."""
    frame = pd.DataFrame.from_dict(repeats, orient="index")
    frame.loc["total"] = frame.sum()
    frame.index = pd.MultiIndex.from_product([frame.index, [""]], names=["stage", "module_path"])
    steps = walls.steps.sum().to_frame(("decode", "")).T.rename_axis(["stage", "module_path"])
    return Samples(frame, steps, walls.forwards)


def _by(rows: pd.DataFrame, columns: list[str], value: str) -> pd.DataFrame:
    return rows.pivot_table(
        index=["stage", "module_path"], columns=columns, values=value, aggfunc="sum", fill_value=0, sort=True
    )


def differences(first: Samples, second: Samples, factors: Mapping[str, float]) -> pd.DataFrame:
    """Test every (stage, module) that both runs sampled.

    Welch's t-test of the difference of the means, and Benjamini and Hochberg's correction for testing many at once.

    Parameters
    ----------
    first, second
        The same kind of time in both runs.
    factors
        By stage: what the second run's times are multiplied with before.

    Returns
    -------
    pandas.DataFrame
        By (stage, module_path): ``low_ns`` and ``high_ns``, the interval of second minus first; ``p``, corrected;
        ``evidence``. Without rows for stages of which nothing is known.
    """
    found = [
        _tested(first.of(stage, kind), second.of(stage, kind) * factor).assign(evidence=kind)
        for stage, factor in factors.items()
        if (kind := evidence(first, second, stage)) is not None
    ]
    if not found:
        return pd.DataFrame(columns=["low_ns", "high_ns", "p", "evidence"])
    table = pd.concat(found)
    return table.assign(p=stats.false_discovery_control(table["p"])) if len(table) else table


def _tested(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    shared = first.index.intersection(second.index)
    low, high, p = _welch(first.loc[shared].to_numpy(dtype=float), second.loc[shared].to_numpy(dtype=float))
    return pd.DataFrame({"low_ns": low, "high_ns": high, "p": p}, index=shared)


def _welch(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Interval of the difference, second minus first, and the chance of such a one; one row per module."""
    with warnings.catch_warnings():
        # Rows without any spread: what never takes time, mostly.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = stats.ttest_ind(second, first, axis=1, equal_var=False)
        interval = result.confidence_interval(CONFIDENCE)
    apart = second.mean(axis=1) - first.mean(axis=1)
    low, high = (np.where(np.isnan(bound), apart, bound) for bound in interval)
    return low, high, np.where(np.isnan(result.pvalue), np.where(apart == 0, 1.0, 0.0), result.pvalue)
