"""dsocr-trace: where DeepSeek-OCR spends its time, beside what every module should cost.

The names below are loaded when first used, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from dsocr_trace.export import load_report, save_report
    from dsocr_trace.forecast import Forecast, predict
    from dsocr_trace.many import load_all
    from dsocr_trace.store import Run, load
    from dsocr_trace.sweeps import sweep
    from hooks.tracer import Tracer as trace  # noqa: N813  reads as a verb in a with statement

__all__ = ["Forecast", "Run", "load", "load_all", "load_report", "predict", "save_report", "sweep", "trace"]

_HOME: Final = {
    "Forecast": ("dsocr_trace.forecast", "Forecast"),
    "predict": ("dsocr_trace.forecast", "predict"),
    "Run": ("dsocr_trace.store", "Run"),
    "load": ("dsocr_trace.store", "load"),
    "load_all": ("dsocr_trace.many", "load_all"),
    "load_report": ("dsocr_trace.export", "load_report"),
    "save_report": ("dsocr_trace.export", "save_report"),
    "sweep": ("dsocr_trace.sweeps", "sweep"),
    "trace": ("hooks.tracer", "Tracer"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
