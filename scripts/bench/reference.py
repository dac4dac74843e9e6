"""What ``dit.py`` measures of diffusers' own transformer, and how the engine's blocks differ from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from measure import report, size_name
from timing import release, seconds, synchronizer
from torch import Tensor

from glm_image.checkpoint.checkpoint import Checkpoint, fill
from glm_image.devices.base import Device
from glm_image.dit.blocks import eager_blocks
from glm_image.dit.quantization import quantize_blocks
from glm_image.dit.select_blocks import select_blocks
from glm_image.request.geometry import Grid

GLYPH_TOKENS = (6, 1)
"""Of the conditional and the unconditional branch."""

COMPARED_GRID = (32, 48)
"""Latent tokens of the image in a comparison of blocks."""


def load_transformer(checkpoint: Checkpoint, device: Device, quantization: str = "none") -> Any:
    """Loads diffusers' transformer, its blocks quantized or not."""
    from diffusers import GlmImageTransformer2DModel  # noqa: PLC0415 - it takes long to import

    with torch.device("meta"):
        transformer = GlmImageTransformer2DModel.from_config(checkpoint.config("transformer"))
    if quantization != "none":
        quantize_blocks(transformer, quantization, device, device.default_dtype)
    fill(transformer, checkpoint.tensors("transformer", device.torch_device, device.default_dtype))
    return transformer


def forward_arguments(transformer: Any, grid: Grid, device: Device) -> dict[str, Any]:
    """Returns the arguments of one forward for an image of ``grid``."""
    place, dtype = device.torch_device, device.default_dtype
    codes = transformer.config.prior_vq_quantizer_codebook_size
    return {
        "hidden_states": torch.randn(1, 16, grid.height * 4, grid.width * 4, device=place, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 6, transformer.config.text_embed_dim, device=place, dtype=dtype),
        "prior_token_id": torch.randint(0, codes, (1, grid.tokens * 4), device=place),
        "prior_token_drop": torch.zeros(1, grid.tokens * 4, device=place, dtype=torch.bool),
        "timestep": torch.full((1,), 500.0, device=place),
        "target_size": torch.tensor([[grid.height * 32, grid.width * 32]], device=place, dtype=dtype),
        "crop_coords": torch.zeros(1, 2, device=place, dtype=dtype),
        "return_dict": False,
    }


def measure_reference(checkpoint: Checkpoint, device: Device, grids: Sequence[Grid], steps: int) -> None:
    """Times a forward of diffusers, eager and, on an accelerator, with compiled blocks."""
    transformer = load_transformer(checkpoint, device)
    synchronize = synchronizer(device)
    with torch.inference_mode():
        for grid in grids:
            inputs = forward_arguments(transformer, grid, device)
            took = seconds(lambda inputs=inputs: transformer(**inputs), synchronize)  # type: ignore[misc]
            picture = {f"seconds_{steps}_steps": took * 2 * steps}
            report("diffusers eager", size=size_name(grid), forward_ms=took * 1e3, **picture)
        for grid in grids if not device.is_host else ():
            torch.compiler.reset()  # a second size would be compiled for sizes of any kind, which are slower
            transformer.compile_repeated_blocks()
            inputs = forward_arguments(transformer, grid, device)
            started = time.perf_counter()
            transformer(**inputs)
            synchronize()
            compile_seconds = time.perf_counter() - started
            took = seconds(lambda inputs=inputs: transformer(**inputs), synchronize)  # type: ignore[misc]
            picture = {f"seconds_{steps}_steps": took * 2 * steps, "compile_seconds": compile_seconds}
            report("diffusers compiled blocks", size=size_name(grid), forward_ms=took * 1e3, **picture)
    torch.compiler.reset()


def block_inputs(transformer: Any, device: Device) -> tuple[list[tuple[Tensor, Tensor]], Tensor, tuple[Tensor, Tensor]]:
    """Returns random inputs of the blocks: the image and glyph tokens of both branches, the time, the rotary tables."""
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim

    def sample(*shape: int) -> Tensor:
        return torch.randn(shape, device=device.torch_device, dtype=device.default_dtype)

    height, columns = COMPARED_GRID
    cos, sin = transformer.rope(torch.empty(1, 1, 2 * height, 2 * columns))
    rotary = (cos.to(device.torch_device), sin.to(device.torch_device))
    sequences = [(sample(1, height * columns, width), sample(1, tokens, width)) for tokens in GLYPH_TOKENS]
    return sequences, sample(1, config.time_embed_dim), rotary


def measure_difference(checkpoint: Checkpoint, device: Device) -> None:
    """Compares the engine's blocks with those of diffusers, and both with fp32, on the same inputs."""
    transformer = load_transformer(checkpoint, device)
    with torch.inference_mode():
        sequences, time_embedding, rotary = block_inputs(transformer, device)
        theirs = eager_blocks(transformer)(sequences, time_embedding, rotary)
        in_fp32 = [(image.float(), glyphs.float()) for image, glyphs in sequences]
        exact = eager_blocks(transformer.float())(in_fp32, time_embedding.float(), rotary)
        del transformer
        release(device)
        ours = select_blocks(load_transformer(checkpoint, device), device)(sequences, time_embedding, rotary)
    report(
        "difference of the blocks",
        ours_to_diffusers=relative_error(ours, theirs),
        ours_to_fp32=relative_error(ours, exact),
        diffusers_to_fp32=relative_error(theirs, exact),
    )


def relative_error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Returns the largest relative error of a sequence, by norm."""
    return max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in zip(outputs, exact, strict=True))
