from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GlmImageProcessor

from glm_image.errors import CheckpointError
from glm_image.request import geometry, prompts
from glm_image.request.geometry import Grid, Size
from glm_image.request.prompts import PromptTokenizer
from helpers import MakeCheckpoint
from make_tiny_checkpoint import TinyConfig
from tiny_checkpoint_configs import SPECIAL_TOKENS

TINY = TinyConfig()
PREFIXES = ("", "[gMASK]<sop><|user|>\n", "Draw: ", "Draw <|user|>: ")
PIECES = st.one_of(st.text(max_size=12), st.sampled_from(["'", '"', "“", "”", "「", "」", " ", "it's", "你好", "'a'"]))
PROMPTS = st.lists(PIECES, max_size=12).map("".join)
SPELLED = (*SPECIAL_TOKENS, f"<|dit_token_{TINY.codebook}|>", f"<|dit_token_{TINY.codebook + 1}|>")


def reference_ids(processor: Any, prompt: str, size: Size) -> list[int]:
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": prompt}]}]],
        tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"target_h": size.height, "target_w": size.width},
    )  # fmt: skip
    ids: list[int] = inputs["input_ids"][0].tolist()
    return ids


def our_ids(tokenizer: PromptTokenizer, prompt: str, size: Size) -> list[int]:
    preview, target = geometry.output_grids(geometry.target_grid(size), image_to_image=False)
    return tokenizer.text_to_image(prompt, target, preview)


@pytest.fixture(scope="module", params=PREFIXES)
def processor(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Any:
    folder: Path = make_checkpoint(weights=False, chat_prefix=request.param)
    return GlmImageProcessor.from_pretrained(folder / "processor")


@pytest.fixture(scope="module")
def tokenizer(processor: Any) -> PromptTokenizer:
    return PromptTokenizer(processor)


def spells_no_special_token(text: str) -> bool:
    return not any(token in text for token in SPELLED)


@given(prompt=PROMPTS.filter(spells_no_special_token), th=st.integers(1, 64), tw=st.integers(1, 64))
def test_prompt_ids_match_the_reference(
    tokenizer: PromptTokenizer, processor: Any, prompt: str, th: int, tw: int
) -> None:
    size = Size(32 * th, 32 * tw)
    assert our_ids(tokenizer, prompt, size) == reference_ids(processor, prompt, size)


@pytest.mark.parametrize("spelled", [*SPELLED, "<sop>32 32<eop>", "a <|image|> b", "<|image|><|image|>"])
def test_text_that_spells_a_special_token_is_text(tokenizer: PromptTokenizer, processor: Any, spelled: str) -> None:
    size = Size(64, 96)
    around = reference_ids(processor, "x", size)
    (place,) = [index for index in range(len(around)) if around[index] == TINY.vision_vocab + ord("x")]
    as_bytes = [TINY.vision_vocab + byte for byte in spelled.encode()]
    assert our_ids(tokenizer, spelled, size) == around[:place] + as_bytes + around[place + 1 :]
    assert reference_ids(processor, spelled, size) != our_ids(tokenizer, spelled, size)


def test_threads_may_share_a_tokenizer(tokenizer: PromptTokenizer) -> None:
    preview, target = Grid(16, 16), Grid(2, 2)
    prompts = ["x" * length for length in range(1, 400)]
    alone = [tokenizer.text_to_image(prompt, target, preview) for prompt in prompts]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda prompt: tokenizer.text_to_image(prompt, target, preview), prompts))
    assert together == alone


@pytest.mark.parametrize("times", [0, 2])
def test_template_must_contain_the_prompt_once(checkpoint_folder: Path, times: int) -> None:
    processor = GlmImageProcessor.from_pretrained(checkpoint_folder / "processor")
    processor.chat_template = "x" + "{{ messages[0].content[0].text }}" * times
    with pytest.raises(CheckpointError, match=rf"chat_template.*{times} times"):
        PromptTokenizer(processor).text_to_image("a", Grid(1, 1), Grid(16, 16))


@given(prompt=PROMPTS)
def test_quoted_strings_match_the_reference(reference: Any, prompt: str) -> None:
    assert prompts.quoted_strings(prompt) == reference.get_glyph_texts(prompt)[0]


@pytest.mark.parametrize(
    ("prompt", "strings"),
    [
        ("no quotes", []),
        ("says 'NEWS'", ["NEWS"]),
        ("「四」 \"three\" “二” 'one'", ["one", "二", "three", "四"]),
        ("it's Bob's", ["s Bob"]),
        ("an 'open one", []),
        ("''", [""]),
    ],
)
def test_quoted_strings(prompt: str, strings: list[str]) -> None:
    assert prompts.quoted_strings(prompt) == strings


@given(prompt=PROMPTS.filter(lambda text: "<" not in text))
def test_glyph_ids_match_the_reference(reference: Any, prompt: str) -> None:
    strings = reference.get_glyph_texts(prompt)[0] or [""]
    ids = reference.tokenizer(strings, max_length=2048, truncation=True).input_ids
    pads = [reference.tokenizer.pad_token_id] * ((len(ids) + 1) % 2)
    assert prompts.glyph_token_ids(prompts.quoted_strings(prompt), reference.tokenizer) == [pads + row for row in ids]


@given(prompt=st.one_of(PROMPTS, PROMPTS.map(lambda text: f"'{text}</s>' and '<pad>'")))
def test_glyph_tokens_are_counted_without_a_tokenizer(reference: Any, prompt: str) -> None:
    ids = prompts.glyph_token_ids(prompts.quoted_strings(prompt), reference.tokenizer)
    assert prompts.glyph_token_count(prompts.quoted_strings(prompt)) == sum(map(len, ids))


@pytest.mark.parametrize("spelled", ["</s>", "<pad>", "<unk>", "<extra_id_0>"])
def test_quoted_text_that_spells_a_special_token_is_text(reference: Any, spelled: str) -> None:
    (ids,) = prompts.glyph_token_ids([spelled], reference.tokenizer)
    assert ids == [3 + byte for byte in spelled.encode()] + [reference.tokenizer.eos_token_id]
