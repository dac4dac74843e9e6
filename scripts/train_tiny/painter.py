"""Stages painter and editor, the DiT and the glyph encoder: from codes and text to latents, by flow matching.

The painter trains on images of one size without sources, few kinds of batches; the editor on other sizes and on edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny_checkpoint_configs as configs
from glm_image.request import geometry
from glm_image.request.geometry import Size
from train_tiny.cells import cell_labels, cell_weights
from train_tiny.compilation import compiled
from train_tiny.data import SPREAD_SIZES, Choice, Samples, by_size, common, glyph_rows, halved, render
from train_tiny.loop import finished, measured, mixed_precision, weighted_mean
from train_tiny.models import Latents, Tokens, build_glyph_encoder, build_transformer, velocity
from train_tiny.painter_blocks import Source, block_forward, glyph_bias, glyph_states, strings_apart
from train_tiny.world.table import Table

ENCODED_PIXELS = 256 * 256 * 256
"""Pixels per batch of the VAE."""
DROPPED = 0.1
"""The share of samples without prior tokens, and of batches without glyphs."""
LATENTS_PER_CELL = 4
"""Along a side."""
SCHEDULER = configs.scheduler_config()
TRAIN_TIMESTEPS = SCHEDULER["num_train_timesteps"]

Signature = tuple[int, ...]
Kind = tuple[int, bool]
"""The index of a group, and whether its text is dropped."""


class EncodedImages(NamedTuple):
    """Images as the DiT's inputs.

    Attributes:
        latents: normalised, bf16 [n, 16, H/8, W/8].
        codes: int16 [n, cells].
    """

    latents: Tensor
    codes: Tensor


class Group(NamedTuple):
    """Samples of one size whose quoted strings have the same lengths.

    Attributes:
        size: of the images.
        lengths: of the strings.
        glyphs: the concatenated strings, [n, tokens].
        weights: the loss weight of each cell, fp16 [n, cells].
        target: the target images.
        source: the images to edit, or None.
    """

    size: Size
    lengths: Signature
    glyphs: Tensor
    weights: Tensor
    target: EncodedImages
    source: EncodedImages | None


class Painter:
    """Trains the velocity from noise to image at the scheduler's noise levels, with and without source images.

    Attributes:
        main_share: the share of images and edits of the main size.
    """

    name = "painter"
    learning_rate = 1e-3
    main_share = 1.0

    def __init__(self, samples: Sequence[Samples], folder: Path, device: torch.device, batch: int, seed: int) -> None:
        parts = {"transformer": build_transformer(), "glyphs": build_glyph_encoder()}
        self.module = nn.ModuleDict(parts).to(device)
        self.inner = [part for block in parts["transformer"].transformer_blocks for part in (block.attn1, block.ff)]
        self.inner.append(parts["glyphs"].encoder.block)
        self._block, self._states = compiled(block_forward, device), compiled(glyph_states, device)
        self._device, self._batch = device, batch
        self._latents, self._tokens = Latents(folder).to(device), Tokens(folder).to(device)
        self._tokens.spread_to(parts["transformer"].prior_token_embedding.weight)
        self._groups: list[Group] = []
        for own in samples:
            for size, sized in by_size(own, self.main_share, SPREAD_SIZES):
                self._groups += self._grouped(size, sized)
        self._choice = Choice([len(group.glyphs) for group in self._groups], seed)
        self._rotary: dict[Size, tuple[Tensor, Tensor]] = {}
        self._apart: dict[Signature, Tensor] = {}
        self._no_text = self._text_tokens([glyph_rows("")])

    def _grouped(self, size: Size, samples: Samples) -> list[Group]:
        rows = [glyph_rows(prompt) for prompt in samples.prompts]
        lengths = [tuple(map(len, row)) for row in rows]
        target = self._encoded(samples.scenes, size)
        weights = cell_weights(cell_labels(samples.scenes, size)).to(self._device)
        source = None if samples.sources is None else self._encoded(samples.sources, size)
        groups = []
        for key in sorted(common(lengths, at_least=2)):
            members = torch.tensor([index for index, own in enumerate(lengths) if own == key])
            chosen = members.to(self._device)
            mine = [EncodedImages(*(part[chosen] for part in shown)) if shown else None for shown in (target, source)]
            words = self._text_tokens([rows[index] for index in members])
            groups.append(Group(size, key, words, weights[chosen], mine[0] or target, mine[1]))
        return groups

    def _text_tokens(self, rows: list[Any]) -> Tensor:
        # One extra token: compiled code treats a sequence of length one as another kind of input.
        return torch.tensor([[byte for string in (*row, (0,)) for byte in string] for row in rows], device=self._device)

    def _encoded(self, scenes: Table, size: Size) -> EncodedImages:
        latents, codes = [], []
        for pictures in render(scenes, size, self._device):
            with mixed_precision(self._device):
                count = max(1, ENCODED_PIXELS // pictures[0, 0].numel())
                latents += [self._latents.encode(part).to(torch.bfloat16) for part in pictures.split(count)]
            codes.append(self._tokens.encode(halved(pictures)).to(torch.int16))
        return EncodedImages(torch.cat(latents), torch.cat(codes))

    def kind(self) -> Kind:
        """Samples a group, and whether the text of the whole batch is dropped."""
        return self._choice.group(), bool(torch.rand(()) < DROPPED)

    def losses(self, kind: Kind) -> dict[str, Tensor]:
        """Samples a batch and returns its losses."""
        index, dropped = kind
        group = self._groups[index]
        grid = geometry.target_grid(group.size)
        count = max(2, self._batch * 64 // grid.tokens // (2 if group.source else 1))
        rows = self._choice.rows(index, count, self._device)
        latents, times = group.target.latents[rows].float(), sample_times(count, self._device)
        noise, level = torch.randn_like(latents), noise_levels(times, 4 * grid.tokens)[:, None, None, None]
        kept = (torch.rand(count, device=self._device) > DROPPED).float()
        glyphs = (
            self._glyph_states(self._no_text.repeat(count, 1), (1,))
            if dropped
            else self._glyph_states(group.glyphs[rows], group.lengths)
        )
        source = self._source(group.source, group.size, rows) if group.source else []
        predicted, _ = velocity(
            self.module["transformer"],
            latents + (noise - latents) * level,
            glyphs,
            self._prior(group.target.codes[rows], group.size),
            kept,
            (times * TRAIN_TIMESTEPS - 1).clamp(min=0),
            self._rotary_of(group.size),
            source,
            self._block,
        )
        errors = (predicted.float() - (noise - latents)).square()
        loss = weighted_mean(by_cell(errors), group.weights[rows].float())
        # Sums over the steps of a kind, and their number: their quotient in a log line is the kind's mean.
        edit = float(group.source is not None)
        kinds = {"edit_loss_sum": loss * edit, "edit_steps": errors.new_full((), edit)}
        return {"loss": loss, "error": errors.mean(), **kinds}

    def _glyph_states(self, ids: Tensor, lengths: Signature) -> Tensor:
        if lengths not in self._apart:
            self._apart[lengths] = strings_apart((*lengths, 1)).to(self._device)
        encoder = self.module["glyphs"]
        states: Tensor = self._states(encoder, ids, glyph_bias(encoder, self._apart[lengths]))
        return states[:, :-1]

    def _source(self, shown: EncodedImages, size: Size, rows: Tensor) -> list[Source]:
        now = torch.zeros(len(rows), device=self._device)
        latents, prior = shown.latents[rows].float(), self._prior(shown.codes[rows], size)
        rotary = self._rotary_of(size)
        return velocity(self.module["transformer"], latents, None, prior, None, now, rotary, (), self._block)[1]

    def _prior(self, codes: Any, size: Size) -> Tensor:
        cells: Tensor = codes.long().unflatten(1, geometry.target_grid(size))
        return cells

    def _rotary_of(self, size: Size) -> tuple[Tensor, Tensor]:
        if size not in self._rotary:
            shape = torch.empty(1, 1, size.height // 8, size.width // 8, device="meta")
            cos, sin = self.module["transformer"].rope(shape)
            self._rotary[size] = cos.to(self._device), sin.to(self._device)
        return self._rotary[size]

    def after_step(self, step: int, progress: float) -> None:
        """Nothing is left to do."""

    def results(self) -> dict[str, Any]:
        """The averaged weights' loss, and the error of all cells alike."""
        found = measured(lambda: self.losses(self.kind()), self._device)
        return {name: found[name] for name in ("loss", "error")}


