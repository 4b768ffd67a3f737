"""How far a time varies within a run, and whether two runs differ by more than that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import pandas as pd
from scipy import stats

from dsocr_trace.runs.gap import own_walls

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    Logs = NDArray[np.float64]

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
#: Fewer modules than this do not tell what is common to all.
_FEWEST_MODULES: Final = 10
#: Standard deviation of a normal distribution over the median of the distances from its middle.
_NORMAL_MAD: Final = 1.4826

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


@attrs.frozen(eq=False)
class Drift:
    """What all modules of a stage share: the speed of the machine while each sample was taken.

    Attributes
    ----------
    first, second
        By sample of either run, the logarithm of the time that all modules took over the usual.
    stray
        How far modules strayed from the common change from run to run: standard deviation of the logarithm, without
        what varies within the runs.
    modules
        How many modules that is known from.
    """

    first: Logs
    second: Logs
    stray: float
    modules: int

    @property
    def factor(self) -> float:
        """By how much all modules took longer in the second run."""
        return float(np.exp(np.median(self.second) - np.median(self.first)))


def evidence(first: Samples, second: Samples, stage: str) -> str | None:
    """What both runs have to tell a difference from chance; None if a stage was measured only once."""
    if min(first.repeats.shape[1], second.repeats.shape[1]) > 1:
        return REPEATS
    if stage == "decode" and min(first.steps.shape[1], second.steps.shape[1]) >= _FEWEST_STEPS:
        return STEPS
    return None


def traced_walls(calls: pd.DataFrame) -> pd.DataFrame:
    """Calls of the traced generations with ``repeat`` and ``wall_self_ns``: host time without the calls that it made.

    Parameters
    ----------
    calls
        The run's ``calls``.
    """
    traced = calls[calls["pass"].str.startswith("traced")]
    # "traced", "traced-2", ..., "traced-10".
    repeat = pd.to_numeric(traced["pass"].str.partition("-")[2], errors="coerce").fillna(1).astype("int64")
    return traced.assign(repeat=repeat, wall_self_ns=own_walls(traced))


def wall_samples(walls: pd.DataFrame, forwards: int) -> Samples:
    """Own host time of each module, from `traced_walls`; a step's is the mean over the repeats."""
    repeats = _by(walls, ["repeat"], "wall_self_ns")
    decode = walls[walls["stage"] == "decode"]
    calls = decode.groupby([*_KEYS, "repeat"])["wall_self_ns"]
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


def drifts(first: Samples, second: Samples, stages: Iterable[str]) -> dict[str, Drift]:
    """Find what the modules of each stage share, where there are enough of them.

    Parameters
    ----------
    first, second
        The same kind of time in both runs, which did the same on the same machine.
    stages
        Stages to look at.
    """
    found = {}
    for stage in stages:
        if (kind := evidence(first, second, stage)) is not None:
            keys = first.of(stage, kind).index.intersection(second.of(stage, kind).index)
            a, b = (_logs(side, stage, kind, keys) for side in (first, second))
            typical = _typical(a, b)
            worth = typical >= _WORTH * typical.sum()
            if worth.sum() >= _FEWEST_MODULES:
                found[stage] = _drift(a[worth], b[worth])
    return found


def _drift(first: Logs, second: Logs) -> Drift:
    """Take the median module of each sample, so that a change of some is no change of all."""
    usual = (np.median(first, axis=1, keepdims=True) + np.median(second, axis=1, keepdims=True)) / 2
    a, b = np.median(first - usual, axis=0), np.median(second - usual, axis=0)
    first, second = first - a, second - b
    apart = second.mean(axis=1) - first.mean(axis=1)
    # The machine slows some kinds of work more than others: the wider side counts.
    sides = [np.abs(side) for side in (apart[apart > 0], apart[apart < 0]) if len(side)]
    spread = _NORMAL_MAD * max((np.median(side) for side in sides), default=0.0)
    noise = np.median(_error(first) + _error(second))
    return Drift(a, b, stray=float(np.sqrt(max(spread**2 - noise, 0.0))), modules=len(apart))


