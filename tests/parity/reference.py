"""The unmodified reference, diffusers' GlmImagePipeline over transformers, in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import GlmImagePipeline
from numpy.typing import NDArray
from PIL import Image


def load_reference(folder: Path) -> GlmImagePipeline:
    """Load ``folder`` in fp32 on the CPU, once a process; its progress bar is off."""
    return _load(Path(folder).resolve())


@lru_cache(maxsize=16)
def _load(folder: Path) -> GlmImagePipeline:
    pipe = GlmImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _sampling(pipe: GlmImagePipeline, overrides: dict[str, float | int]) -> Iterator[None]:
    """Sampling parameters for one call; afterwards those of the checkpoint and the global random state are back."""
    unknown = overrides.keys() - {"temperature", "top_p", "top_k"}
    if unknown:
        raise TypeError(f"no sampling parameter of the reference: {sorted(unknown)}")
    config = pipe.vision_language_encoder.generation_config
    before = {name: getattr(config, name) for name in overrides}
    _forget_positions(pipe)
    with torch.random.fork_rng(devices=[]):
        try:
            config.update(**overrides)
            yield
        finally:
            config.update(**before)


def _forget_positions(pipe: GlmImagePipeline) -> None:
    # The model keeps the decode positions of the last prompt; none of them may reach the next call.
    model = pipe.vision_language_encoder.model
    model.rope_deltas = None
    model._cached_decode_position_ids = None
    model._prefill_len = None


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_tokens(
    pipe: GlmImagePipeline,
    prompt: str,
    height: int,
    width: int,
    seed: int,
    images: Sequence[Image.Image] = (),
    **sampling: float | int,
) -> NDArray[np.int64]:
    """The prior tokens of the large grid, [height/32 * width/32], row-major, before upsampling.

    Args:
        pipe: From :func:`load_reference`.
        prompt: The prompt.
        height: Pixels, a multiple of 32.
        width: Pixels, a multiple of 32.
        seed: Seeds the global generator that the reference samples with.
        images: Source images.
        **sampling: ``temperature``, ``top_p``, ``top_k`` in place of the checkpoint's.
    """
    return _prior(pipe, prompt, height, width, seed, images, sampling)[0]


def reference_source_tokens(
    pipe: GlmImagePipeline, images: Sequence[Image.Image]
) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """The tokens of source images, one after the other before upsampling, and the grid of each."""
    _, tokens, grids = _prior(pipe, "x", 32, 32, 0, images, {})
    return tokens, grids


def _prior(
    pipe: GlmImagePipeline,
    prompt: str,
    height: int,
    width: int,
    seed: int,
    images: Sequence[Image.Image],
    sampling: dict[str, float | int],
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[tuple[int, int]]]:
    with _sampling(pipe, sampling), torch.no_grad():
        upsampled, sources, grids = pipe.generate_prior_tokens(
            prompt=prompt,
            height=height,
            width=width,
            image=[list(images)] if images else None,
            device=torch.device("cpu"),
            generator=_generator(seed),
        )
    sizes = [(rows // 2, columns // 2) for _, rows, columns in grids[0].tolist()] if images else []
    parts = torch.split(sources[0], [4 * rows * columns for rows, columns in sizes]) if images else []
    source_tokens = [_downsample(part, *size) for part, size in zip(parts, sizes, strict=True)]
    return (
        _downsample(upsampled, height // 32, width // 32),
        np.concatenate([*source_tokens, np.zeros(0, np.int64)]),
        sizes,
    )


def _downsample(upsampled: torch.Tensor, rows: int, columns: int) -> NDArray[np.int64]:
    grid = upsampled.view(rows * 2, columns * 2)[::2, ::2]
    tokens: NDArray[np.int64] = grid.reshape(-1).numpy().astype(np.int64)
    return tokens


def reference_generation(
    pipe: GlmImagePipeline, prompt: str, height: int, width: int, seed: int, **sampling: float | int
) -> NDArray[np.int64]:
    """All ids that the AR model generates, [ph*pw + th*tw + 1]: preview, large grid, and the one after them.

    Shorter where the model samples the end of the image early, on which the rest of the reference fails.
    Arguments as in :func:`reference_tokens`.
    """
    model = pipe.vision_language_encoder
    generate = model.generate

    def generate_and_leave(*args: Any, **kwargs: Any) -> None:
        raise _GeneratedError(generate(*args, **kwargs)[0, kwargs["input_ids"].shape[1] :])

    model.generate = generate_and_leave
    try:
        reference_tokens(pipe, prompt, height, width, seed, **sampling)
    except _GeneratedError as left:
        ids: NDArray[np.int64] = left.ids.numpy().astype(np.int64)
        return ids
    finally:
        del model.generate
    raise AssertionError("the reference made prior tokens without its AR model")


class _GeneratedError(Exception):
    """Carries generated ids out of the pipeline."""

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self.ids = ids


def reference_image(
    pipe: GlmImagePipeline,
    prompt: str,
    height: int,
    width: int,
    seed: int,
    steps: int,
    guidance: float,
    prior_token_ids: NDArray[np.int64] | None = None,
    images: Sequence[Image.Image] = (),
    **sampling: float | int,
) -> NDArray[np.uint8]:
    """The picture, [height, width, 3].

    Args:
        pipe: From :func:`load_reference`.
        prompt: The prompt.
        height: Pixels, a multiple of 32.
        width: Pixels, a multiple of 32.
        seed: Seeds the AR model's sampling and the latents' noise.
        steps: Denoising steps.
        guidance: Guidance scale; above 1 the unconditional branch is computed too.
        prior_token_ids: Tokens as :func:`reference_tokens` gives them; without, the AR model makes them. None with
            source images.
        images: Source images.
        **sampling: As for :func:`reference_tokens`.
    """
    prior = None if prior_token_ids is None else _upsample(prior_token_ids, height, width)
    with _sampling(pipe, sampling):
        pictures = pipe(
            prompt=prompt,
            image=list(images) or None,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=_generator(seed),
            prior_token_ids=prior,
        ).images
    return np.array(pictures[0], dtype=np.uint8)


def _upsample(tokens: NDArray[np.int64], height: int, width: int) -> torch.Tensor:
    grid = np.asarray(tokens, dtype=np.int64).reshape(height // 32, width // 32)
    return torch.from_numpy(grid.repeat(2, axis=0).repeat(2, axis=1).reshape(1, -1))
