"""Loads the AR, or a rank's part of it, on a device."""

from __future__ import annotations

from glm_image.ar.commands import MEMORY_SETTINGS
from glm_image.ar.config import ArConfig
from glm_image.ar.executor import Executor
from glm_image.ar.memory import activation_bytes, state_bytes, weight_bytes
from glm_image.ar.model import Decoder
from glm_image.ar.settings import ArSettings, captured, captured_rows
from glm_image.ar.vision import Vision
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.devices.budget import check_budget
from glm_image.devices.open import named_dtype
from glm_image.parallel.collectives import Group
from glm_image.parallel.process_group import Ranks


def load_executor(checkpoint: Checkpoint, settings: ArSettings, device: Device, ranks: Ranks) -> Executor:
    """Loads the decoder, which the ranks of ``ranks.tp`` share, and the whole vision tower on each of them."""
    group = ranks.tp if settings.peer_memory else ranks.tp.without_peer_memory()
    config, dtype = ArConfig.read(checkpoint), named_dtype(settings.dtype) or device.default_dtype
    slots, positions = settings.max_num_seqs, settings.max_sequence_tokens
    rows = captured_rows(settings, is_host=device.is_host)
    capture = captured(settings.graph_mode, () if rows else settings.graph_capture_sizes, slots)
    _check_memory(checkpoint, config, settings, device, group)
    source = checkpoint.tensors("vision_language_encoder", device.torch_device, dtype)
    return Executor(
        Decoder.load(config, source, int8=device.int8_product if settings.int8 else None, group=group),
        device,
        slots,
        positions,
        capture=capture,
        row_counts=rows,
        vision=Vision.load(checkpoint, device.torch_device, dtype),
    )


def _check_memory(checkpoint: Checkpoint, config: ArConfig, settings: ArSettings, device: Device, group: Group) -> None:
    dtype = named_dtype(settings.dtype) or device.default_dtype
    part, slots, positions = config.part(group.size), settings.max_num_seqs, settings.max_sequence_tokens
    rows = max(captured_rows(settings, is_host=device.is_host), default=0)
    state = state_bytes(part, slots, positions, dtype.itemsize, rows)
    activations = activation_bytes(part, max(slots, rows), positions, dtype.itemsize, int8=settings.int8)
    weights = weight_bytes(config, dtype.itemsize, int8=settings.int8, ranks=group.size)
    weights += Vision.bytes_needed(checkpoint, dtype)
    check_budget(
        "glm_ar",
        fixed={"weights": weights},
        scaled={**state, "the longest prompt": activations},
        memory=device.memory(),
        utilization=settings.memory_utilization,
        device=str(device),
        lower=MEMORY_SETTINGS,
    )
