"""Stage vision, the vision tower and its quantizer: one code for each 32x32 pixels of an image.

A small decoder, discarded afterwards, reconstructs the image from the codes and classifies each cell's shape, colour,
letter and background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm_image.request import geometry
from train_tiny.cells import CellLabels, cell_labels, cell_weights
from train_tiny.data import SPREAD_SIZES, Choice, Samples, by_size, render_size, small_pictures
from train_tiny.loop import weighted_mean
from train_tiny.models import CONFIG, build_ar, quantize, tower_features
from train_tiny.world.vocabulary import BACKGROUNDS, COLOURS, LETTERS, SHAPES

NAMED = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "letter": len(LETTERS) + 1,
    "background": len(BACKGROUNDS),
}
WEIGHTS = {
    "shape": 0.5,
    "colour": 0.5,
    "letter": 0.5,
    "background": 0.1,
    "place": 1.0,
    "pixels": 4.0,
    "commitment": 8.0,
}
NAMED_LETTER_WEIGHT, NAMED_HELD_WEIGHT = 6.0, 8.0
"""Weights of the labels of cells with a letter, and with an object inside another, which are rare. Pixels are weighted
by ``cell_weights``."""
DECODED_SIDE = 8
"""The side of a reconstructed cell in pixels."""
USE_DECAY, DEAD_SHARE, STEPS_BETWEEN_REVIVALS = 0.98, 0.05, 25
RECENT = 16384
"""Features sampled from the last batch, to which unused codes are moved."""
FIRST_CODES_AT, ROUNDS = 50, 8
"""The step at which the codes become means of features, and the rounds of k-means."""
REVIVED_UNTIL = 0.7
"""Progress of the stage after which codes are no longer moved."""


class CellDecoder(nn.Module):
    """Reconstructs and classifies cells from their codes and their neighbours'."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1), nn.GELU()) for _ in range(3)
        )
        self.pixels = nn.Conv2d(width, 3 * DECODED_SIDE**2, 1)
        self.names = nn.ModuleDict({name: nn.Conv2d(width, count, 1) for name, count in NAMED.items()})
        self.place = nn.Conv2d(width, 3, 1)

    def forward(self, cells: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Returns pixels [n, 3, 8 gh, 8 gw], the logits of each label and the places, from cells [n, width, gh, gw]."""
        for mixer in self.mixers:
            cells = cells + mixer(cells)
        return (
            F.pixel_shuffle(self.pixels(cells), DECODED_SIDE),
            {n: m(cells) for n, m in self.names.items()},
            self.place(cells),
        )


class Codes:
    """Trains with straight-through gradients (van den Oord et al., 2017); unused codes are moved to features."""

    name = "vision"
    learning_rate = 1.5e-3
    inner = ()

    def __init__(self, samples: Sequence[Samples], device: torch.device, batch: int, seed: int) -> None:
        model = build_ar().model
        parts = {"tower": model.visual, "quantizer": model.vqmodel, "decoder": CellDecoder(CONFIG.vision_hidden)}
        self.module = nn.ModuleDict(parts).to(device)
        nn.init.normal_(model.vqmodel.quantize.embedding.weight, std=CONFIG.vq_dim**-0.5)
        self._device, self._batch = device, batch
        self._decode = parts["decoder"]
        self._use = torch.ones(CONFIG.codebook, device=device)
        self._recent = torch.zeros(RECENT, CONFIG.vq_dim, device=device)
        self._pictures: list[Tensor] = []
        self._labels: list[CellLabels] = []
        for size, own in by_size(samples[0], 0.35, SPREAD_SIZES):
            # Half of the images are previews, whose grid is finer than that of images below 512x512.
            for preview in (False, True):
                scenes = own.scenes.rows(slice(preview, None, 2))
                grid = geometry.target_grid(size)
                grid = geometry.preview_grid(grid) if preview else grid
                self._pictures.append(torch.cat(list(small_pictures(scenes, grid, device, preview=preview))))
                rendered_size = render_size(grid, preview=preview)
                labels = cell_labels(scenes, rendered_size, rendered_size.height // grid.height)
                self._labels.append(CellLabels(*(label.to(device) for label in labels)))
        self._choice = Choice([len(pictures) for pictures in self._pictures], seed)

    def kind(self) -> int:
        """Samples a size, of images or previews."""
        return self._choice.group()

    def _batch_of(self, group: int) -> tuple[Tensor, CellLabels]:
        pictures = self._pictures[group]
        count = max(2, self._batch * 128 * 128 // pictures[0, 0].numel())
        rows = self._choice.rows(group, count, self._device)
        return pictures[rows], CellLabels(*(label[rows] for label in self._labels[group]))

    def losses(self, kind: int) -> dict[str, Tensor]:
        """Samples a batch and returns its losses."""
        pictures, labels = self._batch_of(kind)
        features = tower_features(self.module["tower"], pictures)
        codes, vectors = quantize(self.module["quantizer"], features)
        embedding = F.normalize(self.module["quantizer"].quantize.embedding(codes).float(), dim=-1)
        commitment = 0.25 * F.mse_loss(vectors, embedding.detach()) + F.mse_loss(embedding, vectors.detach())
        passed = vectors + (embedding - vectors).detach()
        grid = pictures.shape[2] // 16, pictures.shape[3] // 16
        cells = self.module["quantizer"].post_quant_conv(passed.transpose(1, 2).unflatten(2, grid))
        decoded_cells, names, place = self._decode(cells)
        target = F.interpolate(pictures.float(), scale_factor=DECODED_SIDE / 16, mode="area") / 127.5 - 1
        held = 1 + (NAMED_HELD_WEIGHT - 1) * labels.held
        letter = 1 + (NAMED_LETTER_WEIGHT - 1) * (labels.letter > 0)
        weights = {"shape": held, "colour": held, "letter": letter, "background": torch.ones_like(held)}
        losses = {name: named_loss(logits, getattr(labels, name), weights[name]) for name, logits in names.items()}
        losses["pixels"] = reconstruction_loss(decoded_cells.float() - target, labels)
        shown = (held * ((labels.shape + labels.letter) > 0)).unsqueeze(-1)
        off = (place.flatten(2).transpose(1, 2).float() - labels.place).square() * shown
        losses["place"] = off.sum() / (3 * shown.sum() + 1)
        losses["commitment"] = commitment * CONFIG.vq_dim / 8
        self._count(codes, vectors)
        return {"loss": sum(WEIGHTS[name] * value for name, value in losses.items())} | losses

    def _count(self, codes: Tensor, vectors: Tensor) -> None:
        share = torch.zeros_like(self._use).scatter_add_(
            0, codes.flatten(), torch.ones_like(codes.flatten(), dtype=torch.float)
        )
        self._use.lerp_(share * (len(self._use) / codes.numel()), 1 - USE_DECAY)
        features = vectors.detach().flatten(0, 1)
        self._recent.copy_(features[torch.randint(len(features), (RECENT,), device=self._device)])

    @torch.no_grad()
    def after_step(self, step: int, progress: float) -> None:
        """Moves rarely used codes to features of the last batch."""
        if step == FIRST_CODES_AT:
            self.module["quantizer"].quantize.embedding.weight.copy_(clustered(self._recent, len(self._use)))
        if (step + 1) % STEPS_BETWEEN_REVIVALS or progress > REVIVED_UNTIL:
            return
        dead = self._use < DEAD_SHARE
        chosen = self._recent[torch.randint(RECENT, (len(dead),), device=self._device)]
        embedding = self.module["quantizer"].quantize.embedding.weight
        embedding.copy_(torch.where(dead[:, None], chosen.to(embedding.dtype), embedding))
        self._use.masked_fill_(dead, 1.0)

    @torch.no_grad()
    def results(self) -> dict[str, Any]:
        """Returns the share of codes in use, and of correctly classified cells; ``held``: shapes inside others."""
        seen = torch.zeros(CONFIG.codebook, device=self._device)
        hits = {name: torch.zeros(2, device=self._device) for name in (*NAMED, "held")}
        for _ in range(40):
            pictures, labels = self._batch_of(self.kind())
            codes, _ = quantize(self.module["quantizer"], tower_features(self.module["tower"], pictures))
            seen[codes.flatten()] += 1
            embedding = F.normalize(self.module["quantizer"].quantize.embedding(codes).float(), dim=-1)
            grid = pictures.shape[2] // 16, pictures.shape[3] // 16
            cells = self.module["quantizer"].post_quant_conv(embedding.transpose(1, 2).unflatten(2, grid))
            for name, logits in self.module["decoder"](cells)[1].items():
                label = getattr(labels, name)
                labelled = torch.ones_like(label) if name == "background" else label > 0
                right = (logits.flatten(2).argmax(1) == label) * labelled
                hits[name] += torch.stack([right.sum(), labelled.sum()])
                if name == "shape":
                    hits["held"] += torch.stack([(right * labels.held).sum(), labels.held.sum()])
        named = {f"{name}_named": float(hit[0] / hit[1].clamp(min=1)) for name, hit in hits.items()}
        return {"codes_used": float((seen > 0).float().mean()), **named}


def named_loss(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Returns the weighted mean cross-entropy of logits [n, classes, gh, gw] and labels [n, cells]."""
    loss = F.cross_entropy(logits.flatten(2).float(), label, reduction="none")
    return weighted_mean(loss, weight)


def reconstruction_loss(errors: Tensor, labels: CellLabels) -> Tensor:
    """Returns the loss of reconstruction errors [n, 3, 8 gh, 8 gw], with the cell weights of the DiT's training."""
    by_cell = F.avg_pool2d((errors.abs() * 0.5 + errors.square()).mean(dim=1), DECODED_SIDE).flatten(1)
    return weighted_mean(by_cell, cell_weights(labels).float())


def clustered(vectors: Tensor, count: int) -> Tensor:
    """Clusters unit vectors [n, dim] by k-means on the sphere; returns the centres [count, dim]."""
    centres = vectors[torch.randint(len(vectors), (count,), device=vectors.device)]
    for _ in range(ROUNDS):
        nearest = (vectors @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        empty = sums.norm(dim=-1, keepdim=True) < 1e-6
        other = vectors[torch.randint(len(vectors), (count,), device=vectors.device)]
        centres = F.normalize(torch.where(empty, other, sums), dim=-1)
    return centres
