"""The results of requests, as Python objects; a malformed answer raises ``ServerFailure``."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glm_image_client.errors import BadArgumentError, ServerFailure, reason_of
from glm_image_client.options import OutputFormat
from glm_image_client.transport import Outputs

SUFFIX_FORMATS: Final[Mapping[str, OutputFormat]] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}

_PLACEHOLDERS: Final = ("{index}", "{seed}", "{width}", "{height}")
_BRACES: Final = re.compile(r"\{\w*\}")
_ENCODER_OPTIONS: Final[Mapping[str, Mapping[str, int]]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
}


@dataclass(frozen=True)
class Metadata:
    """The metadata of a result; fields that the server omits have their defaults.

    Attributes:
        version: the server's version.
        seeds: the seed of each image.
        width: width of the images in pixels.
        height: height of the images in pixels.
        generated_width: width before cropping, a multiple of 32.
        generated_height: height before cropping, a multiple of 32.
        steps: denoising steps.
        rendered_text: the strings that the images show as lettering.
        cached_steps: for each image, the steps that the residual cache shortened.
        attention_backend: the DiT's attention implementation, by its name in diffusers.
        tokens: token counts: prompt, source, preview, image.
        seconds: durations: ar_queue, prefill, decode, dit_queue, condition, denoise, vae, encode.
        model: name and revision of the checkpoint.
        extra: fields that this version of the client does not know.
        raw: the whole JSON object.
    """

    version: str | int | None = None
    seeds: tuple[int, ...] = ()
    width: int = 0
    height: int = 0
    generated_width: int = 0
    generated_height: int = 0
    steps: int = 0
    rendered_text: tuple[str, ...] = ()
    cached_steps: tuple[Any, ...] = ()
    attention_backend: str = ""
    tokens: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> Metadata:
        """Returns the metadata in a JSON object.

        Raises:
            ServerFailure: a field is of another type.
        """
        known = {item.name for item in fields(cls)} - {"extra", "raw"}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in raw.items() if name in known
        }
        defaults = cls()
        for name, value in values.items():
            if name != "version" and not isinstance(value, type(getattr(defaults, name))):
                raise ServerFailure(f"{name} of the server's metadata is {value!r}")
        extra = {name: value for name, value in raw.items() if name not in known}
        return cls(**values, extra=extra, raw=dict(raw))

    @classmethod
    def from_json(cls, text: bytes | str) -> Metadata:
        """Returns the metadata in the text of a JSON object; see ``from_mapping``."""
        return cls.from_mapping(json_object(text, "metadata"))


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """The images of one request.

    Attributes:
        metadata: the server's metadata.
        base64_files: each image file as the server sent it, in base64; empty for raw pixels.
        pixels: uint8 [n, height, width, 3] for raw pixels, else None.
    """

    metadata: Metadata
    base64_files: list[bytes] = field(default_factory=list, repr=False)
    pixels: NDArray[np.uint8] | None = field(default=None, repr=False)

    @classmethod
    def from_outputs(cls, outputs: Outputs) -> GenerationResult:
        """Returns the result in the outputs of a response.

        Raises:
            ServerFailure: an output is missing or malformed.
        """
        metadata = Metadata.from_mapping(json_output(outputs, "metadata"))
        files = base64_files(outputs)
        return cls(metadata, files, None if files else output(outputs, "images"))

    @cached_property
    def encoded(self) -> list[bytes]:
        """The bytes of each image file; empty for raw pixels. Decoded on first use.

        Raises:
            ServerFailure: the server sent no base64.
        """
        return decoded_files(self.base64_files)

    @cached_property
    def images(self) -> list[Image.Image]:
        """The images as PIL images, RGB; decoded on first use."""
        if self.pixels is not None:
            return [Image.fromarray(image) for image in self.pixels]
        return decoded_images(self.encoded)

    @cached_property
    def arrays(self) -> list[NDArray[np.uint8]]:
        """The images as uint8 [height, width, 3] each; decoded on first use."""
        if self.pixels is not None:
            return list(self.pixels)
        return [np.asarray(image) for image in self.images]

    @property
    def image(self) -> Image.Image:
        """The first image as a PIL image, RGB.

        Raises:
            ServerFailure: the server sent no image.
        """
        if not self._count:
            raise ServerFailure("the server's response has no image")
        return self.images[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image."""
        return self.metadata.seeds

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Writes every image and returns the files.

        An image that the server encoded in the suffix's format is written byte for byte.

        Args:
            path: ``.png``, ``.jpg``, ``.jpeg`` or ``.webp``; ``{width}``, ``{height}``, ``{seed}`` and ``{index}`` are
                filled in. Several images without one of the last two go to ``NAME_0.png``, ``NAME_1.png``, ...

        Raises:
            BadArgumentError: the suffix or a placeholder is another one, or a file cannot be written.
            ServerFailure: an image that the server sent cannot be read.
        """
        suffix_format = format_of(path)
        check_template(path)
        files = [Path(name) for name in file_names(os.fspath(path), self._count, self.metadata)]
        for index, file in enumerate(files):
            write_file(file, self._file_bytes(index, suffix_format))
        return files

    @property
    def _count(self) -> int:
        return len(self.base64_files) if self.pixels is None else len(self.pixels)

    def _file_bytes(self, index: int, image_format: str) -> bytes:
        if self.encoded and opened_image(self.encoded[index]).format == image_format.upper():
            return self.encoded[index]
        buffer = io.BytesIO()
        self.images[index].save(buffer, image_format, **_ENCODER_OPTIONS[image_format])
        return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class PriorTokens:
    """The tokens that the AR stage makes of a prompt; they can be kept, edited and rendered again.

    Attributes:
        prior_token_ids: int32 [n, rows * columns], one row for each image.
        prior_grid: int32 [2], rows and columns; a token covers 32x32 pixels.
        source_token_ids: int32 [s], the source images' tokens; [0] without any.
        source_grids: int32 [k, 2], rows and columns of each source; [0, 2] without any.
        resolved_seed: int64 [1], the first image's seed.
        resolved_size: int32 [2], the requested height and width.
        deadline_ns: int64 [1], on the server's clock; the deadline of the request that made the tokens, so it is not
            sent with ``paint``.
        ar_metadata: the AR stage's metadata, a JSON object.
    """

    prior_token_ids: NDArray[np.int32]
    prior_grid: NDArray[np.int32]
    source_token_ids: NDArray[np.int32]
    source_grids: NDArray[np.int32]
    resolved_seed: NDArray[np.int64]
    resolved_size: NDArray[np.int32]
    deadline_ns: NDArray[np.int64]
    ar_metadata: Mapping[str, Any]

    @classmethod
    def from_outputs(cls, outputs: Outputs) -> PriorTokens:
        """Returns the tokens in the outputs of a response.

        Raises:
            ServerFailure: an output is missing or malformed.
        """
        values: dict[str, Any] = {item.name: output(outputs, item.name) for item in fields(cls)}
        values["ar_metadata"] = json_output(outputs, "ar_metadata")
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes everything into one ``.npz`` file and returns it.

        Raises:
            BadArgumentError: the file cannot be written, or a value cannot be saved.
        """
        arrays = {item.name: getattr(self, item.name) for item in fields(self)}
        buffer = io.BytesIO()
        try:
            arrays["ar_metadata"] = np.array(json.dumps(self.ar_metadata))
            np.savez(buffer, allow_pickle=False, **arrays)
        except (TypeError, ValueError) as error:
            raise BadArgumentError(f"the tokens cannot be saved: {error}") from error
        file = as_path(path)
        write_file(file, buffer.getvalue())
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PriorTokens:
        """Reads a file of ``save``; nothing in the file is executed.

        Raises:
            BadArgumentError: the file cannot be read, or was not written by ``save``.
        """
        try:
            content = as_path(path).read_bytes()
        except (OSError, ValueError) as error:
            raise BadArgumentError(f"tokens {str(path)!r} cannot be read: {reason_of(error)}") from error
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                values: dict[str, Any] = {item.name: file[item.name] for item in fields(cls)}
            values["ar_metadata"] = json_object(str(values["ar_metadata"]), "ar_metadata")
        # A damaged archive also raises the errors of its compression.
        except Exception as error:
            raise BadArgumentError(f"tokens {str(path)!r} was not written by PriorTokens.save") from error
        return cls(**values)