def differences(
    first: Samples,
    second: Samples,
    factors: Mapping[str, float],
    keys: pd.MultiIndex,
    drift: Mapping[str, Drift],
) -> pd.DataFrame:
    """Test whether two runs differ by more than their spread.

    Welch's t-test on logarithms, since the noise of times multiplies; then Benjamini and Hochberg's correction, since
    many modules are tested at once. Of a stage whose drift is known, each sample is taken without it, and how far
    modules strayed from it adds to the variance: two runs differ by that alone (DerSimonian and Laird, "Meta-analysis
    in clinical trials", Controlled Clinical Trials 7, 1986).

    Parameters
    ----------
    first, second
        The same kind of time in both runs.
    factors
        By stage: what the second run's times are multiplied with before.
    keys
        The (stage, module_path) to test; what a run has no sample of took no time there.
    drift
        What all modules share, by stage, from `drifts`.

    Returns
    -------
    pandas.DataFrame
        By (stage, module_path): ``low`` and ``high``, the interval of second over first without drift; ``p``,
        corrected; ``evidence``. Without ``p`` for what takes less than a thousandth of its stage, and without rows for
        stages of which nothing is known.
    """
    found = []
    for stage, factor in factors.items():
        kind, mine = evidence(first, second, stage), keys[keys.get_level_values("stage") == stage]
        if kind is not None and len(mine):
            a, b = (_logs(side, stage, kind, mine) for side in (first, second))
            shared = drift.get(stage) or Drift(np.zeros(a.shape[1]), np.zeros(b.shape[1]), 0.0, _FEWEST_MODULES)
            tested = _tested(a, b + np.log(factor), shared)
            typical = _typical(a, b)
            # Both runs count alike here, so that leaving these out favours neither.
            tested.loc[typical < _WORTH * typical.sum(), "p"] = np.nan
            found.append(tested.set_index(mine).assign(evidence=kind))
    if not found:
        return pd.DataFrame(columns=["low", "high", "p", "evidence"], index=keys[:0])
    table = pd.concat(found)
    tested = table["p"].notna()
    table.loc[tested, "p"] = stats.false_discovery_control(table.loc[tested, "p"])
    return table


def _logs(side: Samples, stage: str, kind: str, keys: pd.MultiIndex) -> Logs:
    mine = keys[keys.get_level_values("stage") == stage]
    times = side.of(stage, kind).reindex(mine, fill_value=0).to_numpy(dtype=float)
    # What is not called takes no time; a nanosecond stands for it.
    logs: Logs = np.log(np.maximum(times, 1.0))
    return logs


def _typical(first: Logs, second: Logs) -> NDArray[np.float64]:
    """Time of each module, in ns, both runs together."""
    return np.exp(np.median(first, axis=1)) + np.exp(np.median(second, axis=1))


def _error(side: Logs) -> NDArray[np.float64]:
    """Squared standard error of each row's mean."""
    error: NDArray[np.float64] = side.var(axis=1, ddof=1) / side.shape[1]
    return error


def _tested(first: Logs, second: Logs, shared: Drift) -> pd.DataFrame:
    """Interval of the ratio and the chance of such a one; one row per module."""
    first, second = first - shared.first, second - shared.second
    apart = second.mean(axis=1) - first.mean(axis=1)
    parts = np.stack([_error(first), _error(second), np.full_like(apart, shared.stray**2)])
    counts = np.array([[first.shape[1]], [second.shape[1]], [shared.modules]])
    variance = parts.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Welch and Satterthwaite; rows without any spread, most of which never take time, have no degrees of freedom.
        freedom = variance**2 / (parts**2 / (counts - 1)).sum(axis=0)
        p = 2 * stats.t.sf(np.abs(apart) / np.sqrt(variance), freedom)
        reach = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance)
    certain = variance == 0
    reach, p = np.where(certain, 0.0, reach), np.where(certain, apart == 0, p)
    return pd.DataFrame({"low": np.exp(apart - reach), "high": np.exp(apart + reach), "p": p})
