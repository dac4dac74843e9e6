"""What runs the transformer's blocks: diffusers' own modules, or what a device has that is faster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor

from glm_image.dit.conditioning import Rotary
from glm_image.dit.source_kv import KvHook

Tokens = tuple[Tensor, Tensor]
"""Image tokens [1, image tokens, width] and text tokens [1, text tokens, width] of a sequence; there may be no text."""


class Blocks(ABC):
    """Runs the transformer's blocks over the sequences of a step.

    Attributes:
        attention_backend: what attends there, by the name that it has in diffusers' attention dispatch.
    """

    attention_backend: str

    @abstractmethod
    def __len__(self) -> int:
        """Returns how many blocks there are."""

    @abstractmethod
    def run(
        self,
        which: range,
        sequences: list[Tokens],
        time: Tensor,
        rotary: Rotary,
        joins: Sequence[KvHook] | None = None,
        /,
    ) -> list[Tokens]:
        """Returns the sequences after some of the blocks; those given stay as they are.

        Running blocks in parts gives the same bits as running them at once.

        Args:
            which: the blocks, without gaps.
            sequences: the tokens of each.
            time: silu(time embedding), [1, time width].
            rotary: tables of the image tokens.
            joins: for each block, of all of them, what happens to the first sequence's keys and values before its
                attention.
        """

    def __call__(
        self,
        sequences: list[Tokens],
        time: Tensor,
        rotary: Rotary,
        joins: Sequence[KvHook] | None = None,
        /,
    ) -> list[Tensor]:
        """Returns the image tokens of each sequence after all blocks; see ``run``."""
        return [image for image, _ in self.run(range(len(self)), sequences, time, rotary, joins)]


class _JoinedKeys:
    """A join in the form in which diffusers' attention takes it."""

    mode = "read"

    def __init__(self, join: KvHook) -> None:
        self.get = join


class EagerBlocks(Blocks):
    """diffusers' own modules, run one after the other."""

    def __init__(self, blocks: Sequence[Any], attention_backend: str) -> None:
        self._blocks, self.attention_backend = blocks, attention_backend

    def __len__(self) -> int:
        return len(self._blocks)

    def run(
        self,
        which: range,
        sequences: list[Tokens],
        time: Tensor,
        rotary: Rotary,
        joins: Sequence[KvHook] | None = None,
        /,
    ) -> list[Tokens]:
        results: list[Tokens] = []
        for image, text in sequences:
            for index in which:
                cache = _JoinedKeys(joins[index]) if joins and not results else None
                image, text = self._blocks[index](image, text, time, rotary, kv_cache=cache)  # noqa: PLW2901 - the sequence's state
            results.append((image, text))
        return results


def eager_blocks(transformer: Any) -> Blocks:
    """Returns the blocks of diffusers' ``GlmImageTransformer2DModel``, run one after the other as they are."""
    return EagerBlocks(transformer.transformer_blocks, _dispatched(transformer))


def _dispatched(transformer: Any) -> str:
    """Returns to whom diffusers' dispatch hands the attention of a transformer."""
    chosen = transformer.transformer_blocks[0].attn1.processor._attention_backend
    return str((chosen or _AttentionBackendRegistry.get_active_backend()[0]).value)
