"""Memory of both stages in bytes, composed of the engines' formulas. No torch, no files.

``glm-image inspect`` gives it the configs of a checkpoint, the capacity planner the published sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from glm_image.ar import memory as ar
from glm_image.ar.config import ArConfig
from glm_image.dit import memory as dit
from glm_image.request.geometry import Size
from glm_image.sizing import parameter_counts, reference_sizes

DTYPE_BYTES: Final = {"bfloat16": 2, "float32": 4}

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ModelSizes:
    """The sizes on which memory depends, each part's under the names of its config.

    ``vision`` and ``quantizer`` are ``vision_config`` and ``vq_config`` of ``vision_language_encoder``.
    """

    decoder: ArConfig
    vision: Config
    quantizer: Config
    transformer: Config
    text_encoder: Config
    vae: Config

    @classmethod
    def of(cls, configs: Mapping[str, Config]) -> ModelSizes:
        """Reads the sizes from the configs of a checkpoint's parts; KeyError or ValueError for a broken one."""
        encoder = configs["vision_language_encoder"]
        return cls(
            decoder=ArConfig.from_json(encoder, {}),
            vision=encoder["vision_config"],
            quantizer=encoder["vq_config"],
            transformer=configs["transformer"],
            text_encoder=configs["text_encoder"],
            vae=configs["vae"],
        )


PUBLISHED: Final = ModelSizes(
    decoder=reference_sizes.DECODER,
    vision=reference_sizes.VISION,
    quantizer=reference_sizes.QUANTIZER,
    transformer=reference_sizes.TRANSFORMER,
    text_encoder=reference_sizes.GLYPH_ENCODER,
    vae=reference_sizes.VAE,
)


@dataclass(frozen=True)
class StageMemory:
    """Memory of a stage on each of its devices, in bytes.

    ``cache`` has the keys and values of every slot; ``working`` is an upper bound of everything else that is alive
    together.
    """

    stage: str
    dtype: str
    weights: dict[str, int]
    cache: int
    working: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.cache + self.working


def ar_memory(
    sizes: ModelSizes, dtype: str, slots: int, positions: int, *, int8: bool = False, ranks: int = 1, rows: int = 0
) -> StageMemory:
    """Returns the memory of the first stage with a cache of ``slots`` sequences of ``positions`` tokens.

    ``int8`` is of the decoder's linear layers. ``ranks`` devices share the decoder; each has the vision tower, and with
    more ranks than key and value heads copies of those. ``rows`` are the most of a step with speculation, else 0.
    """
    itemsize, part = DTYPE_BYTES[dtype], sizes.decoder.part(ranks)
    cache = ar.kv_cache_bytes(part, slots, positions, itemsize)
    state = sum(ar.state_bytes(part, slots, positions, itemsize, rows).values())
    decoder = ar.weight_bytes(sizes.decoder, itemsize, int8=int8, ranks=ranks)
    head = ar.head_bytes(sizes.decoder, itemsize, int8=int8, ranks=ranks)
    vision = parameter_counts.vision_tower(sizes.vision) * itemsize
    vision += parameter_counts.encoding_quantizer(sizes.quantizer) * ar.FP32_BYTES  # always fp32, see ``ar.vision``
    weights = {"language model": decoder - head, "vision and head": vision + head}
    activations = ar.activation_bytes(part, max(slots, rows), positions, itemsize, int8=int8)
    return StageMemory("glm_ar", dtype, weights, cache, state - cache + activations)


def dit_memory(sizes: ModelSizes, dtype: str, size: Size, *, quantized: bool = False) -> StageMemory:
    """Returns the memory of the second stage while it denoises one image of a size and decodes another.

    Source images come on top (``dit.memory.source_bytes``). ``quantized`` linear layers of the blocks are of 8 bits.
    """
    itemsize = DTYPE_BYTES[dtype]
    weights = {
        "transformer": parameter_counts.transformer(sizes.transformer) * itemsize,
        "text_encoder": parameter_counts.text_encoder(sizes.text_encoder) * itemsize,
        "vae": parameter_counts.vae(sizes.vae) * itemsize,
    }
    if quantized:
        weights["transformer"] -= dit.quantization_saving(sizes.transformer, itemsize)
    return StageMemory("glm_dit", dtype, weights, 0, dit.working_bytes(sizes.transformer, sizes.vae, size, itemsize))
