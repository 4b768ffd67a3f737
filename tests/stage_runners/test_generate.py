from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from hooks.tracer import PositionStages, Tracer, wrapped_modules
from stage_runners.generate import Generation

if TYPE_CHECKING:
    from torch import nn

    from stage_runners.inputs import ModelInputs

Build = "Callable[..., nn.Module]"
Inputs = "Callable[..., ModelInputs]"

#: No pair of tokens may repeat: the tiny model would run in a circle.
NGRAM = 2
STEPS = 12


@pytest.fixture
def model(tiny_model: Build) -> nn.Module:
    return lively(tiny_model(seed=1))


@pytest.fixture
def inputs(inputs_of: Inputs) -> ModelInputs:
    return inputs_of(no_repeat_ngram_size=NGRAM)


def lively(model: nn.Module) -> nn.Module:
    """Weights so large that tokens depend on what came before, embeddings so small that they repeat."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        model.get_parameter("model.embed_tokens.weight").mul_(0.02)
    return model


def generated(model: nn.Module, inputs: ModelInputs, steps: int = STEPS) -> Generation:
    generation = Generation(model, inputs)
    generation.start()
    for _ in range(steps):
        generation.advance()
    return generation


def allowed(ids: list[int], token: int) -> bool:
    """Whether `token` after `ids` repeats no n-gram."""
    seen = {tuple(ids[at : at + NGRAM]) for at in range(len(ids) - NGRAM + 1)}
    return (*ids[len(ids) - NGRAM + 1 :], token) not in seen


def test_tokens_are_the_likeliest_that_repeat_no_ngram(model: nn.Module, inputs: ModelInputs) -> None:
    """Against a loop that knows no cache."""
    ids, skipped = inputs.input_ids[0].tolist(), 0
    kwargs = inputs.forward_kwargs()
    for _ in range(STEPS + 1):
        mask = torch.zeros(1, len(ids), dtype=torch.bool)
        mask[:, : inputs.images_seq_mask.shape[1]] = inputs.images_seq_mask
        given = kwargs | {"input_ids": torch.tensor([ids]), "images_seq_mask": mask}
        ranked = model(**given, use_cache=False).logits[0, -1].argsort(descending=True).tolist()
        best = next(token for token in ranked if allowed(ids, token))
        skipped += best != ranked[0]
        ids.append(best)
    assert generated(model, inputs).tokens == ids[-STEPS - 1 :]
    assert skipped, "the n-gram rule never mattered here"


def test_start_and_advance_return_the_token(model: nn.Module, inputs: ModelInputs) -> None:
    generation = Generation(model, inputs)
    assert generation.tokens == []
    returned = [generation.start(), generation.advance(), generation.advance()]
    assert generation.tokens == returned


def test_the_inputs_are_not_changed(model: nn.Module, inputs: ModelInputs) -> None:
    before = inputs.input_ids.clone()
    first = generated(model, inputs, 3).tokens
    assert torch.equal(inputs.input_ids, before)
    assert generated(model, inputs, 3).tokens == first


def test_every_step_can_run_again(model: nn.Module, inputs: ModelInputs) -> None:
    generation = generated(model, inputs)
    tokens = list(generation.tokens)
    assert len(set(tokens)) > 5
    for step in range(STEPS, 0, -1):
        for _ in range(2):
            generation.rewind(step)
            assert generation.tokens == tokens[:step]
            assert generation.advance() == tokens[step]


def test_after_a_rewind_the_rest_follows(model: nn.Module, inputs: ModelInputs) -> None:
    generation = generated(model, inputs)
    tokens = list(generation.tokens)
    generation.rewind(1)
    for _ in range(STEPS):
        generation.advance()
    assert generation.tokens == tokens


def test_a_rewound_step_is_traced_as_that_step(model: nn.Module, inputs: ModelInputs) -> None:
    tracer = Tracer(model, detector=PositionStages())
    with tracer:
        generation = generated(model, inputs, 4)
        for step in (4, 2, 1):
            generation.rewind(step)
            generation.advance()
    roots = [call for call in tracer.calls().to_pylist() if call["parent_call_id"] is None]
    assert [call["step"] for call in roots] == [0, 1, 2, 3, 4, 4, 2, 1]


@pytest.mark.parametrize("step", [-1, 0, 5, 6])
def test_a_step_that_has_not_been_run(model: nn.Module, inputs: ModelInputs, step: int) -> None:
    generation = generated(model, inputs, 4)
    tokens = list(generation.tokens)
    with pytest.raises(ValueError, match=f"decode step {step} has not been run"):
        generation.rewind(step)
    assert generation.tokens == tokens


def test_a_fork_goes_its_own_way(model: nn.Module, inputs: ModelInputs) -> None:
    expected = generated(model, inputs).tokens
    generation = generated(model, inputs, 6)
    twin = generation.fork()
    twin.rewind(2)
    for _ in range(4):
        twin.advance()
    assert generation.tokens == expected[:7]
    assert twin.tokens == expected[:6]
    for _ in range(6):
        generation.advance()
    assert generation.tokens == expected
    for _ in range(7):
        twin.advance()
    assert twin.tokens == expected


# --- under the tracer ---


@pytest.mark.parametrize("nvtx", [False, True], ids=["plain", "nvtx"])
@pytest.mark.parametrize("seed", range(4))
def test_tracing_changes_no_token(
    tiny_model: Build, inputs_of: Inputs, monkeypatch: pytest.MonkeyPatch, seed: int, *, nvtx: bool
) -> None:
    monkeypatch.delenv("NVTX_DISABLE", raising=False)
    model = lively(tiny_model(seed=seed))
    inputs = inputs_of(seed=seed, no_repeat_ngram_size=NGRAM)
    untraced = generated(model, inputs).tokens
    tracer = Tracer(model, detector=PositionStages(), nvtx=nvtx, stage_of_subtree={"model.sam_model": "vision"})
    with tracer:
        assert len(wrapped_modules(model)) == len(list(model.modules()))
        traced = generated(model, inputs).tokens
    assert traced == untraced
    assert len(set(untraced)) > 5
    assert tracer.calls().num_rows > STEPS * 70
    assert generated(model, inputs).tokens == untraced


def test_tracing_changes_no_logit(model: nn.Module, inputs: ModelInputs) -> None:
    kwargs: dict[str, Any] = inputs.forward_kwargs()
    untraced = model(**kwargs).logits
    with Tracer(model, nvtx=True):
        traced = model(**kwargs).logits
    assert torch.equal(traced, untraced)
