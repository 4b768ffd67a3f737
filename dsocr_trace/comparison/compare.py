"""Two runs side by side: what is new, gone or changed, and what is more than their spread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np
import pandas as pd

from analytic.errors import InputError
from dsocr_trace.comparison.spread import (
    CONFIDENCE,
    Samples,
    device_samples,
    differences,
    drifts,
    stage_samples,
    traced_walls,
    wall_samples,
)
from dsocr_trace.report.rows import STAGES
from dsocr_trace.runs.many import other_version
from dsocr_trace.runs.pages import TOTAL
from dsocr_trace.runs.schemas import TABLES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsocr_trace.runs.store import Run

#: What a stage's work is counted in.
UNITS: Final = {"vision": "views", "prefill": "prompt tokens", "decode": "steps"}

#: Verdicts on a time. "unknown": measured only once, so nothing says how far it varies.
SLOWER, FASTER, WITHIN, UNKNOWN, NEW, GONE = "slower", "faster", "within spread", "unknown", "new", "gone"
#: Of a stage that took another time, but not beyond what all its modules share.
DRIFTED: Final = "drifted"
#: Less than a thousandth of the stage: not worth a test.
SMALL: Final = "negligible"

_KEYS: Final = ["stage", "module_path"]
_TIMES: Final = (
    "measured_self_ns", "measured_total_ns", "scaled_self_ns", "scaled_total_ns", "wall_total_ns",
    "predicted_self_ns", "predicted_total_ns",
)  # fmt: skip
_WORK: Final = ("tensor_flops", "vector_flops", "bytes_total")
_FACTS: Final = ("model", "variant", "weights", "remote_code", "dtype", "attention", "seed", "git_commit")
#: What may differ between runs whose modules all do the same on the same machine.
_HARMLESS: Final = {"git_commit", "version of dsocr-trace", "predicted for"}


@attrs.frozen(eq=False)
class Comparison:
    """Run B beside run A. The columns of A end in ``_a``, those of B in ``_b``.

    Attributes
    ----------
    differs
        What was not the same when the runs were made: name to the values of A and B.
    caveats
        What cannot be compared, and what was done about it.
    clocks
        The times that tell of a module's speed, weightiest first: "wall" (own host time), "device" (own device time).
    stages
        One row per stage, and "total" where it can be compared. Figures of B are for as much work as A did.
        ``drift`` is by how much all its modules took longer alike, ``modules_ns`` what the modules that are named
        changed beyond that; null where that cannot be told.
    modules
        One row per (stage, module) of either run; ``wall_*`` and ``device_*`` tell how sure a difference is. A
        difference is what is left of it without ``wall_drift`` or ``device_drift``.
    """

    run_a: Run
    run_b: Run
    differs: Mapping[str, tuple[str, str]]
    caveats: tuple[str, ...]
    clocks: tuple[str, ...]
    stages: pd.DataFrame
    modules: pd.DataFrame

    def slower(self, percent: float) -> list[str]:
        """Stages that are slower by more than `percent`: by their named modules, or as far as is known."""
        rows = self.stages
        slower, unknown = rows["verdict"] == SLOWER, rows["verdict"] == UNKNOWN
        change = rows["difference_ns"].where(unknown | rows["modules_ns"].isna(), rows["modules_ns"])
        found: list[str] = rows.loc[(slower | unknown) & (change > rows["wall_ns_a"] * percent / 100), "stage"].tolist()
        return found

    def changes(self, clock: str) -> pd.DataFrame:
        """Modules of both runs by what they changed in one of `clocks`: sure changes first, then the largest."""
        both = self.modules[~self.modules["presence"].isin([NEW, GONE])]
        sure = both[f"{clock}_verdict"].isin([SLOWER, FASTER])
        order = both.assign(sure=sure, size=both[f"{clock}_difference_ns"].abs())
        return order.sort_values(["sure", "size"], ascending=False).drop(columns=["sure", "size"])


@attrs.frozen(eq=False)
class _Side:
    """What is read of one run."""

    run: Run
    attribution: pd.DataFrame
    work: Mapping[str, int]
    stage: Samples
    wall: Samples
    device: Samples

    @property
    def on_cpu(self) -> bool:
        return str(self.run.manifest["device"]["device"]).startswith("cpu")


def compare(run_a: Run, run_b: Run) -> Comparison:
    """Lay run B beside run A.

    Parameters
    ----------
    run_a
        What is compared with, such as the run before a change.
    run_b
        What is compared.

    Raises
    ------
    InputError
        If both are the same run, one has another schema version, or lacks a table.
    """
    if run_a.path.resolve() == run_b.path.resolve():
        raise InputError(f"{run_a.path} and {run_b.path} are the same run; name two different ones")
    a, b = _side(run_a), _side(run_b)
    factors = {stage: a.work[stage] / b.work[stage] for stage in STAGES if a.work[stage] and b.work[stage]}
    same_work, differs = a.work == b.work, _differs(run_a.manifest, run_b.manifest)
    alike = same_work and set(differs) <= _HARMLESS
    stages = _stages(a, b, factors | ({TOTAL: 1.0} if same_work else {}))
    modules = _modules(a, b, factors, alike=alike)
    return Comparison(
        run_a=run_a,
        run_b=run_b,
        differs=differs,
        caveats=tuple(_caveats(a, b)),
        clocks=("wall",) if a.on_cpu and b.on_cpu else ("device",) if a.on_cpu or b.on_cpu else ("device", "wall"),
        stages=_with_drift(stages, modules) if alike else stages.assign(drift=np.nan, modules_ns=np.nan),
        modules=modules,
    )


def _side(run: Run) -> _Side:
    problem = other_version(run)
    if problem:
        raise InputError(problem)
    attribution = run.attribution.reindex(columns=TABLES["attribution"].names)
    # `unclassified` has one row per reason.
    groups = attribution.groupby(_KEYS)
    figures = groups[["calls", "event_count", *_TIMES, *_WORK]].sum(min_count=1)
    rows = figures.assign(module_class=groups["module_class"].first()).reset_index()
    walls = traced_walls(run.calls)
    totals = run.pages[run.pages["page"] == TOTAL].set_index("stage")
    forwards = int(totals.loc["decode", "forwards"])
    wall = wall_samples(walls, forwards)
    own = wall.repeats.median(axis=1).rename("wall_self_ns").reset_index()
    return _Side(
        run=run,
        attribution=rows.merge(own, on=_KEYS, how="left"),
        work=_work(run.pages[run.pages["page"] != TOTAL]),
        stage=stage_samples(_stage_repeats(run.manifest["pages"]), wall),
        wall=wall,
        device=device_samples(run.kernels, forwards),
    )


def _work(pages: pd.DataFrame) -> dict[str, int]:
    """How much of its `UNITS` each stage did, over all pages."""
    first = pages[pages["stage"] == "prefill"]
    tiles = (first["crop_columns"] * first["crop_rows"]).fillna(0).sum()
    decode = pages.loc[pages["stage"] == "decode", "forwards"].sum()
    return {"vision": int(tiles) + len(first), "prefill": int(first["seq_len"].sum()), "decode": int(decode)}


def _stage_repeats(pages: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Wall time of each stage in each repeat, over all pages, in ns."""
    repeats = [page["repeats"] for page in pages]
    return {
        stage: [sum(repeat[f"{stage}_ns"] for repeat in of_pages) for of_pages in zip(*repeats, strict=True)]
        for stage in STAGES
    }


