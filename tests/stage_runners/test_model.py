"""The built-in model: its shape, its seeded weights, and what its forward means."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from analytic.config import variant_config
from analytic.errors import InputError
from hooks.tracer import Tracer
from stage_runners import loading
from stage_runners.deepseek_ocr import DeepseekOCRForCausalLM
from stage_runners.loading import load_model, parameter_count

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from stage_runners.inputs import ModelInputs

Build = "Callable[..., nn.Module]"
BASE = variant_config("deepseek-ocr-v1-base")
TINY_PARAMETERS = 2_437_664

#: Parameters below each prefix, as counted on the published code.
GROUPS = {
    "model.embed_tokens.": 165_478_400,
    "lm_head.": 165_478_400,
    "model.sam_model.": 95_569_152,
    "model.vision_model.": 303_177_728,
    "model.vision_model.embeddings.patch_embedding.": 602_112,
    "model.projector.": 2_622_720,
    "model.image_newline": 1_280,
    "model.view_seperator": 1_280,
    "model.layers.": 2_603_776_000,
    "model.layers.0.": 32_852_480,
    "model.layers.0.self_attn.": 6_553_600,
    "model.layers.11.": 233_720_320,
    "model.layers.11.mlp.gate.": 81_920,
    "model.layers.11.mlp.experts.63.": 3_440_640,
    "model.layers.11.mlp.shared_experts.": 6_881_280,
    "model.norm.": 1_280,
}


@pytest.fixture(scope="module")
def base() -> DeepseekOCRForCausalLM:
    """The base variant without memory."""
    with torch.device("meta"):
        return DeepseekOCRForCausalLM(BASE)


# --- shape ---


def test_size_of_the_base_variant(base: nn.Module) -> None:
    parameters, modules = dict(base.named_parameters()), list(base.modules())
    assert len(parameters) == 2_710
    assert sum(parameter.numel() for parameter in parameters.values()) == parameter_count(BASE) == 3_336_106_240
    assert len(modules) == 4_083
    assert sum(not list(module.children()) for module in modules) == 3_201


@pytest.mark.parametrize("prefix", GROUPS)
def test_parameters_below(base: nn.Module, prefix: str) -> None:
    found = [parameter.numel() for name, parameter in base.named_parameters() if name.startswith(prefix)]
    assert sum(found) == GROUPS[prefix]


def test_names_are_those_of_the_published_checkpoint(base: nn.Module, shared: Callable[[str], Path]) -> None:
    listed = shared("reference/checkpoint-keys.txt").read_text(encoding="utf-8").splitlines()
    expected = {name: int(count) for count, name in (line.split() for line in listed if not line.startswith("#"))}
    assert len(expected) == 52
    folded = Counter(re.sub(r"\d+", "N", name) for name, _ in base.named_parameters())
    assert folded == expected
    assert set(base.state_dict()) == {name for name, _ in base.named_parameters()}


# --- seeded weights ---


def test_weights_follow_the_seed(tiny_model: Build) -> None:
    first, again, other = (tiny_model(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if "norm" not in name and not name.endswith("bias") and "neck" not in name]
    assert len(drawn) > 80
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_norms_are_the_identity_and_biases_zero(tiny_model: Build) -> None:
    norms = 0
    for module in tiny_model().modules():
        if "Norm" in type(module).__name__:
            norms += 1
            assert torch.equal(module.weight, torch.ones_like(module.weight))
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any()
    assert norms == 7 + 4 + 2 + 5  # decoder, SAM blocks, SAM neck, CLIP


def test_drawn_weights_have_the_published_spread(tiny_model: Build) -> None:
    weights = dict(tiny_model().named_parameters())
    spreads = {"lm_head.weight": 0.02, "model.embed_tokens.weight": 1.0, "model.sam_model.pos_embed": 0.02}
    for name, spread in spreads.items():
        assert float(weights[name].std()) == pytest.approx(spread, rel=0.02)
        assert abs(float(weights[name].mean())) < spread / 20


@pytest.mark.parametrize(("size", "offset"), [(5, 0), (5, 3), (11, 10), (29, 4), (11, 0)])
def test_the_pool_repeats_from_its_offset(size: int, offset: int) -> None:
    flat, pool = torch.full((size,), -1), torch.arange(11)
    loading._fill_from_pool(flat, pool, offset)
    assert flat.tolist() == [(offset + index) % 11 for index in range(size)]


class Allocations(TorchDispatchMode):
    """Bytes of each new CPU storage, by type."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[torch.dtype, int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if on_cpu(leaf)}
        for leaf in tree_leaves(result):
            if on_cpu(leaf) and storage_of(leaf) not in known:
                self.sizes[leaf.dtype] += leaf.nbytes
        return result


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def on_cpu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_get_memory_once_and_in_their_own_type(
    tiny_model: Build, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(loading, "_POOL_SIZE", 1_009)
    with Allocations() as allocated:
        model = tiny_model(dtype=dtype)
    sizes, weights = allocated.sizes, TINY_PARAMETERS * dtype.itemsize
    assert sum(parameter.nbytes for parameter in model.parameters()) == weights
    assert weights <= sizes[dtype] < 1.02 * weights
    assert sum(sizes.values()) < 1.02 * weights


def test_nothing_needs_a_gradient(tiny_model: Build) -> None:
    model = tiny_model()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_buffers_have_values_after_a_build_without_memory(tiny_model: Build) -> None:
    buffers = dict(tiny_model().named_buffers())
    assert buffers["model.vision_model.embeddings.position_ids"].tolist() == [list(range(257))]
    frequencies = buffers["model.layers.2.self_attn.rotary_emb.inv_freq"]
    assert torch.allclose(frequencies, 10_000.0 ** (-torch.arange(0, 32, 2) / 32))


# --- forward ---


@pytest.fixture(params=["sdpa", "eager"])
def lively(request: pytest.FixtureRequest, tiny_model: Build) -> nn.Module:
    """Weights so large that attention, rotary positions and routing matter to the logits."""
    model = tiny_model(attention=request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal but for rounding, and not for lack of variation."""
    assert ours.shape == theirs.shape
    assert float(theirs.std()) > 0.1
    return torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[39, 1], [35, 5], [36, 1, 2, 1], [34] + [1] * 6], ids=str)
def test_decode_with_a_cache_is_the_prefill_of_all(
    lively: nn.Module, inputs_of: Callable[..., ModelInputs], chunks: list[int]
) -> None:
    kwargs = inputs_of().forward_kwargs()
    ids, mask = kwargs["input_ids"], kwargs["images_seq_mask"]
    whole = lively(**kwargs).logits
    cache, parts = DynamicCache(), []
    for chunk in torch.split(ids, chunks, dim=1):
        # Images go into the first chunk; the mask is that of the positions given.
        given = kwargs | {"images_seq_mask": mask[:, : chunk.shape[1]]} if not parts else {}
        output = lively(**given | {"input_ids": chunk}, past_key_values=cache)
        assert output.past_key_values is cache
        parts.append(output.logits)
    assert cache.get_seq_length() == 40
    assert close(torch.cat(parts, dim=1), whole)


def test_positions_matter(lively: nn.Module) -> None:
    """Else the test above would not notice wrong positions."""
    ids = torch.tensor([[5, 6, 7, 8]])
    straight, swapped = lively(ids).logits[0, -1], lively(ids[:, [1, 0, 2, 3]]).logits[0, -1]
    assert float((straight - swapped).abs().max()) > 0.1


def test_no_position_sees_a_later_one(lively: nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    changed = torch.tensor([[5, 6, 7, 99]])
    assert torch.allclose(lively(ids).logits[:, :3], lively(changed).logits[:, :3], atol=1e-5)
    assert not torch.allclose(lively(ids).logits[:, 3], lively(changed).logits[:, 3], atol=1e-2)


def test_attention_implementations_agree(tiny_model: Build, inputs_of: Callable[..., ModelInputs]) -> None:
    kwargs = inputs_of().forward_kwargs()
    models = [tiny_model(attention=attention) for attention in ("sdpa", "eager")]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)
    sdpa, eager = (model(**kwargs).logits for model in models)
    assert close(sdpa, eager)


def test_key_value_heads_are_shared(tiny_model: Build) -> None:
    config = variant_config("deepseek-ocr-v1-tiny")
    grouped = attrs.evolve(config, decoder=attrs.evolve(config.decoder, kv_heads=2))
    few = DeepseekOCRForCausalLM(grouped).eval()
    state = tiny_model().state_dict()
    state |= {name: state[name][:64] for name in state if re.search(r"\.[kv]_proj\.weight$", name)}
    few.load_state_dict(state)
    many = tiny_model()
    with torch.no_grad():
        for layer in many.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                first, second = projection.weight[:32].clone(), projection.weight[32:64].clone()
                projection.weight.copy_(torch.cat([first, first, second, second]))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(few(ids).logits, many(ids).logits, atol=1e-6)


def test_without_a_cache(lively: nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    output = lively(ids, use_cache=False)
    assert output.past_key_values is None
    assert close(output.logits, lively(ids).logits)


def vision_calls(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits, and how many images each pass through the encoders held."""
    seen: list[torch.Tensor] = []
    with Tracer(model, observers={"model.projector": seen.append}):
        logits = model(*args, **kwargs).logits
    return logits, [features.shape[0] for features in seen]


def test_a_prompt_without_images(lively: nn.Module, inputs_of: Callable[..., ModelInputs]) -> None:
    kwargs = inputs_of().forward_kwargs()
    with_images, batches = vision_calls(lively, **kwargs)
    assert batches == [2, 1]
    bare, none = vision_calls(lively, kwargs["input_ids"])
    assert not none
    assert not torch.allclose(bare, with_images, atol=1e-2)


def test_a_global_view_of_zeros_hides_the_page(lively: nn.Module, inputs_of: Callable[..., ModelInputs]) -> None:
    """The published code sums the first page's global view and looks at nothing else."""
    kwargs = inputs_of().forward_kwargs()
    ((tiles, view),) = kwargs["images"]
    hidden, none = vision_calls(lively, **kwargs | {"images": [(tiles, torch.zeros_like(view))]})
    assert not none
    assert torch.equal(hidden, lively(kwargs["input_ids"]).logits)


def test_tiles_of_zeros_are_no_tiles(lively: nn.Module, inputs_of: Callable[..., ModelInputs]) -> None:
    inputs = inputs_of(crop_mode=False)
    logits, batches = vision_calls(lively, **inputs.forward_kwargs())
    assert batches == [1]
    assert logits.shape == (1, 28, 2020)


def test_images_without_their_mask(lively: nn.Module, inputs_of: Callable[..., ModelInputs]) -> None:
    kwargs = inputs_of().forward_kwargs()
    with pytest.raises(ValueError, match="images need images_seq_mask"):
        lively(kwargs["input_ids"], images=kwargs["images"])


def test_rows_of_a_batch_are_independent(lively: nn.Module, inputs_of: Callable[..., ModelInputs]) -> None:
    first, second = inputs_of(seed=0), inputs_of(seed=1)
    alone = [lively(**inputs.forward_kwargs()).logits for inputs in (first, second)]
    joined = lively(
        torch.cat([first.input_ids, second.input_ids]),
        images=first.images + second.images,
        images_seq_mask=torch.cat([first.images_seq_mask, second.images_seq_mask]),
        images_spatial_crop=torch.cat([first.images_spatial_crop, second.images_spatial_crop]),
    ).logits
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    assert close(joined, torch.cat(alone))


def test_image_features_fill_the_masked_positions_only(
    tiny_model: Build, inputs_of: Callable[..., ModelInputs]
) -> None:
    """Logits of the begin token come before the image; those of every masked position change."""
    model, kwargs = tiny_model(), inputs_of().forward_kwargs()
    with_images, bare = model(**kwargs).logits[0], model(kwargs["input_ids"]).logits[0]
    changed = (with_images - bare).abs().amax(dim=-1) > 1e-6
    mask = kwargs["images_seq_mask"][0]
    assert not changed[0]
    assert changed[mask].all()


def test_module_hooks_miss_what_they_miss_in_the_published_code(
    tiny_model: Build, inputs_of: Callable[..., ModelInputs]
) -> None:
    """Its CLIP block calls two submodules past ``__call__``."""
    model, hooked = tiny_model(), set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: hooked.add(type(module).__name__))
    tracer = Tracer(model)
    with tracer:
        model(**inputs_of().forward_kwargs())
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    traced = {classes[path] for path in tracer.calls()["module_path"].to_pylist()}
    assert traced - hooked == {"NoTPAttention", "NoTPFeedForward"}


# --- attention implementations ---


def test_flash_attention_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError) as caught:
        load_model("builtin", variant="deepseek-ocr-v1-tiny", attention="flash_attention_2")
    message = str(caught.value)
    assert "flash-attn, which is not installed" in message
    assert "pip install 'dsocr-trace[flash]'" in message
    assert "--attention sdpa" in message
    assert "\n" not in message


def test_unknown_attention() -> None:
    with pytest.raises(InputError, match=r"no attention implementation 'paged'; choose one of sdpa, eager, .*--attent"):
        load_model("builtin", variant="deepseek-ocr-v1-tiny", attention="paged")
