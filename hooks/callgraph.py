"""Who called whom, and how often."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from hooks.tables import CALLGRAPH

_KEYS = ["stage", "parent_path", "child_path"]


def callgraph(calls: pa.Table, modules: pa.Table, pass_name: str | None = None) -> pa.Table:
    """Count the calls between modules.

    Parameters
    ----------
    calls
        With the schema `hooks.tables.CALLS`.
    modules
        With the schema `hooks.tables.MODULES`; names the classes.
    pass_name
        Count the calls of this pass only; by default of all.

    Returns
    -------
    pyarrow.Table
        With the schema `hooks.tables.CALLGRAPH`, in the order of the first call; the stage is the child's.
    """
    child, called_by = calls["module_path"], calls["parent_call_id"]
    parent = child.take(pc.index_in(called_by, calls["call_id"]))
    edges = pa.table([calls["stage"], parent, child], names=_KEYS)
    if pass_name is not None:
        edges = edges.filter(pc.equal(calls["pass"], pass_name))
    counted = edges.group_by(_KEYS, use_threads=False).aggregate([([], "count_all")])
    columns = {
        **{name: counted[name] for name in _KEYS},
        "parent_class": _class_of(counted["parent_path"], modules),
        "child_class": _class_of(counted["child_path"], modules),
        "call_count": counted["count_all"],
    }
    return pa.table([columns[name] for name in CALLGRAPH.names], schema=CALLGRAPH)


def _class_of(paths: pa.ChunkedArray, modules: pa.Table) -> pa.ChunkedArray:
    return modules["module_class"].take(pc.index_in(paths, modules["module_path"]))
