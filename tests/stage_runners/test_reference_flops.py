"""What torch counts on the meta device: the figures of the published model, and nothing left behind."""

from __future__ import annotations

from collections import Counter

import attrs
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from analytic.config import variant_config
from analytic.errors import InputError
from analytic.routing import Routing
from analytic.workload import Workload
from hooks.errors import TraceError
from hooks.modules import is_within
from hooks.tracer import wrapped_modules
from stage_runners.reference_flops import count_flops, sketch_model, sketched_values

BASE = "deepseek-ocr-v1-base"
WHOLE = Workload("whole", 1024, 1024, text_tokens=6, max_new_tokens=1, crop_mode=False)
CROPPED = Workload("cropped", 1280, 1920, text_tokens=6, max_new_tokens=1)

#: FLOPs by stage: a whole page, a page of six tiles, and one token after 909. Recorded from the published code.
STAGE_FLOPS = {
    "vision": (1_139_967_033_344, 3_468_866_060_288, 0),
    "vision and prefill": (1_465_095_223_808, 4_563_339_525_632, 0),
    "decode": (0, 0, 1_204_102_656),
}
SUBTREE_FLOPS = {
    "model.sam_model": (976_909_172_736, 2_930_633_932_800, 0),
    "model.vision_model": (161_715_683_328, 533_744_222_208, 0),
    "model.projector": (1_342_177_280, 4_487_905_280, 0),
    "model.layers.0": (18_728_836_992, 63_951_829_632, 70_359_168),
    "model.layers.1": (19_460_218_752, 66_334_718_592, 72_980_608),
    "model.layers.11": (19_460_218_752, 66_334_718_592, 72_980_608),
    "model.layers.1.self_attn": (4_055_490_432, 16_145_119_872, 17_766_528),
    "model.layers.1.mlp": (15_404_728_320, 50_189_598_720, 55_214_080),
    "model.layers.1.mlp.gate": (45_711_360, 148_930_560, 163_840),
    "model.layers.1.mlp.shared_experts": (3_839_754_240, 12_510_167_040, 13_762_560),
    "model.layers": (232_791_243_264, 793_633_734_144, 873_145_856),
    "lm_head": (92_336_947_200, 300_839_731_200, 330_956_800),
}
#: Own FLOPs by class, over all stages.
CLASS_FLOPS = {
    "Attention": (234_668_359_680, 482_754_232_320, 0),
    "NoTPAttention": (6_492_880_896, 12_509_675_520, 0),
    "LlamaAttention": (4_782_551_040, 50_766_704_640, 55_910_400),
    "LlamaRotaryEmbedding": (428_544, 1_396_224, 1_536),
    "MoEGate": (502_824_960, 1_638_236_160, 1_802_240),
}
#: Calls, those past ``__call__`` included: the published code's hooks see 96 fewer of a page with tiles.
CALLS = (4_020 + 48, 4_325 + 96, 525)


def counted(model, variant, workload, kv_lengths=()):
    decoder = variant_config(variant).decoder
    forwards = [length - workload.seq_len for length in kv_lengths]
    routing = Routing.planned("balanced", decoder.expert_sizes, tokens=workload.seq_len, forwards=forwards)
    return count_flops(model, decoder, workload, prefill=routing.prefill, decode=routing.decode, kv_lengths=kv_lengths)


@pytest.fixture(scope="module")
def base_model():
    return sketch_model("builtin", variant=BASE, attention="sdpa")


@pytest.fixture(scope="module")
def columns(base_model):
    """Own FLOPs by (stage, path), and calls: whole page, page of six tiles, decode."""
    whole, cropped = counted(base_model, BASE, WHOLE), counted(base_model, BASE, CROPPED, (910,))
    return [
        tuple(Counter({key: n for key, n in table.items() if (key[0] == "decode") is decode}) for table in tables)
        for tables, decode in (
            ((whole.flops, whole.calls), False),
            ((cropped.flops, cropped.calls), False),
            ((cropped.flops, cropped.calls), True),
        )
    ]


def test_recorded_stages(columns):
    for name, expected in STAGE_FLOPS.items():
        stages = name.split(" and ")
        assert tuple(sum(n for (stage, _), n in flops.items() if stage in stages) for flops, _ in columns) == expected


def test_six_tiles_without_the_whole_page():
    assert STAGE_FLOPS["vision"][1] - STAGE_FLOPS["vision"][0] == 2_328_899_026_944


@pytest.mark.parametrize("subtree", SUBTREE_FLOPS)
def test_recorded_subtrees(columns, subtree):
    found = tuple(sum(n for (_, path), n in flops.items() if is_within(path, subtree)) for flops, _ in columns)
    assert found == SUBTREE_FLOPS[subtree]


@pytest.mark.parametrize("module_class", CLASS_FLOPS)
def test_recorded_classes(base_model, columns, module_class):
    classes = {path: type(module).__name__ for path, module in base_model.named_modules()}
    found = tuple(sum(n for (_, path), n in flops.items() if classes[path] == module_class) for flops, _ in columns)
    assert found == CLASS_FLOPS[module_class]


def test_recorded_calls(columns):
    assert tuple(calls.total() for _, calls in columns) == CALLS


def test_nothing_stays_behind(small):
    model = sketch_model("builtin", variant=small.variant, attention="sdpa")
    autocast = torch.autocast
    counted(model, small.variant, small)
    assert wrapped_modules(model) == []
    assert torch.autocast is autocast
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(1, device="meta").item()


def test_everything_is_put_back_after_an_error(small):
    model = sketch_model("builtin", variant=small.variant, attention="sdpa")
    autocast = torch.autocast
    with pytest.raises(TraceError, match="reads more values"):
        count_flops(model, variant_config(small.variant).decoder, small, prefill={}, decode={})
    assert wrapped_modules(model) == []
    assert torch.autocast is autocast


def test_values_that_are_not_there():
    sketch = torch.empty(3, device="meta")
    with sketched_values(iter([[4, 5], [6, 7]])):
        assert sketch.sum().item() == 1
        assert sketch.tolist() == [4, 5]
        assert sketch.cpu().numpy().tolist() == [6, 7]
        assert sketch.cuda() is sketch
        with torch.autocast("meta", enabled=False):
            pass
        # Tensors with values keep them.
        assert torch.zeros(2).sum().item() == 0
        assert torch.arange(2).tolist() == [0, 1]


def test_a_batch_runs_every_page(small):
    model = sketch_model("builtin", variant=small.variant, attention="eager")
    decoder = variant_config(small.variant).decoder
    sizes = decoder.expert_sizes
    one, two = (
        Routing.planned("balanced", sizes, tokens=small.seq_len, forwards=[], batch_size=batch).prefill
        for batch in (1, 2)
    )
    single = count_flops(model, decoder, small, prefill=one, decode={})
    double = count_flops(model, decoder, attrs.evolve(small, batch_size=2), prefill=two, decode={})
    by_pages = [sum(n for (stage, _), n in table.flops.items() if stage == "vision") for table in (single, double)]
    assert by_pages[1] == 2 * by_pages[0]


def test_the_counter_is_torchs_own(small):
    """The total is what the counter says without a tracer."""
    model = sketch_model("builtin", variant=small.variant, attention="sdpa")
    expected = counted(model, small.variant, small).flops.total()
    with FlopCounterMode(display=False) as counter:
        counted(model, small.variant, small)
    assert counter.get_total_flops() == expected


def test_a_flash_kernel_has_no_reference():
    with pytest.raises(InputError, match="'flash_attention_2' has no reference; choose one of sdpa, eager"):
        sketch_model("builtin", variant=BASE, attention="flash_attention_2")
