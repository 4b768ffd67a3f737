"""What the layers say of the host, against the operators that PyTorch dispatches in the built-in model."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from analytic.config import variant_config
from analytic.generation import note_sampling
from analytic.hardware import load_hardware
from analytic.layers.base import Policy, SequenceShape, Tape
from analytic.model import deepseek_ocr as analytic_model
from analytic.model import operations
from analytic.operators import OPERATORS
from analytic.predict import category_rows, module_rows, predict
from analytic.routing import CountedLoad, Routing
from analytic.timing.datasheet import from_datasheet
from analytic.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from analytic.model import Work
    from analytic.operators import OperatorCall, Steps

deepseek_ocr = pytest.importorskip("stage_runners.deepseek_ocr", reason="the built-in model is not installed")
from stage_runners.generate import Generation  # noqa: E402  needs torch and transformers
from stage_runners.inputs import build_inputs  # noqa: E402
from stage_runners.pages import synthetic_page  # noqa: E402

TINY = variant_config("deepseek-ocr-v1-tiny")
VISION = ("model.sam_model", "model.vision_model", "model.projector")
STEPS = 3
#: Positions are resized in the first, the grid has two columns in the second, nothing is cut in the third.
TALL = Workload("tall", 700, 1300, 7, STEPS + 1, base_size=512, image_size=320)
SQUARE = Workload("square", 1300, 1300, 7, STEPS + 1, base_size=512, image_size=320)
WHOLE = Workload("whole", 700, 700, 7, STEPS + 1, crop_mode=False, base_size=1024)

#: What PyTorch dispatches without starting a kernel, besides views.
KERNEL_FREE = {"aten::_unsafe_view", "aten::empty_like", "aten::lift_fresh"}


class Dispatched(NamedTuple):
    """Operators that PyTorch dispatches: those that compute or copy, and those that start no kernel."""

    kernels: int
    views: int


#: What one call of an operator dispatches, in the form that the model calls it; others are one kernel each, and what
#: runs as several is the sum of its parts.
OF_ONE_CALL = {
    "linear": Dispatched(1, 3),  # the transposed weight, and two views to multiply matrices
    "bmm": Dispatched(1, 1),  # a transposed operand
    "index_put": Dispatched(1, 1),  # the empty tensor that it fills
    "kv_cache_append": Dispatched(2, 0),  # keys, values
    "view": Dispatched(0, 1),
    "host_loop": Dispatched(0, 0),
}
#: Views that an operator makes between its parts.
BETWEEN_PARTS = {
    "rope_tables": 9,  # the frequencies' and positions' three dimensions, a batched product, its transposition
    "rope_apply": 1,  # the split into halves
    "layer_norm_2d": 4,  # weight and bias, each in three dimensions
    "attention_eager": 10,  # two batched products of five views each, which the keys' transposition adds to
}


def dispatched(call: OperatorCall) -> Dispatched:
    """What one call of an operator dispatches."""
    name, given = call.operator.name, call.arguments
    if call.parts is not None:
        parts = total(call.parts)
        return Dispatched(parts.kernels, parts.views + BETWEEN_PARTS.get(name, 0))
    if name == "cast" and given["source"] == given["target"]:
        return Dispatched(0, 0)
    return OF_ONE_CALL.get(name, Dispatched(1, 0))


def total(steps: Steps) -> Dispatched:
    each = [(dispatched(call), call.times) for call in steps.calls]
    return Dispatched(sum(one.kernels * n for one, n in each), sum(one.views * n for one, n in each))


class Difference(NamedTuple):
    """Where the model dispatches something else than its formulas say, per call of a module."""

    path: str
    stage: str
    attention: str
    kernels: int
    views: int


EVERY = ".*"
DIFFERENCES = (
    # The tokens of an expert are one matrix, without a batch: the product needs no views but the transposed weight.
    Difference(r".*\.experts\.\d+\.\w+_proj", EVERY, EVERY, 0, -2),
    # The cache of transformers begins with empty keys and values.
    Difference(r"model\.layers\.\d+\.self_attn", "prefill", EVERY, 0, 2),
    # A CPU casts to fp32 before the softmax.
    Difference(r"model\.layers\.\d+\.self_attn", "prefill|decode", "eager", 1, 0),
    # The result of a single position is in order without the copy.
    Difference(r"model\.layers\.\d+\.self_attn", "decode", "eager", -1, 0),
    # Bringing a list to the host is no operator where the tensor is there already.
    Difference(r"model\.layers\.[1-9]\d*\.mlp", EVERY, EVERY, -1, 0),
    # The formulas leave out the counting from which each axis's index is made; and either the second copy of the
    # queries, of a single map, or that of the result, which a CPU's fused kernel leaves in the order of the queries.
    Difference(r"model\.sam_model\.blocks\.\d+\.attn", EVERY, EVERY, 3, 0),
)


def of_formulas(work: Work, attention: str) -> dict[tuple[str, str], Dispatched]:
    """What each module dispatches by the formulas and the differences."""
    kernels, views = Counter(), Counter()
    for operation in work.operations:
        for calls, steps in operation.runs:
            one = total(steps)
            kernels[operation.stage, operation.module_path] += one.kernels * calls
            views[operation.stage, operation.module_path] += one.views * calls
    for (stage, path), calls in work.calls.items():
        for each in DIFFERENCES:
            if (
                re.fullmatch(each.path, path)
                and re.fullmatch(each.stage, stage)
                and re.fullmatch(each.attention, attention)
            ):
                kernels[stage, path] += each.kernels * calls
                views[stage, path] += each.views * calls
    return {key: Dispatched(kernels[key], views[key]) for key in kernels if kernels[key] or views[key]}


class Recorder(TorchDispatchMode):
    """Counts what every module dispatches in its own forward, and what happens between forwards of the root."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.stage, self.stack, self.forwards = "prefill", [], 0
        self.kernels, self.views, self.experts = Counter(), Counter(), []
        for path, module in model.named_modules():
            module.forward = self._wrapped(path, module.forward)

    def _wrapped(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not path:
                self.stage = "decode" if self.forwards else "prefill"
                self.forwards += 1
            self.stack.append(("vision" if path.startswith(VISION) else self.stage, path))
            output = forward(*args, **kwargs)
            self.stack.pop()
            if path.endswith("mlp.gate"):
                self.experts.append((self.stage, int(path.split(".")[2]), output[0]))
            return output

        return wrapper

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        where = self.stack[-1] if self.stack else ("between", self.forwards)
        counter = self.views if func.is_view or func._schema.name in KERNEL_FREE else self.kernels
        counter[where] += 1
        return func(*args, **(kwargs or {}))

    def of(self, *stages: str) -> dict[tuple[str, Any], Dispatched]:
        keys = {key for key in self.kernels + self.views if key[0] in stages}
        return {key: Dispatched(self.kernels[key], self.views[key]) for key in keys}

    def routing(self) -> Routing:
        counted = {"prefill": {}, "decode": {}}
        for stage, layer, ids in self.experts:
            counts = np.bincount(ids.flatten().numpy(), minlength=TINY.decoder.routed_experts)
            counted[stage].setdefault(layer, []).append(counts)
        return Routing(counted["prefill"], counted["decode"], "measured")


def recorded(workload: Workload, attention: str) -> Recorder:
    """A whole generation of the tiny model in bf16 with random weights, and fused attention where it is asked for."""
    torch.manual_seed(0)
    model = deepseek_ocr.DeepseekOCRForCausalLM(TINY, attention=attention).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    inputs = build_inputs(synthetic_page(workload, seed=0), workload, TINY.decoder, seed=0)
    generation = Generation(model.to(torch.bfloat16), inputs.to("cpu", torch.bfloat16))
    recorder = Recorder(model)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), recorder:
        generation.start()
        for _ in range(STEPS):
            generation.advance()
    return recorder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("workload", [TALL, SQUARE, WHOLE], ids=lambda workload: workload.id)
