"""A hook that refuses prompts with words of a list: an example, and of use where a list is enough."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from glm_image.safety.verdict import ALLOWED, Action, Verdict


class WordList:
    """Refuses prompts that contain a word or phrase of a file.

    Letter case, compatibility forms such as full-width letters, and the number of spaces do not matter. A word of a
    script with spaces matches whole words only.

    Args:
        source: a UTF-8 file with a word or phrase a line; ``#`` begins a comment.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no words.
    """

    def __init__(self, source: str) -> None:
        lines = (line.partition("#")[0] for line in Path(source).read_text(encoding="utf-8").splitlines())
        words = sorted({_folded(line) for line in lines if line.strip()})
        if not words:
            raise ValueError(f"{source} has no words")
        self._pattern = re.compile("|".join(map(_pattern, words)))

    def check_prompt(self, text: str) -> Verdict:
        found = self._pattern.search(_folded(text))
        return ALLOWED if found is None else Verdict(Action.REFUSE, f"word list: {found[0]}")


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _pattern(word: str) -> str:
    """Returns the pattern of a word; letters of ASCII at its ends are ends of words, as are digits."""
    before = r"(?<![a-z0-9])" if re.match("[a-z0-9]", word) else ""
    after = r"(?![a-z0-9])" if re.search("[a-z0-9]$", word) else ""
    return before + re.escape(word) + after
