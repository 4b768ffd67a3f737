"""The analytic model of one workload on one device, as other tools read it. Units stand in the names."""

# Types stand here at run time too: the schema and the readers are made from them.

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs

from dsocr_trace.exports.subject import (  # noqa: TC001  read at run time
    HardwareReport,
    ModelReport,
    RepetitionKind,
    WorkloadReport,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Raised when a name or a meaning below changes.
SCHEMA_VERSION: Final = 2

Stage: TypeAlias = Literal["vision", "prefill", "decode", "other"]
Bound: TypeAlias = Literal["compute", "memory", "launch", "host"]


@attrs.frozen(kw_only=True)
class CostReport:
    """Predicted cost and time; sums, except for the peak.

    Attributes
    ----------
    tensor_flops
        FLOPs of matrix products and convolutions, one multiply-accumulate counted as 2.
    vector_flops
        All other FLOPs.
    weight_bytes
        Share of bytes_read that is parameters.
    activation_bytes
        Outputs of all operator calls together.
    activation_peak_bytes
        Largest output of a single operator call.
    kv_cache_bytes
        Bytes by which the key-value cache grows.
    predicted_ns
        Wall time: by how much it moves the end of everything, on the clocks of host and device.
    predicted_device_ns, predicted_host_ns
        Busy time of the device and of the host.
    datasheet_ns
        Roofline with the peaks of the device's entry.
    roof_ns
        The same with the ceilings that the time model takes, and the launch floor.
    floor_ns
        The shortest time that anything takes on the device, for each launch.
    extrapolated_ns
        How much of the device's time lies beyond the calibrated sizes.
    predicted_ns_by_bound
        The wall time, by what each operator and each call of a module is bound by.
    bound
        What most of the wall time is bound by; null where nothing takes time.
    """

    tensor_flops: int
    vector_flops: int
    bytes_read: int
    bytes_written: int
    weight_bytes: int
    activation_bytes: int
    activation_peak_bytes: int
    kv_cache_bytes: int
    predicted_ns: int
    predicted_device_ns: int
    predicted_host_ns: int
    datasheet_ns: int
    roof_ns: int
    floor_ns: int
    extrapolated_ns: int
    predicted_ns_by_bound: dict[Bound, int]
    bound: Bound | None


@attrs.frozen(kw_only=True)
class InstanceCostReport:
    """One instance of a folded module, the modules below it included: the mean over all its instances.

    Instances have equal structure. They cost the same unless the router gives experts different numbers of tokens.
    """

    calls: float
    tensor_flops: float
    vector_flops: float
    bytes_read: float
    bytes_written: float
    weight_bytes: float
    activation_bytes: float
    kv_cache_bytes: float
    predicted_ns: float
    predicted_device_ns: float
    predicted_host_ns: float
    datasheet_ns: float
    roof_ns: float
    floor_ns: float
    extrapolated_ns: float
    bound: Bound | None


@attrs.frozen(kw_only=True)
class OperatorReport:
    """One operator in the own forward of a module, over all calls of all instances.

    Attributes
    ----------
    name
        Name within the module.
    operator_category
        conv, linear, attention, norm, activation, embedding, routing, elementwise, reduction, copy or other.
    compute_dtype
        Dtype in which it computes.
    """

    name: str
    operator_category: str
    compute_dtype: str
    calls: int
    cost: CostReport


@attrs.frozen(kw_only=True)
class CategoryReport:
    """Operators of one category in the own forward of a module, over all calls of all instances.

    Attributes
    ----------
    predicted_device_ns
        Busy time of the device.
    flops
        Tensor and vector FLOPs.
    bytes
        Bytes read and written.
    share_of_module_flops
        Share of the module's own FLOPs in this stage; null where it has none.
    event_count, measured_ns, scaled_ns
        As in the run's table of operators; null without a run.
    """

    operator_category: str
    predicted_device_ns: int
    flops: int
    bytes: int
    share_of_module_flops: float | None
    event_count: int | None
    measured_ns: int | None
    scaled_ns: int | None


@attrs.frozen(kw_only=True)
class MeasuredReport:
    """What a run measured of all instances of a module, as in the run's ledger.

    Attributes
    ----------
    measured_self_ns, measured_total_ns
        Device time in the profiled forwards: of the module itself, and with the modules below.
    scaled_self_ns, scaled_total_ns
        The same, scaled to all forwards of the stage.
    wall_total_ns
        Host time inside the module's calls, without a profiler.
    """

    event_count: int
    measured_self_ns: int
    measured_total_ns: int
    scaled_self_ns: int
    scaled_total_ns: int
    wall_total_ns: int


@attrs.frozen(kw_only=True)
class StageReport:
    """What one module costs in one stage.

    Attributes
    ----------
    calls
        Forward calls of all instances.
    own
        What all instances run in their own forward, and the calls of themselves.
    total
        The same, with the modules below: own and the totals of the children add up to it.
    per_instance
        Total over the number of instances.
    categories
        The module's own operators by category.
    operators
        The module's own operators by name; empty for a run, which keeps categories only.
    measured
        Null without a run.
    """

    stage: Stage
    calls: int
    own: CostReport
    total: CostReport
    per_instance: InstanceCostReport
    categories: tuple[CategoryReport, ...]
    operators: tuple[OperatorReport, ...]
    measured: MeasuredReport | None


@attrs.frozen(kw_only=True)
class Repetition:
    """How often a module stands next to itself with equal structure.

    Attributes
    ----------
    kind
        for: one after the other, such as decoder layers. parfor: independent of each other, such as the experts of
        one layer. none: once.
    count
        Instances within one instance of the parent.
    """

    kind: RepetitionKind
    count: int


@attrs.frozen(kw_only=True)
class ModuleReport:
    """A module, or several neighbours in a list of equal structure, folded into one.

    Attributes
    ----------
    module_id
        Path in the model, with the numbers of folded modules as a range: ``model.layers.[1-11].mlp``. Empty for the
        root. It depends on the model only, not on workload or device.
    module_class
        Class in the published model.
    analytic_layer
        Layer of the analytic model that stands for it; null where there is none.
    instances
        Modules that are folded here: the product of the counts on the way from the root.
    parameter_count
        Elements of the parameters of all instances, those of the modules below included.
    """

    module_id: str
    module_class: str
    analytic_layer: str | None
    repetition: Repetition
    instances: int
    parameter_count: int
    stages: tuple[StageReport, ...]
    children: tuple[ModuleReport, ...]


@attrs.frozen(kw_only=True)
class SamplingReport:
    """Predicted time of the choice of tokens, which is in no module: wall time, and busy time of the device."""

    stage: Stage
    predicted_ns: int
    predicted_device_ns: int


@attrs.frozen(kw_only=True)
class UnclassifiedReport:
    """Measured time of no module, by reason."""

    stage: Stage
    reason: str
    event_count: int
    measured_ns: int
    scaled_ns: int


@attrs.frozen(kw_only=True)
class TopModule:
    """One of the modules that take most of the predicted time: what its instances run in their own forward.

    Attributes
    ----------
    name
        Class in the published model.
    share_of_model_time, total_time_ms
        Of the predicted wall time.
    memory_activations_gb
        Largest output of a single operator call, in 10^9 bytes.
    """

    module_id: str
    name: str
    stage: Stage
    share_of_model_time: float
    total_time_ms: float
    total_flops_tflops: float
    memory_activations_gb: float


@attrs.frozen(kw_only=True)
class ReportSummary:
    """The report in a few numbers.

    Attributes
    ----------
    predicted_total_time_ms
        Wall time of all stages and pages, the choice of tokens included.
    measured_total_time_ms
        The same, measured without a profiler; null without a run.
    predicted_vs_measured_ratio
        The former over the latter; null without a run.
    predicted_device_time_ms
        Of the predicted wall time, how long the device is busy.
    measured_device_time_ms
        The same, measured and scaled to all forwards, with what belongs to no module; null without a run.
    notes
        What the reader must know.
    """

    report_id: str
    model_variant: str
    workload_profile_id: str
    predicted_total_time_ms: float
    measured_total_time_ms: float | None
    predicted_vs_measured_ratio: float | None
    predicted_device_time_ms: float
    measured_device_time_ms: float | None
    top_modules: tuple[TopModule, ...]
    notes: tuple[str, ...]


@attrs.frozen(kw_only=True)
class AnalyticModelReport:
    """Everything that is known analytically about one workload on one device, and what a run measured of it.

    Attributes
    ----------
    report_id
        Follows from the content: equal inputs give equal ids.
    run_id
        The run that was measured; null for a prediction without a run.
    routing_source
        Where the tokens per expert are from: measured, or the plan balanced or worst.
    root
        The tree of modules; its totals are the model's.
    sampling
        What is predicted outside the modules; with the root's totals it is the whole.
    unclassified
        Measured time of no module.
    """

    schema_version: Literal[2]
    report_id: str
    run_id: str | None
    model: ModelReport
    workload: WorkloadReport
    hardware: HardwareReport
    routing_source: str
    summary: ReportSummary
    root: ModuleReport
    sampling: tuple[SamplingReport, ...]
    unclassified: tuple[UnclassifiedReport, ...]


def walk(module: ModuleReport) -> Iterator[ModuleReport]:
    """The module and all below it, parents first."""
    yield module
    for child in module.children:
        yield from walk(child)
