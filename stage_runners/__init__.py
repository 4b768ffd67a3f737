"""Loading a model, building its inputs, and running vision, prefill and decode under the tracer."""
