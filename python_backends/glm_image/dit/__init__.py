"""The DiT stage: a diffusion transformer that denoises latents under prior tokens, and the VAE that decodes them."""
