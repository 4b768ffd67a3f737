"""Formulas against what torch counts, module by module."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, cast

import attrs

from analytic.config import DEFAULT_VARIANT
from analytic.errors import DsocrTraceError, InputError
from analytic.families.base import OTHER
from analytic.layers.base import Policy
from analytic.model import STAGES, deepseek_ocr, operations
from dsocr_trace.verification.targets import chosen_targets
from hooks.modules import parent_of
from stage_runners.loading import BUILTIN, check_loadable, default_attention, model_config, own_code_failure
from stage_runners.reference_flops import REFERENCE_ATTENTIONS, CountedFlops, count_flops, sketch_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from analytic.model import Model, Work
    from dsocr_trace.verification.targets import Case, Target
    from stage_runners.stage1 import Progress

Status: TypeAlias = Literal["equal", "different", "no reference"]
Flops: TypeAlias = "Counter[tuple[str, str]]"

_PHASE: Final = "count FLOPs on the meta device"
#: Differing figures that are listed one by one.
MOST_LISTED: Final = 20


@attrs.frozen
class VerifyOptions:
    """What the user asked for; names as on the command line."""

    targets: tuple[str, ...] = ()
    model: str = BUILTIN
    variant: str | None = None
    attention: str | None = None
    trust_remote_code: bool = False


@attrs.frozen(kw_only=True)
class Figure:
    """FLOPs and calls of one module in one stage of one workload: by the formulas, and as counted.

    Attributes
    ----------
    analytic, reference
        Tensor FLOPs.
    analytic_calls, reference_calls
        Forward calls.
    """

    workload: str
    attention: str
    stage: str
    module_path: str
    analytic: int
    reference: int
    analytic_calls: int
    reference_calls: int

    @property
    def status(self) -> Status:
        """Whether formulas and counter agree; where both see no FLOPs, nothing is proven."""
        if self.analytic != self.reference or self.analytic_calls != self.reference_calls:
            return "different"
        return "equal" if self.reference else "no reference"


@attrs.define
class Row:
    """Figures of like modules over all workloads of a target, summed up.

    Attributes
    ----------
    module
        Class of the modules, or their path with ``*`` for numbers.
    figures
        How many figures are summed up: one per workload, attention and module.
    different, no_reference
        How many of them differ, and how many are zero on both sides.
    """

    target: str
    stage: str
    module: str
    module_class: str
    figures: int = 0
    different: int = 0
    no_reference: int = 0
    analytic: int = 0
    reference: int = 0

    def add(self, figure: Figure, status: Status) -> None:
        """Take in one more figure, whose status this is."""
        self.figures += 1
        self.different += status == "different"
        self.no_reference += status == "no reference"
        self.analytic += figure.analytic
        self.reference += figure.reference

    @property
    def status(self) -> Status:
        """Different if one figure is, equal if at least one was counted."""
        if self.different:
            return "different"
        return "equal" if self.figures > self.no_reference else "no reference"

    @property
    def difference(self) -> int:
        """Analytic less reference."""
        return self.analytic - self.reference


@attrs.frozen
class Verification:
    """Everything that was compared.

    Attributes
    ----------
    workloads
        How many workloads each target ran.
    rows
        By target and stage.
    differences
        The first `MOST_LISTED` figures that differ.
    operators_without_reference
        Operators without tensor FLOPs, which the counter cannot see: ``module class.operator``.
    counted_flops
        All FLOPs that were counted, each workload once.
    other_flops
        Those of them in modules that no layer stands for, by class of the module.
    """

    workloads: dict[str, int]
    rows: tuple[Row, ...]
    differences: tuple[Figure, ...]
    operators_without_reference: tuple[str, ...]
    counted_flops: int = 0
    other_flops: dict[str, int] = attrs.field(factory=dict)

    @property
    def holds(self) -> bool:
        """Whether no figure differs, and nothing was counted that no layer stands for."""
        return not any(row.different for row in self.rows) and not any(self.other_flops.values())

    @property
    def other_shares(self) -> dict[str, float]:
        """Share of `other_flops` of all that was counted."""
        return {name: flops / max(self.counted_flops, 1) for name, flops in self.other_flops.items()}

    def counts(self, target: str) -> dict[str, int]:
        """How many figures of a target are equal, different and without a reference."""
        rows = [row for row in self.rows if row.target == target]
        different, unseen = sum(row.different for row in rows), sum(row.no_reference for row in rows)
        equal = sum(row.figures for row in rows) - different - unseen
        return {"equal": equal, "different": different, "no_reference": unseen}


def verify(options: VerifyOptions, progress: Progress) -> Verification:
    """Compare formulas and counter on the meta device.

    Parameters
    ----------
    options
        Targets and model.
    progress
        Called as the work goes on.

    Raises
    ------
    InputError
        If a target or the model cannot be used.
    DsocrTraceError
        If the checkpoint's own code fails.
    """
    targets = chosen_targets(options.targets)
    bench = _Bench(options)
    wanted: defaultdict[_Job, list[str]] = defaultdict(list)
    for name, target in targets.items():
        for job in bench.jobs(name, target):
            wanted[job].append(name)
    tally = _Tally(bench.classes)
    for done, (job, names) in enumerate(wanted.items()):
        progress(_PHASE, done, len(wanted))
        compared = bench.compare(job)
        for name in names:
            tally.add(name, targets[name], _figures(job, compared, targets[name]))
    progress(_PHASE, len(wanted), len(wanted))
    order = list(targets)
    return Verification(
        workloads={name: len(target.cases) for name, target in targets.items()},
        rows=tuple(sorted(tally.rows, key=lambda row: (order.index(row.target), STAGES.index(row.stage)))),
        differences=tuple(tally.differences),
        operators_without_reference=tuple(sorted(bench.unseen)),
        counted_flops=bench.counted_flops,
        other_flops=bench.other_flops,
    )


@attrs.frozen
class _Job:
    """One case under one attention implementation."""

    case: Case
    attention: str


@attrs.frozen
class _Compared:
    """Figures of the formulas and of the counter."""

    analytic: CountedFlops
    reference: CountedFlops


class _Bench:
    """The model, and what runs on it."""

    def __init__(self, options: VerifyOptions) -> None:
        variant = options.variant or DEFAULT_VARIANT
        self._attention = options.attention or default_attention(trust_remote_code=options.trust_remote_code)
        self._only_attention = options.attention is not None or options.trust_remote_code
        check_loadable(
            options.model,
            variant=options.variant,
            attention=self._attention,
            trust_remote_code=options.trust_remote_code,
        )
        self._options, self._variant = options, variant
        self._config = model_config(options.model, variant=variant)
        self._models: dict[str, nn.Module] = {}
        self.unseen: set[str] = set()
        self.classes = {path: type(module).__name__ for path, module in self._model(self._attention).named_modules()}
        self._formulas = deepseek_ocr(self._config)
        _check_known(self._formulas, self.classes)
        layers = self._formulas.family.mapped(self._config, self.classes)
        self._unmapped = {path for path, layer in layers.items() if layer == OTHER}
        self.counted_flops = 0
        self.other_flops = dict.fromkeys((self.classes[path] for path in layers if path in self._unmapped), 0)

    def jobs(self, name: str, target: Target) -> Iterator[_Job]:
        """What a target runs; Llama's attention in both of its forms, unless one was asked for."""
        both = name == "llama" and not self._only_attention
        for attention in REFERENCE_ATTENTIONS if both else (self._attention,):
            for case in target.cases:
                yield _Job(case, attention)

    def compare(self, job: _Job) -> _Compared:
        """Evaluate the formulas of a job, and count it."""
        workload, lengths = job.case.workload, job.case.kv_lengths
        policy = Policy(attention=job.attention)
        work = operations(self._formulas, workload, policy=policy, kv_lengths=lengths)
        try:
            reference = count_flops(
                self._model(job.attention),
                self._config.decoder,
                workload,
                prefill=work.routing.prefill,
                decode=work.routing.decode,
                kv_lengths=lengths,
            )
        except Exception as error:  # what somebody else's code raises is not known
            if not self._options.trust_remote_code or isinstance(error, DsocrTraceError):
                raise
            raise own_code_failure(error, "the meta device") from error
        for (_, path), flops in reference.flops.items():
            self.counted_flops += flops
            if path in self._unmapped:
                self.other_flops[self.classes[path]] += flops
        return _Compared(self._analytic(work), reference)

    def _model(self, attention: str) -> nn.Module:
        if attention not in self._models:
            self._models[attention] = sketch_model(
                self._options.model,
                variant=self._variant,
                attention=attention,
                trust_remote_code=self._options.trust_remote_code,
            )
        return self._models[attention]

    def _analytic(self, work: Work) -> CountedFlops:
        flops: Flops = Counter()
        for operation in work.operations:
            if operation.module_path in self._unmapped:
                continue
            flops[operation.stage, operation.module_path] += operation.cost.tensor_flops
            if not operation.cost.tensor_flops:
                self.unseen.add(f"{self.classes[operation.module_path]}.{operation.name}")
        return CountedFlops(flops, cast("Flops", Counter(work.calls)))