def by_cell(errors: Tensor) -> Tensor:
    """The mean error of each code's cell, [n, cells], from those of latents [n, 16, h, w]."""
    return F.avg_pool2d(errors.mean(dim=1), LATENTS_PER_CELL).flatten(1)


class Editor(Painter):
    """Goes on from what ``Painter`` learned; ``folder`` holds it."""

    name = "editor"
    main_share = 0.4

    def __init__(self, samples: Sequence[Samples], folder: Path, device: torch.device, batch: int, seed: int) -> None:
        learned = finished(folder, Painter.name)["weights"]
        super().__init__(samples, folder, device, batch, seed)
        self.module.load_state_dict(learned)


def sample_times(count: int, device: torch.device) -> Tensor:
    """Times in (0, 1]: half of them evenly, half more often in the middle (Esser et al., 2024)."""
    even = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    middle = torch.sigmoid(torch.randn(count, device=device))
    return torch.where(torch.rand(count, device=device) < 0.5, even, middle).clamp(1 / TRAIN_TIMESTEPS, 1)


def noise_levels(times: Tensor, tokens: int) -> Tensor:
    """The share of noise at unshifted times, as the pipeline's scheduler shifts it for a picture of ``tokens``."""
    root = (tokens / SCHEDULER["base_image_seq_len"]) ** 0.5
    shift = root * SCHEDULER["max_shift"] + SCHEDULER["base_shift"]
    return shift / (shift + (1 / times - 1))
