"""The command ``glm-image`` with a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from glm_image_client.cli import app
from glm_image_client.file_texts import FileTexts
from server.kserve import KServeError, grpc_infer

SMALL = ["--size", "96x64", "--steps", "2", "--seed", "7"]
DEFAULTS = {"width": 256, "height": 256, "num_inference_steps": 20, "guidance_scale": 1.5}


@pytest.fixture(autouse=True)
def _in_folder(triton: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLM_IMAGE_URL", triton.grpc_url)


def run(*arguments: str, code: int = 0, text: str | None = None) -> Any:
    done = CliRunner().invoke(app, arguments, input=text)
    assert done.exit_code == code, done.output
    return done


def pixels(file: str | Path) -> list[Any]:
    return np.asarray(Image.open(file)).tolist()  # type: ignore[no-any-return]


def test_size_and_steps_are_those_of_the_checkpoint(triton: TritonServer) -> None:
    assert "256x256, 20 steps" in run("generate", "A fox").stdout
    with GlmImageClient(triton.http_url, "http") as client:
        assert client.defaults() == DEFAULTS
    answer = json.loads(grpc_infer(triton, {"request_id": "", "action": "defaults"}, "glm_control")["result"][0])
    assert answer == {"action": "defaults", "defaults": DEFAULTS}
    with pytest.raises(KServeError, match="action is default; allowed: cancel, status, defaults"):
        grpc_infer(triton, {"request_id": "", "action": "default"}, "glm_control")


def test_the_prompt_is_read_from_standard_input() -> None:
    prompt = "It doesn't like the cat's toy"
    done = run("generate", "-", *SMALL, "-o", "a.png", text=f"{prompt}\n")
    assert "note: 't like the cat', between two apostrophes, was taken as text to render" in done.stderr
    run("generate", *SMALL, "-o", "b.png", "--wait", text=prompt)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert "prompt is empty" in run("generate", code=2, text="").stderr


def test_a_file_repeats_its_request() -> None:
    run("generate", "A fox", *SMALL, "-n", "2", "-o", "a.png")
    shown = json.loads(run("show", "a_1.png", "--json").stdout)
    assert shown["record"]["prompt"] == "A fox"
    assert shown["aigc"]["Label"] == "1"
    again = run("generate", "--like", "a_1.png", "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("a_1.png").read_bytes()
    assert "differs" not in again.stderr
    run("generate", "A fox", *SMALL, "-o", "b.webp", "--file-metadata", "no_prompt", "--seed", "1")
    assert "has no prompt" in run("generate", "--like", "b.webp", code=2, text="").stderr
    assert "seed" in run("show", "b.webp").stdout
    record = {**shown["record"], "version": "0.0.9"}
    Image.new("RGB", (32, 32)).save("old.png", **FileTexts(json.dumps(record)).encoder_options("png"))
    assert "the server differs: version is" in run("generate", "--like", "old.png").stderr


def test_edit_is_generate_with_a_source() -> None:
    Image.effect_noise((96, 64), 50).convert("RGB").save("source.png")
    run("edit", "source.png", "Paint it red", *SMALL, "-o", "a.png")
    run("generate", "Paint it red", "--image", "source.png", *SMALL, "-o", "b.png")
    assert pixels("a.png") == pixels("b.png")


def test_tokens_and_paint_are_the_two_halves_of_generate() -> None:
    run("generate", "A fox", *SMALL, "-o", "whole.png")
    made = json.loads(run("tokens", "A fox", "--size", "96x64", "--seed", "7", "--json").stdout)
    assert (made["file"], made["seed"], made["grid"]) == ("tokens.npz", 7, [2, 3])
    run("paint", "tokens.npz", "A fox", "--steps", "2", "-o", "painted.png")
    assert pixels("painted.png") == pixels("whole.png")
    assert "'none.npz' cannot be read" in run("paint", "none.npz", "A fox", code=2).stderr


def test_refusals_name_the_flag() -> None:
    assert run("generate", "x", "-n", "9", code=2).stderr == "glm-image: -n is 9; allowed: 1 to 8\n"
    assert "--size: height is 0; allowed: 32 to 2048" in run("generate", "x", "--size", "64x0", code=2).stderr
    refused = json.loads(run("generate", "x", "--steps", "0", "--json", code=2).stdout)
    assert refused == {
        "error": "--steps is 0; allowed: 1 to 200",
        "kind": "RefusedError",
        "exit_code": 2,
    }


def test_a_wrong_port_is_named(triton: TritonServer) -> None:
    http, grpc, metrics = triton.http_url, triton.grpc_url, triton.metrics_url
    for url, message in [
        (http, f"{http} speaks HTTP, not gRPC; use --url http://{http}"),
        (f"http://{grpc}", f"{grpc} speaks gRPC, not HTTP; use --url grpc://{grpc}"),
        (metrics, f"{metrics} is a port of metrics"),
        (f"http://{metrics}", f"{metrics} is a port of metrics"),
    ]:
        assert run("generate", "x", "--url", url, code=3).stderr.startswith(f"glm-image: {message}")
        assert run("generate", "x", "--url", url, "--wait", code=3).stderr.startswith(f"glm-image: {message}")


def test_a_preview_folder_is_made_and_a_missing_preview_explained() -> None:
    done = run("generate", "A fox", "--size", "64x64", "--steps", "11", "--preview-dir", "a/b", "-o", "a.png")
    assert [file.name for file in Path("a/b").iterdir()] == ["00_denoise.png"]
    assert "an image of 64x64 has no preview: previews are for images of twice their area" in done.stderr
    Path("file").touch()
    assert (
        "--preview-dir is 'file', which cannot be made: "
        in run("generate", "x", *SMALL, "--preview-dir", "file", code=2).stderr
    )


def test_a_file_of_prompts_is_resumed_where_it_stopped() -> None:
    Path("p.csv").write_text("prompt,size,seed\nA fox,96x64,7\nx,31x64,\n雪,64x64,8\n", encoding="utf-8")
    first = run("generate", "--prompts", "p.csv", "--steps", "2", code=2)
    assert "prompt 2: --size: width is 31" in first.stderr
    assert "2 of 3 prompts done, 1 failed" in first.stdout
    assert {file.name for file in Path("p").iterdir()} == {
        *("0001.png", "0003.png", "manifest.jsonl", "contact_sheet.png")
    }
    run("generate", "A fox", *SMALL, "-o", "single.png")
    assert Path("p/0001.png").read_bytes() == Path("single.png").read_bytes()
    Path("p.csv").write_text("prompt,size,seed\nA fox,96x64,7\nx,32x64,\n雪,64x64,8\n", encoding="utf-8")
    Path("p/0003.png").unlink()
    again = json.loads(run("generate", "--prompts", "p.csv", "--steps", "2", "--resume", "--json").stdout)
    assert again == {
        "manifest": "p/manifest.jsonl",
        "contact_sheet": "p/contact_sheet.png",
        **{"made": 2, "skipped": 1, "failed": 0, "unsent": 0},
    }