def _check_known(model: Model, classes: dict[str, str]) -> None:
    unknown = [node.module_path for node in model.tree if node.module_path not in classes]
    if unknown:
        raise InputError(
            f"the model lacks {len(unknown)} of the modules that the formulas are for, such as {unknown[0]!r}; "
            "give a DeepSeek-OCR checkpoint with --model DIR"
        )


def _with_subtrees(own: Flops) -> Flops:
    """For every module its own FLOPs and those of all modules below it."""
    totals: Flops = Counter()
    for (stage, path), flops in own.items():
        above: str | None = path
        while above is not None:
            totals[stage, above] += flops
            above = parent_of(above)
    return totals


def _figures(job: _Job, compared: _Compared, target: Target) -> Iterator[Figure]:
    """What a job says about a target."""
    analytic, reference = compared.analytic, compared.reference
    ours, theirs = analytic.flops, reference.flops
    if target.subtrees:
        ours, theirs = _with_subtrees(ours), _with_subtrees(theirs)
    for stage, path in dict.fromkeys((*analytic.calls, *reference.calls, *ours, *theirs)):
        if target.covers(stage, path):
            yield Figure(
                workload=job.case.workload.id,
                attention=job.attention,
                stage=stage,
                module_path=path,
                analytic=ours[stage, path],
                reference=theirs[stage, path],
                analytic_calls=analytic.calls[stage, path],
                reference_calls=reference.calls[stage, path],
            )


class _Tally:
    """Adds figures up: one row per target, stage and kind of module."""

    def __init__(self, classes: dict[str, str]) -> None:
        self._classes = classes
        self._rows: dict[tuple[str, str, str, str], Row] = {}
        self.differences: list[Figure] = []

    @property
    def rows(self) -> Iterable[Row]:
        """In order of appearance."""
        return self._rows.values()

    def add(self, name: str, target: Target, figures: Iterable[Figure]) -> None:
        """Take in figures of a target."""
        for figure in figures:
            module_class = self._classes[figure.module_path]
            module = module_class if target.by_class else re.sub(r"\.\d+(?=\.|$)", ".*", figure.module_path)
            key = (name, figure.stage, module or module_class, module_class)
            row = self._rows.get(key) or self._rows.setdefault(key, Row(*key))
            status = figure.status
            row.add(figure, status)
            if status == "different" and len(self.differences) < MOST_LISTED:
                self.differences.append(figure)
