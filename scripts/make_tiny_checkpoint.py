"""Write a small random checkpoint with the on-disk layout of GLM-Image.

The folder loads unchanged with ``diffusers.GlmImagePipeline.from_pretrained``. The same configuration gives the same
bytes on every machine: weights come from raw random bits by exact arithmetic, each tensor from a stream of its own
name, and no file contains a time or a library version.

    make_tiny_checkpoint.py FOLDER [--seed N] [--dtype bfloat16] [--ar-layers N ...] [--max-shard-size 500KB]
    make_tiny_checkpoint.py FOLDER --preset full --weights none     # configs of the real sizes, no tensors
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, T5Config, T5EncoderModel

import tiny_checkpoint_configs as configs
from tiny_checkpoint_configs import FULL, PRESETS, Json, TinyConfig

__all__ = ["FULL", "PARTS", "PRESETS", "Part", "TinyConfig", "make_tiny_checkpoint", "part_shapes"]

Shapes = dict[str, tuple[int, ...]]

SHARD_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
CONSTANT_CHANNEL = 0
GLYPH_SCALE = 8.0


@dataclass(frozen=True)
class Part:
    """A folder with weights.

    Attributes:
        folder: its name.
        stem: stem of the names of its weight files.
        config: makes its config.
        module: builds the module that has its tensors.
    """

    folder: str
    stem: str
    config: Callable[[TinyConfig], Json]
    module: Callable[[Json], torch.nn.Module]


PARTS = (
    Part(
        "vision_language_encoder",
        "model",
        configs.ar_config,
        lambda j: GlmImageForConditionalGeneration(GlmImageConfig(**j)),
    ),
    Part("text_encoder", "model", configs.text_encoder_config, lambda j: T5EncoderModel(T5Config(**j))),
    Part("transformer", "diffusion_pytorch_model", configs.transformer_config, GlmImageTransformer2DModel.from_config),
    Part("vae", "diffusion_pytorch_model", configs.vae_config, AutoencoderKL.from_config),
)


def part_shapes(part: Part, c: TinyConfig) -> Shapes:
    """Name and shape of every stored tensor of ``part``, sorted by name; nothing is allocated."""
    with torch.device("meta"):
        module = part.module(part.config(c))
    # state_dict repeats a tied tensor under each of its names; files hold the first of them.
    return {name: tuple(tensor.shape) for name, tensor in sorted(module.named_parameters())}


# The first pattern that matches "folder/name" sets the standard deviation of a tensor: of an embedding itself, of other
# weights times 1/sqrt(fan in). With these values codes, latents and pixels vary without saturating.
EMBEDDINGS = (
    ("embed_tokens|prior_token_embedding|quantize.embedding", 1.0),
    ("position_embedding|relative_attention_bias", 0.5),
    ("shared", 1.0),
)
GAINS = (
    ("lm_head", 1.2),
    ("SelfAttention.q", 0.25),
    ("norm1.linear|norm_out.linear", 0.6),
    ("transformer/proj_out", 1.5),
    ("decoder.conv_out", 0.6),
    ("", 1.0),
)


def tensor_values(folder: str, name: str, shape: tuple[int, ...], c: TinyConfig) -> NDArray[np.float64]:
    """The values of one tensor, a function of its name, its shape and the configuration."""
    key = f"{folder}/{name}"
    values = configs.uniform(c.seed, key, math.prod(shape)).reshape(shape) * math.sqrt(3)  # variance 1
    if name.endswith(".bias"):
        values *= 0.1
    elif len(shape) == 1:
        values = 1 + 0.1 * values
    elif deviation := next((d for pattern, d in EMBEDDINGS if re.search(pattern, key)), None):
        values *= deviation
    else:
        gain = next(g for pattern, g in GAINS if re.search(pattern, key))
        values *= gain / math.sqrt(math.prod(shape[1:]))
    if folder == "vision_language_encoder":
        _hold_constant_channel(name, values, c)
    elif folder == "transformer" and name.endswith("norm1.linear.bias"):
        # The modulation's fourth chunk scales the glyph tokens. They are few, so raise their influence.
        values.reshape(12, -1)[3] += GLYPH_SCALE
    return values


def _hold_constant_channel(name: str, values: NDArray[np.float64], c: TinyConfig) -> None:
    """Keep one channel of the residual stream constant; the head uses it to lower logits of ids beyond the codes."""
    constant = 3.0
    if name.endswith("embed_tokens.weight"):
        values[:, CONSTANT_CHANNEL] = constant
    elif name.endswith(("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")):
        values[CONSTANT_CHANNEL] = 0.0
    elif name.endswith("language_model.norm.weight"):
        values[CONSTANT_CHANNEL] = 1.0
    elif name == "lm_head.weight":
        values[: c.codebook, CONSTANT_CHANNEL] = 0.0
        # Each of the two branches of a layer adds about 1 to the variance of the stream, which starts at 1.
        values[c.codebook :, CONSTANT_CHANNEL] = c.reserved_logit * math.sqrt(1 + 2 * c.ar_layers) / constant


def plan_shards(shapes: Shapes, element_bytes: int, max_bytes: int) -> list[Shapes]:
    """Split tensors, in their order, into files of at most ``max_bytes``; a larger tensor gets a file of its own."""
    shards: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * element_bytes
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def random_weights(part: Part, c: TinyConfig) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """Values for ``write_weights``: random weights."""
    return lambda name, shape: torch.from_numpy(tensor_values(part.folder, name, shape, c))


def trained_weights(tensors: Mapping[str, torch.Tensor]) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """Values for ``write_weights``: the tensors of a model."""
    return lambda name, shape: tensors[name].reshape(shape)


def write_weights(
    folder: Path, part: Part, c: TinyConfig, values: Callable[[str, tuple[int, ...]], torch.Tensor]
) -> None:
    """Write the safetensors files of ``part``, and their index when there are several.

    ``values`` returns the tensor of a name and a shape.
    """
    dtype = getattr(torch, c.dtype)
    shapes = part_shapes(part, c)
    shards = plan_shards(shapes, dtype.itemsize, c.max_shard_size)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{part.stem}{suffix}.safetensors"
        tensors = {
            name: values(name, shape).to("cpu", torch.float32).to(dtype).contiguous() for name, shape in shard.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        write_json(
            folder / f"{part.stem}.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )


def write_json(path: Path, content: Json) -> None:
    """Write ``content`` as UTF-8 JSON, making the folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_configs(folder: Path, c: TinyConfig, merges: Sequence[tuple[str, str]] = ()) -> None:
    """Write everything but the tensors; ``merges`` are the AR tokenizer's."""
    write_json(folder / "model_index.json", configs.model_index())
    if c != FULL:
        write_json(folder / "generation_defaults.json", configs.generation_defaults())
    for part in PARTS:
        write_json(folder / part.folder / "config.json", part.config(c))
    write_json(folder / "vision_language_encoder" / "generation_config.json", configs.generation_config(c))
    write_json(folder / "scheduler" / "scheduler_config.json", configs.scheduler_config())
    write_json(folder / "tokenizer" / "tokenizer_config.json", configs.glyph_tokenizer_config())
    processor = folder / "processor"
    write_json(processor / "preprocessor_config.json", configs.image_processor_config(c))
    write_json(processor / "tokenizer.json", configs.bpe_tokenizer(c, merges))
    write_json(processor / "tokenizer_config.json", configs.bpe_tokenizer_config(c))
    (processor / "chat_template.jinja").write_text(configs.chat_template(c), encoding="utf-8")


