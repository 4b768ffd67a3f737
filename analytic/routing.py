"""How many tokens each expert gets: measured in a run, or planned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from analytic.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from analytic.config import ExpertSizes
    from analytic.cost import Size

Counts: TypeAlias = npt.NDArray[np.int64]

#: How a plan spreads tokens over experts. ``balanced``: as evenly as whole numbers allow. ``worst``: no other spread
#: costs more, see `plan`.
Plan: TypeAlias = Literal["balanced", "worst"]
PLANS: Final[tuple[Plan, ...]] = ("balanced", "worst")


class ExpertLoad(Protocol):
    """Tokens of the experts of one mixture-of-experts layer."""

    def groups(self, forwards: Size) -> Iterator[tuple[int, Size, Size]]:
        """Experts that work: number, in how many of the `forwards` it does, and its tokens in them."""


def plan(how: Plan, tokens: Size, sizes: ExpertSizes) -> list[tuple[Size, Size]]:
    """Spread the choices of one forward over the experts.

    ``balanced`` gives every expert the same number of tokens, and one more to some. ``worst`` is an upper bound: it
    first gives a token to as many experts as possible, so that most weights are read, and then fills experts up to
    all tokens of the forward, one after the other. For every cost that is convex in an expert's tokens, such as a
    roofline, no spread costs more: the sum of convex functions is largest at the ends of what each may get.

    Parameters
    ----------
    how
        Which plan.
    tokens
        Tokens of the forward: an int or an array.
    sizes
        Experts of the layer.

    Returns
    -------
    list of (Size, Size)
        Number of experts and tokens of each, most tokens first. Numbers may be zero.
    """
    tokens = np.asarray(tokens)
    choices = tokens * sizes.per_token
    if how == "balanced":
        share, rest = np.divmod(choices, sizes.experts)
        return [(rest, share + 1), (np.where(share > 0, sizes.experts - rest, 0), share)]
    busy = np.minimum(choices, sizes.experts)
    full, rest = np.divmod(choices - busy, np.maximum(tokens - 1, 1))
    partly = np.where(rest > 0, 1, 0)
    return [(full, tokens), (partly, rest + 1), (busy - full - partly, np.ones_like(tokens))]


@attrs.frozen(eq=False)
class PlannedLoad:
    """A plan for each of many workloads: like experts are one group, called as often as it has experts.

    Attributes
    ----------
    how
        Which plan.
    tokens
        Tokens of one forward (workloads,).
    sizes
        Experts of the layer.
    """

    how: Plan
    tokens: Size
    sizes: ExpertSizes

    def groups(self, forwards: Size) -> Iterator[tuple[int, Size, Size]]:
        """Groups of like experts."""
        for number, (experts, tokens) in enumerate(plan(self.how, self.tokens, self.sizes)):
            # Any of the model's experts can stand for a group, since they are alike.
            yield min(number, self.sizes.experts - 1), experts * forwards, tokens


@attrs.frozen(eq=False)
class CountedLoad:
    """Counts of every expert in every forward.

    Attributes
    ----------
    counts
        Tokens (forwards, experts).
    """

    counts: Counts

    def groups(self, forwards: Size) -> Iterator[tuple[int, Size, Size]]:
        """Every expert that gets tokens, with its tokens in each such forward."""
        del forwards  # the counts have a row for each
        for expert in range(self.counts.shape[1]):
            tokens = self.counts[:, expert]
            tokens = tokens[tokens > 0]
            if tokens.size:
                # A plain number where all forwards are alike: then the sizes of many experts are equal.
                alike = (tokens == tokens[0]).all()
                yield expert, tokens.size, int(tokens[0]) if alike else tokens


def _as_rows(counts: Mapping[int, npt.ArrayLike]) -> dict[int, Counts]:
    return {layer: np.atleast_2d(np.asarray(array, dtype=np.int64)) for layer, array in counts.items()}


@attrs.frozen(eq=False)
class Routing:
    """Tokens per expert, for every forward of the decoder.

    Attributes
    ----------
    prefill
        For each mixture-of-experts layer, counts of shape (1, experts); (experts,) is accepted.
    decode
        For each mixture-of-experts layer, counts of shape (decode forwards, experts).
    source
        ``measured`` in a run, or the plan that made it.
    """

    prefill: Mapping[int, Counts] = attrs.field(converter=_as_rows)
    decode: Mapping[int, Counts] = attrs.field(converter=_as_rows)
    source: Literal["measured", "balanced", "worst"]

    @classmethod
    def planned(
        cls, how: Plan, sizes: ExpertSizes, *, tokens: int, forwards: Sequence[int] | Counts, batch_size: int = 1
    ) -> Routing:
        """Counts of a plan. In the prefill the busiest experts are the first; in decode all take turns.

        Parameters
        ----------
        how
            Which plan.
        sizes
            Experts of the model.
        tokens
            Positions of one prompt.
        forwards
            Numbers of the decode forwards, the first being 1. The busiest experts begin at number
            ``s * k * batch_size`` in forward s.
        batch_size
            Prompts per forward.
        """
        first = np.asarray(forwards, dtype=np.int64) * batch_size * sizes.per_token
        prefill = _turned(_counts(how, tokens * batch_size, sizes), np.zeros(1, dtype=np.int64))
        decode = _turned(_counts(how, batch_size, sizes), first)
        return cls(dict.fromkeys(sizes.layers, prefill), dict.fromkeys(sizes.layers, decode), how)

    def check(self, sizes: ExpertSizes, *, tokens: int, forwards: int, batch_size: int = 1) -> None:
        """Check that the counts belong to this model and to these forwards.

        Raises
        ------
        InputError
            If a layer is missing, an array has another shape, or a forward's counts do not add up to k per token.
        """
        for stage, counts, rows, positions in (
            ("prefill", self.prefill, 1, tokens),
            ("decode", self.decode, forwards, 1),
        ):
            if sorted(counts) != list(sizes.layers):
                raise InputError(
                    f"{stage} routing has layers {sorted(counts)}, the model's expert layers are {list(sizes.layers)}"
                )
            expected = positions * batch_size * sizes.per_token
            for layer, array in counts.items():
                where = f"{stage} routing of layer {layer}"
                if array.shape != (rows, sizes.experts):
                    raise InputError(f"{where} has shape {array.shape}, it must be {(rows, sizes.experts)}")
                if (array < 0).any() or (array.sum(axis=1) != expected).any():
                    raise InputError(f"{where} must hold counts that add up to {expected} in every forward")


def _counts(how: Plan, tokens: int, sizes: ExpertSizes) -> Counts:
    """Tokens of each expert (experts,), most first."""
    groups = plan(how, tokens, sizes)
    worked = np.concatenate([np.full(int(experts), int(each), dtype=np.int64) for experts, each in groups])
    return np.pad(worked, (0, sizes.experts - worked.size))


def _turned(counts: Counts, first: Counts) -> Counts:
    """The counts (forwards, experts), from expert `first` (forwards,) on."""
    turned: Counts = counts[(np.arange(counts.size, dtype=np.int64)[None, :] - first[:, None]) % counts.size]
    return turned
