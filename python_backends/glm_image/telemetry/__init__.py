"""Metrics, the request log, tracing and heartbeats."""
