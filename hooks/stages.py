"""Which stage of a generation a forward of the root module belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from hooks.wrappers import NO_CONTEXT, Context

if TYPE_CHECKING:
    from collections.abc import Mapping


class StageDetector(Protocol):
    """Finds the stage and the step of a root call from its arguments, before it runs."""

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Context:
        """Return the stage and the step; the step is None where there is none to count."""


def no_stage(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Context:  # noqa: ARG001
    """Put every root call in stage "other"; what a tracer does without a detector."""
    return NO_CONTEXT


class PositionStages:
    """Tells prefill from decode inside a generate loop by the number of positions that a forward is given.

    Several positions, or one with nothing cached, are a prefill, step 0. One position is a decode step, numbered by
    what the cache holds beyond the prompt: 1 for the first after the prefill, and 1 again when it is replayed on a
    cache cropped to the prompt. The prompt is what the last prefill left cached. A decode without a prefill before it
    has no step; a call with neither ``input_ids`` nor ``inputs_embeds`` is "other".
    """

    def __init__(self) -> None:
        self._prompt_length: int | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Context:
        """Return the stage and the step of the call with these arguments.

        Parameters
        ----------
        args, kwargs
            The root's arguments; ``input_ids`` may be the first positional one.

        Returns
        -------
        tuple of str and (int or None)
            Stage and step.
        """
        positions = _positions(args, kwargs)
        if positions is None:
            return NO_CONTEXT
        cached = _cached_length(kwargs.get("past_key_values"))
        if positions > 1 or cached == 0:
            self._prompt_length = cached + positions
            return "prefill", 0
        return "decode", None if self._prompt_length is None else cached - self._prompt_length + 1


def _positions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    given = kwargs.get("input_ids", args[0] if args else None)
    if given is None:
        given = kwargs.get("inputs_embeds")
    return None if given is None else int(given.shape[1])


def _cached_length(cache: Any) -> int:
    """Count the positions that a cache holds: a cache object, or a legacy tuple of (key, value) per layer."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[2]) if cache else 0
