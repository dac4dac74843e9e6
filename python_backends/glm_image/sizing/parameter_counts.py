"""How many parameters each part has by its config: plain arithmetic, so that nothing has to be loaded or be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    """Parameters of a matrix and its bias; also of a convolution, its window counted into ``inputs``."""
    return inputs * outputs + outputs * bias


def language_model(config: Config) -> int:
    """Parameters of the decoder of ``vision_language_encoder``, embedding included, head not."""
    text = config["text_config"]
    width, heads = text["hidden_size"], text["num_attention_heads"]
    head = text.get("head_dim") or width // heads
    key_values = (text.get("num_key_value_heads") or heads) * head
    bias = text.get("attention_bias", True)
    attention = linear(width, heads * head, bias) + 2 * linear(width, key_values, bias) + heads * head * width
    layer = attention + 3 * width * text["intermediate_size"] + 4 * width
    return int(text["vocab_size"] * width + text["num_hidden_layers"] * layer + width)


def vision_and_head(config: Config) -> int:
    """Parameters of the rest of ``vision_language_encoder``: the vision tower, the quantizer and the decoder's head."""
    vision, vq, text = config["vision_config"], config["vq_config"], config["text_config"]
    width, inner, bias = vision["hidden_size"], vision["intermediate_size"], vision.get("attention_bias", True)
    attention = linear(width, 3 * width, bias) + linear(width, width, bias)
    block = attention + linear(width, inner) + linear(inner, width) + 4 * width
    positions = (vision["image_size"] // vision["patch_size"]) ** 2
    patches = linear(vision.get("in_channels", 3) * vision["patch_size"] ** 2, width)
    tower = vision["depth"] * block + positions * width + patches
    latent = vq["latent_channels"]
    quantizer = vq["num_embeddings"] * vq["embed_dim"] + linear(latent, vq["embed_dim"])
    head = text["vision_vocab_size"] * text["hidden_size"]
    return int(tower + quantizer + linear(vq["embed_dim"], latent) + head)


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
    projectors = linear(config["text_embed_dim"], width) + 3 * linear(width, width)  # glyphs and prior, two each
    projectors += linear(config["in_channels"] * patch, width) + linear(width, config["out_channels"] * patch)
    times = 3 * linear(time, time) + linear(4 * config["condition_dim"], time)
    codes = config["prior_vq_quantizer_codebook_size"] * width
    return int(config["num_layers"] * block + projectors + times + linear(time, 2 * width) + codes)


def vae(config: Config) -> int:
    """Parameters of the autoencoder, encoder and decoder, without attention or convolutions around the latents."""
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