def test_everything_that_a_module_dispatches(workload: Workload, attention: str) -> None:
    recorder = recorded(workload, attention)
    policy = Policy(attention=attention)
    work = operations(analytic_model(TINY), workload, policy=policy, routing=recorder.routing())
    assert of_formulas(work, attention) == recorder.of("vision", "prefill", "decode")


@pytest.mark.parametrize("ngram", [1, 20, 10_000], ids=lambda size: f"ngram-{size}")
def test_everything_between_two_forwards(ngram: int) -> None:
    workload = attrs.evolve(WHOLE, base_size=256, no_repeat_ngram_size=ngram)
    found = recorded(workload, "sdpa").of("between")
    expected = {}
    for forward in range(1, STEPS + 1):  # nothing follows the last token
        tape = Tape(Policy())
        length = workload.seq_len + forward - 1
        note_sampling(tape.at("", 1), vocabulary=TINY.decoder.vocab_size, length=length, ngram=ngram)
        each = [total(steps) for _, _, _, steps in tape.sequence]
        expected["between", forward] = Dispatched(sum(one.kernels for one in each), sum(one.views for one in each))
    assert {key: value for key, value in found.items() if key in expected} == expected


def calls_of(name: str, work: Work, stage: str) -> int:
    runs = [run for operation in work.operations if operation.stage == stage for run in operation.runs]
    return sum(calls * call.times for calls, steps in runs for call in steps.calls if call.operator.name == name)


