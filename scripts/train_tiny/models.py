"""The parts of a GLM-Image of the ``trained`` preset, and the batched forward passes that training takes.

Each forward pass computes what the module's own does, for a batch of pictures of one size and without waiting for
the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from torch import Tensor, nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, T5Config, T5EncoderModel

import tiny_checkpoint_configs as configs
from train_tiny.compilation import Forward
from train_tiny.loop import finished
from train_tiny.painter_blocks import Source, block_forward

CONFIG = configs.PRESETS["trained"]
IMAGE = configs.image_processor_config(CONFIG)
ENCODED_CELLS = 2**19
"""At once by the vision tower: each has a likeness to every code."""


def build_vae() -> Any:
    return AutoencoderKL.from_config(configs.vae_config(CONFIG))


def build_ar() -> Any:
    """The AR with its vision tower and quantizer."""
    model = GlmImageForConditionalGeneration(GlmImageConfig(**configs.ar_config(CONFIG)))
    nn.init.normal_(model.model.visual.embeddings.position_embedding.weight, std=0.02)
    return model


def build_transformer() -> Any:
    """The DiT; blocks start as the identity (Peebles and Xie, 2023)."""
    model = GlmImageTransformer2DModel.from_config(configs.transformer_config(CONFIG))
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_glyph_encoder() -> Any:
    return T5EncoderModel(T5Config(**configs.text_encoder_config(CONFIG))).eval()


def load(module: nn.Module, folder: Path, stage: str, prefix: str = "") -> None:
    """Fills ``module`` with what a stage trained under ``prefix``, rounded as in the checkpoint, and freezes it."""
    weights: Mapping[str, Tensor] = finished(folder, stage)["weights"]
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    rounded = {n: v.to(torch.bfloat16).to(v.dtype) if v.is_floating_point() else v for n, v in own.items()}
    module.load_state_dict(rounded)
    module.requires_grad_(False)


class Latents(nn.Module):
    """A trained VAE's way to normalised latents and back."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.vae = build_vae().to(memory_format=torch.channels_last)
        load(self.vae, folder, "vae", "vae.")
        results = finished(folder, "vae")["results"]
        for name in ("latents_mean", "latents_std"):
            self.register_buffer(name, torch.tensor(results[name]).view(1, -1, 1, 1))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Latents [n, 16, H/8, W/8] of uint8 pictures [n, 3, H, W]."""
        mode = self.vae.encode(signed(pictures)).latent_dist.mode()
        return (mode - self.latents_mean) / self.latents_std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The way back, to uint8 pictures."""
        values = self.vae.decode(latents * self.latents_std + self.latents_mean).sample.float()
        return (values * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)


def signed(pictures: Tensor) -> Tensor:
    """Values in [-1, 1] of uint8 pictures."""
    return pictures.to(memory_format=torch.channels_last).float() / 127.5 - 1


