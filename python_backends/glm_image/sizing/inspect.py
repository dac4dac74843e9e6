"""Contents of a checkpoint folder and the memory that serving it needs, from its configs and file headers; no torch."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm_image.ar.config import ArConfig
from glm_image.ar.memory import decoder_parameters
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.bounds import check_config
from glm_image.checkpoint.files import MAX_TOKENIZER_BYTES, check_regular, read_json
from glm_image.checkpoint.layout import COMPONENTS, NO_WEIGHTS, PIPELINE_CLASS, check_model_index, weight_files
from glm_image.errors import CheckpointError, printable
from glm_image.request.geometry import Size
from glm_image.sizing import parameter_counts
from glm_image.sizing.memory import DTYPE_BYTES, ModelSizes, StageMemory, ar_memory, dit_memory

AR_PART = "vision_language_encoder"
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
LARGEST_HEADER = 100_000_000
SMALLEST_IN_GB = 10_000_000

IMAGE_SIZE = Size(1024, 1024)
"""Size of the images for which the working memory is given."""


def _ar_parameters(config: Mapping[str, Any]) -> int:
    decoder = decoder_parameters(ArConfig.from_json(config, {}))
    vision = parameter_counts.vision_tower(config["vision_config"])
    return decoder + vision + parameter_counts.quantizer(config["vq_config"])


_COUNTS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    AR_PART: _ar_parameters,
    "text_encoder": parameter_counts.text_encoder,
    "transformer": parameter_counts.transformer,
    "vae": parameter_counts.vae,
}


@dataclass(frozen=True)
class PartReport:
    """A folder of the checkpoint.

    Attributes:
        parameters: number by its config; 0 for a part without tensors.
        stored_parameters: number in the files present.
        dtypes: dtype -> parameters stored in it.
        files: weight file -> its bytes; None for a file that the index names and that is missing.
        size: bytes of all files present, small ones included.
    """

    part: str
    class_name: str
    parameters: int
    stored_parameters: int
    dtypes: dict[str, int]
    files: dict[str, int | None]
    size: int


@dataclass(frozen=True)
class Inspection:
    """The report on a checkpoint.

    Attributes:
        stages: memory of each stage in each dtype, with the default parameters and images of ``IMAGE_SIZE``.
        slots: sequences of the cache, and tokens of each.
        token_ids: ids of the tokens that structure a prompt.
        faults: missing or broken files, one sentence each.
    """

    folder: str
    parts: list[PartReport]
    stages: list[StageMemory]
    slots: tuple[int, int]
    token_ids: dict[str, int]
    faults: list[str]

    def fits(self, gigabytes: float) -> dict[str, dict[str, bool]]:
        """Returns for each dtype whether a card of so many GB (10^9 bytes) holds each stage, and both together.

        A stage may use the share of the card that ``memory_utilization`` allows by default.
        """
        usable = gigabytes * 1e9 * ArSettings().memory_utilization
        answers = {}
        for dtype in DTYPE_BYTES:
            needs = {stage.stage: stage.total for stage in self.stages if stage.dtype == dtype}
            answers[dtype] = {name: need <= usable for name, need in [*needs.items(), ("both", sum(needs.values()))]}
        return answers

    def to_json(self, gigabytes: float | None = None) -> dict[str, Any]:
        report = asdict(self) | {"slots": list(self.slots), "complete": not self.faults}
        for stage, entry in zip(self.stages, report["stages"], strict=True):
            entry["total"] = stage.total
        if gigabytes is not None:
            report["card"] = {"gigabytes": gigabytes, "fits": self.fits(gigabytes)}
        return report

    def to_text(self, gigabytes: float | None = None) -> str:
        """Returns the report as lines of text; GB are 10^9 bytes."""
        lines = [f"{self.folder}: {PIPELINE_CLASS}, {_gigabytes(sum(part.size for part in self.parts))}"]
        lines += [_part_line(part) for part in self.parts]
        slots, tokens = self.slots
        size = f"{IMAGE_SIZE.width} x {IMAGE_SIZE.height}"
        lines += ["", f"memory for weights, a cache of {slots} x {tokens} tokens, and working on images of {size}"]
        for stage in self.stages:
            sizes = [*stage.weights.items(), ("cache", stage.cache), ("working", stage.working)]
            terms = " + ".join(f"{name} {_gigabytes(size)}" for name, size in sizes if size)
            lines.append(f"  {stage.dtype:<9} {stage.stage:<8} {_gigabytes(stage.total):>9} = {terms}")
        if gigabytes is not None:
            share = ArSettings().memory_utilization
            lines += ["", f"fits a card of {gigabytes:g} GB, of which memory_utilization allows {share}"]
            for dtype, answers in self.fits(gigabytes).items():
                verdicts = ", ".join(f"{name} {'yes' if fits else 'no'}" for name, fits in answers.items())
                lines.append(f"  {dtype:<9} {verdicts}")
        lines += ["", "token ids: " + ", ".join(f"{name} {value}" for name, value in self.token_ids.items())]
        lines += [f"fault: {fault}" for fault in self.faults]
        return "\n".join(map(printable, lines))


def inspect(folder: Path) -> Inspection:
    """Reads a checkpoint's configs and the headers of its weight files.

    Missing or broken weight files are reported as faults, so that an incomplete download can be inspected; everything
    else that is wrong raises ``CheckpointError``.
    """
    check_model_index(folder)
    faults: list[str] = []
    configs = {part: read_json(folder / part / file) for part, (_, file) in COMPONENTS.items()}
    for part, config in configs.items():
        check_config(folder / part / COMPONENTS[part][1], part, config, tensors=None)
    slots = ArSettings().max_num_seqs, ArSettings().max_sequence_tokens
    try:
        parts = [_part(folder, part, configs[part], faults) for part in COMPONENTS]
        sizes = ModelSizes.of(configs)
        stages = [
            stage
            for dtype in DTYPE_BYTES
            for stage in (ar_memory(sizes, dtype, *slots), dit_memory(sizes, dtype, IMAGE_SIZE))
        ]
        return Inspection(str(folder), parts, stages, slots, _token_ids(folder, configs[AR_PART]), faults)
    except KeyError as error:
        raise CheckpointError(f"{folder}: a config has no {error.args[0]}") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}: a config has an unsupported value: {error}") from error


def _part(folder: Path, part: str, config: Mapping[str, Any], faults: list[str]) -> PartReport:
    configured = _COUNTS[part](config) if part in _COUNTS else 0
    files: dict[str, int | None] = {}
    dtypes: Counter[str] = Counter()
    faults_before = len(faults)
    expected = weight_files(folder / part) if configured else {}
    if expected is None:
        faults.append(f"{folder / part} has {NO_WEIGHTS}")
    for file, tensors in (expected or {}).items():
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


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Reads the header of a safetensors file: tensor name -> (dtype, shape)."""
    size = check_regular(path).st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LARGEST_HEADER, size - 8):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {
            name: (DTYPE_NAMES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]))
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{path} has {size} bytes; by its header it has {8 + length + end}")
    return tensors


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
        added = read_json(processor / "tokenizer.json", MAX_TOKENIZER_BYTES).get("added_tokens", ())
        ids = {token["content"]: token["id"] for token in added}
        found |= {
            name.removesuffix("_token"): ids.get(special.get(name)) for name in ("grid_bos_token", "grid_eos_token")
        }
    return {name: value for name, value in found.items() if value is not None}


def _part_line(part: PartReport) -> str:
    line = f"  {part.part:<24}{_gigabytes(part.size):>9}"
    if not part.parameters:
        return f"{line}  {part.class_name}"
    present = sum(size is not None for size in part.files.values())
    dtypes = ", ".join(part.dtypes) or "no tensors"
    return f"{line}  {part.class_name}: {part.parameters:,} parameters, {present} of {len(part.files)} files, {dtypes}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= SMALLEST_IN_GB else f"{size / 1e6:.2f} MB"
