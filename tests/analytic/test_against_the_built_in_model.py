"""The formulas against the operators that the built-in model really runs, module by module."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from analytic.config import variant_config
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr as analytic_model
from analytic.model import operations
from analytic.routing import Routing
from analytic.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

deepseek_ocr = pytest.importorskip("stage_runners.deepseek_ocr", reason="the built-in model is not installed")

TINY = variant_config("deepseek-ocr-v1-tiny")
VISION = ("model.sam_model", "model.vision_model", "model.projector")
STEPS = 3


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class ModuleWork(TorchDispatchMode):
    """Counts calls, FLOPs and bytes written per (stage, module), by wrapping every module's own ``forward``."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.stage, self.stack = "prefill", []
        self.calls, self.flops, self.written, self.experts = Counter(), Counter(), Counter(), []
        for path, module in model.named_modules():
            module.forward = self._wrapped(path, module.forward)

    def _wrapped(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            stage = "vision" if path.startswith(VISION) else self.stage
            self.calls[stage, path] += 1
            self.stack.append((stage, path))
            try:
                output = forward(*args, **kwargs)
            finally:
                self.stack.pop()
            if path.endswith("mlp.gate"):
                self.experts.append((stage, int(path.split(".")[2]), output[0]))
            return output

        return wrapper

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops[self.stack[-1]] += count(*args, **(kwargs or {}), out_val=result)
        if self.stack and "empty" not in func.overloadpacket.__name__:
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
            self.written[self.stack[-1]] += sum(
                tensor.nbytes
                for tensor in tensors_in(result)
                if func._schema.is_mutable or tensor.untyped_storage().data_ptr() not in given
            )
        return result

    def routing(self) -> Routing:
        counted = {"prefill": {}, "decode": {}}
        for stage, layer, ids in self.experts:
            counts = np.bincount(ids.flatten().numpy(), minlength=TINY.decoder.routed_experts)
            counted[stage].setdefault(layer, []).append(counts)
        return Routing(counted["prefill"], counted["decode"], "measured")


def run(workload: Workload, attention: str, dtype: torch.dtype, backends: list[SDPBackend]) -> ModuleWork:
    """One prefill and `STEPS` decode forwards of the tiny model with random weights."""
    torch.manual_seed(0)
    model = deepseek_ocr.DeepseekOCRForCausalLM(TINY, attention=attention).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(dtype)
    views = {view.kind: torch.randn(view.count, 3, view.size, view.size, dtype=dtype) for view in workload.views}
    mask = torch.zeros(1, workload.seq_len, dtype=torch.bool)
    mask[:, 1 : 1 + workload.image_tokens] = True
    recorder = ModuleWork(model)
    with torch.no_grad(), sdpa_kernel(backends), recorder:
        output = model(
            torch.zeros(1, workload.seq_len, dtype=torch.int64),
            images=[(views.get("crops", torch.zeros_like(views["global"])), views["global"])],
            images_seq_mask=mask,
            images_spatial_crop=torch.tensor([workload.grid or (1, 1)]),
        )
        recorder.stage = "decode"
        for step in range(STEPS):
            ids = torch.tensor([[step + 2]])
            output = model(ids, past_key_values=output.past_key_values)
    return recorder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "workload",
    [
        Workload("crops", 700, 1300, 7, STEPS + 1, base_size=512, image_size=320),
        Workload("whole", 700, 700, 7, STEPS + 1, crop_mode=False, base_size=1024),
    ],
    ids=lambda workload: workload.id,
)
def test_calls_and_flops_of_every_module(workload: Workload, attention: str) -> None:
    recorder = run(workload, attention, torch.float32, [SDPBackend.MATH])
    policy = Policy(dtype="float32", attention=attention)
    work = operations(analytic_model(TINY), workload, policy=policy, routing=recorder.routing())
    predicted = Counter()
    for operation in work.operations:
        predicted[operation.stage, operation.module_path] += operation.cost.tensor_flops
    assert work.calls == recorder.calls
    assert +predicted == +recorder.flops


#: Side outputs that no formula has, as shares of what is written: row statistics of norms and of fused attention, the
#: positions that masked and scattering operators leave as they are.
SIDE_OUTPUTS = {
    "LayerNorm": 0.06,
    "ClipAttention": 0.12,
    "SamAttention": 0.04,
    "DecoderAttention": 0.01,
    "MixtureOfExperts": 0.02,
    "OcrModel": 0.01,
    "LayerNorm2d": 0.001,
}


def test_bytes_written_by_every_layer() -> None:
    """Everything that an operator writes is predicted, in bf16 and with fused attention."""
    workload = Workload("crops", 1300, 1300, 7, STEPS + 1, base_size=512, image_size=320)
    recorder = run(workload, "sdpa", torch.bfloat16, [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    work = operations(analytic_model(TINY), workload, policy=Policy(), routing=recorder.routing())
    layers = {node.module_path: node.analytic_layer for node in work.tree}
    predicted, written = Counter(), Counter()
    for operation in work.operations:
        predicted[layers[operation.module_path]] += operation.cost.bytes_written
    for (_, path), size in recorder.written.items():
        written[layers[path]] += size
    for layer, size in written.items():
        assert predicted[layer] == pytest.approx(size, rel=SIDE_OUTPUTS.get(layer, 0)), layer


@pytest.mark.parametrize("variant", ["deepseek-ocr-v1-tiny", "deepseek-ocr-v1-base"])
def test_the_tree_is_that_of_the_model(variant: str) -> None:
    config = variant_config(variant)
    with torch.device("meta"):
        model = deepseek_ocr.DeepseekOCRForCausalLM(config)
    expected = [
        (path, type(module).__name__, {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)})
        for path, module in model.named_modules()
    ]
    assert [(node.module_path, node.module_class, node.parameters) for node in analytic_model(config).tree] == expected
