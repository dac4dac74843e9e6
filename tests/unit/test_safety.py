"""Safety hooks: verdicts, failures and time limits, on the engines."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from glm_image.ar.metrics import PROMPT_CHECKS
from glm_image.dit.metrics import IMAGE_CHECKS
from glm_image.errors import ConfigurationError, ContentRefusedError, SafetyCheckError
from glm_image.lifecycle.context import RequestContext
from glm_image.pipeline import LocalPipeline, paint_request
from glm_image.request.parameters import ArMetadata, GenerationParameters
from glm_image.safety.checks import SafetyChecks, blurred
from glm_image.safety.settings import SafetySettings
from glm_image.safety.verdict import ALLOWED, Action, Verdict
from glm_image.safety.word_list import WordList
from glm_image.telemetry.metrics import MetricSpec

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
RELEASED = threading.Event()


class Hook:
    """Acts as the text, or as the image's first value, says."""

    def check_prompt(self, text: str) -> Verdict:
        if text == "hang":
            RELEASED.wait(60)
        if text == "raise":
            raise SystemExit
        return Verdict(Action(text), "because") if text in {"refuse", "blur"} else ALLOWED

    def check_image(self, pixels: NDArray[np.uint8]) -> Verdict:
        return (ALLOWED, Verdict(Action.REFUSE, "red"), Verdict(Action.BLUR))[pixels[0, 0, 0] % 3]


class BlurAll:
    """Has every image blurred."""

    def check_image(self, pixels: NDArray[np.uint8]) -> Verdict:
        return Verdict(Action.BLUR)


def checks(on_failure: str = "refuse", kind: str = "Hook") -> tuple[SafetyChecks, list[str]]:
    counted: list[str] = []

    def record(metric: MetricSpec, _: float, __: int = 1) -> None:
        counted.append(metric.outcome)

    settings = SafetySettings(safety=f"{__name__}:{kind}", safety_timeout_ms=50, safety_on_failure=on_failure)
    return SafetyChecks(settings, PROMPT_CHECKS, IMAGE_CHECKS, record), counted


def test_prompts_follow_the_verdict_and_the_log_has_the_reason() -> None:
    hook, counted = checks()
    context = RequestContext()
    assert not hook.check_prompt(context, GenerationParameters(prompt="a fox"))
    assert not context.attributes
    with pytest.raises(ContentRefusedError, match=r"prompt is refused by .* \(content_refused\)$"):
        hook.check_prompt(context, GenerationParameters(prompt="refuse"))
    assert context.attributes == {"prompt_check": "refuse", "prompt_check_reason": "because"}
    assert hook.check_prompt(context, GenerationParameters(prompt="blur"))
    with pytest.raises(ContentRefusedError):
        hook.check_prompt(context, GenerationParameters(prompt="a sign", glyph_text=("a", "refuse")))
    assert counted == ["allow", "refuse", "blur", "allow", "allow", "refuse"]


def test_images_follow_the_verdict() -> None:
    hook, counted = checks()
    image = np.zeros((8, 8, 3), np.uint8)
    assert not hook.check_image(RequestContext(), image)
    with pytest.raises(ContentRefusedError, match="the image is refused"):
        hook.check_image(RequestContext(), image + 1)
    assert hook.check_image(RequestContext(), image + 2)
    assert counted == ["allow", "refuse", "blur"]


@pytest.mark.parametrize("prompt", ["raise", "hang"])
def test_a_check_that_fails_refuses_or_allows_as_configured(prompt: str) -> None:
    RELEASED.clear()
    try:
        for on_failure in ("refuse", "allow"):
            hook, counted = checks(on_failure)
            context = RequestContext()
            if on_failure == "allow":
                assert not hook.check_prompt(context, GenerationParameters(prompt=prompt))
            else:
                with pytest.raises(SafetyCheckError, match="safety_check_failed"):
                    hook.check_prompt(context, GenerationParameters(prompt=prompt))
            assert (counted, context.attributes["prompt_check"]) == (["failed"], "failed")
    finally:
        RELEASED.set()


@pytest.mark.parametrize("entry", ["no_module_of_this_name:Hook", f"{__name__}:Nothing", "pathlib:Path"])
def test_a_hook_that_cannot_be_loaded_is_refused(entry: str) -> None:
    with pytest.raises(ConfigurationError, match="safety is "):
        SafetyChecks(SafetySettings(safety=entry), {}, {})


def test_the_word_list_matches_words_in_any_form(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# words\nbad  word\nass # whole words only\n坏词\n", encoding="utf-8")
    hook = WordList(str(path))
    for text in ("a BAD word", "ＢＡＤ\n\tword!", "an ass", "一个坏词在这里"):
        assert hook.check_prompt(text).action is Action.REFUSE, text
    for text in ("a class", "bad words are many", "word bad"):
        assert hook.check_prompt(text) == ALLOWED, text


def test_a_blurred_image_has_no_detail() -> None:
    result = blurred(PIXELS)
    assert result.shape == PIXELS.shape
    assert np.abs(np.diff(result.astype(int), axis=1)).max() < 16


def test_the_engines_check_prompt_and_image(
    pipeline: LocalPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "words.txt"
    path.write_text("forbidden", encoding="utf-8")
    words = SafetySettings(safety="glm_image.safety.word_list:WordList", safety_source=str(path))
    parameters = GenerationParameters(prompt="forbidden", height=32, width=64, num_inference_steps=1, seed=1)
    plain = pipeline.generate(parameters)
    reported: ArMetadata = {}
    request = paint_request(pipeline.resolve(parameters), pipeline.prior(pipeline.resolve(parameters)), reported)
    for place in (pipeline, pipeline.dit):
        monkeypatch.setattr(place, "_safety", SafetyChecks(words, PROMPT_CHECKS, IMAGE_CHECKS))
    for refused in (lambda: pipeline.generate(parameters), lambda: pipeline.paint(request)):
        with pytest.raises(ContentRefusedError):
            refused()
    monkeypatch.setattr(pipeline.dit, "_safety", checks(kind="BlurAll")[0])
    result = pipeline.paint(request)
    assert result.metadata["blurred"] == [0]
    np.testing.assert_array_equal(result.pixels[0], blurred(plain.pixels[0]))


def test_a_verdict_may_name_its_action() -> None:
    assert Verdict("refuse").action is Action.REFUSE  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="maybe"):
        Verdict("maybe")  # type: ignore[arg-type]
