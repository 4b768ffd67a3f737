"""The published size, end to end: what only the full model shows."""

from __future__ import annotations

import json

import psutil
import pytest

from dsocr_trace.runs.store import load

pytestmark = [
    pytest.mark.full_size,
    pytest.mark.timeout(1_500),
    pytest.mark.skipif(psutil.virtual_memory().available < 10e9, reason="the full-size model takes 10 GB"),
]

#: ``__call__`` calls of a decode step of the published model, counted on its own code.
DECODE_CALLS = 525
#: Vision modules called once per view through ``__call__``; and the 48 that are called as ``module.forward``.
VISION_CALLS = 305
DIRECT_CALLS = 48
VIEWS = 2


@pytest.fixture(scope="module")
def standard(tmp_path_factory, invoke):
    root = tmp_path_factory.mktemp("full")
    result = invoke(
        "run", "--workload", "dsocr-standard-v1", "--device", "cpu", "--max-new-tokens", 4, "--profile-steps", 2,
        "--output", root, "--run-id", "full", "--json", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return load(root / "full"), json.loads(result.stdout)


def test_parameters_and_modules(standard):
    run, _ = standard
    assert run.modules.parameter_count.sum() == 3_336_106_240
    assert run.modules.weight_bytes.sum() == 2 * 3_336_106_240
    assert (len(run.modules), run.modules.is_leaf.sum()) == (4_083, 3_201)


def test_calls(standard):
    run, _ = standard
    calls = run.calls[run.calls["pass"] == "traced"]
    assert calls[calls.stage == "decode"].groupby("step").size().tolist() == [DECODE_CALLS] * 3
    assert (calls.stage == "vision").sum() == VIEWS * (VISION_CALLS + DIRECT_CALLS)
    experts = calls[
        (calls.stage == "prefill") & calls.module_path.str.fullmatch(r"model\.layers\.\d+\.mlp\.experts\.\d+")
    ]
    # 805 with two views' vision, five for each expert that the router chose: its own call and its four children's.
    assert (calls.stage == "prefill").sum() == 805 - VIEWS * VISION_CALLS + 5 * len(experts)
    assert len(experts) == run.manifest["expert_routing"]["experts_hit"]["prefill"]
    direct = calls[calls.module_path.str.fullmatch(r"model\.vision_model\.transformer\.layers\.\d+\.(self_attn|mlp)")]
    assert len(direct) == VIEWS * DIRECT_CALLS


def test_coverage(standard):
    _, summary = standard
    assert summary["coverage"] >= 0.99


def test_flops_do_not_depend_on_the_routing(standard):
    # One tile less than the six of an A4 page: the figures of the engine's own tests, by view.
    _, summary = standard
    stages = summary["stages"]
    global_view, six_tiles = 1_139_967_033_344, 2_328_899_026_944
    assert stages["vision"]["tensor_flops"] == global_view + six_tiles * 2 // 6
    assert stages["decode"]["tensor_flops"] == sum(
        1_204_102_656 + (length - 910) * 12 * 2 * 2 * 1_280 for length in (513, 514, 515)
    )
