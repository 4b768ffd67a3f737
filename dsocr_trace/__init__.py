"""dsocr-trace: where DeepSeek-OCR spends its time, beside what every module should cost.

The names below are loaded when first used, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from dsocr_trace.exports.files import load_report, save_report
    from dsocr_trace.forecasts.forecast import Forecast, predict
    from dsocr_trace.forecasts.sweep import sweep
    from dsocr_trace.runs.many import load_all
    from dsocr_trace.runs.store import Run, load
    from hooks.tracer import Tracer as trace  # noqa: N813  reads as a verb in a with statement

__all__ = ["Forecast", "Run", "load", "load_all", "load_report", "predict", "save_report", "sweep", "trace"]

_HOME: Final = {
    "Forecast": ("dsocr_trace.forecasts.forecast", "Forecast"),
    "predict": ("dsocr_trace.forecasts.forecast", "predict"),
    "Run": ("dsocr_trace.runs.store", "Run"),
    "load": ("dsocr_trace.runs.store", "load"),
    "load_all": ("dsocr_trace.runs.many", "load_all"),
    "load_report": ("dsocr_trace.exports.files", "load_report"),
    "save_report": ("dsocr_trace.exports.files", "save_report"),
    "sweep": ("dsocr_trace.forecasts.sweep", "sweep"),
    "trace": ("hooks.tracer", "Tracer"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
