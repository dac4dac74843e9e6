"""Triton kernels over tensors, for the steps in which library kernels leave the device waiting.

Kernels know no model. Each has a reference implementation in plain torch, which the tests compare it with: the linear
layers, norms, attention and sampling of ``ar`` for the AR, diffusers' blocks and VAE for the DiT.
"""
