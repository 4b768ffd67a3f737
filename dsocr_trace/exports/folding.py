"""From costs per module to the tree of an analytic report, with neighbours of equal structure folded into one."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import chain, groupby
from typing import TYPE_CHECKING, Final, get_args

import attrs

from analytic.cost import COST_COLUMNS
from analytic.layers.decoder import RoutedExpert
from analytic.predict import TIME_COLUMNS
from dsocr_trace.exports.analytic_report import (
    Bound,
    CategoryReport,
    CostReport,
    InstanceCostReport,
    MeasuredReport,
    ModuleReport,
    OperatorReport,
    Repetition,
    Stage,
    StageReport,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

    from dsocr_trace.exports.subject import RepetitionKind

STAGES: Final[tuple[Stage, ...]] = get_args(Stage)
#: Layers whose instances in one list do not depend on each other.
_INDEPENDENT: Final = {RoutedExpert.__name__}

_ADDED: Final = (*COST_COLUMNS, *TIME_COLUMNS)
_MEASURED: Final = tuple(field.name for field in attrs.fields(MeasuredReport))

#: Stage and module path.
Key = tuple[str, str]


@attrs.frozen(kw_only=True)
class ModuleRecord:
    """One module of the model, unfolded; `parameter_count` counts those that it owns itself."""

    module_path: str
    module_class: str
    analytic_layer: str | None
    parent_path: str | None
    parameter_count: int


@attrs.frozen(kw_only=True)
class SelfValues:
    """What every module runs in its own forward, by stage and module path; absent where there is nothing.

    Attributes
    ----------
    calls
        Forward calls.
    costs
        Predicted costs.
    categories, operators
        The same by category and by operator.
    measured
        What a run measured; its ``*_total_ns`` include the modules below.
    """

    calls: Mapping[Key, int]
    costs: Mapping[Key, CostReport]
    categories: Mapping[Key, Sequence[CategoryReport]]
    operators: Mapping[Key, Sequence[OperatorReport]]
    measured: Mapping[Key, MeasuredReport]


@attrs.frozen(eq=False)
class _Node:
    """A module with those below it; `structure` is equal for equal subtrees."""

    record: ModuleRecord
    children: tuple[_Node, ...]
    structure: int

    @property
    def name(self) -> str:
        """Name within the parent."""
        return self.record.module_path.rpartition(".")[2]

    @property
    def parameter_count(self) -> int:
        """Of the whole subtree."""
        return self.record.parameter_count + sum(child.parameter_count for child in self.children)


def fold(modules: Sequence[ModuleRecord], values: SelfValues) -> ModuleReport:
    """Tree of a report.

    Neighbours in a numbered list are folded where class, analytic layer and number of parameters are equal all the
    way down.

    Parameters
    ----------
    modules
        Every module once, parents before their children.
    values
        What they run.

    Returns
    -------
    ModuleReport
        The root. Sums are exact: its totals are the sums over all `values`.
    """
    return _folded("", [_tree(modules)], "none", values)


def summed(costs: Iterable[CostReport]) -> CostReport:
    """Costs together: sums, the largest peak, and what most of the time is bound by."""
    costs = tuple(costs)
    by_bound: Counter[Bound] = Counter()
    for cost in costs:
        by_bound.update(cost.predicted_ns_by_bound)
    return CostReport(
        **{name: sum(getattr(cost, name) for cost in costs) for name in _ADDED},
        activation_peak_bytes=max((cost.activation_peak_bytes for cost in costs), default=0),
        predicted_ns_by_bound=dict(sorted(by_bound.items())),
        bound=by_bound.most_common(1)[0][0] if by_bound.total() else None,
    )


def _tree(modules: Sequence[ModuleRecord]) -> _Node:
    structures: dict[Hashable, int] = {}
    below: dict[str | None, list[_Node]] = defaultdict(list)
    for record in reversed(modules):
        children = tuple(reversed(below.pop(record.module_path, [])))
        looks = (
            record.module_class,
            record.analytic_layer,
            record.parameter_count,
            tuple((child.name, child.structure) for child in children),
        )
        structure = structures.setdefault(looks, len(structures))
        below[record.parent_path].append(_Node(record, children, structure))
    (root,) = below[None]
    return root


def _groups(children: Iterable[_Node]) -> Iterator[tuple[str, int]]:
    """Name and size of each group of children that is folded into one."""
    for _, group in groupby(children, key=lambda child: child.structure if child.name.isdecimal() else child.name):
        names = [child.name for child in group]
        yield (names[0] if len(names) == 1 else f"[{names[0]}-{names[-1]}]"), len(names)


def _folded(
    module_id: str, nodes: Sequence[_Node], kind: RepetitionKind, values: SelfValues, count: int = 1
) -> ModuleReport:
    """Fold modules of equal structure, `count` of which stand next to each other in every parent."""
    first = nodes[0]
    children, start = [], 0
    for name, size in _groups(first.children):
        members = [child for node in nodes for child in node.children[start : start + size]]
        independent = members[0].record.analytic_layer in _INDEPENDENT
        repeated: RepetitionKind = "none" if size == 1 else "parfor" if independent else "for"
        children.append(_folded(f"{module_id}.{name}".lstrip("."), members, repeated, values, size))
        start += size
    paths = [node.record.module_path for node in nodes]
    return ModuleReport(
        module_id=module_id,
        module_class=first.record.module_class,
        analytic_layer=first.record.analytic_layer,
        repetition=Repetition(kind=kind, count=count),
        instances=len(nodes),
        parameter_count=first.parameter_count * len(nodes),
        stages=tuple(_stages(paths, children, values)),
        children=tuple(children),
    )


def _stages(paths: Sequence[str], children: Sequence[ModuleReport], values: SelfValues) -> Iterator[StageReport]:
    """What the modules at `paths` and their children run, in every stage in which they do."""
    for stage in STAGES:
        keys = [(stage, path) for path in paths]
        below = [entry for child in children for entry in child.stages if entry.stage == stage]
        if not below and not any(key in values.calls or key in values.costs or key in values.measured for key in keys):
            continue
        calls = sum(values.calls.get(key, 0) for key in keys)
        own = summed(values.costs[key] for key in keys if key in values.costs)
        whole = summed([own, *(entry.total for entry in below)])
        yield StageReport(
            stage=stage,
            calls=calls,
            own=own,
            total=whole,
            per_instance=InstanceCostReport(
                calls=calls / len(paths),
                bound=whole.bound,
                **{name: getattr(whole, name) / len(paths) for name in _ADDED},
            ),
            categories=_categories(keys, values),
            operators=_operators(keys, values),
            measured=_measured(keys, values),
        )


def _categories(keys: Sequence[Key], values: SelfValues) -> tuple[CategoryReport, ...]:
    groups: dict[str, list[CategoryReport]] = defaultdict(list)
    for row in chain.from_iterable(values.categories.get(key, ()) for key in keys):
        groups[row.operator_category].append(row)
    module_flops = sum(row.flops for rows in groups.values() for row in rows)

    def merged(category: str, rows: Sequence[CategoryReport]) -> CategoryReport:
        flops = sum(row.flops for row in rows)
        return CategoryReport(
            operator_category=category,
            predicted_device_ns=sum(row.predicted_device_ns for row in rows),
            flops=flops,
            bytes=sum(row.bytes for row in rows),
            share_of_module_flops=flops / module_flops if module_flops else None,
            event_count=_known_sum(row.event_count for row in rows),
            measured_ns=_known_sum(row.measured_ns for row in rows),
            scaled_ns=_known_sum(row.scaled_ns for row in rows),
        )

    return tuple(merged(category, rows) for category, rows in groups.items())


def _known_sum(numbers: Iterable[int | None]) -> int | None:
    """Sum of the numbers that are known, None if none is."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _operators(keys: Sequence[Key], values: SelfValues) -> tuple[OperatorReport, ...]:
    groups: dict[str, list[OperatorReport]] = defaultdict(list)
    for row in chain.from_iterable(values.operators.get(key, ()) for key in keys):
        groups[row.name].append(row)
    return tuple(
        attrs.evolve(rows[0], calls=sum(row.calls for row in rows), cost=summed(row.cost for row in rows))
        for rows in groups.values()
    )


def _measured(keys: Sequence[Key], values: SelfValues) -> MeasuredReport | None:
    rows = [values.measured[key] for key in keys if key in values.measured]
    return MeasuredReport(**{name: sum(getattr(row, name) for row in rows) for name in _MEASURED}) if rows else None
