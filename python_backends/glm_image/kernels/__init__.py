"""Kernels of our own, for the steps where libraries leave the device waiting.

Each has a twin in plain torch, with which a test compares it. For the first stage: the linears, norms and attention
that ``ar.model`` makes of torch's operators, and ``ar.sampler.draw``. For the second: diffusers' own blocks.
"""
