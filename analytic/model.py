"""The DeepSeek-OCR module tree, and every operator that a workload runs in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs
import numpy as np

from analytic.cost import Cost, dtype_name, total
from analytic.errors import InputError
from analytic.layers.base import Tape
from analytic.layers.decoder import DecoderShape
from analytic.layers.ocr import build_model
from analytic.routing import Routing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from analytic.config import ModelConfig
    from analytic.layers.base import Layer
    from analytic.layers.ocr import OcrForCausalLM
    from analytic.routing import Counts
    from analytic.workload import Workload

Stage: TypeAlias = Literal["vision", "prefill", "decode"]
STAGES: Final[tuple[Stage, ...]] = ("vision", "prefill", "decode")
ATTENTIONS: Final = ("sdpa", "eager", "flash_attention_2")


@attrs.frozen
class ModuleNode:
    """One module of the model.

    Attributes
    ----------
    module_path
        Dotted name, empty for the root.
    module_class
        Class in the published model.
    analytic_layer
        Layer of the analytic model that stands for it.
    parent_path
        Path of the parent, None for the root.
    depth
        Names in the path.
    is_leaf
        Whether it has no children.
    parameters
        Names and shapes of the parameters that it owns itself.
    """

    module_path: str
    module_class: str
    analytic_layer: str
    parent_path: str | None
    depth: int
    is_leaf: bool
    parameters: dict[str, tuple[int, ...]]

    @property
    def parameter_count(self) -> int:
        """Elements of the parameters that the module owns itself."""
        return sum(math.prod(shape) for shape in self.parameters.values())


def module_tree(config: ModelConfig) -> tuple[ModuleNode, ...]:
    """Every module of the model once, in the order of ``torch.nn.Module.named_modules``."""
    return tuple(_walk(build_model(config), "", None, 0))


def _walk(layer: Layer, path: str, parent: str | None, depth: int) -> Iterator[ModuleNode]:
    children = tuple(layer.children())
    yield ModuleNode(path, layer.module_class, layer.analytic_layer, parent, depth, not children, layer.parameters())
    for name, child in children:
        yield from _walk(child, f"{path}.{name}" if path else name, path, depth + 1)


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
        Dtype in which it computes.
    calls
        How often it ran.
    cost
        Sum over all its runs, in plain ints.
    runs
        Pairs of a number of calls and their cost, each field of which is one number for all of them or an array
        with one entry per call.
    """

    stage: Stage
    module_path: str
    name: str
    operator_category: str
    compute_dtype: str
    calls: int
    cost: Cost
    runs: tuple[tuple[int, Cost], ...] = attrs.field(repr=False, eq=False)

    @property
    def activation_peak_bytes(self) -> int:
        """Output bytes of the largest single run."""
        sizes = (cost.activation_bytes for _, cost in self.runs)
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
    """

    tree: tuple[ModuleNode, ...]
    operations: tuple[Operation, ...]
    calls: dict[tuple[Stage, str], int]
    routing: Routing


def operations(
    config: ModelConfig,
    workload: Workload,
    *,
    attention: str = "sdpa",
    dtype: str = "bfloat16",
    routing: Routing | None = None,
    kv_lengths: Sequence[int] | Counts | None = None,
) -> Work:
    """Evaluate every operator of every module that a workload runs.

    Parameters
    ----------
    config
        Dimensions of the model.
    workload
        Page, prompt and number of new tokens.
    attention
        How the decoder attends: sdpa, eager or flash_attention_2.
    dtype
        Dtype of weights and activations.
    routing
        Tokens per expert, one row per evaluated decode forward; balanced if not given.
    kv_lengths
        Cached positions after each decode forward to evaluate: prompt length + s for forward s = 1, 2, ...
        If not given, all ``max_new_tokens - 1`` forwards.

    Raises
    ------
    InputError
        If the dtype or attention is unknown, or lengths or routing do not fit the workload.
    """
    if attention not in ATTENTIONS:
        raise InputError(f"no attention {attention!r}; choose one of {', '.join(ATTENTIONS)} with --attention")
    lengths = _decode_lengths(workload, kv_lengths)
    sizes = {"tokens": workload.seq_len, "batch_size": workload.batch_size}
    if routing is None:
        routing = Routing.balanced(config, forwards=lengths - workload.seq_len, **sizes)
    else:
        routing.check(config, forwards=lengths.size, **sizes)
    model = build_model(config)
    tapes: dict[Stage, Tape] = {stage: Tape(dtype_name(dtype), attention) for stage in STAGES}
    _run_vision(model, workload, tapes["vision"])
    _run_prefill(model, workload, tapes["prefill"], routing)
    _run_decode(model, workload, tapes["decode"], lengths, routing)
    return Work(
        tree=tuple(_walk(model, "", None, 0)),
        operations=tuple(operation for stage, tape in tapes.items() for operation in _read(stage, tape)),
        calls={(stage, path): calls for stage, tape in tapes.items() for path, calls in tape.calls.items()},
        routing=routing,
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


def _run_vision(model: OcrForCausalLM, workload: Workload, tape: Tape) -> None:
    """Each view batch of each page is a call of its own."""
    for view in workload.views:
        model.model.encode_view(tape.at("model", workload.batch_size), view)


def _run_prefill(model: OcrForCausalLM, workload: Workload, tape: Tape, routing: Routing) -> None:
    shape = DecoderShape(workload.batch_size, workload.seq_len, workload.seq_len, causal=True, routing=routing.prefill)
    root = tape.enter(1)
    inner = root.child("model")
    model.model.place_images(tape.at("model", workload.batch_size), workload)
    model.model.decode(inner, shape)
    model.score(root, shape)


def _run_decode(model: OcrForCausalLM, workload: Workload, tape: Tape, lengths: Counts, routing: Routing) -> None:
    if not lengths.size:
        return
    shape = DecoderShape(workload.batch_size, 1, lengths, causal=False, routing=routing.decode)
    root = tape.enter(lengths.size)
    model.model.decode(root.child("model"), shape)
    model.score(root, shape)


def _read(stage: Stage, tape: Tape) -> Iterator[Operation]:
    for (path, name), operator in tape.operators.items():
        yield Operation(
            stage=stage,
            module_path=path,
            name=name,
            operator_category=operator.operator_category,
            compute_dtype=operator.compute_dtype,
            calls=sum(calls for calls, _ in operator.runs),
            cost=total([cost.over(calls) for calls, cost in operator.runs]),
            runs=tuple(operator.runs),
        )
