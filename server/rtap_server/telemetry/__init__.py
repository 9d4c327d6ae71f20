"""Metrics, tracing, logs and feedback statistics."""
