"""Which experts the routers chose, read from their outputs while the model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stage_runners.measurement import RoutingCounts

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

_ROUTER_CLASS = "MoEGate"


class RoutingRecorder:
    """Keeps the expert ids that each router returns; reads them back from the device only when asked.

    Parameters
    ----------
    model
        Its modules of class ``MoEGate`` are the routers; the first item that they return holds the ids (tokens, k).
    experts
        Number of routed experts.

    Attributes
    ----------
    observers
        Module path of each router to the function that takes its output.
    """

    def __init__(self, model: nn.Module, experts: int) -> None:
        self._experts = experts
        self._ids: dict[str, list[torch.Tensor]] = {
            path: [] for path, module in model.named_modules() if type(module).__name__ == _ROUTER_CLASS
        }
        self.observers: dict[str, Callable[[Any], None]] = {
            path: lambda output, kept=kept: kept.append(output[0])  # type: ignore[misc]
            for path, kept in self._ids.items()
        }

    def clear(self) -> None:
        """Forget what was recorded."""
        for kept in self._ids.values():
            kept.clear()

    def counts(self) -> RoutingCounts:
        """Tokens per expert since the last `clear`, which must have preceded a prefill."""
        prefill = {path: self._count(kept[:1])[0] for path, kept in self._ids.items() if kept}
        decode = {path: self._count(kept[1:]) for path, kept in self._ids.items()}
        return RoutingCounts(prefill, decode)

    def _count(self, forwards: list[torch.Tensor]) -> np.ndarray[Any, np.dtype[np.int64]]:
        counts = np.zeros((len(forwards), self._experts), np.int64)
        for forward, ids in enumerate(forwards):
            counts[forward] = np.bincount(ids.flatten().cpu().numpy(), minlength=self._experts)
        return counts
