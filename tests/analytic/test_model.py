"""The module tree and its FLOPs against figures recorded from the published model.

Recorded with ``torch.utils.flop_counter`` on the meta device, every expert hit; 1 multiply-accumulate = 2 FLOPs.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pytest

from analytic.config import variant_config
from analytic.layers.base import OPERATOR_CATEGORIES, Policy
from analytic.model import Work, deepseek_ocr, operations
from analytic.predict import subtree_totals
from analytic.routing import Counts, Routing
from analytic.workload import Workload

if TYPE_CHECKING:
    from analytic.families.base import ModuleNode

Cases: TypeAlias = tuple[tuple[Work, set[str]], ...]

BASE = variant_config("deepseek-ocr-v1-base")
MODEL = deepseek_ocr(BASE)
TREE = MODEL.tree
POLICY = Policy()
#: 903 image tokens and 6 others; 273 image tokens and 6 others.
CROPPED = Workload("cropped", page_width=1654, page_height=2339, text_tokens=6, max_new_tokens=2)
WHOLE = Workload("whole", page_width=1024, page_height=1024, text_tokens=6, max_new_tokens=2, crop_mode=False)

CLASSES = {
    "DeepseekOCRForCausalLM": (1, 0, 0),
    "DeepseekOCRModel": (1, 0, 2_560),
    "Embedding": (2, 2, 165_741_568),
    "ModuleList": (14, 0, 0),
    "DeepseekV2DecoderLayer": (12, 0, 0),
    "LlamaAttention": (12, 0, 0),
    "Linear": (2342, 2342, 3_158_173_952),
    "LlamaRotaryEmbedding": (12, 12, 0),
    "DeepseekV2MLP": (716, 0, 0),
    "SiLU": (716, 716, 0),
    "DeepseekV2RMSNorm": (25, 25, 32_000),
    "DeepseekV2MoE": (11, 0, 0),
    "MoEGate": (11, 11, 901_120),
    "ImageEncoderViT": (1, 0, 3_145_728),
    "PatchEmbed": (1, 0, 0),
    "Conv2d": (6, 6, 7_877_376),
    "Block": (12, 0, 0),
    "LayerNorm": (73, 73, 137_216),
    "Attention": (12, 0, 92_672),
    "MLPBlock": (12, 0, 0),
    "GELU": (12, 12, 0),
    "Sequential": (1, 0, 0),
    "LayerNorm2d": (2, 2, 1_024),
    "VitModel": (1, 0, 0),
    "CLIPVisionEmbeddings": (1, 0, 1_024),
    "NoTPTransformer": (1, 0, 0),
    "NoTPTransformerBlock": (24, 0, 0),
    "NoTPAttention": (24, 0, 0),
    "NoTPFeedForward": (24, 0, 0),
    "MlpProjector": (1, 0, 0),
}

PARAMETER_GROUPS = {
    "model.embed_tokens": 165_478_400,
    "lm_head": 165_478_400,
    "model.sam_model": 95_569_152,
    "model.vision_model": 303_177_728,
    "model.vision_model.embeddings.patch_embedding": 602_112,
    "model.projector": 2_622_720,
    "model.layers": 2_603_776_000,
    "model.layers.0": 32_852_480,
    "model.layers.1": 233_720_320,
    "model.layers.1.self_attn": 6_553_600,
    "model.layers.0.mlp": 26_296_320,
    "model.layers.1.mlp": 227_164_160,
    "model.layers.1.mlp.experts.63": 3_440_640,
    "model.layers.1.mlp.experts": 220_200_960,
    "model.layers.1.mlp.shared_experts": 6_881_280,
    "model.layers.1.mlp.gate": 81_920,
    "model.norm": 1_280,
    "": 3_336_106_240,
}

#: Own FLOPs: whole page, page and 6 crops (vision and prefill), and decode of 1 token after 909.
CLASS_FLOPS = {
    "Conv2d@SAM": (16_106_127_360, 53_854_863_360, 0),
    "Linear@SAM": (726_134_685_696, 2_394_024_837_120, 0),
    "Attention": (234_668_359_680, 482_754_232_320, 0),
    "Linear@CLIP": (155_222_802_432, 521_234_546_688, 0),
    "NoTPAttention": (6_492_880_896, 12_509_675_520, 0),
    "Linear@projector": (1_342_177_280, 4_487_905_280, 0),
    "Linear@self_attn": (43_882_905_600, 142_973_337_600, 157_286_400),
    "LlamaAttention": (4_782_551_040, 50_766_704_640, 55_910_400),
    "LlamaRotaryEmbedding": (428_544, 1_396_224, 1_536),
    "Linear@dense": (14_673_346_560, 47_806_709_760, 52_592_640),
    "MoEGate": (502_824_960, 1_638_236_160, 1_802_240),
    "Linear@experts": (126_711_889_920, 412_835_512_320, 454_164_480),
    "Linear@shared_experts": (42_237_296_640, 137_611_837_440, 151_388_160),
    "Linear@lm_head": (92_336_947_200, 300_839_731_200, 330_956_800),
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
    "lm_head": (92_336_947_200, 300_839_731_200, 330_956_800),
    "": (1_465_095_223_808, 4_563_339_525_632, 1_204_102_656),
}


@pytest.fixture(scope="module")
def recorded_cases() -> Cases:
    """Work and stages of the three columns of the tables above."""
    whole, cropped = operations(MODEL, WHOLE, policy=POLICY), operations(MODEL, CROPPED, policy=POLICY)
    return ((whole, {"vision", "prefill"}), (cropped, {"vision", "prefill"}), (cropped, {"decode"}))


def flops_by_stage(work: Work) -> Counter[str]:
    flops = Counter()
    for operation in work.operations:
        flops[operation.stage] += operation.cost.tensor_flops
    return flops


def own_flops(work: Work, stages: set[str]) -> Counter[str]:
    flops = Counter()
    for operation in work.operations:
        if operation.stage in stages:
            flops[operation.module_path] += operation.cost.tensor_flops
    return flops


def recorded_class(node: ModuleNode) -> str:
    """Group of the recorded table that a module belongs to."""
    if node.module_class not in {"Linear", "Conv2d"}:
        return node.module_class
    for part in ("sam_model", "vision_model", "projector", "self_attn", "shared_experts", "experts", "lm_head"):
        if part in node.module_path.split("."):
            where = {"sam_model": "SAM", "vision_model": "CLIP"}.get(part, part)
            return f"{node.module_class}@{where}"
    return f"{node.module_class}@dense"


def test_counts() -> None:
    assert len(TREE) == 4_083
    assert sum(node.is_leaf for node in TREE) == 3_201
    assert sum(len(node.parameters) for node in TREE) == 2_710
    assert len({node.module_path for node in TREE}) == len(TREE)
    assert max(node.depth for node in TREE) == 7


def test_class_table() -> None:
    found = defaultdict(lambda: (0, 0, 0))
    for node in TREE:
        row = (1, int(node.is_leaf), node.parameter_count)
        found[node.module_class] = tuple(map(sum, zip(found[node.module_class], row, strict=True)))
    assert found == CLASSES


def test_parameter_groups() -> None:
    totals = subtree_totals(TREE, {node.module_path: node.parameter_count for node in TREE}, 0)
    assert {path: totals[path] for path in PARAMETER_GROUPS} == PARAMETER_GROUPS


def test_registration_order() -> None:
    top = [node.module_path for node in TREE if node.depth <= 2 and node.depth > 0]
    names = ("embed_tokens", "layers", "norm", "sam_model", "vision_model", "projector")
    assert top == ["model", *(f"model.{name}" for name in names), "lm_head"]
    assert TREE[0].module_path == ""
    assert TREE[0].parent_path is None


def test_vision_totals() -> None:
    assert flops_by_stage(operations(MODEL, WHOLE, policy=POLICY))["vision"] == 1_139_967_033_344
    assert flops_by_stage(operations(MODEL, CROPPED, policy=POLICY))["vision"] == 3_468_866_060_288
    crops_only = [
        steps.cost.tensor_flops
        for operation in operations(MODEL, CROPPED, policy=POLICY).operations
        if operation.stage == "vision"
        for _, steps in operation.runs[:1]
    ]
    assert 2_328_899_026_944 == 3_468_866_060_288 - 1_139_967_033_344
    # Operators that resize positions run for the crops only; they have no tensor FLOPs.
    assert sum(crops_only) == 2_328_899_026_944


def test_class_flops(recorded_cases: Cases) -> None:
    for column, (work, stages) in enumerate(recorded_cases):
        own, found = own_flops(work, stages), Counter()
        for node in TREE:
            found[recorded_class(node)] += own[node.module_path]
        expected = {name: row[column] for name, row in CLASS_FLOPS.items() if row[column]}
        assert +found == expected


def test_subtree_flops(recorded_cases: Cases) -> None:
    for column, (work, stages) in enumerate(recorded_cases):
        totals = subtree_totals(TREE, own_flops(work, stages), 0)
        assert {path: totals[path] for path in SUBTREE_FLOPS} == {
            path: row[column] for path, row in SUBTREE_FLOPS.items()
        }


def test_total_from_parameters_alone() -> None:
    """A second way to the decoder's total: 2 FLOPs per active weight and position, attention, rotary angles."""
    decoder, length = BASE.decoder, CROPPED.seq_len
    norms = (2 * decoder.layers + 1) * decoder.hidden_size
    # Embedding, norms and vision apart, with k of all experts: the parameters that multiply every position.
    idle = (decoder.routed_experts - decoder.experts_per_token) * 3_440_640 * len(decoder.moe_layers)
    weights = 2_603_776_000 + decoder.hidden_size - norms - idle + 165_478_400
    attention = decoder.layers * (4 * length * length * decoder.hidden_size + decoder.head_dim * length)
    prefill = flops_by_stage(operations(MODEL, CROPPED, policy=POLICY))["prefill"]
    assert prefill == 2 * length * weights + attention


