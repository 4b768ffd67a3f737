"""Balanced and measured expert routing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
import pytest

from analytic.config import variant_config
from analytic.errors import InputError
from analytic.routing import Counts, Routing

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = variant_config("deepseek-ocr-v1-base")


def test_prefill_remainder_goes_to_the_lowest_ids() -> None:
    counts = Routing.balanced(BASE, tokens=909, forwards=[1]).prefill[1]
    share, rest = divmod(909 * 6, 64)
    assert counts.tolist() == [[share + 1] * rest + [share] * (64 - rest)]


def test_decode_forwards_take_turns() -> None:
    counts = Routing.balanced(BASE, tokens=909, forwards=range(1, 12)).decode[11]
    assert counts.shape == (11, 64)
    for row, forward in enumerate(range(1, 12)):
        chosen = sorted((forward * 6 + i) % 64 for i in range(6))
        assert np.flatnonzero(counts[row]).tolist() == chosen
    assert counts.sum(axis=1).tolist() == [6] * 11


def test_layers_are_those_with_experts() -> None:
    assert sorted(Routing.balanced(BASE, tokens=5, forwards=[]).decode) == list(range(1, 12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: {1: counts}, r"prefill routing has layers \[1\]"),
        (lambda counts: dict.fromkeys(range(1, 12), counts[:, :5]), r"shape \(1, 5\), it must be \(1, 64\)"),
        (lambda counts: dict.fromkeys(range(1, 12), counts + 1), r"add up to 30 in every forward"),
    ],
)
def test_routing_of_another_run_is_refused(change: Callable[[Counts], dict[int, Counts]], message: str) -> None:
    routing = Routing.balanced(BASE, tokens=5, forwards=[1, 2])
    routing.check(BASE, tokens=5, forwards=2)
    wrong = attrs.evolve(routing, prefill=change(routing.prefill[1]))
    with pytest.raises(InputError, match=message):
        wrong.check(BASE, tokens=5, forwards=2)
