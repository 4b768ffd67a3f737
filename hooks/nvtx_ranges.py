"""NVTX ranges around forward calls, prepared once for each stage and module."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import nvtx

if TYPE_CHECKING:
    from collections.abc import Sequence

DOMAIN: Final = "dsocr-trace"

#: A profiler that injects itself into a process sets one of these.
_ATTACHED: Final = ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID")


def nvtx_attached() -> bool:
    """Say whether a profiler listens to this process's NVTX ranges, by the variables that profilers set.

    Returns
    -------
    bool
        True under Nsight Systems, Nsight Compute or another injected tool, unless ``NVTX_DISABLE`` is set.
    """
    return bool(nvtx.enabled()) and any(os.environ.get(name) for name in _ATTACHED)


class Ranges:
    """The ranges of a module tree: message = module path, category = stage, in the domain `DOMAIN`.

    Parameters
    ----------
    messages
        One message for each module; the first is the root's.
    own_stages
        The stage that a module always has, or None where it takes that of the root call.
    """

    def __init__(self, messages: Sequence[str], own_stages: Sequence[str | None]) -> None:
        self._messages = messages
        self._own_stages = own_stages
        self._prepared: dict[str, list[Any]] = {}
        self._stepped: dict[str, Any] = {}

    def of(self, stage: str) -> list[Any]:
        """Give the ranges for a root call in ``stage``: context managers by module index.

        The first time that a stage is asked for, they are made; that takes some microseconds for each module.
        """
        if stage not in self._prepared:
            self._stepped[stage] = self._range(self._messages[0], self._own_stages[0] or stage, payload=0)
            self._prepared[stage] = [
                self._range(message, own or stage)
                for message, own in zip(self._messages, self._own_stages, strict=True)
            ]
        return self._prepared[stage]

    def root(self, stage: str, step: int | None) -> Any:
        """Give the root's range, whose payload is ``step`` unless that is None."""
        if step is None:
            return self.of(stage)[0]
        stepped = self._stepped[stage]
        stepped.attributes.payload = step
        return stepped

    @staticmethod
    def _range(message: str, stage: str, payload: int | None = None) -> Any:
        return nvtx.annotate(message, domain=DOMAIN, category=stage, payload=payload)
