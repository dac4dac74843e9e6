"""The transformer around its blocks: projections in and out, and the pass of the source images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glm_image.dit.blocks import Blocks, Tokens
from glm_image.dit.conditioning import Branch, Conditioning, SourceConditioning
from glm_image.dit.parallel_context import SINGLE_RANK, ParallelContext
from glm_image.dit.source_kv import SourceCache


class DitModel:
    """The transformer, for this rank's share of an image.

    Args:
        transformer: diffusers' ``GlmImageTransformer2DModel``; its projections are used, its blocks are not.
        blocks: run in place of the transformer's blocks.
        parallel: which branches and tokens are this rank's.
    """

    def __init__(self, transformer: Any, blocks: Blocks, parallel: ParallelContext = SINGLE_RANK) -> None:
        self.transformer, self.blocks, self.parallel = transformer, blocks, parallel
        self.dtype: torch.dtype = transformer.proj_out.weight.dtype

    def project_in(self, latents: Tensor, branches: Sequence[Branch]) -> list[Tokens]:
        """Returns this rank's tokens of each of its branches, as they enter the blocks.

        Args:
            latents: fp32 [1, channels, height, width].
            branches: as ``ParallelContext.shard_conditioning`` returns them.
        """
        patches = self.transformer.image_projector(latents.to(self.dtype))
        shard = self.parallel.shard(patches, dim=1)
        return [(shard + branch.prior, branch.glyphs) for branch in branches]

    def run_blocks(
        self,
        which: range,
        sequences: list[Tokens],
        time: Tensor,
        conditioning: Conditioning,
        *,
        conditional: bool = True,
    ) -> list[Tokens]:
        """Runs some of the blocks over this rank's tokens of each branch; see ``Blocks.run``.

        ``conditional`` says whether the first sequence is the conditional branch, which attends to source images.
        """
        sources = conditioning.sources if conditional else None
        shape = self.parallel.sequence_shape(conditioning.tokens, sources.tokens if sources else ())
        return self.blocks.run(
            which, sequences, time, conditioning.rotary, sources.readers() if sources else None, shape
        )

    def project_out(
        self, images: Sequence[Tensor], time: Tensor, shape: tuple[int, ...], *, guided: bool
    ) -> list[Tensor]:
        """Returns the velocity that every branch predicts, fp32 of the latents' ``shape``.

        ``images`` are the image tokens of this rank's branches after the blocks, [1, image tokens, width].
        """
        patch = self.transformer.config.patch_size
        tokens = shape[2] * shape[3] // patch**2
        velocities = []
        for image in images:
            projected = self.transformer.proj_out(self.transformer.norm_out(image, time))
            velocities.append(unpatchify(self.parallel.all_gather(projected, tokens), shape, patch).float())
        return self.parallel.gather_branches(velocities, guided=guided)

    def read_source(self, source: SourceConditioning, cache: SourceCache, index: int) -> None:
        """Passes source image ``index`` through the blocks, which write its keys and values to ``cache``."""
        ring = self.parallel.ranks.ring
        start = sum(len(ring.shard_range(tokens)) for tokens in cache.tokens[:index])
        image = self.transformer.image_projector(source.latents) + source.prior
        no_text, tokens = image[:, :0], image.shape[1]
        sequence = (self.parallel.shard(image, dim=1), no_text)
        rotary, shape = self.parallel.shard_rotary(source.rotary), self.parallel.sequence_shape(tokens)
        self.blocks([sequence], source.time, rotary, cache.recorders(start), shape)


def unpatchify(tokens: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """Lays tokens [batch, tokens, channels * patch * patch] out as latents of ``shape``."""
    batch, _, height, width = shape
    grid = tokens.reshape(batch, height // patch, width // patch, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
