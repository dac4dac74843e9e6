"""Stages 5 and 6, the AR: from words, and the codes of a source picture, to the codes of a picture.

First pictures alone; then edits as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from glm_image.request import geometry
from glm_image.request.geometry import Grid, PlacedGrid, Size
from glm_image.request.prompts import PromptTokenizer
from train_tiny.cells import decision_weights
from train_tiny.compilation import compile_blocks, compiled
from train_tiny.data import OTHER_SIZES, Choice, Samples, by_size, small_pictures
from train_tiny.loop import finished, measured, weighted_mean
from train_tiny.models import CONFIG, Tokens, build_ar
from train_tiny.vocabulary import processor_of
from train_tiny.world.table import Table

SOURCE_START = 1
"""Of a source picture's codes in a prompt: after the image start."""
ONE_IN = 50
"""Scenes is kept from training, to measure by."""
MAIN_SHARE = 0.5
"""Of the pictures, and of the edits, that are of the main size."""
LENGTH_STEP = 32
HOLDING_WEIGHT = 2.0
"""Of a picture that shows a thing inside another, whose shapes are learned last; of others it is 1."""


class Group(NamedTuple):
    """Sequences of about one length, of any sizes: prompts, and what the AR writes after them.

    They are padded at the end, where nothing looks: attention is causal.

    Attributes:
        ids: int32 [n, length].
        positions: M-RoPE's, int16 [n, 3, length].
        lengths: of the prompts, int64 [n].
        targets: codes of the grids, then the image end: int32 [n, tokens].
        weights: how much each target counts, 0 where there is none: fp16 [n, tokens].
        large: which of them are of the large grid, bool [n, tokens].
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    targets: Tensor
    weights: Tensor
    large: Tensor

    def rows(self, chosen: Tensor) -> Group:
        """Returns some of the sequences."""
        return Group(*(part[chosen] for part in self))


class Writer:
    """Trains the next token, over all tokens that the AR writes itself."""

    name = "writer"
    learning_rate = 1.5e-3

    def __init__(self, samples: Sequence[Samples], folder: Path, device: torch.device, batch: int, seed: int) -> None:
        model = build_ar()
        self.module = nn.ModuleDict({"decoder": model.model.language_model, "head": model.lm_head}).to(device)
        self.inner = [model.model.language_model.layers]
        compile_blocks(model.model.language_model.layers, device)
        self._predicted = compiled(predicted, device)
        self._device, self._batch = device, batch
        self._tokens = Tokens(folder).to(device)
        for rows in (model.model.language_model.embed_tokens.weight, model.lm_head.weight):
            self._tokens.spread_to(rows[: CONFIG.codebook])
        self._processor = processor_of(folder)
        self._groups, self._kept = list[Group](), list[Group]()
        for part in samples:
            self._add(part)
        self._choice, self._kept_choice = (
            Choice([len(group.lengths) for group in groups], seed) for groups in (self._groups, self._kept)
        )

    def _add(self, samples: Samples) -> None:
        # Pictures apart from edits: in a batch's mean loss the few codes of edits would count for little.
        kept = torch.from_numpy(measured_by(samples)).to(self._device)
        sized = [self._sized(*own) for own in by_size(samples, MAIN_SHARE, OTHER_SIZES)]
        shares = kept.split([len(group.lengths) for group in sized])
        pairs = list(zip(sized, shares, strict=True))
        self._groups += by_length([group.rows(~own) for group, own in pairs])
        self._kept += by_length([group.rows(own) for group, own in pairs])

    def _sized(self, size: Size, samples: Samples) -> Group:
        target, scenes, sources = geometry.target_grid(size), samples.scenes, samples.sources
        grids = geometry.output_grids(target, image_to_image=sources is not None)
        if sources is None:
            codes = [self._codes(scenes, grid, preview=not n) for n, grid in enumerate(grids)]
        else:
            # Drawn together: the launches of a few hundred pictures' drawing take longer than their work.
            *codes, seen = self._codes(Table.joined([scenes, sources]), target, preview=False).chunk(2)
        end = torch.full((scenes.length, 1), CONFIG.codebook + 1, device=self._device)
        targets = torch.cat([*codes, end], dim=1)
        each = torch.from_numpy(np.where(scenes.inside, HOLDING_WEIGHT, 1.0)[:, None]).to(self._device, torch.float16)
        weights = each.expand(targets.shape).clone()
        placed = () if sources is None else (PlacedGrid(SOURCE_START, target),)
        ids, lengths = prompt_ids(self._processor, samples.prompts, target, [target] * len(placed))
        prompts, ends = torch.from_numpy(ids).to(self._device), torch.from_numpy(lengths).to(self._device)
        if sources is not None:
            prompts[:, SOURCE_START : SOURCE_START + target.tokens] = seen
            weights[:, : target.tokens] *= decision_weights(sources, size).to(each)
        decoded = geometry.decode_positions(grids, 0)
        decoded = np.concatenate([decoded, decoded[:, -1:] + 1], axis=1)  # nothing is read from the end's
        positions = (geometry.prompt_positions(ids.shape[1] + 1, placed), decoded)
        laid_out = sequences(prompts, ends, targets, *(torch.from_numpy(own).to(self._device) for own in positions))
        large = torch.zeros(targets.shape, dtype=torch.bool, device=self._device)
        large[:, -1 - target.tokens : -1] = True
        return Group(*laid_out, ends, targets.int(), weights, large)

    def _codes(self, scenes: Table, grid: Grid, *, preview: bool) -> Tensor:
        pictures = small_pictures(scenes, grid, self._device, preview=preview)
        return torch.cat([self._tokens.encode(small) for small in pictures])

    def kind(self) -> int:
        """Chooses a length, of pictures or edits."""
        return self._choice.group()

    def losses(self, kind: int) -> dict[str, Tensor]:
        """Draws a batch."""
        return self._losses(self._groups, self._choice, kind)

    def _losses(self, groups: Sequence[Group], choice: Choice, index: int) -> dict[str, Tensor]:
        group = groups[index]
        rows = choice.rows(index, max(2, self._batch * 384 // group.ids.shape[1]), self._device)
        return self.loss_of(group.rows(rows))

    def loss_of(self, batch: Group) -> dict[str, Tensor]:
        """The loss, and how often the likeliest code of the large grid is the picture's."""
        states = decoded(self.module["decoder"], batch.ids, batch.positions.transpose(0, 1))
        column = torch.arange(batch.targets.shape[1], device=self._device)
        wanted_at = (batch.lengths[:, None] - 1 + column).clamp(max=batch.ids.shape[1] - 1)
        written = states.gather(1, wanted_at[:, :, None].expand(-1, -1, CONFIG.ar_hidden))
        loss, right = self._predicted(self.module["head"](written), batch.targets.long(), batch.weights.float())
        return {"loss": loss, "large_grid_right": weighted_mean(right, batch.large.float())}

    def after_step(self, step: int, progress: float) -> None:
        """Nothing is left to do."""

    def results(self) -> dict[str, Any]:
        """The averaged weights' losses and how often the likeliest code of the large grid is the picture's.

        On samples kept from training, and, by names that begin with ``trained``, on others.
        """
        kept, trained = (
            measured(lambda own=groups, by=choice: self._losses(own, by, by.group()), self._device)
            for groups, choice in ((self._kept, self._kept_choice), (self._groups, self._choice))
        )
        return kept | {f"trained_{name}": value for name, value in trained.items()}


