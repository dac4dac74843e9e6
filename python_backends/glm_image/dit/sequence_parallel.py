"""Attention over tokens that several ranks share, and who has which of them.

Text tokens are few, so every rank has all of them; image tokens are split, first among the ranks of the ring, then each
part among those that exchange heads. Text may be of any length, and tokens need not divide by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glm_image.dit.source_kv import KvHook
from glm_image.parallel.collectives import Group, Transfer

# Attention of queries [1, tokens, heads, head_dim] over keys and values of that form: what is attended to, as the
# queries, and the logarithm of the sum of the exponentiated scores, fp32 [1, heads, tokens].
AttendWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class TokenSplit:
    """Which image tokens are this rank's.

    Args:
        ring: ranks whose keys and values go around.
        ulysses: ranks that exchange heads for tokens at attention.
    """

    def __init__(self, ring: Group, ulysses: Group) -> None:
        self.ring, self.ulysses = ring, ulysses

    def own(self, tokens: Tensor, dim: int = 0) -> Tensor:
        """Returns this rank's part of what all ranks have whole."""
        share = self.ring.shard_range(tokens.shape[dim])
        inner = self.ulysses.shard_range(len(share))
        return tokens.narrow(dim, share.start + inner.start, len(inner))

    def whole(self, own: Tensor, count: int) -> Tensor:
        """Returns all ``count`` tokens of which this rank has ``own``, [own tokens, ...]."""
        shares = self.ring.shard_range(count)
        return self.ring.all_gather_rows(self.ulysses.all_gather_rows(own, len(shares)), count)