def base64_files(outputs: Outputs) -> list[bytes]:
    """Returns the output ``images_base64``."""
    return list(output(outputs, "images_base64").ravel())


def decoded_files(files: Sequence[bytes]) -> list[bytes]:
    """Returns files in base64 as their bytes."""
    try:
        return [base64.b64decode(file, validate=True) for file in files]
    except (TypeError, ValueError) as error:
        raise ServerFailure("images_base64 of the server's response is not base64") from error


def decoded_images(files: Sequence[bytes]) -> list[Image.Image]:
    """Returns image files of the server as PIL images, RGB."""
    images = [opened_image(file) for file in files]
    try:
        return [image.convert("RGB") for image in images]
    except Exception as error:
        raise _unreadable(error) from error


def opened_image(file: bytes) -> Image.Image:
    """Returns an image file of the server as a PIL image whose pixels are not decoded yet."""
    try:
        return Image.open(io.BytesIO(file))
    except Exception as error:  # each format's reader has its own errors
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> ServerFailure:
    return ServerFailure(f"an image of the server's response cannot be read: {error}")


def output(outputs: Outputs, name: str) -> NDArray[Any]:
    """Returns an output of a response."""
    if name not in outputs:
        raise ServerFailure(f"the server's answer has no output {name!r}")
    return outputs[name]