def test_calls() -> None:
    """Calls of a prefill with every expert hit, and of one decode step; direct ``forward`` calls included."""
    calls = Counter()
    for (stage, _), count in operations(MODEL, CROPPED, policy=POLICY).calls.items():
        calls[stage] += count
    unhooked = 2 * 48
    assert calls["vision"] + calls["prefill"] == 4_325 + unhooked
    assert calls["decode"] == 525
    whole = operations(MODEL, WHOLE, policy=POLICY).calls
    assert sum(count for (stage, _), count in whole.items() if stage != "decode") == 4_020 + 48


def test_equal_layers_are_evaluated_once() -> None:
    """Experts, layers and views are alike: most of what runs has been evaluated before."""
    work = operations(MODEL, CROPPED, policy=POLICY)
    steps = [id(steps) for operation in work.operations for _, steps in operation.runs]
    assert len(steps) > 10 * len(set(steps))


def test_never_called_modules_are_absent() -> None:
    called = {path for _, path in operations(MODEL, CROPPED, policy=POLICY).calls}
    absent = Counter(node.module_class for node in TREE if node.module_path not in called)
    assert absent == {"ModuleList": 14, "Conv2d": 1}


def test_kv_cache_bytes() -> None:
    work = operations(MODEL, CROPPED, policy=POLICY)
    grown = Counter()
    for operation in work.operations:
        grown[operation.stage] += operation.cost.kv_cache_bytes
    assert grown == {"vision": 0, "prefill": 909 * 61_440, "decode": 61_440}


