"""How many tokens each expert gets: measured in a run, or spread evenly for planning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from analytic.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from analytic.config import ModelConfig

Counts: TypeAlias = npt.NDArray[np.int64]


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
        ``measured`` in a run, or ``balanced``: the expectation used for planning.
    """

    prefill: Mapping[int, Counts] = attrs.field(converter=_as_rows)
    decode: Mapping[int, Counts] = attrs.field(converter=_as_rows)
    source: Literal["measured", "balanced"]

    @classmethod
    def balanced(
        cls, config: ModelConfig, *, tokens: int, forwards: Sequence[int] | Counts, batch_size: int = 1
    ) -> Routing:
        """Spread tokens as evenly as whole numbers allow.

        Every expert gets the same share of the ``tokens * k`` choices. What is left over goes to the lowest ids in
        the prefill; in decode forward s it goes to experts ``(s * k * batch_size + i) mod experts``, so that all
        experts take turns.

        Parameters
        ----------
        config
            Dimensions of the model.
        tokens
            Positions of one prompt.
        forwards
            Numbers of the decode forwards, the first being 1.
        batch_size
            Prompts per forward.
        """
        decoder = config.decoder
        choices = batch_size * decoder.experts_per_token
        steps = np.asarray(forwards, dtype=np.int64)
        prefill = _spread(tokens * choices, np.zeros(1, dtype=np.int64), decoder.routed_experts)
        decode = _spread(choices, steps * choices, decoder.routed_experts)
        layers = decoder.moe_layers
        return cls(dict.fromkeys(layers, prefill), dict.fromkeys(layers, decode), "balanced")

    def check(self, config: ModelConfig, *, tokens: int, forwards: int, batch_size: int = 1) -> None:
        """Check that the counts belong to this model and to these forwards.

        Raises
        ------
        InputError
            If a layer is missing, an array has another shape, or a forward's counts do not add up to k per token.
        """
        decoder = config.decoder
        for stage, counts, rows, positions in (
            ("prefill", self.prefill, 1, tokens),
            ("decode", self.decode, forwards, 1),
        ):
            if sorted(counts) != list(decoder.moe_layers):
                raise InputError(
                    f"{stage} routing has layers {sorted(counts)}, the model's expert layers are "
                    f"{list(decoder.moe_layers)}"
                )
            expected = positions * batch_size * decoder.experts_per_token
            for layer, array in counts.items():
                where = f"{stage} routing of layer {layer}"
                if array.shape != (rows, decoder.routed_experts):
                    raise InputError(f"{where} has shape {array.shape}, it must be {(rows, decoder.routed_experts)}")
                if (array < 0).any() or (array.sum(axis=1) != expected).any():
                    raise InputError(f"{where} must hold counts that add up to {expected} in every forward")


def _spread(choices: int, first: Counts, experts: int) -> Counts:
    """Spread `choices` choices over the experts of each forward, the remainder from expert `first` on."""
    share, rest = divmod(choices, experts)
    distance = (np.arange(experts, dtype=np.int64)[None, :] - first[:, None]) % experts
    return share + (distance < rest).astype(np.int64)