def make_tiny_checkpoint(folder: Path, config: TinyConfig = PRESETS["tiny"], weights: bool = True) -> Path:
    """Write a checkpoint of random weights.

    The folder appears under its name only when it is complete.

    Args:
        folder: Where to write; must not exist, or be empty.
        config: The sizes.
        weights: Without, only configs and tokenizers are written.

    Returns:
        ``folder``.

    Raises:
        FileExistsError: ``folder`` is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        unfinished = Path(scratch) / "checkpoint"
        unfinished.mkdir()
        write_configs(unfinished, config)
        if weights:
            for part in PARTS:
                write_weights(unfinished / part.folder, part, config, random_weights(part, config))
        unfinished.replace(folder)
    return folder


def parse_size(text: str) -> int:
    """Bytes of a size such as 500KB or 5GB (powers of 1000) or 2MiB (powers of 1024)."""
    match = re.fullmatch(r"([1-9]\d*) ?([KMG]?I?B)?", text.strip().upper())
    if not match or match[2] == "IB":
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; allowed: numbers such as 500KB, 2MiB or 5GB")
    return int(match[1]) * SHARD_UNITS[match[2] or "B"]


def parse_widths(text: str) -> tuple[int, ...]:
    """Integers separated by commas."""
    return tuple(int(width) for width in text.split(","))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write a small random checkpoint with the layout of GLM-Image.")
    parser.add_argument("folder", type=Path, help="must not exist, or be empty")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="values of options that are not given")
    parser.add_argument("--weights", choices=["random", "none"], default="random")
    special = {"max_shard_size": parse_size, "vae_widths": parse_widths, "ar_mrope_section": parse_widths}
    for field in fields(TinyConfig):
        option = "--" + field.name.replace("_", "-")
        kind = special.get(field.name, type(field.default))
        parser.add_argument(option, type=kind, default=None, help=f"default {field.default!r}")
    options = vars(parser.parse_args(arguments))
    sizes = {f.name: options[f.name] for f in fields(TinyConfig) if options[f.name] is not None}
    try:
        config = replace(PRESETS[options["preset"]], **sizes)
        folder = make_tiny_checkpoint(options["folder"], config, weights=options["weights"] == "random")
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
