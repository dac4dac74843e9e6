"""Sizes of the published model, under the names of each part's ``config.json``.

The capacity planner computes memory from them, ``make_tiny_checkpoint.py --preset full`` writes them into configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from glm_image.ar.config import ArConfig
from glm_image.request.parameters import Sampling

DECODER: Final = ArConfig(
    layers=40,
    hidden_size=4096,
    intermediate_size=13696,
    heads=32,
    kv_heads=2,
    head_dim=128,
    rotary_dim=64,
    rotary_theta=10000.0,
    mrope_section=(8, 12, 12),
    norm_eps=1e-5,
    attention_bias=True,
    vocab_size=168064,
    vision_vocab_size=16512,
    codebook_size=16384,
    end_ids=(16385,),
    sampling=Sampling(0.9, 0.75, 16512),
)

FIRST_SPECIAL_ID: Final = 167841
"""Id of the padding token, the first special token."""

VISION: Final[Mapping[str, int]] = {
    "depth": 40,
    "hidden_size": 1536,
    "num_heads": 16,
    "intermediate_size": 6144,
    "image_size": 2048,
    "patch_size": 16,
    "in_channels": 3,
}
QUANTIZER: Final[Mapping[str, int]] = {
    "num_embeddings": DECODER.codebook_size,
    "embed_dim": 2048,
    "latent_channels": VISION["hidden_size"],
}

TRANSFORMER: Final[Mapping[str, int]] = {
    "num_layers": 30,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "time_embed_dim": 512,
    "condition_dim": 256,
    "text_embed_dim": 1472,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "prior_vq_quantizer_codebook_size": DECODER.codebook_size,
}
GLYPH_ENCODER: Final[Mapping[str, int]] = {
    "vocab_size": 384,
    "d_model": 1472,
    "num_layers": 12,
    "num_heads": 6,
    "d_kv": 64,
    "d_ff": 3584,
    "relative_attention_num_buckets": 32,
}
VAE: Final[Mapping[str, Any]] = {
    "block_out_channels": (128, 512, 1024, 1024),
    "layers_per_block": 3,
    "norm_num_groups": 32,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
}
