"""Every operator that a workload runs in a model."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs
import numpy as np

from analytic.cost import Cost, dtype_name, total
from analytic.errors import InputError
from analytic.families.deepseek_ocr import DeepseekOcr
from analytic.layers.base import Policy, SequenceShape, Tape
from analytic.routing import CountedLoad, Routing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from analytic.config import ModelConfig
    from analytic.families.base import FamilyConfig, ModelFamily, ModuleNode
    from analytic.layers.base import Moment
    from analytic.operators import Steps
    from analytic.routing import Counts, Plan
    from analytic.workload import Workload

Stage: TypeAlias = Literal["vision", "prefill", "decode"]
STAGES: Final[tuple[Stage, ...]] = ("vision", "prefill", "decode")
ATTENTIONS: Final = ("sdpa", "eager", "flash_attention_2")
ATTENTION_FLOPS: Final = ("full", "executed", "counter")


@attrs.frozen
class Model:
    """One model of a family: how to build it, and its dimensions."""

    family: ModelFamily
    config: FamilyConfig

    @property
    def tree(self) -> tuple[ModuleNode, ...]:
        """Every module once, in the order of ``torch.nn.Module.named_modules``."""
        return self.family.tree(self.config)


def deepseek_ocr(config: ModelConfig) -> Model:
    """DeepSeek-OCR with these dimensions."""
    return Model(DeepseekOcr(), config)


@attrs.frozen
class Operation:
    """One operator of one module, over all its calls in a stage.

    Attributes
    ----------
    stage
        vision, prefill or decode.
    module_path
        Module in whose own forward the operator runs.
    name
        Name of the operator within the module.
    operator_category
        One of `analytic.layers.base.OPERATOR_CATEGORIES`.
    compute_dtype
        Name of the dtype in which it computes.
    calls
        How often it ran.
    cost
        Sum over all its runs, in plain ints.
    runs
        Pairs of a number of calls and their steps, whose cost is one number for all of them or an array with one
        entry per call.
    """

    stage: Stage
    module_path: str
    name: str
    operator_category: str
    compute_dtype: str
    calls: int
    cost: Cost
    runs: tuple[tuple[int, Steps], ...] = attrs.field(repr=False, eq=False)

    @property
    def activation_peak_bytes(self) -> int:
        """Output bytes of the largest single run."""
        sizes = (steps.cost.activation_bytes for _, steps in self.runs)
        return max(int(size.max()) if isinstance(size, np.ndarray) else size for size in sizes)


@attrs.frozen
class Work:
    """Everything that a workload runs.

    Attributes
    ----------
    tree
        The modules of the model.
    operations
        Operators, by stage and in order of their first run.
    calls
        Forward calls by stage and module path. Modules that are never called are absent.
    routing
        Tokens per expert that was assumed.
    kv_lengths
        Cached positions after each decode forward.
    vision, prefill
        Everything that these stages run, in its order.
    """

    tree: tuple[ModuleNode, ...]
    operations: tuple[Operation, ...]
    calls: dict[tuple[Stage, str], int]
    routing: Routing
    kv_lengths: Counts
    vision: Sequence[Moment] = attrs.field(repr=False)
    prefill: Sequence[Moment] = attrs.field(repr=False)


def checked_policy(policy: Policy) -> Policy:
    """The policy with its dtype's full name.

    Raises
    ------
    InputError
        If the dtype, the attention or what it counts is unknown.
    """
    if policy.attention not in ATTENTIONS:
        choices = ", ".join(ATTENTIONS)
        raise InputError(f"no attention {policy.attention!r}; choose one of {choices} with --attention")
    if policy.attention_flops not in ATTENTION_FLOPS:
        choices = ", ".join(ATTENTION_FLOPS)
        raise InputError(f"no attention_flops {policy.attention_flops!r}; choose one of {choices} with --set")
    return attrs.evolve(policy, dtype=dtype_name(policy.dtype))


def operations(
    model: Model,
    workload: Workload,
    *,
    policy: Policy,
    routing: Routing | Plan = "balanced",
    kv_lengths: Sequence[int] | Counts | None = None,
) -> Work:
    """Evaluate every operator of every module that a workload runs.

    Parameters
    ----------
    model
        Which model.
    workload
        Page, prompt and number of new tokens.
    policy
        How the model runs, and what is counted.
    routing
        Tokens per expert, one row per evaluated decode forward; or how to plan them.
    kv_lengths
        Cached positions after each decode forward to evaluate: prompt length + s for forward s = 1, 2, ...
        If not given, all ``max_new_tokens - 1`` forwards.

    Raises
    ------
    InputError
        If the policy is unknown, or lengths or routing do not fit the workload.
    """
    policy = checked_policy(policy)
    lengths = _decode_lengths(workload, kv_lengths)
    experts = model.config.experts
    sizes = {"tokens": workload.seq_len, "batch_size": workload.batch_size}
    if isinstance(routing, Routing):
        routing.check(experts, forwards=lengths.size, **sizes)
    else:
        routing = Routing.planned(routing, experts, forwards=lengths - workload.seq_len, **sizes)
    tapes: dict[Stage, Tape] = {stage: Tape(policy) for stage in STAGES}
    _run(model, workload, tapes, lengths, routing)
    return Work(
        tree=model.tree,
        operations=tuple(operation for stage, tape in tapes.items() for operation in _read(stage, tape)),
        calls={(stage, path): calls for stage, tape in tapes.items() for path, calls in tape.calls.items()},
        routing=routing,
        kv_lengths=lengths,
        vision=tapes["vision"].sequence,
        prefill=tapes["prefill"].sequence,
    )


def _decode_lengths(workload: Workload, kv_lengths: Sequence[int] | Counts | None) -> Counts:
    if kv_lengths is None:
        return workload.seq_len + np.arange(1, workload.max_new_tokens, dtype=np.int64)
    lengths = np.asarray(kv_lengths, dtype=np.int64)
    if lengths.ndim != 1 or (lengths <= workload.seq_len).any():
        raise InputError(
            f"kv_lengths of workload {workload.id} must be a list of numbers above its prompt length {workload.seq_len}"
        )
    return lengths


def _run(model: Model, workload: Workload, tapes: Mapping[Stage, Tape], lengths: Counts, routing: Routing) -> None:
    family, root = model.family, model.family.build(model.config)
    batch, page = workload.batch_size, workload.layout
    family.encode_page(root, tapes["vision"], page, batch)
    family.place_page(root, tapes["prefill"], page, batch)
    prompt = SequenceShape(batch, workload.seq_len, workload.seq_len, causal=True, loads=_loads(routing.prefill))
    family.prefill(root, tapes["prefill"], prompt, workload.image_tokens)
    if lengths.size:
        step = SequenceShape(batch, 1, lengths, causal=False, loads=_loads(routing.decode))
        family.decode(root, tapes["decode"], step, lengths.size)


def _loads(counts: Mapping[int, Counts]) -> dict[int, CountedLoad]:
    return {layer: CountedLoad(array) for layer, array in counts.items()}


def _read(stage: Stage, tape: Tape) -> Iterator[Operation]:
    # Equal layers share their steps, so most sums are needed many times.
    summed = functools.cache(_summed)
    for (path, name), operator in tape.operators.items():
        runs = tuple(operator.runs)
        yield Operation(
            stage=stage,
            module_path=path,
            name=name,
            operator_category=operator.operator_category,
            compute_dtype=operator.compute_dtype,
            calls=sum(calls for calls, _ in runs),
            cost=summed(runs),
            runs=runs,
        )


def _summed(runs: tuple[tuple[int, Steps], ...]) -> Cost:
    return total(steps.cost.over(calls) for calls, steps in runs)