class Heads:
    """Queries, keys and values of a sequence's own tokens.

    Args:
        qkv: [text + own image tokens, 3, heads, head_dim].
        text: see the attribute.

    Attributes:
        qkv: as given.
        text: tokens of text, which come first.
    """

    def __init__(self, qkv: Tensor, text: int) -> None:
        self.qkv, self.text = qkv, text

    def whole(self) -> Tensor:
        """Returns what is attended with, as ``qkv``."""
        return self.qkv

    def scatter_heads(self, rank: int, words: Tensor, image: Tensor) -> None:
        """Writes what is attended with by whose heads they are.

        Args:
            rank: whose heads of the text are wanted.
            words: written, [text, 3, heads / ranks, head_dim].
            image: written, [ranks, own image tokens, 3, heads / ranks, head_dim].
        """
        rows, _, heads, head_dim = self.qkv.shape
        by_rank = self.qkv.view(rows, 3, len(image), heads // len(image), head_dim)
        words.copy_(by_rank[: self.text, :, rank])
        image.copy_(by_rank[self.text :].movedim(2, 0))


class SequenceAttention:
    """Attention from a rank's tokens to everyone's.

    Args:
        split: who has which tokens.
        attend: attention on this device.
        attend_with_lse: the same, telling the sums; used where keys and values go around.
        backend: see the attribute.

    Attributes:
        backend: the name in diffusers of the one that is used.
    """

    def __init__(self, split: TokenSplit, attend: Attend, attend_with_lse: AttendWithLse, backend: str) -> None:
        self._split, self._attend, self._attend_with_lse = split, attend, attend_with_lse
        self.backend = backend
        self._tokens = 0
        self._joined: tuple[int, ...] = ()

    def begin(self, tokens: int, joined: Sequence[int] = ()) -> None:
        """To be called before a forward.

        Args:
            tokens: image tokens that all ranks have together.
            joined: image tokens of each source whose keys and values are joined to the first sequence's.
        """
        self._tokens, self._joined = tokens, tuple(joined)

    def __call__(self, sequences: Sequence[Heads], results: Sequence[Tensor], join: KvHook | None) -> None:
        """Attends within each sequence of a step. While one attends, what the others need is on its way.

        Args:
            sequences: of this rank's tokens.
            results: written, [text + own image tokens, heads, head_dim] each.
            join: what happens to the first one's keys and values, of this rank's heads and ring.
        """
        arriving = [self._to_heads(sequence) for sequence in sequences]
        leaving = []
        for index, (sequence, result) in enumerate(zip(sequences, results, strict=True)):
            query, key, value = arriving[index].whole()[None].unbind(2)
            attended = self._attend_to_all(query, key, value, sequence.text, None if index else join)
            leaving.append(self._to_tokens(attended[0], sequence.text, result))
        for each in leaving:
            each.write()

    def _attend_to_all(self, query: Tensor, key: Tensor, value: Tensor, text: int, join: KvHook | None) -> Tensor:
        if self._split.ring.size == 1:
            return self._attend(query, *(join(key, value) if join else (key, value)))
        return self._ring_attention(query, key, value, text, join)

    def _to_heads(self, sequence: Heads) -> PendingQkv:
        """From all heads of own tokens to own heads of the ring's share of tokens."""
        group = self._split.ulysses
        if group.size == 1:
            return PendingQkv(sequence.whole())
        qkv, text = sequence.qkv, sequence.text
        rows = [len(share) for share in group.shard_ranges(len(self._split.ring.shard_range(self._tokens)))]
        own, of_rank = rows[group.rank], (3, qkv.shape[2] // group.size, qkv.shape[3])
        whole, sent = qkv.new_empty(text + sum(rows), *of_rank), qkv.new_empty(group.size, own, *of_rank)
        sequence.scatter_heads(group.rank, whole[:text], sent)
        return PendingQkv(whole, group.all_to_all_async(sent.flatten(0, 1), [own] * group.size, whole[text:], rows))

    def _to_tokens(self, attended: Tensor, text: int, result: Tensor) -> PendingOutput:
        """The way back."""
        group = self._split.ulysses
        if group.size == 1:
            return PendingOutput([(attended[None], result)])
        words, image = torch.split(attended.contiguous(), [text, len(attended) - text])
        rows = [len(share) for share in group.shard_ranges(len(image))]
        own = rows[group.rank]
        of_words, of_image = (words.new_empty(group.size, count, *words.shape[1:]) for count in (text, own))
        transfers = [group.all_to_all_async(image, rows, of_image.flatten(0, 1), [own] * group.size)]
        if text:
            transfers.append(group.all_gather_async(of_words.flatten(0, 1), words))
        return PendingOutput([(of_words, result[:text]), (of_image, result[text:])], transfers)

    def _ring_attention(self, query: Tensor, key: Tensor, value: Tensor, text: int, join: KvHook | None) -> Tensor:
        """Ring attention (Liu et al., 2023): partial results are merged by their sums as keys and values come by."""
        ring = self._split.ring
        words, keys, values = (key[:, :text], value[:, :text]), key[:, text:], value[:, text:]
        if join:
            keys, values = join(keys, values)
        moving = torch.stack([keys, values])
        counts = (self._tokens, *(self._joined if join else ()))
        coming = self._pass_on(moving, counts, 1)
        total = self._attend_with_lse(query, torch.cat([words[0], keys], 1), torch.cat([words[1], values], 1))
        for step in range(1, ring.size):
            moving = coming.whole()
            if step + 1 < ring.size:
                coming = self._pass_on(moving, counts, step + 1)
            total = _merged(total, self._attend_with_lse(query, *moving))
        return total[0].to(query.dtype)

    def _pass_on(self, moving: Tensor, counts: Sequence[int], step: int) -> PendingQkv:
        """Gives the next rank of the ring what this one has; what comes is that of the rank ``step`` places before."""
        ring = self._split.ring
        length = sum(len(ring.shard_ranges(count)[(ring.rank - step) % ring.size]) for count in counts)
        coming = moving.new_empty(*moving.shape[:2], length, *moving.shape[3:])
        return PendingQkv(coming, ring.send_recv_async(moving, coming))


class PendingQkv:
    """Queries, keys and values that other ranks may still be writing."""

    def __init__(self, tensor: Tensor, transfer: Transfer | None = None) -> None:
        self._tensor, self._transfer = tensor, transfer

    def whole(self) -> Tensor:
        if self._transfer:
            self._transfer.wait()
        return self._tensor


class PendingOutput:
    """Heads [ranks, tokens, heads, head_dim] that others may still be writing, and where those of all ranks belong."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], transfers: Sequence[Transfer] = ()) -> None:
        self._parts, self._transfers = parts, transfers

    def write(self) -> None:
        for transfer in self._transfers:
            transfer.wait()
        for by_rank, result in self._parts:
            ranks, tokens, *heads = by_rank.shape
            result.view(tokens, ranks, *heads).copy_(by_rank.movedim(0, 1))


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention to two sets of keys, weighted by the sums of their exponentiated scores."""
    lse = torch.logaddexp(one[1], other[1])
    parts = [attended.float() * (own - lse).exp().transpose(1, 2)[..., None] for attended, own in (one, other)]
    return parts[0] + parts[1], lse
