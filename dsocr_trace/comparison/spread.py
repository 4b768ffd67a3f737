"""How far a time varies within a run, and whether two runs differ by more than that."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import pandas as pd
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

#: Of the intervals. Of the differences that are named, one in a hundred is expected to be chance.
CONFIDENCE: Final = 0.99

#: Steps in a row resemble each other, so means over blocks of them are compared. Between 10 and 30 blocks are enough:
#: Schmeiser, "Batch size effects in the analysis of simulation output", Operations Research 30(3), 1982.
_BLOCKS: Final = 10
#: Fewer steps than this say nothing about their spread.
_FEWEST_STEPS: Final = 5

_KEYS: Final = ["stage", "module_path"]
#: Share of its stage's time below which a module is not tested: each test more hides changes of the others.
_WORTH: Final = 0.001

#: What a spread was read off: "repeats" of the generation, "steps" of the decoding, or nothing.
REPEATS: Final = "repeats"
STEPS: Final = "steps"


@attrs.frozen(eq=False)
class Samples:
    """One kind of time of a run, by module, taken several times.

    Attributes
    ----------
    repeats
        ns of the whole stage; rows (stage, module_path), one column per repeat. A module's decode is its median call
        times its calls.
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
    """Own host time of each module, from `own_walls`; a step's is the mean over the repeats."""
    repeats = _by(walls, ["pass"], "wall_self_ns")
    decode = walls[walls["stage"] == "decode"]
    calls = decode.groupby([*_KEYS, "pass"])["wall_self_ns"]
    # All calls in a decode do like work, so that one which the machine disturbed can be told from the others.
    repeats.update((calls.median() * calls.count()).unstack())  # noqa: PD010  the index holds all that is needed
    return Samples(repeats, _by(decode, ["page", "step"], "wall_self_ns") / max(repeats.shape[1], 1), forwards)


def device_samples(kernels: pd.DataFrame, forwards: int) -> Samples:
    """Own device time of each module, from the run's ``kernels``: profiled once, so only its steps vary."""
    decode = kernels[kernels["stage"] == "decode"]
    return Samples(pd.DataFrame(), _by(decode, ["page", "step"], "duration_ns"), forwards)


def stage_samples(repeats: Mapping[str, list[int]], walls: Samples) -> Samples:
    """Wall time of each stage and of all, from the wall of each repeat; a step's is that of its modules."""
    frame = pd.DataFrame.from_dict(repeats, orient="index")
    frame.loc["total"] = frame.sum()
    frame.index = pd.MultiIndex.from_product([frame.index, [""]], names=_KEYS)
    steps = walls.steps.sum().to_frame(("decode", "")).T.rename_axis(_KEYS)
    return Samples(frame, steps, walls.forwards)


def _by(rows: pd.DataFrame, columns: list[str], value: str) -> pd.DataFrame:
    return rows.pivot_table(index=_KEYS, columns=columns, values=value, aggfunc="sum", fill_value=0).astype(float)


def differences(first: Samples, second: Samples, factors: Mapping[str, float], keys: pd.MultiIndex) -> pd.DataFrame:
    """Test whether two runs differ by more than their spread.

    Welch's t-test on logarithms, since the noise of times multiplies; then Benjamini and Hochberg's correction, since
    many modules are tested at once.

    Parameters
    ----------
    first, second
        The same kind of time in both runs.
    factors
        By stage: what the second run's times are multiplied with before.
    keys
        The (stage, module_path) to test; what a run has no sample of took no time there.

    Returns
    -------
    pandas.DataFrame
        By (stage, module_path): ``low`` and ``high``, the interval of second over first; ``p``, corrected;
        ``evidence``. Without ``p`` for what takes less than a thousandth of its stage, and without rows for stages of
        which nothing is known.
    """
    found = []
    for stage, factor in factors.items():
        kind, mine = evidence(first, second, stage), keys[keys.get_level_values("stage") == stage]
        if kind is not None and len(mine):
            sides = (side.of(stage, kind).reindex(mine, fill_value=0) for side in (first, second))
            a, b = (side.to_numpy(dtype=float) for side in sides)
            found.append(_tested(a, b * factor).set_index(mine).assign(evidence=kind))
    if not found:
        return pd.DataFrame(columns=["low", "high", "p", "evidence"], index=keys[:0])
    table = pd.concat(found)
    tested = table["p"].notna()
    table.loc[tested, "p"] = stats.false_discovery_control(table.loc[tested, "p"])
    return table


def _tested(first: NDArray[np.float64], second: NDArray[np.float64]) -> pd.DataFrame:
    """Interval of the ratio and the chance of such a one; one row per module."""
    # What is not called takes no time; a nanosecond stands for it.
    a, b = (np.log(np.maximum(times, 1.0)) for times in (first, second))
    with warnings.catch_warnings():
        # Rows without any spread, most of which never take time.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = stats.ttest_ind(b, a, axis=1, equal_var=False)
        interval = result.confidence_interval(CONFIDENCE)
    apart = b.mean(axis=1) - a.mean(axis=1)
    low, high = (np.exp(np.where(np.isnan(bound), apart, bound)) for bound in interval)
    p = np.where(np.isnan(result.pvalue), np.where(apart == 0, 1.0, 0.0), result.pvalue)
    typical = np.median(first, axis=1) + np.median(second, axis=1)
    # Both runs count alike here, so that leaving these out favours neither.
    p[typical < _WORTH * typical.sum()] = np.nan
    return pd.DataFrame({"low": low, "high": high, "p": p})