class Reviser(Writer):
    """Goes on from what ``Writer`` learned; ``folder`` holds it."""

    name = "reviser"

    def __init__(self, samples: Sequence[Samples], folder: Path, device: torch.device, batch: int, seed: int) -> None:
        learned = finished(folder, Writer.name)["weights"]
        super().__init__(samples, folder, device, batch, seed)
        self.module.load_state_dict(learned)


def measured_by(samples: Samples) -> NDArray[np.bool_]:
    """Which samples are not trained on but measured by: those of one scene in ``ONE_IN``, [n].

    Edits of one scene follow one another.
    """
    begins = np.ones(samples.scenes.length, dtype=bool)
    if samples.sources is not None:
        begins[1:] = samples.sources.changes()
    kept: NDArray[np.bool_] = begins.cumsum() % ONE_IN == 1
    return kept


def decoded(decoder: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """The last hidden states [n, length, width] of a ``GlmImageTextModel``, causal and without a mask.

    The module's own forward makes one while a graph is captured, which turns off the fastest attention.

    Args:
        decoder: transformers' module.
        ids: [n, length].
        positions: M-RoPE's, [3, n, length].
    """
    hidden = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    states: Tensor = decoder.norm(hidden)
    return states


def predicted(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss of logits [n, targets, codes], and where the likeliest code is the target, [n, targets].

    Args:
        logits: of the codes that may follow.
        targets: those that do, [n, targets].
        weights: how much each counts in the mean, [n, targets].
    """
    each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(weights)
    return weighted_mean(each, weights), (logits.argmax(-1) == targets).float()


def sequences(
    prompts: Tensor, lengths: Tensor, targets: Tensor, prompt_positions: Tensor, target_positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Lays out prompts of one size and what follows them, without gaps.

    Args:
        prompts: ids [n, longest], padded at the end.
        lengths: of the prompts, [n].
        targets: ids [n, tokens].
        prompt_positions: M-RoPE's of the longest prompt and one more, [3, longest + 1].
        target_positions: of the targets, from 0: [3, tokens].

    Returns:
        ids, int32 [n, longest + tokens]; positions, int16 [n, 3, longest + tokens].
    """
    count, longest = prompts.shape
    column = torch.arange(longest + targets.shape[1], device=prompts.device)[None]
    written = (column - lengths[:, None]).clamp(0, targets.shape[1] - 1)
    in_prompt = column < lengths[:, None]
    prompt_column = column.clamp(max=longest - 1).expand(count, -1)
    ids = torch.where(in_prompt, prompts.gather(1, prompt_column), targets.gather(1, written))
    start = prompt_positions[:, lengths][:, :, None]
    positions = torch.where(in_prompt, prompt_positions[:, prompt_column], start + target_positions[:, written])
    return ids.int(), positions.transpose(0, 1).to(torch.int16)


def by_length(groups: Sequence[Group]) -> list[Group]:
    """Deals sequences of one size each out to groups of all sizes, by their lengths, rounded up.

    Batches are then of few kinds, and each has many sizes.
    """
    parts = defaultdict(list)
    for group in groups:
        steps = (group.lengths + group.targets.shape[1] + LENGTH_STEP - 1) // LENGTH_STEP
        for step in steps.unique().tolist():
            parts[step].append(group.rows(steps == step))
    return [_joined(parts[step], step * LENGTH_STEP) for step in sorted(parts)]


def _joined(groups: Sequence[Group], length: int) -> Group:
    tokens = max(group.targets.shape[1] for group in groups)

    def padded(part: Tensor, width: int) -> Tensor:
        return F.pad(part[..., :width], (0, max(0, width - part.shape[-1])))

    alike = [
        Group(padded(ids, length), padded(positions, length), lengths, *(padded(part, tokens) for part in of_targets))
        for ids, positions, lengths, *of_targets in groups
    ]
    return Group(*(torch.cat(parts) for parts in zip(*alike, strict=True)))


def prompt_ids(
    processor: Any, texts: Sequence[str], target: Grid, sources: Sequence[Grid]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the AR's input ids of many prompts for one size, as ``PromptTokenizer`` gives them one at a time.

    Returns:
        ids [n, longest], padded at the end; their lengths, [n].
    """
    one = PromptTokenizer(processor)

    def whole(text: str) -> list[int]:
        if sources:
            return one.image_to_image(text, target, sources)[0]
        return one.text_to_image(text, target, geometry.preview_grid(target))

    # The template puts special tokens on both sides of the text, so that the text's ids are its own alone.
    # By the tokenizer's own library: transformers makes objects of each text, which takes longer than all the rest.
    tokenizer = processor.tokenizer.backend_tokenizer
    tokenizer.encode_special_tokens = True
    own = [found.ids for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    first = whole(texts[0])
    start = next(i for i in range(len(first)) if first[i : i + len(own[0])] == own[0])
    head, tail = first[:start], first[start + len(own[0]) :]
    inner = np.fromiter(map(len, own), np.int64, len(own))
    lengths = inner + len(head) + len(tail)
    ids, column = np.zeros((len(own), lengths.max()), np.int64), np.arange(lengths.max()) - len(head)
    ids[:, : len(head)] = head
    ids[(column >= 0) & (column < inner[:, None])] = np.fromiter(chain.from_iterable(own), np.int64, inner.sum())
    ids[(column >= inner[:, None]) & (column < inner[:, None] + len(tail))] = tail * len(own)
    if ids[-1, : lengths[-1]].tolist() != whole(texts[-1]):
        raise RuntimeError(f"{texts[-1]!r} is not tokenised alone as it is in the template")
    return ids, lengths
