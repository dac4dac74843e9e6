"""The AR's decode step and prefill on Triton kernels; imported only where Triton can run."""
