"""A checkpoint folder: configs and tensors of its components. Tensors are read straight to a device.

A file that is missing, broken or of another model raises ``CheckpointError``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from glm_image.checkpoint.bounds import check_config
from glm_image.checkpoint.files import WEIGHTS_SUFFIX, check_regular, check_tree, read_from, read_json
from glm_image.checkpoint.layout import COMPONENTS, DEFAULTS_FILE, NO_WEIGHTS, check_model_index, weight_files
from glm_image.errors import CheckpointError, InvalidInputError
from glm_image.request.geometry import PIXELS_PER_TOKEN, SourceRule
from glm_image.request.limits import Limits
from glm_image.request.parameters import DEFAULT_SIDE, GenerationParameters
from glm_image.request.tensors import check_fields

DUMMY_STD = 0.02
SAMPLED_PIECES, SAMPLED_BYTES = 64, 4096
"""Pieces of a weight file that are hashed for the revision: reading a whole checkpoint takes a minute."""

LARGEST_HASHED_WHOLE = 64 * 2**20
"""Bytes of another file above which pieces of it are hashed too."""

CHECKED_VALUES = 2**24
"""Values that are checked one by one at a time: that takes so many bytes of the device's memory, and more."""

LONGEST_SOURCE_SIDE = 2**14


class TensorSource(Protocol):
    """Source of a component's tensors, on its device and in its dtype."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises ``CheckpointError`` if the tensor is missing or has another shape."""

    def has(self, name: str) -> bool: ...


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the layout of ``GlmImagePipeline.save_pretrained``.

    With the ``load_format`` ``dummy`` its tensors are not read but random, of the configured shapes.
    """

    folder: Path
    load_format: str = "auto"

    @classmethod
    def open(cls, folder: Path, load_format: str = "auto") -> Checkpoint:
        """Opens a folder and checks its layout, its files and the numbers in its configs."""
        checkpoint = cls(folder, load_format)
        check_model_index(folder)
        for component, (_, file) in COMPONENTS.items():
            check_tree(checkpoint.path(component))
            tensors = None if load_format == "dummy" else checkpoint.tensor_files(component)
            check_config(checkpoint.path(component) / file, component, checkpoint.config(component), tensors)
        return checkpoint

    def path(self, component: str) -> Path:
        return self.folder / component

    def config(self, component: str) -> dict[str, Any]:
        return read_json(self.path(component) / COMPONENTS[component][1])

    def optional_json(self, component: str, file: str) -> dict[str, Any]:
        """Returns the content of a JSON file of a component; {} if there is no such file."""
        path = self.path(component) / file
        return read_json(path) if path.is_file() else {}

    @cached_property
    def image_processor(self) -> Any:
        """The image processor of source images: the Pillow variant, whose results are the same on every machine."""
        from transformers import GlmImageImageProcessorPil  # noqa: PLC0415 - seconds to import

        with read_from(self.path("processor")):
            return GlmImageImageProcessorPil.from_pretrained(self.path("processor"))

    @cached_property
    def processor(self) -> Any:
        """The ``GlmImageProcessor``: the tokenizer, the chat template and the names of special tokens."""
        from transformers import GlmImageProcessor  # noqa: PLC0415 - seconds to import

        with read_from(self.path("processor")):
            return GlmImageProcessor.from_pretrained(self.path("processor"))

    @cached_property
    def source_rule(self) -> SourceRule:
        """The rule by which source images are resized."""
        processor = self.image_processor
        with read_from(self.path("processor")):
            patch = processor.patch_size * processor.merge_size
            edges = (processor.size[edge] or 0 for edge in ("shortest_edge", "longest_edge"))
            shortest, longest = (round(math.sqrt(edge)) for edge in edges)
            resample = int(processor.resample)
        if patch * 2 != PIXELS_PER_TOKEN or not PIXELS_PER_TOKEN <= shortest <= longest <= LONGEST_SOURCE_SIDE:
            raise CheckpointError(
                f"{self.path('processor')}: the image processor has patches of {patch} pixels and sides of {shortest} "
                f"to {longest}; allowed: patches of {PIXELS_PER_TOKEN // 2}, sides of {PIXELS_PER_TOKEN} to "
                f"{LONGEST_SOURCE_SIDE}"
            )
        return SourceRule(patch, shortest, longest, resample)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The options that suit this checkpoint: those of ``DEFAULTS_FILE``, else the published model's.

        They are recommendations for clients; a request without them has the defaults of ``GenerationParameters``.
        """
        published = {"width": DEFAULT_SIDE, "height": DEFAULT_SIDE} | {
            name: getattr(GenerationParameters, name) for name in ("num_inference_steps", "guidance_scale")
        }
        path = self.folder / DEFAULTS_FILE
        values = read_json(path) if path.is_file() else {}
        for name, value in values.items():
            if name not in published:
                raise CheckpointError(f"{path}: {name} is not known; allowed: {', '.join(published)}")
            if type(value) not in (int, type(published[name])):
                raise CheckpointError(f"{path}: {name} is {value!r}; allowed: a number like {published[name]}")
        try:
            check_fields(GenerationParameters(prompt="x", **values), Limits())
        except InvalidInputError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return published | values

    @property
    def name(self) -> str:
        """The name in responses: that of the folder, or of the repository for a folder in a hub's cache."""
        folder = self.folder.resolve()
        if folder.parent.name == "snapshots":
            return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return folder.name

    @cached_property
    def revision(self) -> str:
        """The revision in responses: the commit for a folder in a hub's cache, else the fingerprint."""
        folder = self.folder.resolve()
        return folder.name if folder.parent.name == "snapshots" else self.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits of a hash of the content, which tokens carry: only this checkpoint's DiT renders them.

        The hash covers all files except hidden ones, such as a download's notes; of weight files and other large ones,
        ``SAMPLED_PIECES`` pieces.
        """
        folder, digest = self.folder.resolve(), hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            if any(part.startswith(".") for part in name.parts):
                continue
            digest.update(str(name).encode() + b"\0")
            is_sampled = path.suffix == WEIGHTS_SUFFIX or path.stat().st_size > LARGEST_HASHED_WHOLE
            digest.update(_sampled(path) if is_sampled else path.read_bytes())
            digest.update(b"\0")
        return digest.hexdigest()[:12]

    def tensors(self, component: str, device: torch.device, dtype: torch.dtype) -> TensorSource:
        if self.load_format == "dummy":
            return RandomTensors(device, dtype)
        paths = self.tensor_files(component)
        if paths is None:
            raise CheckpointError(f"{self.path(component)}: {NO_WEIGHTS}")
        return FileTensors(self.path(component), paths, device, dtype)

    def tensor_files(self, component: str) -> dict[str, Path] | None:
        """Returns the file of each tensor of a component; None if the component has no weight files."""
        folder = self.path(component)
        files = weight_files(folder)
        if files is None:
            return None
        paths: dict[str, Path] = {}
        for file, names in files.items():
            paths |= dict.fromkeys(names or _open(folder / file).keys(), folder / file)
        return paths


def _sampled(path: Path) -> bytes:
    """Returns a file's size and pieces spread over it: retrained weights have the same size but other content."""
    size = path.stat().st_size
    pieces = [str(size).encode()]
    with path.open("rb") as file:
        for piece in range(SAMPLED_PIECES):
            file.seek(piece * max(0, size - SAMPLED_BYTES) // (SAMPLED_PIECES - 1))
            pieces.append(file.read(SAMPLED_BYTES))
    return b"\0".join(pieces)


def _open(path: Path, device: str = "cpu") -> Any:
    check_regular(path)
    try:
        return safe_open(path, framework="pt", device=device)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


@dataclass(frozen=True)
class FileTensors:
    """Reads tensors from safetensors files, one at a time, straight to the device."""

    folder: Path
    paths: dict[str, Path]
    device: torch.device
    dtype: torch.dtype
    _files: dict[Path, Any] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.paths

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        path = self.paths.get(name)
        if path is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        if path not in self._files:
            self._files[path] = _open(path, str(self.device))
        try:
            found = tuple(self._files[path].get_slice(name).get_shape())
            if found != shape:
                raise CheckpointError(f"{path}: tensor {name} has shape {found}; by the config it is {shape}")
            tensor: Tensor = self._files[path].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}") from error
        tensor = tensor.to(self.dtype)
        if not _is_finite(tensor):
            raise CheckpointError(f"{path}: tensor {name} has values that are infinite or not a number in {self.dtype}")
        return tensor


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; computed on the tensor's device, with one wait for it."""
    # A sum reads the tensor once and takes no memory. It is finite only if all values are.
    if torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
        return True
    # The sum of large finite values may overflow.
    return all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.flatten(), CHECKED_VALUES))


