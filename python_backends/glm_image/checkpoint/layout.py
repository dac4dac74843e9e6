"""Layout of a checkpoint folder: its required files. No torch.

A file that is missing or has other content raises ``CheckpointError``.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from glm_image.checkpoint.files import WEIGHTS_SUFFIX, read_json
from glm_image.errors import CheckpointError, shown

PIPELINE_CLASS = "GlmImagePipeline"

COMPONENTS: dict[str, tuple[str, str]] = {
    "vision_language_encoder": ("GlmImageForConditionalGeneration", "config.json"),
    "processor": ("GlmImageProcessor", "tokenizer_config.json"),
    "text_encoder": ("T5EncoderModel", "config.json"),
    "tokenizer": ("ByT5Tokenizer", "tokenizer_config.json"),
    "transformer": ("GlmImageTransformer2DModel", "config.json"),
    "vae": ("AutoencoderKL", "config.json"),
    "scheduler": ("FlowMatchEulerDiscreteScheduler", "scheduler_config.json"),
}
"""Folder -> (class in ``model_index.json``, config file). Processor, tokenizer and scheduler have no tensors."""

DEFAULTS_FILE = "generation_defaults.json"
"""An optional file of a checkpoint: the options that suit it."""

WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""Names of a component's single weight file in transformers and diffusers; "NAME.index.json" lists shards."""

NO_WEIGHTS = f"no {' or '.join(WEIGHT_FILES)}, and no index of one"


def check_model_index(folder: Path) -> None:
    """Checks that ``model_index.json`` is that of GLM-Image."""
    path = folder / "model_index.json"
    index = read_json(path)
    if index.get("_class_name") != PIPELINE_CLASS:
        found = shown(repr(index.get("_class_name")))
        raise CheckpointError(f"{path}: _class_name is {found}; allowed: {PIPELINE_CLASS}")
    for component, (class_name, _) in COMPONENTS.items():
        entry = index.get(component)  # [library, class]
        if not isinstance(entry, list) or entry[1:] != [class_name]:
            raise CheckpointError(f"{path}: {component} is {shown(repr(entry))}; allowed: {class_name}")


def weight_files(folder: Path) -> dict[str, set[str]] | None:
    """Returns a component's weight files; None if it has none.

    A file that an index lists has the names of its tensors; a single file has an empty set.
    """
    for file in WEIGHT_FILES:
        index = folder / f"{file}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise CheckpointError(f"{index}: weight_map does not map every tensor name to a file name")
            files: dict[str, set[str]] = {shard: set() for shard in sorted(set(weight_map.values()))}
            for shard in files:
                _check_shard(index, shard)
            for tensor, shard in weight_map.items():
                files[shard].add(tensor)
            return files
        if (folder / file).is_file():
            return {file: set()}
    return None


def _check_shard(index: Path, name: str) -> None:
    """Refuses the name of a file outside the component's folder."""
    if PurePosixPath(name).name != name or "\0" in name or not name.endswith(WEIGHTS_SUFFIX):
        raise CheckpointError(
            f"{index}: weight_map names the file {shown(name)}; allowed: a {WEIGHTS_SUFFIX} file in its folder"
        )
