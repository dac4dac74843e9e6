"""What a checkpoint folder holds and what serving it takes, from its configs and the headers of its files; no torch."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.layout import (
    COMPONENTS,
    PIPELINE_CLASS,
    WEIGHT_FILES,
    check_model_index,
    read_json,
    read_weight_map,
)
from glm_image.errors import CheckpointError
from glm_image.sizing import parameter_counts

AR_PART = "vision_language_encoder"
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
LARGEST_HEADER = 100_000_000
SMALLEST_IN_GB = 10_000_000

# Bytes that painting 1024 x 1024 takes beside the weights: about five feature maps of the autoencoder's largest layer.
WORKING_PIXELS = 1024 * 1024
WORKING_MAPS = 5

_COUNTS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    AR_PART: lambda config: parameter_counts.language_model(config) + parameter_counts.vision_and_head(config),
    "text_encoder": parameter_counts.text_encoder,
    "transformer": parameter_counts.transformer,
    "vae": parameter_counts.vae,
}


@dataclass(frozen=True)
class PartReport:
    """A folder of the checkpoint.

    Attributes:
        part: the folder's name.
        class_name: what it is for.
        parameters: by its config; 0 for a part without tensors.
        stored_parameters: in the files that are there.
        dtypes: dtype -> parameters stored in it.
        files: weight file -> its bytes; None for one that an index names and that is not there.
        size: bytes of all files that are there, small ones included.
    """

    part: str
    class_name: str
    parameters: int
    stored_parameters: int
    dtypes: dict[str, int]
    files: dict[str, int | None]
    size: int


@dataclass(frozen=True)
class StageReport:
    """What a stage takes of a device's memory, in bytes.

    Attributes:
        stage: the model's name.
        dtype: what it computes in.
        weights: part -> bytes.
        cache: keys and values of every slot, with the default parameters.
        working: what painting takes beside, estimated for 1024 x 1024.
    """

    stage: str
    dtype: str
    weights: dict[str, int]
    cache: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.weights.values()) + self.cache + self.working


@dataclass(frozen=True)
class Inspection:
    """What there is to tell of a checkpoint.

    Attributes:
        folder: where it lies.
        parts: its folders.
        stages: memory, for each stage and dtype.
        slots: sequences of the cache, and tokens of each.
        token_ids: what the tokens that structure a prompt are.
        faults: what is missing or broken, one sentence each.
    """

    folder: str
    parts: list[PartReport]
    stages: list[StageReport]
    slots: tuple[int, int]
    token_ids: dict[str, int]
    faults: list[str]

    def fits(self, gigabytes: float) -> dict[str, dict[str, bool]]:
        """Tells for each dtype whether a card of so many GB (10^9 bytes) holds each stage, and both together.

        As much of the card is used as a stage's default ``memory_utilization`` allows.
        """
        usable = gigabytes * 1e9 * ArSettings().memory_utilization
        answers = {}
        for dtype in DTYPE_BYTES:
            needs = {stage.stage: stage.total for stage in self.stages if stage.dtype == dtype}
            answers[dtype] = {name: need <= usable for name, need in [*needs.items(), ("both", sum(needs.values()))]}
        return answers

    def to_json(self, gigabytes: float | None = None) -> dict[str, Any]:
        """Returns everything as plain values."""
        told = asdict(self) | {"slots": list(self.slots), "complete": not self.faults}
        for stage, shown in zip(self.stages, told["stages"], strict=True):
            shown["total"] = stage.total
        if gigabytes is not None:
            told["card"] = {"gigabytes": gigabytes, "fits": self.fits(gigabytes)}
        return told

    def to_text(self, gigabytes: float | None = None) -> str:
        """Returns everything as lines to read; GB are 10^9 bytes."""
        lines = [f"{self.folder}: {PIPELINE_CLASS}, {_gigabytes(sum(part.size for part in self.parts))}"]
        lines += [_part_line(part) for part in self.parts]
        slots, tokens = self.slots
        lines += ["", f"memory for weights, a cache of {slots} x {tokens} tokens, and painting 1024 x 1024 (estimated)"]
        for stage in self.stages:
            sizes = [*stage.weights.items(), ("cache", stage.cache), ("working", stage.working)]
            told = " + ".join(f"{name} {_gigabytes(size)}" for name, size in sizes if size)
            lines.append(f"  {stage.dtype:<9} {stage.stage:<8} {_gigabytes(stage.total):>9} = {told}")
        if gigabytes is not None:
            share = ArSettings().memory_utilization
            lines += ["", f"fits a card of {gigabytes:g} GB, of which memory_utilization allows {share}"]
            for dtype, answers in self.fits(gigabytes).items():
                told = ", ".join(f"{name} {'yes' if fits else 'no'}" for name, fits in answers.items())
                lines.append(f"  {dtype:<9} {told}")
        lines += ["", "token ids: " + ", ".join(f"{name} {value}" for name, value in self.token_ids.items())]
        lines += [f"fault: {fault}" for fault in self.faults]
        return "\n".join(lines)


def inspect(folder: Path) -> Inspection:
    """Reads a checkpoint's configs and the headers of its weight files.

    Missing or broken weights are faults of the report, so that a half finished download can be inspected.

    Raises:
        CheckpointError: the folder is no GLM-Image checkpoint, or a config is missing or lacks an entry.
    """
    check_model_index(folder)
    faults: list[str] = []
    configs = {part: read_json(folder / part / file) for part, (_, file) in COMPONENTS.items()}
    try:
        parts = [_part(folder, part, configs[part], faults) for part in COMPONENTS]
        return Inspection(
            folder=str(folder),
            parts=parts,
            stages=[stage for dtype in DTYPE_BYTES for stage in _stages(configs, dtype)],
            slots=_slots(),
            token_ids=_token_ids(folder, configs[AR_PART]),
            faults=faults,
        )
    except KeyError as error:
        raise CheckpointError(f"{folder}: a config has no {error.args[0]}") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}: a config holds what it may not: {error}") from error


def _part(folder: Path, part: str, config: Mapping[str, Any], faults: list[str]) -> PartReport:
    configured = _COUNTS[part](config) if part in _COUNTS else 0
    files: dict[str, int | None] = {}
    dtypes: Counter[str] = Counter()
    faults_before = len(faults)
    named = _weight_files(folder / part, faults) if configured else {}
    for file, tensors in named.items():
        path = folder / part / file
        files[file] = path.stat().st_size if path.is_file() else None
        if files[file] is None:
            faults.append(f"{path} is missing")
            continue
        try:
            header = read_header(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        faults.extend(f"{path} has no tensor {name}" for name in sorted(tensors - set(header)))
        for dtype, shape in header.values():
            dtypes[dtype] += math.prod(shape)
    stored = sum(dtypes.values())
    if len(faults) == faults_before and stored != configured:
        faults.append(f"{folder / part} holds {stored:,} parameters; by its config it has {configured:,}")
    size = sum(path.stat().st_size for path in (folder / part).rglob("*") if path.is_file())
    return PartReport(part, COMPONENTS[part][0], configured, stored, dict(dtypes), files, size)


def _weight_files(folder: Path, faults: list[str]) -> dict[str, set[str]]:
    """Returns a part's weight files and the tensors that an index expects in each, {} where there are none at all."""
    for file in WEIGHT_FILES:
        index = folder / f"{file}.index.json"
        if index.is_file():
            expected: dict[str, set[str]] = {}
            for tensor, shard in read_weight_map(index).items():
                expected.setdefault(shard, set()).add(tensor)
            return dict(sorted(expected.items()))
        if (folder / file).is_file():
            return {file: set()}
    faults.append(f"{folder} has no {' or '.join(WEIGHT_FILES)}, whole or with an index")
    return {}


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Reads which tensors a safetensors file holds, each with its dtype and shape.

    Raises:
        CheckpointError: the file is none, or ends before its last tensor.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LARGEST_HEADER, size - 8):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((one["data_offsets"][1] for one in header.values()), default=0)
        found = {
            name: (DTYPE_NAMES.get(one["dtype"], one["dtype"]), tuple(one["shape"])) for name, one in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{path} has {size} bytes; by its header it has {8 + length + end}")
    return found


def _stages(configs: Mapping[str, Mapping[str, Any]], dtype: str) -> list[StageReport]:
    each = DTYPE_BYTES[dtype]
    counts = {part: count(configs[part]) for part, count in _COUNTS.items() if part != AR_PART}
    ar = configs[AR_PART]
    text = ar["text_config"]
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    key_values = (text.get("num_key_value_heads") or text["num_attention_heads"]) * head
    cache = 2 * text["num_hidden_layers"] * key_values * math.prod(_slots()) * each
    ar_weights = {
        "language model": parameter_counts.language_model(ar) * each,
        "vision and head": parameter_counts.vision_and_head(ar) * each,
    }
    working = WORKING_MAPS * WORKING_PIXELS * configs["vae"]["block_out_channels"][1] * each
    return [
        StageReport("glm_ar", dtype, ar_weights, cache, 0),
        StageReport("glm_dit", dtype, {part: count * each for part, count in counts.items()}, 0, working),
    ]


def _slots() -> tuple[int, int]:
    return ArSettings().max_num_seqs, ArSettings().max_sequence_tokens


def _token_ids(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    found = {
        "codebook": config["vq_config"]["num_embeddings"],
        "image_start": config["image_start_token_id"],
        "image_end": config["image_end_token_id"],
        "image": config["image_token_id"],
        "pad": config["text_config"].get("pad_token_id"),
    }
    processor = folder / "processor"
    special = read_json(processor / "tokenizer_config.json").get("extra_special_tokens") or {}
    if (processor / "tokenizer.json").is_file():
        ids = {one["content"]: one["id"] for one in read_json(processor / "tokenizer.json").get("added_tokens", ())}
        found |= {
            name.removesuffix("_token"): ids.get(special.get(name)) for name in ("grid_bos_token", "grid_eos_token")
        }
    return {name: value for name, value in found.items() if value is not None}


def _part_line(part: PartReport) -> str:
    line = f"  {part.part:<24}{_gigabytes(part.size):>9}"
    if not part.parameters:
        return f"{line}  {part.class_name}"
    there = sum(size is not None for size in part.files.values())
    dtypes = ", ".join(part.dtypes) or "no tensors"
    return f"{line}  {part.class_name}: {part.parameters:,} parameters, {there} of {len(part.files)} files, {dtypes}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= SMALLEST_IN_GB else f"{size / 1e6:.2f} MB"