def _differs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    def facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
        workload = {
            ("workload" if name == "id" else f"workload {name}"): value for name, value in manifest["workload"].items()
        }
        return {
            **workload,
            **{name: manifest.get(name) for name in _FACTS},
            **{
                ("device" if name == "name" else f"device {name}"): value
                for name, value in manifest["device"].items()
                if name != "device"
            },
            "predicted for": manifest["hardware"]["name"],
            **{f"version of {name}": value for name, value in manifest["versions"].items()},
        }

    left, right = facts(a), facts(b)
    names = [name for name in left | right if left.get(name) != right.get(name)]
    return {name: (str(left.get(name, "none")), str(right.get(name, "none"))) for name in names}


def _caveats(a: _Side, b: _Side) -> list[str]:
    """What cannot be compared as it is."""
    found = [
        f"{stage}: A did {a.work[stage]:,} {UNITS[stage]}, B {b.work[stage]:,}; "
        + (
            f"compared per {UNITS[stage].removesuffix('s')}: figures of B are for {a.work[stage]:,}"
            if a.work[stage] and b.work[stage]
            else "not compared"
        )
        for stage in STAGES
        if a.work[stage] != b.work[stage]
    ]
    if found:
        found.append("total: not compared, since the runs did not do the same work")
    left, right = a.run.manifest, b.run.manifest
    if left["hardware"]["name"] != right["hardware"]["name"]:
        found.append("predictions: for different hardware, so they differ where the model does not")
    if a.on_cpu != b.on_cpu:
        found.append("modules: by device time only; host time is the work itself on a CPU, and its launching on a GPU")
    if (left["model"], left["variant"]) != (right["model"], right["variant"]):
        found.append("modules: of two models, paired where path and stage are the same")
    return found


def _verdicts(rows: pd.DataFrame, presence: pd.Series, prefix: str = "") -> pd.Series:
    low, high, p = (rows[f"{prefix}{name}"].astype(float) for name in ("low", "high", "p"))
    known, sure = rows[f"{prefix}evidence"].notna(), p < 1 - CONFIDENCE
    found = np.select(
        [presence.isin([NEW, GONE]), ~known, p.isna(), sure & (low > 1), sure & (high < 1)],
        [presence, UNKNOWN, SMALL, SLOWER, FASTER],
        WITHIN,
    )
    return pd.Series(found, index=rows.index)


