"""Estimates throughput, latency and memory of every profile on a machine, without the machine."""
