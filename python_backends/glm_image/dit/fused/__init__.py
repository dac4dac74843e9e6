"""The fused transformer blocks of the DiT, over the kernels of ``glm_image.kernels``."""
