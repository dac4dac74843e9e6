"""The AR's decode step and prefill on fused kernels, a file or more for each kind of device; imported only there."""
