"""The built-in classes against recordings of the published code."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hooks.tracer import PositionStages, Tracer
from stage_runners.loading import load_model

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, parity: Any) -> nn.Module:
    return load_model(str(parity.directory), attention=request.param)


def generate(model: nn.Module, parity: Any) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits of the prefill and of six decode steps, and the tokens that were fed."""
    output = model(**parity.forward_kwargs())
    prefill, steps, tokens = output.logits, [], []
    for _ in range(6):
        tokens.append(int(output.logits[0, -1].argmax()))
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values)
        steps.append(output.logits[0, -1])
    return prefill, torch.stack(steps), tokens


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    return float((ours - theirs).abs().max())


def test_the_configuration_decides_on_the_type(model: nn.Module) -> None:
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert sum(tensor.numel() for tensor in model.parameters()) == 1_132_016


def test_logits_and_tokens(model: nn.Module, parity: Any) -> None:
    prefill, decode, tokens = generate(model, parity)
    assert largest_difference(prefill, parity.expected["prefill_logits"]) < TOLERANCE
    assert largest_difference(decode, parity.expected["decode_logits"]) < TOLERANCE
    assert tokens == parity.expected["token_ids"][0].tolist()


def test_vision_features(model: nn.Module, parity: Any) -> None:
    seen: list[torch.Tensor] = []
    with Tracer(model, observers={"model.projector": seen.append}):
        model(**parity.forward_kwargs())
    crops, overview = seen
    assert largest_difference(crops, parity.expected["vision_crops"]) < TOLERANCE
    assert largest_difference(overview, parity.expected["vision_global"]) < TOLERANCE


def test_call_graph_of_every_forward(model: nn.Module, parity: Any) -> None:
    recorded = json.loads((parity.directory / "callgraph.json").read_text(encoding="utf-8"))
    tracer = Tracer(model, detector=PositionStages())
    with tracer:
        generate(model, parity)
    calls = tracer.calls().to_pylist()
    path_of = {call["call_id"]: call["module_path"] for call in calls}
    found: dict[str, Counter[tuple[str | None, str]]] = {}
    for call in calls:
        name = "prefill" if call["stage"] == "prefill" else f"decode_{call['step'] - 1}"
        edge = (path_of.get(call["parent_call_id"]), call["module_path"])
        found.setdefault(name, Counter())[edge] += 1
    expected = {
        stage["stage"]: {(parent, child): count for parent, child, count in stage["edges"]}
        for stage in recorded["stages"]
    }
    assert len(expected) == 7
    assert found == expected
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    assert classes == recorded["module_classes"]
