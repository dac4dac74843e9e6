"""Memory of the second stage in bytes, computed from its configs before anything is allocated.

The engine, ``glm-image inspect`` and the capacity planner use these formulas; none of them imports torch for it.
``itemsize`` is the number of bytes of an element of the dtype that the stage computes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from glm_image.request import geometry
from glm_image.request.geometry import Size

FP32_BYTES = 4
INT8_BYTES = 1

BLOCK_MATRICES: Final = 12
"""Parameters of the six linear layers of a block that are quantized, in matrices of [width, width]: four of the
attention, four each of the MLP's two."""

BLOCK_ROWS: Final = 9
"""Output channels of these layers, in widths: one each of q, k, v, out and down, four of up."""

STEP_TENSORS: Final = {1: 15, 2: 19}
"""Upper bound of the live tensors of [image tokens, width] in a pass of one or two sequences through the blocks.

In bf16 diffusers' blocks have 14.1 and 16.2 (their rotary embedding works in fp32), in fp32 13.0 and 15.1. The fused
blocks run both sequences together and have 9 each; with int8 on CUDA also int32 sums of the MLP, which are not counted.
"""

VAE_TENSORS: Final = 5
"""Upper bound of the live tensors of [height, width, channels] in the VAE's decoder, its convolutions' copies included.

Channels are those of its largest feature map. The published VAE has three such tensors (a block's input, its norm and
its activation) and up to two copies that a convolution makes: 4.03 tensors in all on a CPU, 4.75 through cuDNN, 2.75
with channels last and fused norms. Where the last block does not narrow, five tensors are alive and the convolutions'
copies are not.
"""


def quantization_saving(config: Mapping[str, Any], itemsize: int) -> int:
    """Returns by how many bytes 8-bit linear layers make the weights of a transformer smaller.

    Only the blocks' six linear layers are quantized, each with one fp32 scale an output channel; the modulation and the
    layers outside the blocks keep their dtype. See ``dit.quantization``.
    """
    width = _width(config)
    parameters = config["num_layers"] * BLOCK_MATRICES * width * width
    scales = config["num_layers"] * BLOCK_ROWS * width
    return int(parameters * (itemsize - INT8_BYTES) - scales * FP32_BYTES)


def step_bytes(config: Mapping[str, Any], tokens: int, itemsize: int, *, sequences: int = 2) -> int:
    """Returns an upper bound of the memory in which a pass through the blocks works.

    ``tokens`` are the image tokens of a sequence; ``sequences`` is 2 for a denoising step with guidance, otherwise 1.
    """
    return int(STEP_TENSORS[sequences] * tokens * _width(config) * itemsize)


def source_bytes(config: Mapping[str, Any], tokens: int, itemsize: int) -> int:
    """Returns the memory of the keys and values of source images with ``tokens`` image tokens, and of their pass."""
    kept = 2 * config["num_layers"] * tokens * _width(config) * itemsize
    return int(kept + step_bytes(config, tokens, itemsize, sequences=1))


def vae_bytes(config: Mapping[str, Any], size: Size, itemsize: int) -> int:
    """Returns an upper bound of the memory in which the VAE decodes an image in one piece."""
    # The last block reads, at full resolution, the channels of the one before it.
    channels = config["block_out_channels"][:2]
    return int(VAE_TENSORS * size.height * size.width * max(channels) * itemsize)


def working_bytes(transformer: Mapping[str, Any], vae: Mapping[str, Any], size: Size, itemsize: int) -> int:
    """Returns the memory of a denoising step with guidance, and of decoding another image of that size meanwhile."""
    generated = geometry.generated_size(size)
    side = transformer["patch_size"] * 2 ** (len(vae["block_out_channels"]) - 1)  # of an image token, in pixels
    tokens = generated.height * generated.width // side**2
    return step_bytes(transformer, tokens, itemsize) + vae_bytes(vae, generated, itemsize)


def _width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])
