"""The decoder's configuration, read from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from glm_image.errors import CheckpointError, ConfigurationError, InvalidInputError
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, Sampling
from glm_image.request.tensors import check_fields

if TYPE_CHECKING:  # sizes are read without torch too
    from glm_image.checkpoint.checkpoint import Checkpoint

# The sampling of the model's authors, where a checkpoint has none.
DEFAULT_TEMPERATURE = 0.9
DEFAULT_TOP_P = 0.75

NOISE_BLOCK = 64
"""Steps of a slot whose sampling noise is in the device's memory: all of it would be 287 MB a request."""


@dataclass(frozen=True)
class ArConfig:
    """The decoder's sizes and token ids.

    Attributes:
        rotary_dim: leading channels of a head that are rotated.
        mrope_section: how many frequencies each run of an axis takes; run i belongs to axis i % 3.
        vision_vocab_size: rows of the head: image tokens and end tokens.
        codebook_size: number of image content ids, which come first.
        end_ids: ids that end a sequence in the reference.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rotary_theta: float
    mrope_section: tuple[int, ...]
    norm_eps: float
    attention_bias: bool
    vocab_size: int
    vision_vocab_size: int
    codebook_size: int
    end_ids: tuple[int, ...]
    sampling: Sampling

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> ArConfig:
        """Reads ``vision_language_encoder/config.json`` and ``generation_config.json``.

        Raises:
            CheckpointError: a value is missing or not supported.
        """
        path = checkpoint.path("vision_language_encoder") / "config.json"
        config = checkpoint.config("vision_language_encoder")
        generation = checkpoint.optional_json("vision_language_encoder", "generation_config.json")
        try:
            return cls.from_json(config, generation)
        except KeyError as error:
            raise CheckpointError(f"{path}: {error.args[0]} is missing") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def part(self, ranks: int) -> ArConfig:
        """Returns the configuration of one rank's part: its heads and its share of the MLP's width.

        With more ranks than kv_heads, several share a KV head.

        Raises:
            ConfigurationError: the decoder can't be divided among so many ranks.
        """
        heads, kv_heads, width = self.heads, self.kv_heads, self.intermediate_size
        if heads % ranks or width % ranks or (kv_heads % ranks and ranks % kv_heads):
            raise ConfigurationError(
                f"glm_ar has {ranks} devices; allowed: what divides {heads} heads and {width} channels of the MLP, and "
                f"divides {kv_heads} key and value heads or is a multiple of them"
            )
        return replace(self, heads=heads // ranks, kv_heads=max(1, kv_heads // ranks), intermediate_size=width // ranks)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], generation: Mapping[str, Any]) -> ArConfig:
        """Reads the content of both files; raises KeyError or ValueError where a value is missing or not supported."""
        text = config["text_config"]
        rope = text["rope_parameters"]
        _require("text_config.hidden_act", text.get("hidden_act", "silu"), "silu")
        _require("text_config.rope_parameters.rope_type", rope.get("rope_type", "default"), "default")
        heads = _positive(text, "num_attention_heads")
        head_dim = _positive(text, "head_dim", text["hidden_size"] // heads)
        kv_heads = _positive(text, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(f"text_config.num_key_value_heads is {kv_heads}; allowed: what divides {heads} heads")
        vision_vocab_size = text["vision_vocab_size"]
        end_ids = generation.get("eos_token_id", config["image_end_token_id"])
        rotary_dim = int(head_dim * rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0)))
        mrope_section = tuple(rope.get("mrope_section", (8, 12, 12)))
        if sum(mrope_section) * 2 != rotary_dim or min(mrope_section, default=0) < 1:
            raise ValueError(f"mrope_section {mrope_section} does not fill {rotary_dim} rotary channels")
        return cls(
            layers=text["num_hidden_layers"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rotary_theta=float(rope.get("rope_theta", 10000.0)),
            mrope_section=mrope_section,
            norm_eps=text["rms_norm_eps"],
            attention_bias=text.get("attention_bias", True),
            vocab_size=text["vocab_size"],
            vision_vocab_size=vision_vocab_size,
            codebook_size=config["vq_config"]["num_embeddings"],
            end_ids=tuple(end_ids) if isinstance(end_ids, list) else (end_ids,),
            sampling=_sampling(generation, vision_vocab_size),
        )


def _given(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns a value of a JSON object; null, like a missing one, has the default."""
    value = values.get(name)
    return default if value is None else value


def _positive(text: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value: int = text[name] if default is None else _given(text, name, default)
    if value < 1:
        raise ValueError(f"text_config.{name} is {value}; allowed: 1 or more")
    return value


def _sampling(generation: Mapping[str, Any], vision_vocab_size: int) -> Sampling:
    top_k = _given(generation, "top_k", 0)
    sampling = Sampling(
        temperature=_given(generation, "temperature", DEFAULT_TEMPERATURE),
        top_p=_given(generation, "top_p", DEFAULT_TOP_P),
        top_k=vision_vocab_size if top_k == 0 else top_k,  # transformers' 0 is no limit
    )
    try:
        check_fields(GenerationParameters(prompt="x", **vars(sampling)), Limits())
    except (InvalidInputError, TypeError) as error:
        raise ValueError(f"in generation_config.json, {error}") from error
    return sampling


def _require(name: str, value: object, allowed: object) -> None:
    if value != allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed!r}")