def tower_features(tower: Any, pictures: Tensor) -> Tensor:
    """Features [n, gh * gw, hidden] of uint8 pictures [n, 3, 16 gh, 16 gw]."""
    _, _, height, width = pictures.shape
    mean, std = image_statistics(pictures.device)
    values = (pictures.float() / 255 - mean) / std
    hidden = tower.patch_embed.proj(values).flatten(2).transpose(1, 2)
    hidden = hidden + _positions(tower.embeddings, height // 16, width // 16)
    for block in tower.blocks:
        hidden = _tower_block(block, hidden, tower.config.num_heads)
    return hidden


@lru_cache
def image_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the image processor takes for the mean and the deviation of values in [0, 1], [1, 3, 1, 1] each."""
    mean, std = (torch.tensor(IMAGE[name], device=device).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    return mean, std


def _tower_block(block: Any, hidden: Tensor, heads: int) -> Tensor:
    parts = block.attn.qkv(block.norm1(hidden)).unflatten(2, (3, heads, -1))
    query, key, value = parts.permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    hidden = hidden + block.attn.proj(attended)
    after: Tensor = hidden + block.mlp(block.norm2(hidden))
    return after


def _positions(embeddings: Any, height: int, width: int) -> Tensor:
    side = embeddings.image_size // embeddings.patch_size
    table = embeddings.position_embedding.weight.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    rows, columns = ((torch.arange(size, device=table.device) + 0.5) / size * 2 - 1 for size in (height, width))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)[None]
    found = F.grid_sample(table, grid, mode="bilinear", align_corners=False, padding_mode="border")
    return found.flatten(2).transpose(1, 2)


def quantize(quantizer: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """The codes [n, tokens] of features [n, tokens, hidden], and the unit vectors they stand for, before rounding.

    In fp32 whatever autocast says: bfloat16 cannot tell codes apart.
    """
    with torch.autocast(features.device.type, enabled=False):
        weight = quantizer.quant_conv.weight.flatten(1)
        vectors = F.normalize(F.linear(features.float(), weight, quantizer.quant_conv.bias), dim=-1)
        codes = (vectors.detach() @ F.normalize(quantizer.quantize.embedding.weight.detach(), dim=-1).T).argmax(-1)
    return codes, vectors


class Tokens(nn.Module):
    """A trained vision tower and quantizer: pictures to codes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        model = build_ar().model
        self.tower, self.quantizer = model.visual, model.vqmodel
        load(self.tower, folder, "vision", "tower.")
        load(self.quantizer, folder, "vision", "quantizer.")

    @torch.no_grad()
    def encode(self, small: Tensor) -> Tensor:
        """Codes, int64 [n, gh * gw], of uint8 pictures [n, 3, 16 gh, 16 gw]."""
        at_once = max(1, ENCODED_CELLS * 16 * 16 // small[0, 0].numel())
        parts = (quantize(self.quantizer, tower_features(self.tower, part))[0] for part in small.split(at_once))
        return torch.cat(list(parts))

    @torch.no_grad()
    def spread_to(self, rows: Tensor) -> None:
        """Makes ``rows``, [codes, width], the codes' own directions in a wider space, as long as they are in the mean.

        Codes that stand for like cells are then alike from the start, and what is learned of one is learned of others.
        """
        directions = F.normalize(self.quantizer.quantize.embedding.weight, dim=-1)
        frame = nn.init.orthogonal_(torch.empty(rows.shape[1], directions.shape[1], device=rows.device))
        rows.copy_(directions @ frame.T * rows.norm(dim=-1).mean())


def velocity(
    model: Any,
    latents: Tensor,
    glyphs: Tensor | None,
    prior: Tensor,
    kept: Tensor | None,
    times: Tensor,
    rotary: tuple[Tensor, Tensor],
    source: Sequence[Source] = (),
    call: Forward = block_forward,
) -> tuple[Tensor, list[Source]]:
    """What the DiT predicts, [n, 16, h, w], and its keys and values, block by block.

    Args:
        model: diffusers' ``GlmImageTransformer2DModel``.
        latents: noisy, normalised [n, 16, h, w].
        glyphs: hidden states of the quoted strings [n, glyph tokens, width]; None for a source picture.
        prior: codes [n, h/4, w/4], each of 2x2 tokens.
        kept: [n], 0 where the prior is dropped, 1 elsewhere; None keeps all.
        times: the timesteps, [n], 0..999.
        rotary: cosines and sines of the size.
        source: what the blocks made of a source picture; () where there is none.
        call: ``block_forward``, or faster.
    """
    count, _, height, width = latents.shape
    embedded = model.prior_token_embedding(prior)
    if kept is not None:
        embedded = embedded * kept[:, None, None, None]
    hidden = model.image_projector(latents) + _doubled(model.prior_projector(embedded)).flatten(1, 2)
    words = 0 if glyphs is None else glyphs.shape[1]
    if glyphs is not None:
        hidden = torch.cat([model.glyph_projector(glyphs), hidden], dim=1)
    # Words are not rotated.
    cos, sin = (F.pad(table, (0, 0, words, 0), value=still) for table, still in zip(rotary, (1.0, 0.0), strict=True))
    are_words = torch.arange(len(cos), device=latents.device) < words
    # Filled there: what is copied from the host makes it wait for the device.
    sizes = torch.cat([latents.new_full((count, 1), side * 8.0) for side in (height, width)], dim=1)
    time = model.time_condition_embed(times, sizes, torch.zeros_like(sizes), hidden.dtype)
    made: list[Source] = []
    for block, seen in zip(model.transformer_blocks, source or [None] * len(model.transformer_blocks), strict=True):
        hidden, own = call(block, hidden, are_words, time, (cos, sin), seen)
        made.append(own)
    patches = model.proj_out(model.norm_out(hidden[:, words:], time)).view(count, height // 2, width // 2, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, -1, height, width), made


def _doubled(cells: Tensor) -> Tensor:
    wide = cells[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return wide.flatten(3, 4).flatten(1, 2)
