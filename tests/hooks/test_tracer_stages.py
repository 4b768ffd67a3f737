"""Stage and step of calls."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define
from torch import nn

from hooks.tracer import PositionStages, Tracer


@define
class Cache:
    length: int

    def get_seq_length(self) -> int:
        return self.length


class Decoder(nn.Module):
    """Uses its vision part when several positions come."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Identity())
        self.vision_norm = nn.Identity()
        self.layer = nn.Identity()

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None) -> None:
        if input_ids.shape[1] > 1:
            self.vision_norm(self.vision(input_ids))
        self.layer(input_ids)
        if past_key_values is not None:
            past_key_values.length += input_ids.shape[1]


def ids(positions: int) -> torch.Tensor:
    return torch.zeros(1, positions, dtype=torch.long)


def test_position_stages_through_a_generation_and_a_replay() -> None:
    detect, cache = PositionStages(), Cache(0)
    assert detect((ids(7),), {"past_key_values": cache}) == ("prefill", 0)
    found = []
    for length in (7, 8, 9, 7, 8):
        cache.length = length
        found.append(detect((), {"input_ids": ids(1), "past_key_values": cache}))
    assert found == [("decode", 1), ("decode", 2), ("decode", 3), ("decode", 1), ("decode", 2)]
    cache.length = 0
    assert detect((ids(3),), {"past_key_values": cache}) == ("prefill", 0)
    cache.length = 3
    assert detect((ids(1),), {"past_key_values": cache}) == ("decode", 1), "the prompt is the last prefill's"


def test_position_stages_reads_embeddings_and_legacy_caches() -> None:
    detect = PositionStages()
    assert detect((), {"input_ids": None, "inputs_embeds": torch.zeros(1, 5, 8), "past_key_values": ()}) == (
        "prefill",
        0,
    )
    legacy = tuple((torch.zeros(1, 2, 6, 4),) * 2 for _ in range(3))
    assert detect((), {"inputs_embeds": torch.zeros(1, 1, 8), "past_key_values": legacy}) == ("decode", 2)


def test_position_stages_at_the_edges() -> None:
    assert PositionStages()((), {}) == ("other", None)
    assert PositionStages()((ids(1),), {"past_key_values": Cache(4)}) == ("decode", None)
    single = PositionStages()
    assert single((ids(1),), {}) == ("prefill", 0), "a prompt of one token"
    assert single((ids(1),), {"past_key_values": Cache(1)}) == ("decode", 1)
    chunked = PositionStages()
    chunked((ids(4),), {})
    assert chunked((ids(3),), {"past_key_values": Cache(4)}) == ("prefill", 0)
    assert chunked((ids(1),), {"past_key_values": Cache(7)}) == ("decode", 1)


def test_descendants_inherit_and_subtrees_keep_their_own_stage() -> None:
    model, cache = Decoder(), Cache(0)
    with Tracer(model, detector=PositionStages(), stage_of_subtree={"vision": "vision"}) as tracer:
        model(ids(5), past_key_values=cache)
        model(ids(1), past_key_values=cache)
        model.layer(ids(1))
        model.vision(ids(1))
    rows = [(row["module_path"], row["stage"], row["step"]) for row in tracer.calls().to_pylist()]
    assert rows == [
        ("", "prefill", 0),
        ("vision", "vision", 0),
        ("vision.0", "vision", 0),
        ("vision_norm", "prefill", 0),
        ("layer", "prefill", 0),
        ("", "decode", 1),
        ("layer", "decode", 1),
        ("layer", "other", None),
        ("vision", "vision", None),
        ("vision.0", "vision", None),
    ]
    graph = {(row["stage"], row["parent_path"], row["child_path"]) for row in tracer.callgraph().to_pylist()}
    assert ("vision", "", "vision") in graph, "the stage of an edge is the child's"
    assert ("vision", None, "vision") in graph


def test_the_innermost_subtree_counts() -> None:
    model = Decoder()
    with Tracer(model, stage_of_subtree={"": "prefill", "vision": "vision", "vision.0": "other"}) as tracer:
        model(ids(2))
    assert tracer.calls()["stage"].to_pylist() == ["prefill", "vision", "other", "prefill", "prefill"]
