"""Encodes source images to tokens: transformers' vision tower, and the nearest code of each patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GlmImageConfig, GlmImageVisionModel, GlmImageVQVAE

from glm_image.checkpoint.checkpoint import Checkpoint, fill
from glm_image.checkpoint.files import read_from
from glm_image.request.geometry import Grid
from glm_image.request.source_images import Source

QUANTIZER_DTYPE = torch.float32
"""bfloat16 rounds the distances of different codes to the same number."""


class Vision:
    """transformers' vision tower ``GlmImageVisionModel`` and quantizer ``GlmImageVQVAE``, the latter in fp32."""

    def __init__(self, tower: Any, quantizer: Any) -> None:
        self._tower = tower
        self._quantizer = quantizer
        weight = tower.patch_embed.proj.weight
        self._device: torch.device = weight.device
        self._dtype: torch.dtype = weight.dtype

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Vision:
        tower, quantizer = _build(checkpoint)
        component = "vision_language_encoder"
        fill(tower, checkpoint.tensors(component, device, dtype), "model.visual.")
        fill(quantizer, checkpoint.tensors(component, device, QUANTIZER_DTYPE), "model.vqmodel.")
        return cls(tower, quantizer)

    @staticmethod
    def bytes_needed(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
        tower, quantizer = (sum(weight.numel() for weight in module.parameters()) for module in _build(checkpoint))
        return int(tower * dtype.itemsize + quantizer * QUANTIZER_DTYPE.itemsize)

    def encode(self, patches: NDArray[np.float32], grids: Sequence[Grid]) -> NDArray[np.int32]:
        """Encodes a request's source images, int32 [tokens of all grids].

        ``patches`` is fp32 [tokens of all grids, channels of a patch], image by image, row by row; see ``patches_of``.
        """
        values = torch.from_numpy(patches).to(self._device, self._dtype)
        sides = torch.tensor([(1, *grid) for grid in grids], device=self._device)
        features: Tensor = self._tower(values, grid_thw=sides).last_hidden_state
        tokens = []
        for image, grid in zip(torch.split(features, [grid.tokens for grid in grids]), grids, strict=True):
            laid_out = image.view(1, *grid, -1).permute(0, 3, 1, 2).contiguous()
            tokens.append(self._quantizer.encode(laid_out.to(QUANTIZER_DTYPE)).image_tokens)
        ids: NDArray[np.int32] = torch.cat(tokens).to("cpu", torch.int32).numpy()
        return ids


def patches_of(processor: Any, sources: Sequence[Source]) -> NDArray[np.float32]:
    """Returns the vision tower's input of resized source images, fp32 [tokens, channels of a patch]."""
    images = [source.pixels for source in sources]
    inputs = processor(images=images, do_resize=False, input_data_format="channels_last", return_tensors="np")
    patches: NDArray[np.float32] = inputs["pixel_values"].astype(np.float32, copy=False)
    return patches


def _build(checkpoint: Checkpoint) -> tuple[Any, Any]:
    path, json = checkpoint.path("vision_language_encoder"), checkpoint.config("vision_language_encoder")
    with read_from(path / "config.json"):
        config = GlmImageConfig(**json)
        with torch.device("meta"):
            tower, quantizer = GlmImageVisionModel(config.vision_config), GlmImageVQVAE(config.vq_config)
    del quantizer.post_quant_conv  # unused: codes are never turned back into features
    return tower, quantizer
