"""Sequence parallelism: attention over tokens that several ranks share.

Every rank has all text tokens, which are few. Image tokens are split, first among the ranks of the ring, then each
shard among the ranks that exchange heads (Ulysses). Text may be of any length, and the number of tokens need not be a
multiple of the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glm_image.dit.source_kv import KvHook
from glm_image.parallel.collectives import Group, Transfer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries [1, tokens, heads, head_dim] over keys and values of the same form; returns as the queries."""

AttendWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""As ``Attend``; returns also the logarithm of the sum of the exponentiated scores, fp32 [1, heads, tokens]."""


class SequenceShape(NamedTuple):
    """The lengths of a sequence whose image tokens are split.

    Attributes:
        image_tokens: of all ranks together.
        source_tokens: image tokens of each source whose keys and values the sequence also attends to.
    """

    image_tokens: int
    source_tokens: tuple[int, ...] = ()


class Heads:
    """Queries, keys and values of a sequence's own tokens.

    Attributes:
        qkv: [text + own image tokens, 3, heads, head_dim].
        text: number of text tokens, which come first.
    """

    def __init__(self, qkv: Tensor, text: int) -> None:
        self.qkv, self.text = qkv, text

    def normed(self) -> Tensor:
        """Returns the normed and rotated heads that attention reads, as ``qkv``."""
        return self.qkv

    def scatter_heads(self, rank: int, text: Tensor, image: Tensor) -> None:
        """Writes the normed and rotated heads by the rank that attends with them.

        Args:
            rank: whose heads of the text are written.
            text: written, [text, 3, heads / ranks, head_dim].
            image: written, [ranks, own image tokens, 3, heads / ranks, head_dim].
        """
        rows, _, heads, head_dim = self.qkv.shape
        by_rank = self.qkv.view(rows, 3, len(image), heads // len(image), head_dim)
        text.copy_(by_rank[: self.text, :, rank])
        image.copy_(by_rank[self.text :].movedim(2, 0))


class SequenceAttention:
    """Attention from a rank's tokens to those of all ranks.

    Args:
        ring: ranks that pass keys and values around.
        ulysses: ranks that exchange heads for tokens at attention.
        attend: attention on this device.
        attend_with_lse: the same with the log-sum-exp; used by the ring.
        backend: the name in diffusers of the attention in use.
    """

    def __init__(
        self, ring: Group, ulysses: Group, attend: Attend, attend_with_lse: AttendWithLse, backend: str
    ) -> None:
        self._ring, self._ulysses = ring, ulysses
        self._attend, self._attend_with_lse, self.backend = attend, attend_with_lse, backend

    def __call__(
        self, sequences: Sequence[Heads], results: Sequence[Tensor], kv_hook: KvHook | None, shape: SequenceShape
    ) -> None:
        """Attends within each sequence of a step. While one attends, the transfers of the others are under way.

        Args:
            sequences: of this rank's tokens.
            results: written, [text + own image tokens, heads, head_dim] each.
            kv_hook: applied to the keys and values of the first sequence, of this rank's heads and ring shard.
            shape: of the first sequence; the others differ from it in their text only.
        """
        pending = [self._exchange_tokens(sequence, shape) for sequence in sequences]
        outputs = []
        for index, (sequence, result) in enumerate(zip(sequences, results, strict=True)):
            query, key, value = pending[index].wait()[None].unbind(2)
            hook = None if index else kv_hook
            if self._ring.size > 1:
                attended = self._ring_attention(query, key, value, sequence.text, hook, shape)
            else:
                attended = self._attend(query, *(hook(key, value) if hook else (key, value)))
            outputs.append(self._exchange_heads(attended[0], sequence.text, result))
        for output in outputs:
            output.write()

    def _exchange_tokens(self, sequence: Heads, shape: SequenceShape) -> PendingTensor:
        """Exchanges all heads of own tokens for own heads of the ring shard's tokens."""
        group = self._ulysses
        if group.size == 1:
            return PendingTensor(sequence.normed())
        qkv, text = sequence.qkv, sequence.text
        rows = [len(shard) for shard in group.shard_ranges(len(self._ring.shard_range(shape.image_tokens)))]
        own, of_rank = rows[group.rank], (3, qkv.shape[2] // group.size, qkv.shape[3])
        gathered, sent = qkv.new_empty(text + sum(rows), *of_rank), qkv.new_empty(group.size, own, *of_rank)
        sequence.scatter_heads(group.rank, gathered[:text], sent)
        transfer = group.all_to_all_async(sent.flatten(0, 1), [own] * group.size, gathered[text:], rows)
        return PendingTensor(gathered, transfer)

    def _exchange_heads(self, attended: Tensor, text: int, result: Tensor) -> PendingOutput:
        """Exchanges own heads of the ring shard's tokens back for all heads of own tokens."""
        group = self._ulysses
        if group.size == 1:
            return PendingOutput([(attended[None], result)])
        text_heads, image_heads = torch.split(attended.contiguous(), [text, len(attended) - text])
        rows = [len(shard) for shard in group.shard_ranges(len(image_heads))]
        own = rows[group.rank]
        text_by_rank, image_by_rank = (
            attended.new_empty(group.size, count, *attended.shape[1:]) for count in (text, own)
        )
        transfers = [group.all_to_all_async(image_heads, rows, image_by_rank.flatten(0, 1), [own] * group.size)]
        if text:
            transfers.append(group.all_gather_async(text_by_rank.flatten(0, 1), text_heads))
        return PendingOutput([(text_by_rank, result[:text]), (image_by_rank, result[text:])], transfers)

    def _ring_attention(
        self, query: Tensor, key: Tensor, value: Tensor, text: int, kv_hook: KvHook | None, shape: SequenceShape
    ) -> Tensor:
        """Ring attention (Liu et al., 2023): merges partial results as the other ranks' keys and values arrive."""
        ring = self._ring
        text_key, text_value, keys, values = key[:, :text], value[:, :text], key[:, text:], value[:, text:]
        if kv_hook:
            keys, values = kv_hook(keys, values)
        sent = torch.stack([keys, values])
        counts = (shape.image_tokens, *(shape.source_tokens if kv_hook else ()))
        pending = self._send_recv(sent, counts, 1)
        total = self._attend_with_lse(query, torch.cat([text_key, keys], 1), torch.cat([text_value, values], 1))
        for step in range(1, ring.size):
            received = pending.wait()
            if step + 1 < ring.size:
                pending = self._send_recv(received, counts, step + 1)
            total = _merged(total, self._attend_with_lse(query, *received))
        return total[0].to(query.dtype)

    def _send_recv(self, sent: Tensor, counts: Sequence[int], step: int) -> PendingTensor:
        """Sends keys and values to the next rank of the ring, and receives those of the rank ``step`` places before."""
        ring = self._ring
        length = sum(len(ring.shard_ranges(count)[(ring.rank - step) % ring.size]) for count in counts)
        received = sent.new_empty(*sent.shape[:2], length, *sent.shape[3:])
        return PendingTensor(received, ring.send_recv_async(sent, received))


class PendingTensor:
    """A tensor that other ranks may still be writing."""

    def __init__(self, tensor: Tensor, transfer: Transfer | None = None) -> None:
        self._tensor, self._transfer = tensor, transfer

    def wait(self) -> Tensor:
        if self._transfer:
            self._transfer.wait()
        return self._tensor


class PendingOutput:
    """Attended heads [ranks, tokens, heads, head_dim] that other ranks may still be writing, and their destinations."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], transfers: Sequence[Transfer] = ()) -> None:
        self._parts, self._transfers = parts, transfers

    def write(self) -> None:
        for transfer in self._transfers:
            transfer.wait()
        for by_rank, result in self._parts:
            ranks, tokens, *heads = by_rank.shape
            result.view(tokens, ranks, *heads).copy_(by_rank.movedim(0, 1))


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention over two sets of keys, weighted by the sums of their exponentiated scores."""
    lse = torch.logaddexp(one[1], other[1])
    parts = [attended.float() * (own - lse).exp().transpose(1, 2)[..., None] for attended, own in (one, other)]
    return parts[0] + parts[1], lse
