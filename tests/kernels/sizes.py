"""A decoder small enough for Triton's interpreter, and the tolerance between bf16 computations."""

from __future__ import annotations

from torch import Tensor

from glm_image.ar.config import ArConfig
from glm_image.request.parameters import Sampling

CONFIG = ArConfig(
    layers=2,
    hidden_size=96,
    intermediate_size=200,
    heads=6,
    kv_heads=2,
    head_dim=32,
    rotary_dim=16,
    rotary_theta=10000.0,
    mrope_section=(2, 3, 3),
    norm_eps=1e-5,
    attention_bias=True,
    vocab_size=150,
    vision_vocab_size=75,
    codebook_size=64,
    end_ids=(65,),
    sampling=Sampling(0.9, 0.75, 75),
)
BF16_ERROR = 0.02  # more than rounding: the interpreter truncates to bf16


def relative_error(got: Tensor, want: Tensor) -> float:
    """Returns the norm of the difference over that of ``want``."""
    return float((got.float() - want.float()).norm() / want.float().norm())
