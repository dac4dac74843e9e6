"""The second stage: a diffusion transformer that paints image tokens, and the VAE that makes pixels of its latents."""
