"""A run's call graph in Graphviz' language, modules of equal structure folded into one node."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, Any, Final

import attrs

from analytic.errors import InputError
from dsocr_trace.exports.analytic_report import MeasuredReport, walk
from dsocr_trace.exports.folding import STAGES, ModuleRecord, SelfValues, fold
from dsocr_trace.exports.tables import rows
from dsocr_trace.report.units import duration, percent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from dsocr_trace.exports.analytic_report import ModuleReport
    from dsocr_trace.runs.store import Run

    Row = dict[str, Any]

#: Fill of a node by its share of the stage's measured time, from little to much: the blues of ColorBrewer
#: (https://colorbrewer2.org), which Graphviz knows by name and which also differ in grey.
_SCHEME: Final = "blues9"
#: From this shade on, white text is read more easily than black.
_DARK: Final = 6
#: Smallest share of time of each shade.
_SHADES: Final = (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_WIDEST_EDGE: Final = 6
_TIMES: Final = tuple(field.name for field in attrs.fields(MeasuredReport))


def call_graph_dot(run: Run, stage: str | None = None) -> str:
    """Write who called whom, one cluster per stage.

    Nodes are modules with their repetition, calls, measured time of their own and its share of the stage, which is also
    their colour. Edges carry the number of calls, and are the wider the more time was measured below them. A module
    with a dashed outline only calls: its own call is in another stage.

    Parameters
    ----------
    run
        What to export.
    stage
        The only stage to write; all by default.

    Raises
    ------
    InputError
        If the run has no calls in that stage.
    """
    edges, ledger = rows(run, "callgraph"), rows(run, "attribution")
    stages = [name for name in STAGES if any(row["stage"] == name for row in edges)]
    if stage is not None and stage not in stages:
        raise InputError(f"{run.path} has no calls in stage {stage!r}; choose one of {', '.join(stages)} with --stage")
    modules = {module.module_id: module for module in walk(_folded(rows(run, "modules"), ledger))}
    ids = {path: name for name in modules for path in _instances(name)}
    measured_ns: Counter[str] = Counter()
    for row in ledger:
        measured_ns[row["stage"]] += row["measured_self_ns"]
    lines = [
        f"digraph {_quoted(run.path.resolve().name)} {{",
        '  rankdir=LR; ordering=out; ranksep=0.6; nodesep=0.12; fontname="sans-serif";',
        f'  node [shape=box, style="filled,rounded", colorscheme={_SCHEME}, fontname="sans-serif", fontsize=11];',
        '  edge [fontname="sans-serif", fontsize=9, color="#00000080", arrowsize=0.6];',
    ]
    for name in reversed(stages) if stage is None else [stage]:
        lines += _cluster(name, _folded_edges(name, edges, ids), modules, measured_ns[name])
    return "\n".join([*lines, "}", ""])


def _folded(modules: Iterable[Row], ledger: Iterable[Row]) -> ModuleReport:
    """The module tree with calls and measured times."""
    names = [field.name for field in attrs.fields(ModuleRecord)]
    ledger = [row for row in ledger if row["unclassified_reason"] is None]
    values = SelfValues(
        calls={(row["stage"], row["module_path"]): row["calls"] for row in ledger},
        costs={},
        categories={},
        operators={},
        measured={
            (row["stage"], row["module_path"]): MeasuredReport(**{name: row[name] for name in _TIMES}) for row in ledger
        },
    )
    return fold([ModuleRecord(**{name: row[name] for name in names}) for row in modules], values)


def _instances(module_id: str) -> Iterator[str]:
    """Paths of the modules that are folded into one."""
    choices = []
    for part in module_id.split("."):
        first, dash, last = part.strip("[]").partition("-")
        is_range = part.startswith("[") and dash
        choices.append([str(number) for number in range(int(first), int(last) + 1)] if is_range else [part])
    return map(".".join, product(*choices))


def _folded_edges(stage: str, edges: Iterable[Row], ids: Mapping[str, str]) -> dict[tuple[str | None, str], int]:
    """Calls from one folded module, or from outside every module, to another."""
    counts: Counter[tuple[str | None, str]] = Counter()
    for row in edges:
        if row["stage"] == stage:
            parent = row["parent_path"]
            counts[None if parent is None else ids[parent], ids[row["child_path"]]] += row["call_count"]
    return counts


def _cluster(
    stage: str, edges: dict[tuple[str | None, str], int], modules: Mapping[str, ModuleReport], whole_ns: int
) -> Iterator[str]:
    called = dict.fromkeys(child for _, child in edges)
    callers = [parent for parent, _ in edges if parent is not None and parent not in called]
    measured = {name: _in_stage(modules[name], stage) for name in (*callers, *called)}
    title = f"{stage}: {duration(whole_ns)} measured"
    yield f"  subgraph {_quoted(f'cluster_{stage}')} {{"
    yield f'    label={_quoted(title)}; labeljust=l; fontsize=16; style=rounded; color="#00000060";'
    # In reverse of the order of the calls: what comes first is drawn lowest.
    for name in reversed(called):
        share = measured[name].measured_self_ns / whole_ns if whole_ns else 0.0
        shade = sum(share >= least for least in _SHADES)
        text = f"{_title(modules[name])}\n{duration(measured[name].measured_self_ns)} ({percent(share)})"
        font = ', fontcolor="white"' if shade >= _DARK else ""
        yield f"    {_node(stage, name)} [label={_quoted(text)}, fillcolor={shade}{font}];"
    for name in dict.fromkeys(callers):
        yield f'    {_node(stage, name)} [label={_quoted(_title(modules[name]))}, style="dashed,rounded"];'
    for (parent, child), count in reversed(edges.items()):
        if parent is not None:
            share = measured[child].measured_total_ns / whole_ns if whole_ns else 0.0
            width = 1 + (_WIDEST_EDGE - 1) * share
            yield f'    {_node(stage, parent)} -> {_node(stage, child)} [label="{count}", penwidth={width:.2f}];'
    yield "  }"


def _in_stage(module: ModuleReport, stage: str) -> MeasuredReport:
    found = (entry.measured for entry in module.stages if entry.stage == stage and entry.measured)
    return next(found, MeasuredReport(**dict.fromkeys(_TIMES, 0)))


def _title(module: ModuleReport) -> str:
    """Last names of the path, then the class with the number of modules that are one node."""
    parts = module.module_id.split(".")
    # A number says nothing without the list that it counts in.
    named = next((at for at in range(len(parts) - 1, -1, -1) if parts[at].isidentifier()), 0)
    name = ".".join(parts[named:])
    many = f"{module.instances} \N{MULTIPLICATION SIGN} " if module.instances > 1 else ""
    return f"{name}\n{many}{module.module_class}" if name else f"{many}{module.module_class}"


def _node(stage: str, module_id: str) -> str:
    return _quoted(f"{stage}:{module_id}")


def _quoted(text: str) -> str:
    """A text as Graphviz reads it: quotes and line ends escaped as JSON does, other characters as they are."""
    return json.dumps(text, ensure_ascii=False)