def test_all_weights_of_the_called_modules_are_read_in_one_prefill() -> None:
    """Except embeddings, of which only the rows looked up are read; and tables that are gathered from."""
    read = Counter()
    for operation in operations(MODEL, WHOLE, policy=POLICY).operations:
        if operation.stage != "decode":
            read[operation.module_path] += operation.cost.weight_bytes
    for node in TREE:
        if node.module_class in {"Linear", "Conv2d", "LayerNorm", "DeepseekV2RMSNorm", "MoEGate", "LayerNorm2d"}:
            expected = 0 if node.module_path.endswith("patch_embedding") else 2 * node.parameter_count
            assert read[node.module_path] == expected, node.module_path


def test_decode_is_the_sum_of_its_steps() -> None:
    """Forwards evaluated together give what they give one by one."""
    together = operations(MODEL, CROPPED, policy=POLICY, kv_lengths=[910, 915, 1200])
    apart = [operations(MODEL, CROPPED, policy=POLICY, kv_lengths=[length]) for length in (910, 915, 1200)]
    assert together.calls.keys() == {key for work in apart for key in work.calls}

    def decode(works: list[Work]) -> Counter[str]:
        summed = Counter()
        for work in works:
            for operation in work.operations:
                if operation.stage == "decode":
                    cost = operation.cost
                    summed["calls"] += operation.calls
                    summed["flops"] += cost.tensor_flops + cost.vector_flops
                    summed["bytes"] += cost.bytes_total
                    summed["kv"] += cost.kv_cache_bytes
        return summed

    assert decode([together]) == decode(apart)


