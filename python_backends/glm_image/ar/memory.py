"""Memory of the first stage in bytes, computed from the decoder's sizes before anything is allocated.

The budget check, ``glm-image inspect`` and the capacity planner use these formulas; none of them imports torch for it.
``itemsize`` is the number of bytes of an element of the dtype that the stage computes in.
"""

from __future__ import annotations

from glm_image.ar.config import NOISE_BLOCK, ArConfig

FP32_BYTES = 4
INT8_BYTES = 1
INT64_BYTES = 8

SAMPLER_COPIES = 12
"""Live fp32 tensors of [slots, vision_vocab_size] in the unfused sampler."""

NORM_COPIES = 5
"""Live fp32 copies of a norm's input in the unfused norm."""

DISTANCE_COPIES = 3
"""Live fp32 tables [patches, codes] of distances in the quantizer."""


def decoder_parameters(config: ArConfig, ranks: int = 1) -> int:
    """Returns how many parameters the decoder has on each rank, head included."""
    part = config.part(ranks)
    matrices = sum(inputs * outputs for inputs, outputs in _linears(part, ranks))
    biases = part.layers * (part.heads + 2 * part.kv_heads) * part.head_dim * part.attention_bias
    norms = (4 * part.layers + 1) * part.hidden_size
    return matrices + biases + norms + part.vocab_size * part.hidden_size


def weight_bytes(config: ArConfig, itemsize: int, *, int8: bool = False, ranks: int = 1) -> int:
    """Returns the memory of the decoder's weights on each rank, head included; of the largest where ranks differ.

    With ``int8`` the linear layers have int8 weights and one fp32 scale an output channel.
    """
    size = decoder_parameters(config, ranks) * itemsize
    if int8:
        for inputs, outputs in _linears(config.part(ranks), ranks):
            size += _linear_bytes(inputs, outputs, itemsize, int8=True) - inputs * outputs * itemsize
    return size


def head_bytes(config: ArConfig, itemsize: int, *, int8: bool = False, ranks: int = 1) -> int:
    """Returns the part of ``weight_bytes`` that is the head's."""
    return _linear_bytes(*_linears(config.part(ranks), ranks)[-1], itemsize, int8=int8)


def _linear_bytes(inputs: int, outputs: int, itemsize: int, *, int8: bool) -> int:
    return inputs * outputs * INT8_BYTES + outputs * FP32_BYTES if int8 else inputs * outputs * itemsize


def _linears(part: ArConfig, ranks: int) -> list[tuple[int, int]]:
    """Returns input and output channels of a rank's linear layers, the head last."""
    hidden, inner = part.hidden_size, part.intermediate_size
    queries, keys = part.heads * part.head_dim, part.kv_heads * part.head_dim
    layer = [(hidden, queries + 2 * keys), (queries, hidden), (hidden, 2 * inner), (inner, hidden)]
    return [*layer * part.layers, (hidden, -(-part.vision_vocab_size // ranks))]


def kv_cache_bytes(config: ArConfig, slots: int, positions: int, itemsize: int) -> int:
    """Returns the memory of all slots' keys and values."""
    return 2 * config.layers * slots * config.kv_heads * positions * config.head_dim * itemsize


def state_bytes(config: ArConfig, slots: int, positions: int, itemsize: int, rows: int = 0) -> dict[str, int]:
    """Returns the memory of the tensors of ``DecodeState`` by purpose, for a rank's part of the decoder's sizes.

    With speculation, ``rows`` are the most of a step, and those of ``Window`` come on top.
    """
    vocabulary = config.vision_vocab_size
    slot = 4 * INT64_BYTES  # counters of ``DecodeState``
    window = (2 * slots + slots * positions + 2 * rows) * INT64_BYTES if rows else 0
    sampler_row = 2 * FP32_BYTES + 2 * INT64_BYTES
    return {
        f"{slots} x {positions} cached tokens": kv_cache_bytes(config, slots, positions, itemsize),
        "rotary tables": 2 * slots * positions * config.rotary_dim * itemsize,
        "noise": slots * NOISE_BLOCK * vocabulary * FP32_BYTES,
        "tokens and sampling": slots * (slot + sampler_row + positions * INT64_BYTES) + 2 * vocabulary + window,
    }


def activation_bytes(config: ArConfig, rows: int, positions: int, itemsize: int, *, int8: bool = False) -> int:
    """Returns an upper bound of the activations that are alive together; a step has ``rows`` rows.

    The peak is in the MLP of the longest prompt, or in the quantizer, where a prompt consists of source images.
    """
    hidden, inner, queries = config.hidden_size, config.intermediate_size, config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    attention = (queries + 2 * keys) + (queries + keys) + queries  # projected, rotated, result of the attention
    # Gate and up, then the activated gate and the product, or the norm of the result.
    token = (2 * hidden + attention + 2 * inner) * itemsize
    token += max(2 * inner * itemsize, NORM_COPIES * hidden * FP32_BYTES)
    prompt = positions * token
    if int8:  # the widest matrix in the activations' dtype, and a product before it is scaled
        prompt += (hidden + positions) * 2 * inner * itemsize
    quantizer = positions * config.codebook_size * FP32_BYTES * DISTANCE_COPIES
    sampler = rows * config.vision_vocab_size * FP32_BYTES * SAMPLER_COPIES
    return max(prompt, quantizer) + sampler