class RandomTensors:
    """Generates random tensors of any name and shape for benchmarks, the same ones at each load."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def has(self, name: str) -> bool:
        return True

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # Mean 1 for scales of norms, else mean 0; the deviation keeps activations finite.
        tensor = torch.empty(shape, device=self._device, dtype=self._dtype)
        is_scale = len(shape) == 1 and name.endswith("weight")
        std = DUMMY_STD if len(shape) < 2 else min(DUMMY_STD, 1 / math.sqrt(math.prod(shape[1:])))  # noqa: PLR2004
        return tensor.normal_(1.0 if is_scale else 0.0, std, generator=self._generator)


@runtime_checkable
class FillHook(Protocol):
    """A module that transforms its parameters; ``fill`` calls ``filled`` when the module has them."""

    def filled(self) -> None: ...


def fill(module: nn.Module, source: TensorSource, prefix: str = "") -> None:
    """Loads the parameters and buffers of a module that was built on the meta device, and freezes the module.

    ``prefix`` begins the module's names in the source. A submodule that is a ``FillHook`` is called after its own
    parameters, before the next submodule's are read.
    """
    ties = getattr(module, "_tied_weights_keys", None) or {}
    for path, owner in module.named_modules():
        dotted = f"{path}." if path else ""
        for name, parameter in list(owner.named_parameters(recurse=False)):
            full = dotted + name
            if full in ties and not source.has(prefix + full):
                continue
            tensor = source.read(prefix + full, tuple(parameter.shape))
            setattr(owner, name, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner.register_buffer(name, source.read(prefix + dotted + name, tuple(buffer.shape)))
        if isinstance(owner, FillHook):
            owner.filled()
    if ties:
        module.tie_weights()  # type: ignore[operator]
    module.eval()
