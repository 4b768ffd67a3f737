"""One greedy generation with a key-value cache, as the published inference code runs it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache, NoRepeatNGramLogitsProcessor

if TYPE_CHECKING:
    from torch import nn

    from stage_runners.inputs import ModelInputs


class Generation:
    """Prefill once with `start`, then one token per `advance`.

    `rewind` takes the generation back to the moment before a decode step, so that the very same step can run again
    under another instrument: earlier positions of the cache do not depend on later ones.

    Parameters
    ----------
    model
        Takes the arguments of the published model's forward, returns ``logits`` and ``past_key_values``.
    inputs
        On the model's device, in its type.

    Attributes
    ----------
    tokens
        Generated ids of the batch's first row; ``tokens[0]`` comes from the prefill, ``tokens[s]`` from decode step s.
    """

    def __init__(self, model: nn.Module, inputs: ModelInputs) -> None:
        self._model = model
        self._inputs = inputs
        self._cache = DynamicCache()
        self._ids = inputs.input_ids
        self._no_repeat = NoRepeatNGramLogitsProcessor(inputs.workload.no_repeat_ngram_size)
        self.tokens: list[int] = []

    @torch.no_grad()
    def start(self) -> int:
        """Run vision and prefill; return the first token."""
        return self._select(self._model(**self._inputs.forward_kwargs(), past_key_values=self._cache, use_cache=True))

    @torch.no_grad()
    def advance(self) -> int:
        """Run one decode step on the last token; return the next."""
        kwargs = self._inputs.forward_kwargs() | {"input_ids": self._ids[:, -1:]}
        return self._select(self._model(**kwargs, past_key_values=self._cache, use_cache=True))

    def rewind(self, step: int) -> None:
        """Go back to before decode step `step` (1 is the first); `advance` then runs that step.

        Raises
        ------
        ValueError
            If that step has not been run.
        """
        if not 1 <= step < len(self.tokens):
            raise ValueError(f"decode step {step} has not been run")
        surplus = len(self.tokens) - step
        # Negative counts positions to drop: the one meaning that all supported versions share.
        self._cache.crop(-surplus)
        self._ids = self._ids[:, :-surplus]
        del self.tokens[step:]

    def fork(self) -> Generation:
        """A generation of its own that stands where this one does."""
        twin = Generation(self._model, self._inputs)
        twin._cache = copy.deepcopy(self._cache)
        twin._ids = self._ids
        twin.tokens = list(self.tokens)
        return twin

    def _select(self, output: object) -> int:
        """Append the likeliest token that repeats no n-gram."""
        logits: torch.Tensor = output.logits  # type: ignore[attr-defined]
        # The clone lets go of the logits of all other positions.
        scores = self._no_repeat(self._ids, logits[:, -1, :].clone().float())
        best = scores.argmax(dim=-1)
        self._ids = torch.cat([self._ids, best[:, None]], dim=-1)
        # Reading the token back waits for the device, as the stopping test of the published loop does.
        self.tokens.append(int(best[0]))
        return self.tokens[-1]
