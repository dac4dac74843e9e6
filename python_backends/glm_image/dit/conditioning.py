"""Conditioning: everything that stays the same from one denoising step to the next, computed once per image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_image.dit.commands import Prepare
from glm_image.dit.schedule import Schedule
from glm_image.dit.source_kv import SourceCache
from glm_image.request import geometry, prompts
from glm_image.request.geometry import Grid, Size

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of image tokens, fp32 [image tokens, head_dim] each."""


@dataclass(frozen=True)
class Branch:
    """The conditioning of one branch of classifier-free guidance.

    Attributes:
        glyphs: projected hidden states of the quoted strings, [1, glyph tokens, width].
        prior: projected embeddings of the prior tokens, [1, image tokens, width]; added to the image tokens.
    """

    glyphs: Tensor
    prior: Tensor


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of an image.

    Attributes:
        branches: the prompt's, and with guidance the negative prompt's, without prior tokens.
        guided: whether there is guidance.
        tokens: image tokens of a branch, of all ranks together.
        times: silu(time + size embedding) of every step, [steps, time width].
        sources: keys and values of source images, which the conditional branch attends to; None without any.
    """

    branches: list[Branch]
    guided: bool
    tokens: int
    guidance_scale: float
    times: Tensor
    rotary: Rotary
    sources: SourceCache | None = None


@dataclass(frozen=True)
class SourceConditioning:
    """The conditioning of a source image.

    Attributes:
        latents: normalised, [1, channels, H/8, W/8].
        prior: projected embeddings of its tokens, [1, image tokens, width]; added to the image tokens.
        time: silu(time + size embedding) of time 0, [1, time width].
    """

    latents: Tensor
    prior: Tensor
    time: Tensor
    rotary: Rotary


class Conditioner:
    """Prepares conditioning with diffusers' transformer, transformers' ``T5EncoderModel`` and the ByT5 tokenizer."""

    def __init__(self, transformer: Any, glyph_encoder: Any, glyph_tokenizer: Any) -> None:
        self._transformer = transformer
        self._glyph_encoder = glyph_encoder
        self._glyph_tokenizer = glyph_tokenizer
        self._device: torch.device = transformer.proj_out.weight.device
        self._dtype: torch.dtype = transformer.proj_out.weight.dtype

    def prepare(self, command: Prepare, schedule: Schedule, sources: SourceCache | None = None) -> Conditioning:
        """Prepares one image; a guidance scale above 1 adds the unconditional branch.

        The rendered and the negative text are the glyph conditions of the two branches.
        """
        embedded = self._embedded(command.prior_token_ids, command.grid)
        guided = command.guidance_scale > 1
        branches = [self._branch(command.rendered_text, embedded)]
        if guided:
            branches.append(self._branch(command.negative_text, torch.zeros_like(embedded)))
        return Conditioning(
            branches=branches,
            guided=guided,
            tokens=embedded.shape[1],
            guidance_scale=command.guidance_scale,
            times=self._times(geometry.rendered_size(command.grid), schedule.timesteps),
            rotary=self._rotary(command.grid),
            sources=sources,
        )

    def prepare_source(self, latents: Tensor, token_ids: NDArray[np.int32], grid: Grid) -> SourceConditioning:
        """Prepares one source image.

        ``latents`` are normalised, [1, channels, H/8, W/8]; ``token_ids`` is int32 [grid.tokens].
        """
        return SourceConditioning(
            latents=latents,
            prior=self._transformer.prior_projector(self._embedded(token_ids, grid)),
            time=self._times(geometry.rendered_size(grid), torch.zeros(1, device=self._device)),
            rotary=self._rotary(grid),
        )

    def _embedded(self, token_ids: NDArray[np.int32], grid: Grid) -> Tensor:
        upsampled = torch.from_numpy(geometry.upsample_tokens(token_ids, grid)).long().to(self._device)
        embedded: Tensor = self._transformer.prior_token_embedding(upsampled[None])
        return embedded

    def _branch(self, strings: tuple[str, ...], prior_embedding: Tensor) -> Branch:
        model = self._transformer
        return Branch(
            glyphs=model.glyph_projector(self._glyph_states(strings)), prior=model.prior_projector(prior_embedding)
        )

    def _glyph_states(self, strings: tuple[str, ...]) -> Tensor:
        rows = prompts.glyph_token_ids(strings, self._glyph_tokenizer)
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=self._glyph_tokenizer.pad_token_id
        )
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self._device)
        states = self._glyph_encoder(ids.to(self._device), attention_mask=mask.long()).last_hidden_state
        packed: Tensor = states[mask][None].to(self._dtype)
        return packed

    def _times(self, size: Size, timesteps: Tensor) -> Tensor:
        # Step by step rather than as one batch: the reference multiplies matrices of one row, and so do we.
        embed = self._transformer.time_condition_embed
        target_size = torch.tensor([size], dtype=self._dtype, device=self._device)
        crop = torch.zeros_like(target_size)
        return torch.cat([embed(time[None], target_size, crop, self._dtype) for time in timesteps])

    def _rotary(self, grid: Grid) -> Rotary:
        # The module only looks at the shape of the latents, whose sides are four times the grid's.
        latents = torch.empty(1, 1, grid.height * 4, grid.width * 4, device="meta")
        cos, sin = self._transformer.rope(latents)
        return cos.to(self._device), sin.to(self._device)