def test_the_host_waits_where_the_published_model_does() -> None:
    """Once per mixture-of-experts layer and forward, and for both sums of pixels before the vision encoders."""
    config = variant_config("deepseek-ocr-v1-base")
    layers = len(config.decoder.moe_layers)
    for workload in (TALL, WHOLE):
        work = operations(analytic_model(config), workload, policy=Policy())
        assert calls_of("to_host", work, "vision") == 0
        assert calls_of("to_host", work, "prefill") == 2 + layers
        assert calls_of("to_host", work, "decode") == STEPS * layers
        assert calls_of("host_loop", work, "decode") == STEPS * layers


def test_an_experts_tokens_are_cut_out_before_it_is_called() -> None:
    counts = np.array([[2, 0, 1, 0, 0, 0, 0, 3]])
    layers = TINY.decoder.moe_layers
    loads = {layer: CountedLoad(counts) for layer in layers}
    tape, model = Tape(Policy()), analytic_model(TINY)
    step = SequenceShape(3, 1, 100, causal=False, loads=loads)
    model.family.decode(model.family.build(model.config), tape, step, 1)
    called = {path: number for number, (path, _, _, steps) in enumerate(tape.sequence) if steps is None}
    for layer in layers:
        for expert in np.flatnonzero(counts):
            where, _, _, steps = tape.sequence[called[f"model.layers.{layer}.mlp.experts.{expert}"] - 1]
            assert where == f"model.layers.{layer}.mlp"
            assert [call.operator for call in steps.calls] == [OPERATORS["view"]]


def test_what_keeps_only_the_host_busy_is_no_work_of_the_device() -> None:
    """A module of nothing but views has no category, and no time on the device."""
    device = from_datasheet(load_hardware("h100-sxm"))
    prediction = predict(analytic_model(TINY), TALL, device=device, policy=Policy())
    noted = {(each.operation.stage, each.operation.module_path) for each in prediction.operations}
    assert ("vision", "model.sam_model.patch_embed") in noted
    rows = {(row.stage, row.module_path): row for row in module_rows(prediction)}
    idle = rows["vision", "model.sam_model.patch_embed"]
    assert idle.predicted_device_ns == 0
    assert idle.predicted_host_ns > 0
    categories = category_rows(prediction)
    assert "other" not in {row.operator_category for row in categories}
    assert idle.module_path not in {row.module_path for row in categories}
