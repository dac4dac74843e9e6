"""The memory model of the second stage: weights to the byte, working memory against live tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.checkpoint.layout import COMPONENTS
from glm_image.devices.open import open_device
from glm_image.dit.blocks import eager_blocks
from glm_image.dit.conditioning import Branch, Conditioning
from glm_image.dit.engine import DitEngine
from glm_image.dit.loading import _empty_modules
from glm_image.dit.memory import BLOCK_MATRICES, quantization_saving, step_bytes, vae_bytes
from glm_image.dit.model import DitModel
from glm_image.dit.quantization import QuantizedLinear, weight_bytes
from glm_image.dit.settings import DitSettings
from glm_image.dit.step import ExactStep, ImageState, StepCapture
from glm_image.parallel.process_group import ONE_RANK
from glm_image.request.geometry import Size
from glm_image.sizing.memory import PUBLISHED, ModelSizes, dit_memory
from live_memory import LiveBytes, allocated_peak
from make_tiny_checkpoint import make_tiny_checkpoint
from tiny_checkpoint_configs import FULL

SIZE = Size(256, 256)
META = torch.device("meta")
DTYPES = [torch.float32, torch.bfloat16]


def sizes_of(checkpoint: Checkpoint) -> ModelSizes:
    return ModelSizes.of({part: checkpoint.config(part) for part in COMPONENTS})


def weights_of(module: Any) -> int:
    """The bytes of a loaded module's weights, scales of quantized layers included."""
    scales = [layer.scales for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    return sum(tensor.nbytes for tensor in [*module.parameters(), *scales])


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_the_loaded_engine(checkpoint_folder: Path, dtype: torch.dtype, quantization: str) -> None:
    name = str(dtype).removeprefix("torch.")
    settings = DitSettings(dtype=name, quantization=quantization)
    engine = DitEngine(Checkpoint.open(checkpoint_folder), open_device("cpu"), settings)
    executor: Any = engine.executor
    sizes = sizes_of(Checkpoint.open(checkpoint_folder))
    assert dit_memory(sizes, name, SIZE, quantized=quantization == "int8").weights == {
        "transformer": weights_of(executor._model.transformer),
        "text_encoder": weights_of(executor._conditioner._glyph_encoder),
        "vae": weights_of(executor._vae._autoencoder),
    }


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_weights_of_the_published_sizes(tmp_path: Path, quantization: str) -> None:
    checkpoint = Checkpoint.open(make_tiny_checkpoint(tmp_path / "full", FULL, weights=False), "dummy")
    settings = DitSettings(quantization=quantization)
    modules = _empty_modules(checkpoint, settings, open_device("cpu"), torch.bfloat16, ONE_RANK)
    for sizes in (PUBLISHED, sizes_of(checkpoint)):
        predicted = dit_memory(sizes, "bfloat16", SIZE, quantized=quantization == "int8").weights
        assert predicted == {name: weight_bytes(module, torch.bfloat16) for name, module in modules.items()}


def test_only_the_blocks_linear_layers_are_quantized() -> None:
    parameters = 30 * BLOCK_MATRICES * 4096**2
    assert parameters == 6_039_797_760
    scales = 30 * (5 * 4096 + 4 * 4096)
    assert quantization_saving(PUBLISHED.transformer, 2) == parameters - 4 * scales


def published_step(dtype: torch.dtype, tokens: int, sequences: int) -> int:
    """The peak of a denoising step of the published transformer, of which three blocks are enough."""
    with META:
        transformer: Any = GlmImageTransformer2DModel(**{**PUBLISHED.transformer, "num_layers": 3}).to(dtype).eval()
    side = 2 * round(tokens**0.5)
    branch = Branch(
        torch.empty(1, 64, 4096, device=META, dtype=dtype), torch.empty(1, tokens, 4096, device=META, dtype=dtype)
    )
    rotary = (torch.empty(tokens, 128, device=META), torch.empty(tokens, 128, device=META))
    times = torch.empty(50, 512, device=META, dtype=dtype)
    conditioning = Conditioning([branch] * sequences, sequences == 2, tokens, 1.5, times, rotary)
    latents, sigmas = torch.empty(1, 16, side, side, device=META), torch.empty(51, device=META)
    step = torch.zeros(1, device=META, dtype=torch.int64)
    model, state = DitModel(transformer, eager_blocks(transformer)), ImageState(conditioning, latents, step, sigmas)
    take_step = ExactStep(model, state, StepCapture(open_device("cpu"), 1))
    with torch.inference_mode(), LiveBytes() as counted:
        take_step()
    return counted.peak


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_working_memory_of_a_step(dtype: torch.dtype, sequences: int) -> None:
    peak = published_step(dtype, 4096, sequences)
    predicted = step_bytes(PUBLISHED.transformer, 4096, dtype.itemsize, sequences=sequences)
    assert predicted * 0.75 <= peak <= predicted


def autoencoder(config: Any, dtype: torch.dtype) -> Any:
    levels = len(config["block_out_channels"])
    shape = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**{**config, **shape}).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_live_tensors_of_the_published_vae(dtype: torch.dtype) -> None:
    """Three feature maps: two more are left for the copies that convolutions make, which no operator returns."""
    size = Size(1024, 1024)
    with META:
        vae = autoencoder(PUBLISHED.vae, dtype)
    latents = torch.empty(1, 16, size.height // 8, size.width // 8, device=META, dtype=dtype)
    with torch.inference_mode(), LiveBytes() as counted:
        vae.decode(latents)
    assert counted.peak == vae_bytes(PUBLISHED.vae, size, dtype.itemsize) * 3 // 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("widths", "side", "least"),
    [((32, 128, 256, 256), 64, 0.75), ((16, 16, 32, 32), 128, 0.95), ((32, 48, 80, 96), 128, 0.6)],
    ids=["published", "tiny", "trained"],
)
def test_working_memory_of_the_vae(widths: tuple[int, ...], side: int, least: float, dtype: torch.dtype) -> None:
    """Decodes and encodes on the CPU, whose allocator also counts the workspaces of its convolutions.

    The published VAE is scaled down to a quarter of its widths and, from 128, to half the side: feature maps (width
    times side squared) and reordered weights (width squared) both shrink to a sixteenth.
    """
    layers = PUBLISHED.vae["layers_per_block"]
    config = {**PUBLISHED.vae, "block_out_channels": widths, "norm_num_groups": 8, "layers_per_block": layers}
    vae = autoencoder(config, dtype)
    latents = torch.zeros(1, 16, side // 8, side // 8, dtype=dtype)
    pixels = torch.zeros(1, 3, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    predicted = vae_bytes(config, Size(side, side), dtype.itemsize)
    with torch.inference_mode():
        peak = max(allocated_peak(lambda: vae.decode(latents)), allocated_peak(lambda: vae.encode(pixels)))
    # Reordered weights do not grow with the image: at 128 x 128 they are some percent of the tiny model's memory.
    assert predicted * least <= peak <= predicted * 1.05
