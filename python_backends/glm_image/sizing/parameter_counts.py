"""Parameters of each part, computed from its config: neither modules nor files are needed.

Those of the decoder are in ``ar.memory``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    """Parameters of a linear layer; of a convolution with ``inputs`` = input channels times window."""
    return inputs * outputs + outputs * bias


def vision_tower(config: Config) -> int:
    """Parameters of the vision tower, by ``vision_config``."""
    width, inner, bias = config["hidden_size"], config["intermediate_size"], config.get("attention_bias", True)
    attention = linear(width, 3 * width, bias) + linear(width, width, bias)
    block = attention + linear(width, inner) + linear(inner, width) + 4 * width
    positions = (config["image_size"] // config["patch_size"]) ** 2
    patches = linear(config.get("in_channels", 3) * config["patch_size"] ** 2, width)
    return int(config["depth"] * block + positions * width + patches)


def encoding_quantizer(config: Config) -> int:
    """Parameters of the vector quantizer on the way from features to codes, by ``vq_config``."""
    return int(config["num_embeddings"] * config["embed_dim"] + linear(config["latent_channels"], config["embed_dim"]))


def quantizer(config: Config) -> int:
    """Parameters of the whole vector quantizer; the server does not load its way back to features."""
    return encoding_quantizer(config) + linear(config["embed_dim"], config["latent_channels"])


def text_encoder(config: Config) -> int:
    """Parameters of the glyph encoder: T5 with a gated feed-forward network."""
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    layer = 4 * width * inner + 3 * width * config["d_ff"] + 2 * width
    buckets = config["relative_attention_num_buckets"] * config["num_heads"]
    return int(config["vocab_size"] * width + config["num_layers"] * layer + buckets + width)


def transformer(config: Config) -> int:
    """Parameters of the diffusion transformer."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    time = config["time_embed_dim"]
    patch = config["patch_size"] ** 2
    block = 4 * linear(width, width) + linear(width, 4 * width) + linear(4 * width, width) + linear(time, 12 * width)
    projectors = linear(config["text_embed_dim"], width) + 3 * linear(width, width)  # of glyphs and prior
    projectors += linear(config["in_channels"] * patch, width) + linear(width, config["out_channels"] * patch)
    times = 3 * linear(time, time) + linear(4 * config["condition_dim"], time)
    codes = config["prior_vq_quantizer_codebook_size"] * width
    return int(config["num_layers"] * block + projectors + times + linear(time, 2 * width) + codes)


def vae(config: Config) -> int:
    """Parameters of the autoencoder's encoder and decoder, without attention and quantization convolutions."""
    widths: list[int] = config["block_out_channels"]
    layers, latent = config["layers_per_block"], config["latent_channels"]
    middle = 2 * _resnet(widths[-1], widths[-1])
    encoder = decoder = middle
    encoder += _convolution(config["in_channels"], widths[0]) + 2 * widths[-1] + _convolution(widths[-1], 2 * latent)
    decoder += _convolution(latent, widths[-1]) + 2 * widths[0] + _convolution(widths[0], config["out_channels"])
    for inputs, outputs in zip([widths[0], *widths], widths, strict=False):
        encoder += _resnet(inputs, outputs) + (layers - 1) * _resnet(outputs, outputs)
    for inputs, outputs in zip([widths[-1], *reversed(widths)], reversed(widths), strict=False):
        decoder += _resnet(inputs, outputs) + layers * _resnet(outputs, outputs)
    encoder += sum(_convolution(width, width) for width in widths[:-1])
    decoder += sum(_convolution(width, width) for width in widths[1:])
    return encoder + decoder


def _convolution(inputs: int, outputs: int) -> int:
    return linear(9 * inputs, outputs)


def _resnet(inputs: int, outputs: int) -> int:
    shortcut = linear(inputs, outputs) if inputs != outputs else 0
    return 2 * inputs + 2 * outputs + _convolution(inputs, outputs) + _convolution(outputs, outputs) + shortcut
