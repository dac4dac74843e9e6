"""Prompts as inputs of the two models: quoted strings for the glyph encoder, token ids for the AR."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from glm_image.errors import CheckpointError
from glm_image.request import chat_template
from glm_image.request.geometry import Grid, PlacedGrid

# The strings of one kind of quotes come before those of the next (diffusers pipeline_glm_image.py).
QUOTED = tuple(re.compile(pattern) for pattern in (r"'([^']*)'", r"“([^“”]*)”", r'"([^"]*)"', r"「([^「」]*)」"))

# Placeholder of the prompt while the chat template is rendered: a private-use code point, in no template.
PROMPT_MARK = "\ue0a5"

DEFAULT_COUNTS = 5
"""Numbers of source images, from 0, that requests have by default."""


def quoted_strings(prompt: str) -> list[str]:
    """Returns the quoted strings, which the image shows as lettering, by kind of quotes."""
    return [string for pattern in QUOTED for string in pattern.findall(prompt)]


def glyph_token_count(strings: Sequence[str]) -> int:
    """Returns the number of glyph tokens: one for each byte and each end of a string.

    Each string has a pad token more if the number of strings is even. Without strings there is one empty string.
    """
    strings = strings or [""]
    return sum(len(string.encode("utf-8")) for string in strings) + len(strings) * (1 + _pads(strings))


def glyph_token_ids(strings: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Returns the byte tokens of each string that the image shows as lettering, not padded to a common length.

    Each begins with one pad token if the number of strings is even, as in training. Text that spells a special token
    is tokenized as text. ``tokenizer`` is the checkpoint's ByT5 tokenizer.
    """
    strings = strings or [""]
    pads = [tokenizer.pad_token_id] * _pads(strings)
    return [pads + ids for ids in tokenizer(list(strings), split_special_tokens=True).input_ids]


def _pads(strings: Sequence[str]) -> int:
    return (len(strings) + 1) % 2


@dataclass(frozen=True)
class PromptTokenizer:
    """Turns prompts into the AR's input ids with the checkpoint's ``GlmImageProcessor``; threads may share one."""

    processor: Any
    # A fast tokenizer keeps the options of a call, split_special_tokens among them, until the next call.
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _templates: dict[int, tuple[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def text_to_image(self, prompt: str, target: Grid, preview: Grid) -> list[int]:
        """Returns the input ids of a text-to-image prompt; the last one is the start of the image."""
        return self._with_template(0, prompt, target, preview)

    def image_to_image(
        self, prompt: str, target: Grid, sources: Sequence[Grid]
    ) -> tuple[list[int], tuple[PlacedGrid, ...]]:
        """Returns the input ids of an image-to-image prompt, and the places of the source images in it.

        The places hold image tokens, which the ids of the vision tower replace. The tokens that the chat template puts
        around each image are kept.
        """
        ids: list[int] = []
        placed: list[PlacedGrid] = []
        left = list(sources)
        image_token: int = self.processor.image_token_id
        for token in self._with_template(len(sources), prompt, target):
            if token != image_token:
                ids.append(token)
            elif left:
                placed.append(PlacedGrid(len(ids), left.pop(0)))
                ids += [image_token] * placed[-1].grid.tokens
            else:
                raise _wrong_template("more images than there are")
        if left:
            raise _wrong_template(f"{len(placed)} of {len(sources)} images")
        return ids, tuple(placed)

    def _with_template(self, images: int, prompt: str, *grids: Grid) -> list[int]:
        before, after = self._template(images)
        begin, end = self.processor.grid_bos_token, self.processor.grid_eos_token
        tail = "".join(f"{begin}{grid.height} {grid.width}{end}" for grid in grids) + self.processor.bos_token
        with self._one_at_a_time:
            return self._encode(before, prompt, after + tail)

    def _template(self, images: int) -> tuple[str, str]:
        """Returns the text before and after the prompt."""
        if images not in self._templates:
            # One process renders all numbers of images that are allowed by default.
            counts = sorted({*range(DEFAULT_COUNTS), images} - set(self._templates))
            for count, text in zip(counts, self._render(counts), strict=True):
                parts = text.split(PROMPT_MARK)
                if len(parts) != 2:  # noqa: PLR2004
                    raise _wrong_template(f"the user's text {len(parts) - 1} times; allowed: once")
                self._templates[count] = (parts[0], parts[1])
        return self._templates[images]

    def _render(self, counts: Sequence[int]) -> list[str]:
        template = self.processor.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not isinstance(template, str):
            raise CheckpointError("processor/chat_template: is missing, or has no entry 'default'")
        chats = []
        for count in counts:
            content = [{"type": "image"}] * count + [{"type": "text", "text": PROMPT_MARK}]
            chats.append([{"role": "user", "content": content}])
        return chat_template.render(template, chats, self.processor.tokenizer.special_tokens_map)

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        added = self.processor.tokenizer.added_tokens_decoder.values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(re.escape(text) for text in special) or r"(?!)")

    def _encode(self, before: str, prompt: str, after: str) -> list[int]:
        # A tokenizer cuts text at special tokens before anything else, so the run of text that holds the prompt can be
        # encoded on its own: from the last special token before it to the first one after it.
        tokenizer = self.processor.tokenizer
        left = max((match.end() for match in self._special_text.finditer(before)), default=0)
        right_match = self._special_text.search(after)
        right = right_match.start() if right_match else len(after)
        text = before[left:] + prompt + after[:right]
        head: list[int] = tokenizer(before[:left]).input_ids
        body: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        tail: list[int] = tokenizer(after[right:], add_special_tokens=False).input_ids
        return head + body + tail


def _wrong_template(shows: str) -> CheckpointError:
    return CheckpointError(f"processor/chat_template: shows {shows}")
