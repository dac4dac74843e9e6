"""First guesses of Jacobi decoding: what a token is guessed to be before any step has sampled it."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_image.ar.commands import Admit
from glm_image.request.geometry import Grid


def first_guesses(command: Admit) -> tuple[Tensor, Tensor]:
    """Returns, for the tokens of a sequence, where their first guesses come from.

    The guess is the token at the same place of the first source image or, in text to image, of the preview; in the
    preview the token above, in its first row the one to the left.

    Returns:
        Indices int64 [tokens] of the tokens that are the guesses, and guesses int64 [tokens] for those whose index is
        their own.
    """
    indices = torch.arange(command.tokens)
    guesses = torch.zeros_like(indices)
    if command.sources:
        start, source = command.sources[0]
        guesses[:] = torch.tensor(command.prompt_ids)[start + _same_places(command.grids[-1], source)]
        return indices, guesses
    preview = command.grids[0]
    sources = torch.where(indices >= preview.width, indices - preview.width, (indices - 1).clamp(min=0))
    if len(command.grids) > 1:
        sources[preview.tokens :] = _same_places(command.grids[-1], preview)
    return sources, guesses


def _same_places(grid: Grid, other: Grid) -> Tensor:
    """Returns for the tokens of a grid, row by row, the indices of those at the same places of another."""
    rows = torch.arange(grid.height) * other.height // grid.height
    columns = torch.arange(grid.width) * other.width // grid.width
    return (rows[:, None] * other.width + columns).flatten()