def test_one_new_token_needs_no_decode() -> None:
    workload = Workload("short", page_width=640, page_height=640, text_tokens=6, max_new_tokens=1)
    work = operations(MODEL, workload, policy=POLICY)
    assert {operation.stage for operation in work.operations} == {"vision", "prefill"}


def test_routing_moves_flops_but_keeps_their_sum() -> None:
    rng = np.random.default_rng(0)
    decoder = BASE.decoder
    lengths = [910, 911, 912]

    def measured(rows: int, tokens: int) -> Counts:
        counts = np.zeros((rows, decoder.routed_experts), dtype=np.int64)
        for row, _ in itertools.product(range(rows), range(tokens)):
            counts[row, rng.choice(16, size=decoder.experts_per_token, replace=False)] += 1
        return counts

    skewed = Routing(
        {layer: measured(1, CROPPED.seq_len) for layer in decoder.moe_layers},
        {layer: measured(3, 1) for layer in decoder.moe_layers},
        "measured",
    )
    balanced = operations(MODEL, CROPPED, policy=POLICY, kv_lengths=lengths)
    work = operations(MODEL, CROPPED, policy=POLICY, kv_lengths=lengths, routing=skewed)
    assert work.routing.source == "measured"
    assert flops_by_stage(work) == flops_by_stage(balanced)
    assert ("prefill", "model.layers.3.mlp.experts.63") not in work.calls
    expert = work.calls["decode", "model.layers.3.mlp.experts.0.down_proj"]
    assert expert == np.count_nonzero(skewed.decode[3][:, 0])


def test_eager_and_fused_attention_have_the_same_products() -> None:
    by_attention = {
        name: operations(MODEL, CROPPED, policy=Policy(attention=name))
        for name in ("sdpa", "eager", "flash_attention_2")
    }
    flops = [flops_by_stage(work) for work in by_attention.values()]
    assert flops[0] == flops[1] == flops[2]
    masks = [o.stage for o in by_attention["eager"].operations if o.name == "causal_mask"]
    assert masks == ["prefill"] * 12


def test_names_and_categories() -> None:
    work = operations(MODEL, CROPPED, policy=Policy(attention="eager"))
    paths = {node.module_path for node in TREE}
    for operation in work.operations:
        assert operation.operator_category in OPERATOR_CATEGORIES
        assert re.fullmatch(r"[a-z0-9_]+", operation.name)
        assert operation.module_path in paths
        in_vision = operation.module_path.startswith(("model.sam_model", "model.vision_model", "model.projector"))
        assert in_vision == (operation.stage == "vision")


def test_pages_of_a_batch_are_encoded_one_by_one() -> None:
    pair = Workload("pair", page_width=1024, page_height=1024, text_tokens=6, max_new_tokens=3, batch_size=2)
    one = Workload("one", page_width=1024, page_height=1024, text_tokens=6, max_new_tokens=3)
    work, single = operations(MODEL, pair, policy=POLICY), operations(MODEL, one, policy=POLICY)
    assert work.calls["vision", "model.sam_model"] == 2 * single.calls["vision", "model.sam_model"]
    assert flops_by_stage(work)["vision"] == 2 * flops_by_stage(single)["vision"]
    assert work.calls["decode", "lm_head"] == single.calls["decode", "lm_head"]
