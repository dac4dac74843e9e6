"""The fused decode step and prefill of the AR, over the kernels of ``glm_image.kernels``."""
