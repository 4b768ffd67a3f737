"""The call graph, folded: modules that are called along the same chain of classes become one row."""

from __future__ import annotations

import pandas as pd

from hooks.tables import STAGES

_OUTSIDE = "(outside every module)"


def folded_calls(callgraph: pd.DataFrame) -> pd.DataFrame:
    """Fold the call graph by class.

    Parameters
    ----------
    callgraph
        Columns of `hooks.tables.CALLGRAPH`.

    Returns
    -------
    pandas.DataFrame
        One row per (stage, chain of classes), callers before those they call: ``id``, ``parent_id`` (null at the top),
        ``stage``, ``module_class``, ``modules`` (how many are folded) and ``call_count``. Calls add up to the graph's.
    """
    rows = [row for stage in STAGES for row in _stage(stage, callgraph[callgraph["stage"] == stage])]
    table = pd.DataFrame(rows, columns=["stage", "chain", "parent", "module_class", "modules", "call_count"])
    ids = {key: number for number, key in enumerate(zip(table["stage"], table["chain"], strict=True))}
    parents = [ids.get(key) for key in zip(table["stage"], table["parent"], strict=True)]
    table = table.assign(id=range(len(table)), parent_id=pd.array(parents, dtype="Int64"))
    return table[["id", "parent_id", "stage", "module_class", "modules", "call_count"]]


def _stage(stage: str, edges: pd.DataFrame) -> list[tuple[str, tuple[str, ...], tuple[str, ...], str, int, int]]:
    """Rows of one stage, level by level. A module counts once, below the first chain that reaches it."""
    parent = edges["parent_path"]
    # Callers that belong to another stage, such as the model around its vision tower, start a chain here.
    start = edges[parent.isna() | ~parent.isin(edges["child_path"])]
    level = start.assign(chain=[(_OUTSIDE if pd.isna(name) else name,) for name in start["parent_class"]])
    rows, seen = [], set[str]()
    while len(level):
        level = level.assign(
            below=[(*chain, name) for chain, name in zip(level["chain"], level["child_class"], strict=True)]
        )
        for (chain, below), group in level.groupby(["chain", "below"], sort=False):
            modules, calls = group["child_path"].nunique(), int(group["call_count"].sum())
            rows.append((stage, below, chain, below[-1], modules, calls))
        fresh = level[~level["child_path"].isin(seen)].drop_duplicates("child_path")
        seen |= set(fresh["child_path"])
        chains = fresh.set_index("child_path")["below"]
        level = edges[edges["parent_path"].isin(chains.index)]
        level = level.assign(chain=level["parent_path"].map(chains))
    return rows
