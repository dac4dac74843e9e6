"""Runs the transformer's blocks: the interface, and diffusers' own modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Final

from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor

from glm_image.dit.conditioning import Rotary
from glm_image.dit.sequence_parallel import SequenceShape
from glm_image.dit.source_kv import KvHook

MAX_SEQUENCES: Final = 2
"""Those of the two branches of guidance, which fused blocks run together."""

Tokens = tuple[Tensor, Tensor]
"""Image tokens [1, image tokens, width] and text tokens [1, text tokens, width] of a sequence; there may be no text."""


class Blocks(ABC):
    """Runs the transformer's blocks over the sequences of a step.

    Attributes:
        attention_backend: the attention in use, by its name in diffusers' attention dispatch.
    """

    attention_backend: str

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of blocks."""

    @abstractmethod
    def run(
        self,
        which: range,
        sequences: list[Tokens],
        time: Tensor,
        rotary: Rotary,
        kv_hooks: Sequence[KvHook] | None = None,
        shape: SequenceShape | None = None,
        /,
    ) -> list[Tokens]:
        """Returns the sequences after some of the blocks; the given tensors are left as they are.

        Running blocks in parts gives the same bits as running all of them in one call.

        Args:
            which: the blocks, contiguous.
            sequences: the tokens of each.
            time: silu(time embedding), [1, time width].
            rotary: tables of the image tokens.
            kv_hooks: one for each of all blocks, applied to the first sequence's keys and values before its attention.
            shape: of the first sequence where ranks share its tokens; the others differ from it in their text only.
        """

    def __call__(
        self,
        sequences: list[Tokens],
        time: Tensor,
        rotary: Rotary,
        kv_hooks: Sequence[KvHook] | None = None,
        shape: SequenceShape | None = None,
        /,
    ) -> list[Tensor]:
        """Returns the image tokens of each sequence after all blocks; see ``run``."""
        return [image for image, _ in self.run(range(len(self)), sequences, time, rotary, kv_hooks, shape)]


def check_sequences(sequences: Sequence[Tokens]) -> None:
    """Raises ``ValueError`` for more sequences than fused blocks run together."""
    if not 1 <= len(sequences) <= MAX_SEQUENCES:
        raise ValueError(f"{len(sequences)} sequences; allowed: 1 or {MAX_SEQUENCES}")


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
        kv_hooks: Sequence[KvHook] | None = None,
        shape: SequenceShape | None = None,
        /,
    ) -> list[Tokens]:
        options = {} if shape is None else {"attention_kwargs": {"shape": shape}}
        results: list[Tokens] = []
        for image, text in sequences:
            for index in which:
                # The hook in the form of a cache that diffusers' attention reads.
                cache = SimpleNamespace(mode="read", get=kv_hooks[index]) if kv_hooks and not results else None
                image, text = self._blocks[index](image, text, time, rotary, kv_cache=cache, **options)  # noqa: PLW2901 - the sequence's state
            results.append((image, text))
        return results


def eager_blocks(transformer: Any) -> Blocks:
    """Returns diffusers' blocks as they are, with the attention that its dispatch chooses."""
    chosen = transformer.transformer_blocks[0].attn1.processor._attention_backend
    backend = chosen or _AttentionBackendRegistry.get_active_backend()[0]
    return EagerBlocks(transformer.transformer_blocks, str(backend.value))
