"""A denoising step in two halves, between which it is decided what is reused of the step last computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glm_image.dit.blocks import Blocks, Tokens
from glm_image.dit.cache import CacheSettings
from glm_image.dit.conditioning import Branch, Conditioning
from glm_image.dit.forward import euler_step, project_in, project_out
from glm_image.dit.parallel_context import SINGLE_RANK, ParallelContext

Repeat = Callable[[Callable[[], None]], Callable[[], None]]
"""Wraps what is run many times: where the device can, it is captured."""


@dataclass(frozen=True)
class BranchState:
    """What a branch keeps, all of it where it was made: captured steps know only addresses.

    Attributes:
        image: image tokens after the front blocks, [1, image tokens, width].
        text: text tokens after the front blocks, [1, text tokens, width].
        front: what the front blocks added to the image tokens.
        computed_front: the same, of the step last computed.
        residual: what the middle blocks added to the image tokens, of the step last computed.
        text_residual: what they added to the text tokens; None where no block follows that would read them.
    """

    image: Tensor
    text: Tensor
    front: Tensor
    computed_front: Tensor
    residual: Tensor
    text_residual: Tensor | None

    @classmethod
    def of(cls, branch: Branch, with_text: bool) -> BranchState:
        """Makes the state of a branch with these conditions."""
        image, text = torch.zeros_like(branch.prior), torch.zeros_like(branch.glyphs)
        return cls(
            image=image,
            text=text,
            front=torch.zeros_like(image),
            computed_front=torch.zeros_like(image),
            residual=torch.zeros_like(image),
            text_residual=torch.zeros_like(text) if with_text else None,
        )

    @property
    def reused(self) -> Tokens:
        """The tokens after the middle blocks, had these added what they did in the step last computed."""
        text = self.text if self.text_residual is None else self.text + self.text_residual
        return self.image + self.residual, text

    def keep(self, image: Tensor, text: Tensor) -> None:
        """Takes note of the tokens after the middle blocks."""
        self.computed_front.copy_(self.front)
        torch.sub(image, self.image, out=self.residual)
        if self.text_residual is not None:
            torch.sub(text, self.text, out=self.text_residual)


class DbCacheStep:
    """The tensors' side of a picture's cached steps: no part of it looks at a value, so all of it can be captured.

    Args:
        transformer: provides the projections in and out.
        blocks: what is between them.
        settings: how the blocks are divided.
        conditioning: the picture's.
        latents: fp32, updated by each step.
        step: int64 [1], counted up by each step.
        sigmas: fp32 [steps + 1].
        sharing: what of it is this rank's; all that share a branch's tokens get the same changes.

    Attributes:
        branches: the state of each of this rank's branches.
        changes: relative L1 change of each branch's front residual since the step last computed, fp32 [branches]; of
            an infinite or unknown change it is not a number, which is below no threshold.
    """

    def __init__(
        self,
        transformer: Any,
        blocks: Blocks,
        settings: CacheSettings,
        conditioning: Conditioning,
        latents: Tensor,
        step: Tensor,
        sigmas: Tensor,
        sharing: ParallelContext = SINGLE_RANK,
    ) -> None:
        self._sharing = sharing
        self._transformer, self._blocks, self._conditioning = transformer, blocks, conditioning
        self._latents, self._step, self._sigmas = latents, step, sigmas
        self._front, self._middle, self._back = settings.parts(len(blocks))
        self.branches = [BranchState.of(branch, with_text=len(self._back) > 0) for branch in conditioning.branches]
        self.changes = torch.zeros(len(self.branches), device=latents.device)

    def front(self) -> None:
        """Computes the front blocks and how much their residuals have changed."""
        sequences = project_in(self._transformer, self._latents, self._conditioning.branches, self._sharing)
        after = self._run(self._front, sequences)
        for index, (state, (before, _), (image, text)) in enumerate(zip(self.branches, sequences, after, strict=True)):
            state.image.copy_(image)
            state.text.copy_(text)
            torch.sub(image, before, out=state.front)
            # Summed up in fp32: the mean of bf16 numbers in bf16 has two digits.
            change = (state.computed_front - state.front).abs().mean(dtype=torch.float32)
            size = state.computed_front.abs().mean(dtype=torch.float32)
            change, size = self._sharing.mean(torch.stack([change, size]), state.front.shape[1])
            self.changes[index] = change / size

    def back(self, reuse: tuple[bool, ...]) -> None:
        """Computes or reuses the middle blocks, computes the back ones, and takes the step.

        Args:
            reuse: for each branch, whether the middle blocks are reused.
        """
        tokens = [
            state.reused if reused else (state.image, state.text)
            for state, reused in zip(self.branches, reuse, strict=True)
        ]
        computed = [index for index, reused in enumerate(reuse) if not reused]
        if computed:
            after = self._run(self._middle, [tokens[index] for index in computed], conditional=computed[0] == 0)
            for index, result in zip(computed, after, strict=True):
                self.branches[index].keep(*result)
                tokens[index] = result
        if self._back:
            tokens = self._run(self._back, tokens)
        images = [image for image, _ in tokens]
        scale, guided = self._conditioning.guidance_scale, self._conditioning.guided
        shape = self._latents.shape
        velocities = project_out(self._transformer, images, self._time, shape, self._sharing, guided=guided)
        self._latents.copy_(euler_step(self._latents, velocities, scale, self._step, self._sigmas))
        self._step.add_(1)

    @property
    def _time(self) -> Tensor:
        return self._conditioning.times.index_select(0, self._step)

    def _run(self, which: range, sequences: list[Tokens], conditional: bool = True) -> list[Tokens]:
        sources = self._conditioning.sources if conditional else None
        joins = sources.readers() if sources else None
        self._sharing.begin_picture(self._conditioning)
        return self._blocks.run(which, sequences, self._time, self._conditioning.rotary, joins)


class CachedDenoiser:
    """Takes a picture's steps; all its state is the picture's own, and gone with it.

    Args:
        halves: the tensors' side.
        settings: what decides.
        steps: the picture's.
        sources: source images that it reads.
        repeat: wraps what is run step after step.
    """

    def __init__(self, halves: DbCacheStep, settings: CacheSettings, steps: int, sources: int, repeat: Repeat) -> None:
        from glm_image.dit.cache_decisions import BranchDecisions  # noqa: PLC0415 - cache-dit is only for those who use it

        # What is captured holds the halves, and this holds what is captured: were it a circle, a dropped picture's
        # graphs would stay until some later collection.
        self._repeat = repeat
        self._front = repeat(halves.front)
        self._backs: dict[tuple[bool, ...], Callable[[], None]] = {}
        self._halves = halves
        self._changes = changes = _Changes(halves.changes)
        branches = len(halves.branches)
        self._decisions = [
            BranchDecisions(
                settings,
                steps,
                settings.refresh_step(sources, index, branches),
                state.residual,
                state.text_residual,
                partial(changes.of, index),
            )
            for index, state in enumerate(halves.branches)
        ]

    def __call__(self) -> bool:
        """Takes the next step; returns whether all branches reused their middle blocks."""
        self._front()
        self._changes.forget()
        reuse = tuple(branch.begin_step() for branch in self._decisions)
        if reuse not in self._backs:
            self._backs[reuse] = self._repeat(partial(self._halves.back, reuse))
        self._backs[reuse]()
        for branch, reused in zip(self._decisions, reuse, strict=True):
            if not reused:
                branch.end_computed_step()
        return all(reuse)


class _Changes:
    """Reads the changes of all branches at once, at most once a step, and only when one is asked for."""

    def __init__(self, changes: Tensor) -> None:
        self._changes = changes
        self._read: list[float] | None = None

    def forget(self) -> None:
        self._read = None

    def of(self, branch: int) -> float:
        if self._read is None:
            self._read = self._changes.tolist()
        return self._read[branch]
