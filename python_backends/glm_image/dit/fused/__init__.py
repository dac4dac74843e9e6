"""The fused transformer blocks and VAE of the DiT, on the kernels of ``glm_image.kernels``."""
