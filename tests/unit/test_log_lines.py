"""Text of clients and checkpoints in log lines and printed errors ends no line, steers no terminal, hides nothing."""

from __future__ import annotations

import io
import json
import logging
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from glm_image.errors import InvalidInputError, printable, shown
from glm_image.lifecycle.context import RequestContext
from glm_image.sizing.inspect import Inspection
from glm_image.supervisor import cli
from glm_image.telemetry.logs import LineFormatter
from glm_image.telemetry.request_log import FILE, PROMPTS, RequestLog
from glm_image_client import errors as client_errors
from glm_image_client.cli.application import app
from glm_image_client.cli.exits import EXIT_REFUSED

HOSTILE = "\x00\x1b[2J\n\r\x7f\x85\x9b31m\u061c\u200b\u200e\u2028\u2029\u202e\u2066\ufeff\U000e0041\ud800"
HARMLESS = "Füchse 你好\u3000\u00a0\U0001f98a é"
TEXT = st.text(st.characters() | st.sampled_from(HOSTILE))


def is_safe(text: str) -> bool:
    return not any(unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for character in text)


@given(TEXT)
def test_nothing_unsafe_is_printed(text: str) -> None:
    for escaped in (printable(text), client_errors.printable(text), shown(text)):
        assert is_safe(escaped)
    assert printable(text) == client_errors.printable(text)
    assert printable(text, keep="\t").replace("\t", "\\t") == printable(text)


def test_letters_of_all_scripts_stay() -> None:
    assert printable(HARMLESS) == HARMLESS
    assert printable("a\x9b\u202eb\n") == r"a\x9b\u202eb\n"


@pytest.fixture
def log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FILE, str(tmp_path / "requests.jsonl"))
    monkeypatch.setenv(PROMPTS, "1")
    return tmp_path / "requests.jsonl"


def test_the_request_log_is_one_safe_line_of_json(log_file: Path) -> None:
    context = RequestContext(HOSTILE + HARMLESS)
    context.attributes["prompt"] = HARMLESS + HOSTILE
    log = RequestLog("glm_dit_0", is_last=True, record=lambda *_: None)
    log.finished(context, InvalidInputError.of("prompt", HOSTILE, "less"))
    log.close()
    text = log_file.read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert is_safe(text[:-1])
    assert HARMLESS in text
    line = json.loads(text)
    assert (line["id"], line["prompt"]) == (HOSTILE + HARMLESS, HARMLESS + HOSTILE)


def test_a_record_cannot_look_like_two(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(asctime)s glm_ar_0 %(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    forged = "x\n2026-01-01 00:00:00,000 glm_ar_0 forged \x9b\u2028"
    try:
        raise ValueError(forged)
    except ValueError:
        logger.exception("request %s failed", forged)
    first, *rest = stream.getvalue().rstrip("\n").split("\n")
    assert first.endswith(r"request x\n2026-01-01 00:00:00,000 glm_ar_0 forged \x9b\u2028 failed")
    assert rest[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") and is_safe(line) for line in rest)


def test_printed_errors_are_safe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["--checkpoint", "\x9b\u202e/none"]) == cli.EXIT_REFUSED
    assert is_safe(capsys.readouterr().err.rstrip("\n"))

    def fail(*_: object) -> None:
        raise client_errors.RefusedError(f"prompt is {HOSTILE}; allowed: less")

    monkeypatch.setattr("glm_image_client.cli.commands.inspect.inspect_checkpoint", fail)
    result = CliRunner().invoke(app, ["inspect", "x"])
    assert result.exit_code == EXIT_REFUSED
    assert is_safe(result.output.rstrip("\n"))
    assert r"\x1b[2J\n" in result.output


def test_the_report_on_a_checkpoint_is_safe() -> None:
    report = Inspection("x", [], [], (8, 8192), {}, [f"x has no tensor {HOSTILE}"]).to_text()
    assert all(map(is_safe, report.split("\n")))
    assert r"\x1b[2J\n\r" in report