def json_output(outputs: Outputs, name: str) -> dict[str, Any]:
    """Returns the JSON object in an output BYTES [1]."""
    texts = output(outputs, name).ravel()
    if len(texts) != 1:
        raise ServerFailure(f"the server's {name} has {len(texts)} elements; expected: 1")
    return json_object(texts[0], name)


def json_object(text: bytes | str, name: str) -> dict[str, Any]:
    """Returns the JSON object in an output's text."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ServerFailure(f"the server's {name} is not JSON") from error
    if not isinstance(value, dict):
        raise ServerFailure(f"the server's {name} is not a JSON object")
    return value


def as_path(path: object) -> Path:
    """Returns a path that a caller names."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise BadArgumentError(f"path is {path!r}; allowed: the path of a file")
    return Path(path)


def write_file(file: Path, content: bytes) -> None:
    """Writes a file that a caller names.

    Raises:
        BadArgumentError: it cannot be written.
    """
    try:
        file.write_bytes(content)
    except (OSError, ValueError) as error:  # ValueError: a NUL, or text that the file system cannot hold
        raise BadArgumentError(f"{str(file)!r} cannot be written: {reason_of(error)}") from error


def format_of(path: str | os.PathLike[str]) -> OutputFormat:
    """Returns the image format of a file's suffix: ``png``, ``jpeg`` or ``webp``."""
    suffix = as_path(path).suffix
    if suffix.lower() not in SUFFIX_FORMATS:
        raise BadArgumentError(f"output {str(path)!r} ends in {suffix!r}; allowed: {', '.join(SUFFIX_FORMATS)}")
    return SUFFIX_FORMATS[suffix.lower()]


def check_template(path: str | os.PathLike[str], *further: str) -> None:
    """Raises BadArgumentError where a file's name has a placeholder that is not filled in; ``further`` are more."""
    allowed = (*_PLACEHOLDERS, *further)
    for found in _BRACES.findall(as_path(path).name):
        if found not in allowed:
            raise BadArgumentError(f"output {str(path)!r} has {found}; allowed: {', '.join(allowed)}")


def file_names(template: str, count: int, metadata: Metadata) -> list[str]:
    """Returns the names of ``count`` files; see ``GenerationResult.save``."""
    if count > 1 and not any(field in template for field in ("{index}", "{seed}")):
        path = Path(template)
        template = str(path.with_name(path.stem + "_{index}" + path.suffix))
    names = []
    for index in range(count):
        seed = metadata.seeds[index] if index < len(metadata.seeds) else index
        placeholders = {"index": index, "seed": seed, "width": metadata.width, "height": metadata.height}
        name = template
        for placeholder, value in placeholders.items():
            name = name.replace(f"{{{placeholder}}}", str(value))
        names.append(name)
    return names
