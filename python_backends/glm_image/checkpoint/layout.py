"""How a checkpoint folder is laid out: what has to be there, and JSON files read with each fault named. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm_image.errors import CheckpointError

PIPELINE_CLASS = "GlmImagePipeline"

# Folder -> (its class as model_index.json names it, its config file). The processor and tokenizer have no tensors.
COMPONENTS: dict[str, tuple[str, str]] = {
    "vision_language_encoder": ("GlmImageForConditionalGeneration", "config.json"),
    "processor": ("GlmImageProcessor", "tokenizer_config.json"),
    "text_encoder": ("T5EncoderModel", "config.json"),
    "tokenizer": ("ByT5Tokenizer", "tokenizer_config.json"),
    "transformer": ("GlmImageTransformer2DModel", "config.json"),
    "vae": ("AutoencoderKL", "config.json"),
    "scheduler": ("FlowMatchEulerDiscreteScheduler", "scheduler_config.json"),
}

# The names transformers and diffusers give the single file of a component; "<name>.index.json" lists its shards.
WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing, cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; allowed: a JSON object")
    return content


def check_model_index(folder: Path) -> None:
    """Refuses a folder whose ``model_index.json`` is of another model.

    Raises:
        CheckpointError: names the entry and what is allowed.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    if index.get("_class_name") != PIPELINE_CLASS:
        raise CheckpointError(f"{path}: _class_name is {index.get('_class_name')!r}; allowed: {PIPELINE_CLASS}")
    for component, (class_name, _) in COMPONENTS.items():
        named = index.get(component)  # [library, class]
        if not isinstance(named, list) or named[1:] != [class_name]:
            raise CheckpointError(f"{path}: {component} is {named!r}; allowed: {class_name}")


def read_weight_map(index: Path) -> dict[str, str]:
    """Reads an index of shards: tensor name -> file name.

    Raises:
        CheckpointError: it cannot be read, or names no file of its own folder for each tensor.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map names no shard for each tensor")
    return weight_map