def _stages(a: _Side, b: _Side, factors: Mapping[str, float]) -> pd.DataFrame:
    left, right = _stage_figures(a, dict.fromkeys(factors, 1.0)), _stage_figures(b, factors)
    rows = left.add_suffix("_a").join(right.add_suffix("_b"))
    tested = differences(a.stage, b.stage, factors, a.stage.repeats.index, {}).droplevel("module_path")
    rows = rows.join(tested).assign(difference_ns=rows["wall_ns_b"] - rows["wall_ns_a"])
    rows.insert(0, "unit", rows.index.map(UNITS.get))
    return rows.assign(verdict=_verdicts(rows, pd.Series("both", index=rows.index))).reset_index()


def _with_drift(stages: pd.DataFrame, modules: pd.DataFrame) -> pd.DataFrame:
    """Say of each stage what its named modules changed, and that the rest of a change is shared by all."""
    named = modules[modules["wall_verdict"].isin([SLOWER, FASTER])]
    changed = named.groupby("stage")["wall_difference_ns"].sum().reindex(STAGES).fillna(0.0)
    behind = {stage: set(rows["wall_verdict"]) for stage, rows in named.groupby("stage")}
    behind[TOTAL] = set[str]().union(*behind.values())
    drift = modules.groupby("stage")["wall_drift"].first()
    stands_alone = [
        verdict in {SLOWER, FASTER} and verdict not in behind.get(stage, ())
        for stage, verdict in zip(stages["stage"], stages["verdict"], strict=True)
    ]
    return stages.assign(
        drift=stages["stage"].map(drift),
        modules_ns=stages["stage"].map(changed.to_dict() | {TOTAL: changed.sum()}),
        verdict=stages["verdict"].mask(pd.Series(stands_alone, index=stages.index), DRIFTED),
    )


def _stage_figures(side: _Side, factors: Mapping[str, float]) -> pd.DataFrame:
    """Figures of each stage of `factors`, times its factor; units and calls as they were."""
    names = {
        "calls": "calls", "tensor_flops": "tensor_flops", "bytes_total": "bytes_total",
        "scaled_self_ns": "device_ns", "predicted_self_ns": "predicted_ns",
    }  # fmt: skip
    sums = side.attribution.groupby("stage")[list(names)].sum(min_count=1).rename(columns=names)
    sums.loc[TOTAL] = sums.reindex(STAGES).sum(min_count=1)
    walls = side.stage.repeats.droplevel("module_path").median(axis=1)
    rows = sums.assign(wall_ns=walls).reindex(list(factors)).rename_axis("stage")
    scaled = rows.drop(columns="calls").mul(pd.Series(factors), axis=0)
    return rows[["calls"]].join(scaled).assign(units=rows.index.map(side.work.get))


def _modules(a: _Side, b: _Side, factors: Mapping[str, float], *, alike: bool) -> pd.DataFrame:
    scale = b.attribution["stage"].map(factors).fillna(1.0)
    figures = [*_TIMES, "wall_self_ns", *_WORK]
    scaled = b.attribution.assign(**b.attribution[figures].mul(scale, axis=0))
    rows = a.attribution.merge(scaled, on=_KEYS, how="outer", suffixes=("_a", "_b"), indicator="presence")
    presence = rows["presence"].astype(str).map({"left_only": GONE, "right_only": NEW, "both": "both"})
    rows["presence"] = presence
    rows["class_changed"] = (presence == "both") & (rows["module_class_a"] != rows["module_class_b"])
    pairs = [rows[[f"{name}_a", f"{name}_b"]].fillna(-1) for name in ("calls", *_WORK)]
    same_work = rows["stage"].map(factors) == 1
    rows["work_changed"] = same_work & np.any([pair.iloc[:, 0] != pair.iloc[:, 1] for pair in pairs], axis=0)
    shared = pd.MultiIndex.from_frame(rows.loc[presence == "both", _KEYS])
    for clock, column, sides in (
        ("wall", "wall_self_ns", (a.wall, b.wall)),
        ("device", "scaled_self_ns", (a.device, b.device)),
    ):
        drift = drifts(*sides, STAGES) if alike else {}
        rows[f"{clock}_drift"] = rows["stage"].map({stage: shared.factor for stage, shared in drift.items()})
        without = rows[f"{column}_b"] / rows[f"{clock}_drift"].fillna(1.0)
        rows[f"{clock}_difference_ns"] = without.fillna(0) - rows[f"{column}_a"].fillna(0)
        tested = differences(*sides, factors, shared, drift).add_prefix(f"{clock}_")
        rows = rows.merge(tested, left_on=_KEYS, right_index=True, how="left")
        rows[f"{clock}_verdict"] = _verdicts(rows, presence, f"{clock}_")
    return rows
