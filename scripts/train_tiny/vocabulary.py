"""The AR tokenizer's merges, and the processor that holds them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoProcessor

from glm_image.request.prompts import QUOTED
from make_tiny_checkpoint import write_configs
from train_tiny.data import sample
from train_tiny.models import CONFIG

Merge = tuple[str, str]
TEXTS, SEED = 10_000, 1


def train_merges(texts: Sequence[str]) -> list[Merge]:
    """Byte-pair merges of ``texts`` without what is in quotes: words of signs stay letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(alphabet) + CONFIG.unused_ids
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, min_frequency=20, show_progress=False)
    tokenizer.train_from_iterator((_unquoted(text) for text in texts), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) for merge in merges][: CONFIG.unused_ids]


def _unquoted(text: str) -> str:
    for pattern in QUOTED:
        text = re.sub(pattern, lambda found: found[0][0] + found[0][-1], text)
    return text


def merges_of(folder: Path) -> list[Merge]:
    """The merges of a run: the same for all its stages."""
    file = folder / "merges.json"
    if not file.exists():
        texts = [prompt for edits in (False, True) for prompt in sample(TEXTS, SEED, edits=edits).prompts]
        file.write_text(json.dumps(train_merges(texts)), encoding="utf-8")
    return [tuple(merge) for merge in json.loads(file.read_text(encoding="utf-8"))]


def processor_of(folder: Path) -> Any:
    """The checkpoint's processor."""
    with tempfile.TemporaryDirectory() as scratch:
        write_configs(Path(scratch), CONFIG, merges_of(folder))
        return AutoProcessor.from_pretrained(Path(scratch) / "processor")
