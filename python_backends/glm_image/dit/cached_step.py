"""The denoising steps of one image with the residual cache: a step may skip the middle blocks.

What the middle blocks add to the tokens changes little from one step to the next. A step computes the front blocks,
decides by the change of their residual whether to reuse the middle blocks' residual, and computes the back blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from glm_image.dit.blocks import Tokens
from glm_image.dit.cache import CacheSettings
from glm_image.dit.cache_policy import ReusePolicy, TaylorSeer
from glm_image.dit.conditioning import Branch
from glm_image.dit.model import DitModel
from glm_image.dit.step import Compute, ImageState, StepCapture


@dataclass(frozen=True)
class BranchState:
    """The cached tensors of a branch. They stay where they are, as captured steps know only addresses.

    Attributes:
        image: image tokens after the front blocks, [1, image tokens, width].
        text: text tokens after the front blocks, [1, text tokens, width].
        front: the front blocks' residual of the image tokens.
        computed_front: the same, of the step last computed.
        residual: the middle blocks' residual of the image tokens, of the step last computed.
        text_residual: the same of the text tokens; None where no block follows that would read them.
    """

    image: Tensor
    text: Tensor
    front: Tensor
    computed_front: Tensor
    residual: Tensor
    text_residual: Tensor | None

    @classmethod
    def of(cls, branch: Branch, with_text: bool) -> BranchState:
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
    def residuals(self) -> list[Tensor]:
        return [self.residual] if self.text_residual is None else [self.residual, self.text_residual]

    @property
    def reused(self) -> Tokens:
        """The tokens after the middle blocks, by the residuals."""
        text = self.text if self.text_residual is None else self.text + self.text_residual
        return self.image + self.residual, text

    def store(self, image: Tensor, text: Tensor) -> None:
        """Updates the residuals by computed tokens after the middle blocks."""
        self.computed_front.copy_(self.front)
        torch.sub(image, self.image, out=self.residual)
        if self.text_residual is not None:
            torch.sub(text, self.text, out=self.text_residual)


class DbCacheStep:
    """The computation of a cached step in two halves. Neither looks at a value, so both can be captured.

    Attributes:
        branches: the state of each of this rank's branches.
        changes: relative L1 change of each branch's front residual since the step last computed, fp32 [branches]; the
            same on all ranks that share a branch's tokens. NaN where a residual is infinite: below no threshold.
    """

    def __init__(self, model: DitModel, state: ImageState, settings: CacheSettings) -> None:
        self._model, self._state = model, state
        self._front, self._middle, self._back = settings.parts(len(model.blocks))
        with_text = len(self._back) > 0
        self.branches = [BranchState.of(branch, with_text) for branch in state.conditioning.branches]
        self.changes = torch.zeros(len(self.branches), device=state.latents.device)

    def compute_front(self) -> None:
        sequences = self._model.project_in(self._state.latents, self._state.conditioning.branches)
        after = self._run(self._front, sequences)
        for index, (branch, (before, _), (image, text)) in enumerate(zip(self.branches, sequences, after, strict=True)):
            branch.image.copy_(image)
            branch.text.copy_(text)
            torch.sub(image, before, out=branch.front)
            # Summed up in fp32: the mean of bf16 numbers in bf16 has two digits.
            change = (branch.computed_front - branch.front).abs().mean(dtype=torch.float32)
            size = branch.computed_front.abs().mean(dtype=torch.float32)
            change, size = self._model.parallel.mean(torch.stack([change, size]), branch.front.shape[1])
            self.changes[index] = change / size

    def finish(self, reuse: tuple[bool, ...]) -> None:
        """Computes or reuses the middle blocks, computes the back ones, and takes the step.

        ``reuse`` says for each branch whether the middle blocks' residuals are reused.
        """
        tokens = [
            branch.reused if reused else (branch.image, branch.text)
            for branch, reused in zip(self.branches, reuse, strict=True)
        ]
        computed = [index for index, reused in enumerate(reuse) if not reused]
        if computed:
            after = self._run(self._middle, [tokens[index] for index in computed], conditional=computed[0] == 0)
            for index, result in zip(computed, after, strict=True):
                self.branches[index].store(*result)
                tokens[index] = result
        if self._back:
            tokens = self._run(self._back, tokens)
        images, state = [image for image, _ in tokens], self._state
        shape, guided = tuple(state.latents.shape), state.conditioning.guided
        state.advance(self._model.project_out(images, state.time, shape, guided=guided))

    def _run(self, which: range, sequences: list[Tokens], *, conditional: bool = True) -> list[Tokens]:
        state = self._state
        return self._model.run_blocks(which, sequences, state.time, state.conditioning, conditional=conditional)


class CachedStep:
    """Takes the next step of an image, skipping the middle blocks of each branch where its policy allows."""

    def __init__(
        self, halves: DbCacheStep, policies: list[ReusePolicy], settings: CacheSettings, capture: StepCapture
    ) -> None:
        # The captured graphs hold ``halves``, which must not hold the graphs: in a reference cycle those of a dropped
        # image would live until some later garbage collection.
        self._halves, self._policies, self._capture = halves, policies, capture
        self._compute_front = capture(halves.compute_front)
        self._finish: dict[tuple[bool, ...], Compute] = {}
        self._series = [
            [(residual, TaylorSeer(settings.taylorseer_order)) for residual in branch.residuals]
            if settings.enable_taylorseer
            else []
            for branch in halves.branches
        ]

    def __call__(self) -> bool:
        """Takes the step; returns whether all of this rank's branches skipped their middle blocks."""
        self._compute_front()
        changes = cache(self._halves.changes.tolist)  # waits for the device: at most once a step, if at all
        reuse = tuple(
            policy.begin_step(lambda index=index: changes()[index])  # type: ignore[misc]
            for index, policy in enumerate(self._policies)
        )
        for policy, series, reused in zip(self._policies, self._series, reuse, strict=True):
            for residual, expansion in series if reused else ():
                residual.copy_(expansion.extrapolate(policy.step))
        if reuse not in self._finish:
            self._finish[reuse] = self._capture(partial(self._halves.finish, reuse))
        self._finish[reuse]()
        for policy, series, reused in zip(self._policies, self._series, reuse, strict=True):
            for residual, expansion in () if reused else series:
                expansion.update(residual, policy.step)
        return all(reuse)


def cached_step(
    model: DitModel, state: ImageState, settings: CacheSettings, steps: int, sources: int, capture: StepCapture
) -> CachedStep:
    """Returns the cached step of an image with ``steps`` steps that attends to ``sources`` source images."""
    halves = DbCacheStep(model, state, settings)
    mask, branches = settings.steps_mask(steps), len(halves.branches)
    policies = [
        ReusePolicy(settings, mask, settings.refresh_step(sources, branch, branches)) for branch in range(branches)
    ]
    return CachedStep(halves, policies, settings, capture)
