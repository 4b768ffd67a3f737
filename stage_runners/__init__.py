"""Loading a model, building its inputs, and running vision, prefill and decode under the tracer."""

from stage_runners.loading import load_model

__all__ = ["load_model"]
