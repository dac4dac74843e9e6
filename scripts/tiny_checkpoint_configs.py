"""The sizes, configs and tokenizers of a small checkpoint with the layout of GLM-Image; no tensors."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_image.sizing import reference_sizes
from glm_image.sizing.reference_sizes import DECODER

Json = dict[str, Any]

# In the order of the vocabulary: the first is the padding token, the last the image placeholder.
SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>",
)  # fmt: skip
ROTARY_SHARE = 0.5


def uniform(seed: int, name: str, count: int) -> NDArray[np.float64]:
    """``count`` values in (-1, 1), a function of seed and name; computed exactly, so equal on every machine."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])).random_raw(count)
    return ((bits >> np.uint64(40)).astype(np.float64) + 0.5) / 2**23 - 1


@dataclass(frozen=True)
class TinyConfig:
    """Every size of a checkpoint; the defaults give about 3 MB.

    The vocabulary is laid out as codes, image start, image end, ``reserved_ids``, 256 bytes, ``unused_ids``, special
    tokens, ``trailing_ids``. ``reserved_logit`` is added to the head's logits of every id that is no code, which keeps
    random weights from sampling them (0 allows it). ``max_shard_size`` is in bytes. Source images are
    enlarged until their shorter side is the root of ``source_min_pixels``, then reduced until the longer one is at
    most the root of ``source_max_pixels``. ``ar_mrope_section`` holds the frequencies that the axes T, H and W take in
    turn; empty splits them in the published model's proportions. The tokenizer's merges take the first unused ids.
    """

    seed: int = 0
    dtype: str = "float32"
    max_shard_size: int = 5 * 10**9
    codebook: int = 256
    reserved_ids: int = 14
    unused_ids: int = 0
    trailing_ids: int = 9
    reserved_logit: float = -60.0
    chat_prefix: str = ""
    ar_layers: int = 2
    ar_hidden: int = 128
    ar_heads: int = 4
    ar_kv_heads: int = 2
    ar_head_dim: int = 32
    ar_ffn: int = 192
    ar_rope_theta: float = 10000.0
    ar_mrope_section: tuple[int, ...] = ()
    vision_depth: int = 2
    vision_hidden: int = 32
    vision_heads: int = 2
    vision_ffn: int = 64
    vision_image_size: int = 256
    vq_dim: int = 48
    dit_layers: int = 2
    dit_heads: int = 4
    dit_head_dim: int = 16
    dit_time_dim: int = 32
    dit_condition_dim: int = 16
    glyph_d_model: int = 32
    glyph_layers: int = 2
    glyph_heads: int = 2
    glyph_head_dim: int = 16
    glyph_ffn: int = 64
    latent_channels: int = 16
    latent_stats_seed: int = 0
    vae_widths: tuple[int, ...] = (16, 16, 32, 32)
    vae_layers: int = 1
    vae_norm_groups: int = 8
    temperature: float = 0.9
    top_p: float = 0.75
    source_min_pixels: int = 512 * 512
    source_max_pixels: int = 2048 * 2048

    def __post_init__(self) -> None:
        checks = {
            "dtype": (self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
            "ar_heads": (self.ar_heads % self.ar_kv_heads == 0, f"a multiple of ar_kv_heads = {self.ar_kv_heads}"),
            "ar_head_dim": (self.ar_head_dim % 4 == 0 and self.ar_head_dim >= 12, "a multiple of 4, 12 or more"),
            "ar_mrope_section": (
                not self.ar_mrope_section or sum(self.ar_mrope_section) == int(self.ar_head_dim * ROTARY_SHARE) // 2,
                "empty, or numbers whose sum is a quarter of ar_head_dim",
            ),
            "dit_head_dim": (self.dit_head_dim % 4 == 0, "a multiple of 4"),
            "vision_hidden": (self.vision_hidden % self.vision_heads == 0, "a multiple of vision_heads"),
            "vae_widths": (
                len(self.vae_widths) == 4 and not any(w % self.vae_norm_groups for w in self.vae_widths),
                f"four multiples of vae_norm_groups = {self.vae_norm_groups}",
            ),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")

    @property
    def vision_vocab(self) -> int:
        """Rows of the AR head: the codes, image start and end, the reserved ids."""
        return self.codebook + 2 + self.reserved_ids

    @property
    def first_special(self) -> int:
        """Id of the padding token, the first of ``SPECIAL_TOKENS``."""
        return self.vision_vocab + 256 + self.unused_ids

    @property
    def vocab(self) -> int:
        """Rows of the AR embedding."""
        return self.first_special + len(SPECIAL_TOKENS) + self.trailing_ids


FULL = TinyConfig(
    dtype="bfloat16",
    codebook=DECODER.codebook_size,
    reserved_ids=DECODER.vision_vocab_size - DECODER.codebook_size - 2,
    unused_ids=reference_sizes.FIRST_SPECIAL_ID - DECODER.vision_vocab_size - 256,
    trailing_ids=DECODER.vocab_size - reference_sizes.FIRST_SPECIAL_ID - len(SPECIAL_TOKENS),
    ar_layers=DECODER.layers,
    ar_hidden=DECODER.hidden_size,
    ar_heads=DECODER.heads,
    ar_kv_heads=DECODER.kv_heads,
    ar_head_dim=DECODER.head_dim,
    ar_ffn=DECODER.intermediate_size,
    vision_depth=reference_sizes.VISION["depth"],
    vision_hidden=reference_sizes.VISION["hidden_size"],
    vision_heads=reference_sizes.VISION["num_heads"],
    vision_ffn=reference_sizes.VISION["intermediate_size"],
    vision_image_size=reference_sizes.VISION["image_size"],
    vq_dim=reference_sizes.QUANTIZER["embed_dim"],
    dit_layers=reference_sizes.TRANSFORMER["num_layers"],
    dit_heads=reference_sizes.TRANSFORMER["num_attention_heads"],
    dit_head_dim=reference_sizes.TRANSFORMER["attention_head_dim"],
    dit_time_dim=reference_sizes.TRANSFORMER["time_embed_dim"],
    dit_condition_dim=reference_sizes.TRANSFORMER["condition_dim"],
    glyph_d_model=reference_sizes.GLYPH_ENCODER["d_model"],
    glyph_layers=reference_sizes.GLYPH_ENCODER["num_layers"],
    glyph_heads=reference_sizes.GLYPH_ENCODER["num_heads"],
    glyph_head_dim=reference_sizes.GLYPH_ENCODER["d_kv"],
    glyph_ffn=reference_sizes.GLYPH_ENCODER["d_ff"],
    vae_widths=reference_sizes.VAE["block_out_channels"],
    vae_layers=reference_sizes.VAE["layers_per_block"],
    vae_norm_groups=reference_sizes.VAE["norm_num_groups"],
)
# The sizes of the trained checkpoint of scripts/train_tiny.
TRAINED = TinyConfig(
    dtype="bfloat16", max_shard_size=12 * 10**6, codebook=2048, reserved_ids=14, unused_ids=768, reserved_logit=0.0,
    ar_layers=5, ar_hidden=256, ar_heads=4, ar_kv_heads=2, ar_head_dim=64, ar_ffn=640, ar_rope_theta=100.0,
    ar_mrope_section=(1, 2, 2, 1, 2, 2, 1, 2, 2, 1),
    vision_depth=4, vision_hidden=192, vision_heads=3, vision_ffn=512, vq_dim=32,
    dit_layers=7, dit_heads=4, dit_head_dim=64, dit_time_dim=128, dit_condition_dim=32,
    glyph_d_model=128, glyph_layers=3, glyph_heads=4, glyph_head_dim=32, glyph_ffn=256,
    vae_widths=(32, 48, 80, 96), temperature=1.0, top_p=0.9, source_min_pixels=128 * 128, source_max_pixels=512 * 512,
)  # fmt: skip
PRESETS = {"tiny": TinyConfig(), "trained": TRAINED, "full": FULL}


def ar_config(c: TinyConfig) -> Json:
    """config.json of ``vision_language_encoder``."""
    frequencies = int(c.ar_head_dim * ROTARY_SHARE) // 2
    temporal = max(1, frequencies // 4)
    height = (frequencies - temporal) // 2
    sections = list(c.ar_mrope_section) or [temporal, height, frequencies - temporal - height]
    text: Json = {
        "model_type": "glm_image_text", "vocab_size": c.vocab, "vision_vocab_size": c.vision_vocab,
        "hidden_size": c.ar_hidden, "intermediate_size": c.ar_ffn, "num_hidden_layers": c.ar_layers,
        "num_attention_heads": c.ar_heads, "num_key_value_heads": c.ar_kv_heads, "hidden_act": "silu",
        "attention_bias": True, "attention_dropout": 0.0, "rms_norm_eps": 1e-5, "use_cache": True,
        "max_position_embeddings": 131072, "pad_token_id": c.first_special, "eos_token_id": c.codebook + 1,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": c.ar_rope_theta, "partial_rotary_factor": ROTARY_SHARE,
            "mrope_section": sections,
        },
    }  # fmt: skip
    if c.ar_heads * c.ar_head_dim != c.ar_hidden:
        text["head_dim"] = c.ar_head_dim
    vision = {
        "model_type": "glm_image_vision", "depth": c.vision_depth, "hidden_size": c.vision_hidden,
        "num_heads": c.vision_heads, "intermediate_size": c.vision_ffn, "image_size": c.vision_image_size,
        "patch_size": 16, "spatial_merge_size": 1, "in_channels": 3, "hidden_act": "gelu", "attention_bias": True,
        "attention_dropout": 0.0, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    vq = {
        "model_type": "glm_image_vqmodel", "num_embeddings": c.codebook, "embed_dim": c.vq_dim,
        "latent_channels": c.vision_hidden, "in_channels": 3,
    }  # fmt: skip
    return {
        "architectures": ["GlmImageForConditionalGeneration"], "model_type": "glm_image", "dtype": c.dtype,
        "image_token_id": c.first_special + len(SPECIAL_TOKENS) - 1, "image_start_token_id": c.codebook,
        "image_end_token_id": c.codebook + 1, "tie_word_embeddings": False,
        "text_config": text, "vision_config": vision, "vq_config": vq,
    }  # fmt: skip


def transformer_config(c: TinyConfig) -> Json:
    """config.json of ``transformer``."""
    return {
        "_class_name": "GlmImageTransformer2DModel", "patch_size": 2, "in_channels": c.latent_channels,
        "out_channels": c.latent_channels, "num_layers": c.dit_layers, "num_attention_heads": c.dit_heads,
        "attention_head_dim": c.dit_head_dim, "text_embed_dim": c.glyph_d_model, "time_embed_dim": c.dit_time_dim,
        "condition_dim": c.dit_condition_dim, "prior_vq_quantizer_codebook_size": c.codebook,
    }  # fmt: skip


def text_encoder_config(c: TinyConfig) -> Json:
    """config.json of ``text_encoder``."""
    return {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "dtype": c.dtype, "vocab_size": 384,
        "d_model": c.glyph_d_model, "d_kv": c.glyph_head_dim, "d_ff": c.glyph_ffn, "num_layers": c.glyph_layers,
        "num_heads": c.glyph_heads, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1,
        "is_encoder_decoder": False, "use_cache": False, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def vae_config(c: TinyConfig) -> Json:
    """config.json of ``vae``; means and standard deviations of the latents come from their own seed."""
    mean, std = (uniform(c.latent_stats_seed, name, c.latent_channels) for name in ("latents_mean", "latents_std"))
    return {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": c.latent_channels,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": list(c.vae_widths), "layers_per_block": c.vae_layers, "act_fn": "silu",
        "norm_num_groups": c.vae_norm_groups, "sample_size": 1024, "scaling_factor": 1.0, "shift_factor": 0.0,
        "force_upcast": False, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False,
        "latents_mean": [round(0.4 * float(x), 4) for x in mean],
        "latents_std": [round(1.2 + 0.5 * float(x), 4) for x in std],
    }  # fmt: skip


def scheduler_config() -> Json:
    """scheduler_config.json of ``scheduler``."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0,
        "use_dynamic_shifting": True, "time_shift_type": "linear", "base_image_seq_len": 256,
        "max_image_seq_len": 4096, "base_shift": 0.25, "max_shift": 0.75, "shift_terminal": None,
        "invert_sigmas": False, "stochastic_sampling": False, "use_karras_sigmas": False,
        "use_exponential_sigmas": False, "use_beta_sigmas": False,
    }  # fmt: skip


def generation_config(c: TinyConfig) -> Json:
    """generation_config.json of ``vision_language_encoder``."""
    return {
        "do_sample": True, "temperature": c.temperature, "top_p": c.top_p, "top_k": c.vision_vocab,
        "eos_token_id": c.codebook + 1, "pad_token_id": c.first_special,
    }  # fmt: skip


def model_index() -> Json:
    """model_index.json: which class of which library each folder is for."""
    return {
        "_class_name": "GlmImagePipeline",
        "processor": ["transformers", "GlmImageProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "GlmImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "vision_language_encoder": ["transformers", "GlmImageForConditionalGeneration"],
    }


def generation_defaults() -> Json:
    """generation_defaults.json: the options that clients should use where a user does not say."""
    return {"width": 256, "height": 256, "num_inference_steps": 20, "guidance_scale": 1.5}


def image_processor_config(c: TinyConfig) -> Json:
    """preprocessor_config.json of ``processor``; ``size`` holds areas in pixels."""
    return {
        "image_processor_type": "GlmImageImageProcessor", "processor_class": "GlmImageProcessor",
        "patch_size": 16, "merge_size": 1, "temporal_patch_size": 1, "do_resize": True, "do_rescale": True,
        "do_normalize": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": c.source_min_pixels, "longest_edge": c.source_max_pixels},
    }  # fmt: skip


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each of the 256 bytes."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in kept else next(moved) for byte in range(256)]


def bpe_tokenizer(c: TinyConfig, merges: Sequence[tuple[str, str]] = ()) -> Json:
    """tokenizer.json of ``processor``: image tokens first, then one token a byte and a merge, special tokens last."""
    if len(merges) > c.unused_ids:
        raise ValueError(f"{len(merges)} merges; allowed: unused_ids, {c.unused_ids}")
    vocab = {f"<|dit_token_{i}|>": i for i in range(c.vision_vocab)}
    vocab |= {letter: c.vision_vocab + byte for byte, letter in enumerate(_byte_letters())}
    vocab |= {a + b: c.vision_vocab + 256 + n for n, (a, b) in enumerate(merges)}
    special = {f"<|dit_token_{i}|>": i for i in (c.codebook, c.codebook + 1)}
    special |= {token: c.first_special + n for n, token in enumerate(SPECIAL_TOKENS)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special.items()],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab | special, "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip


def bpe_tokenizer_config(c: TinyConfig) -> Json:
    """tokenizer_config.json of ``processor``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "GlmImageProcessor",
        "bos_token": f"<|dit_token_{c.codebook}|>", "eos_token": f"<|dit_token_{c.codebook + 1}|>",
        "pad_token": SPECIAL_TOKENS[0], "padding_side": "left", "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    }  # fmt: skip


def glyph_tokenizer_config() -> Json:
    """tokenizer_config.json of ``tokenizer``: bytes, no vocabulary file."""
    return {
        "tokenizer_class": "ByT5Tokenizer", "extra_ids": 125, "pad_token": "<pad>", "eos_token": "</s>",
        "unk_token": "<unk>", "model_max_length": 1000000000000000019884624838656,
    }  # fmt: skip


def chat_template(c: TinyConfig) -> str:
    """chat_template.jinja of ``processor``: contents in order, each image between image start and image end."""
    image = f"<|dit_token_{c.codebook}|><|image|><|dit_token_{c.codebook + 1}|>"
    return (
        c.chat_prefix + "{%- for message in messages -%}{%- if message.content is string -%}{{- message.content -}}"
        "{%- else -%}{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}{{- '" + image + "' -}}"
        "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{%- endfor -%}"
    )
