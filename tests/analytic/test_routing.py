"""Planned and measured expert routing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analytic.config import ExpertSizes, variant_config
from analytic.errors import InputError
from analytic.routing import PLANS, CountedLoad, Counts, Plan, PlannedLoad, Routing, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZES = variant_config("deepseek-ocr-v1-base").experts


def test_prefill_remainder_goes_to_the_lowest_ids() -> None:
    counts = Routing.planned("balanced", SIZES, tokens=909, forwards=[1]).prefill[1]
    share, rest = divmod(909 * 6, 64)
    assert counts.tolist() == [[share + 1] * rest + [share] * (64 - rest)]


def test_decode_forwards_take_turns() -> None:
    counts = Routing.planned("balanced", SIZES, tokens=909, forwards=range(1, 12)).decode[11]
    assert counts.shape == (11, 64)
    for row, forward in enumerate(range(1, 12)):
        chosen = sorted((forward * 6 + i) % 64 for i in range(6))
        assert np.flatnonzero(counts[row]).tolist() == chosen
    assert counts.sum(axis=1).tolist() == [6] * 11


def test_layers_are_those_with_experts() -> None:
    assert sorted(Routing.planned("balanced", SIZES, tokens=5, forwards=[]).decode) == list(range(1, 12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: {1: counts}, r"prefill routing has layers \[1\]"),
        (lambda counts: dict.fromkeys(range(1, 12), counts[:, :5]), r"shape \(1, 5\), it must be \(1, 64\)"),
        (lambda counts: dict.fromkeys(range(1, 12), counts + 1), r"add up to 30 in every forward"),
    ],
)
def test_routing_of_another_run_is_refused(change: Callable[[Counts], dict[int, Counts]], message: str) -> None:
    routing = Routing.planned("balanced", SIZES, tokens=5, forwards=[1, 2])
    routing.check(SIZES, tokens=5, forwards=2)
    wrong = attrs.evolve(routing, prefill=change(routing.prefill[1]))
    with pytest.raises(InputError, match=message):
        wrong.check(SIZES, tokens=5, forwards=2)


@st.composite
def loads(draw: st.DrawFn, most_experts: int = 70, most_tokens: int = 300) -> tuple[int, ExpertSizes]:
    """Tokens of a forward, and a layer's experts."""
    experts = draw(st.integers(1, most_experts))
    return draw(st.integers(1, most_tokens)), ExpertSizes((1,), experts, draw(st.integers(1, experts)))


def spread(how: Plan, tokens: int, sizes: ExpertSizes) -> list[int]:
    """Tokens of each expert that works."""
    groups = ((int(experts), int(each)) for experts, each in plan(how, tokens, sizes))
    return [each for experts, each in groups for _ in range(experts)]


@pytest.mark.parametrize("how", PLANS)
@given(load=loads())
def test_a_plan_can_happen(how: Plan, load: tuple[int, ExpertSizes]) -> None:
    """Each token chooses k different experts: none has more tokens than there are, and all choices are made."""
    tokens, sizes = load
    each = spread(how, tokens, sizes)
    assert sum(each) == tokens * sizes.per_token
    assert len(each) <= sizes.experts
    assert all(1 <= count <= tokens for count in each)
    assert each == sorted(each, reverse=True)


@given(load=loads())
def test_balanced_experts_differ_by_one_token(load: tuple[int, ExpertSizes]) -> None:
    tokens, sizes = load
    each = spread("balanced", tokens, sizes)
    assert max(each) - min(each) <= 1
    assert len(each) == min(tokens * sizes.per_token, sizes.experts)


@pytest.mark.parametrize("how", PLANS)
@pytest.mark.parametrize("kind", [np.int64, np.float64])
@given(drawn=st.lists(loads(), min_size=1, max_size=5))
def test_many_forwards_at_once(how: Plan, kind: type[np.number], drawn: list[tuple[int, ExpertSizes]]) -> None:
    sizes = drawn[0][1]
    tokens = np.array([count for count, _ in drawn], dtype=kind)
    together = [(np.broadcast_to(experts, tokens.shape), each) for experts, each in plan(how, tokens, sizes)]
    for index, count in enumerate(tokens):
        alone = [(int(experts), int(each)) for experts, each in plan(how, int(count), sizes) if experts]
        assert [(int(n[index]), int(each[index])) for n, each in together if n[index]] == alone


def spreads(choices: int, experts: int, most: int) -> Iterator[list[int]]:
    """Every way to hand out the choices, most first."""
    if experts == 0:
        if choices == 0:
            yield []
        return
    for first in range(min(choices, most), -1, -1):
        for rest in spreads(choices - first, experts - 1, first):
            yield [first, *rest]


@given(
    load=loads(most_experts=6, most_tokens=5),
    per_token=st.integers(0, 9),
    weights=st.integers(0, 30),
    moved=st.integers(0, 9),
)
def test_no_spread_costs_more_than_the_worst(
    load: tuple[int, ExpertSizes], per_token: int, weights: int, moved: int
) -> None:
    """Against all that there are, for a roofline: arithmetic per token, or weights and what moves per token."""
    tokens, sizes = load

    def cost(each: list[int]) -> int:
        return sum(max(per_token * count, weights + moved * count) for count in each if count)

    everything = spreads(tokens * sizes.per_token, sizes.experts, tokens)
    assert cost(spread("worst", tokens, sizes)) == max(map(cost, everything))


@pytest.mark.parametrize("how", PLANS)
@given(load=loads(), batch=st.integers(1, 9), forwards=st.lists(st.integers(1, 1000), max_size=4))
def test_planned_counts_are_the_groups_of_the_plan(
    how: Plan, load: tuple[int, ExpertSizes], batch: int, forwards: list[int]
) -> None:
    """Counts of every expert and groups of like experts say the same, forward by forward."""
    tokens, sizes = load
    routing = Routing.planned(how, sizes, tokens=tokens, forwards=forwards, batch_size=batch)
    routing.check(sizes, tokens=tokens, forwards=len(forwards), batch_size=batch)
    assert routing.source == how
    for counts, in_forward in ((routing.prefill[1], tokens * batch), (routing.decode[1], batch)):
        expected = spread(how, in_forward, sizes)
        for row in counts:
            assert sorted(row[row > 0].tolist(), reverse=True) == expected
        grouped = [(int(n), int(each)) for _, n, each in PlannedLoad(how, in_forward, sizes).groups(1) if n]
        assert [each for n, each in grouped for _ in range(n)] == expected
    groups = CountedLoad(routing.decode[1]).groups(len(forwards))
    every = sum(int(np.broadcast_to(tokens, n).sum()) for _, n, tokens in groups)
    assert every == len(forwards) * batch * sizes.per_token


def test_the_worst_prefill_by_hand() -> None:
    """909 tokens, 64 experts, 6 choices: five experts get all tokens, one what is left, and all others one."""
    assert spread("worst", 909, SIZES) == [909] * 5 + [909 * 6 - 5 * 909 - 58] + [1] * 58
    assert spread("worst", 1, SIZES) == [1] * 6
    assert spread("worst", 11, SIZES) == [1 + (66 - 64)] + [1] * 63
