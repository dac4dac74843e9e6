"""The parts of ``glm-image`` that need no server: names of files, files of prompts, and what answers at an address."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from glm_image_client import BadArgumentError, GenerationResult, Metadata, RefusedError
from glm_image_client.cli import app
from glm_image_client.cli.application import WAIT_SECONDS, with_wait_seconds
from glm_image_client.cli.contact_sheet import write_contact_sheet
from glm_image_client.cli.diagnosis import diagnose
from glm_image_client.cli.exits import flag_message
from glm_image_client.cli.flags import Output
from glm_image_client.cli.manifest import Manifest
from glm_image_client.cli.outputs import OutputFiles
from glm_image_client.cli.prompts_file import Row, read_rows
from glm_image_client.transport import Endpoint
from helpers import serving

RESULT = GenerationResult(
    Metadata.from_mapping({"seeds": [7, 8], "width": 5, "height": 3}), pixels=np.zeros((2, 3, 5, 3), np.uint8)
)
ONE = GenerationResult(Metadata.from_mapping({"seeds": [7], "width": 5, "height": 3}), pixels=RESULT.pixels[:1])  # type: ignore[index]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("height is 0; allowed: 32 to 2048", "--size: height is 0; allowed: 32 to 2048"),
        ("num_images is 9; allowed: 1 to 8", "-n is 9; allowed: 1 to 8"),
        ("num_inference_steps is 500; allowed", "--steps is 500; allowed"),
        ("guidance_scale is 99", "--guidance is 99"),
        ("negative_prompt is 'x'", "--negative-prompt is 'x'"),
        ("image 2 of 3 is empty", "--image 2 of 3 is empty"),
        ("request_id is ''", "--request-id is ''"),
        ("prompt is empty", "prompt is empty"),
        ("no server answers", "no server answers"),
        ("", ""),
    ],
)
def test_errors_name_the_flag(message: str, shown: str) -> None:
    assert flag_message(message) == shown


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--wait"], [f"--wait={WAIT_SECONDS}"]),
        (["--wait", "30", "x"], ["--wait", "30", "x"]),
        (["--wait", "0.5"], ["--wait", "0.5"]),
        (["--wait", "a fox"], [f"--wait={WAIT_SECONDS}", "a fox"]),
        (["--wait", "--json"], [f"--wait={WAIT_SECONDS}", "--json"]),
        (["--wait=3"], ["--wait=3"]),
        (["--wait", "--", "--wait"], [f"--wait={WAIT_SECONDS}", "--", "--wait"]),
    ],
)
def test_the_seconds_of_wait_may_be_omitted(given: list[str], expected: list[str]) -> None:
    assert with_wait_seconds(given) == expected


class TestOutputFiles:
    def test_the_default_name_is_numbered_instead_of_overwritten(self) -> None:
        saved = [OutputFiles(Output(), {}).save(ONE) for _ in range(3)]
        assert [str(file) for (file,) in saved] == ["output_5x3.png", "output_5x3-2.png", "output_5x3-3.png"]
        several = [OutputFiles(Output(), {}).save(RESULT) for _ in range(2)]
        assert [[str(file) for file in files] for files in several] == [
            ["output_5x3_0.png", "output_5x3_1.png"],
            ["output_5x3-2_0.png", "output_5x3-2_1.png"],
        ]

    def test_a_given_name_is_overwritten_unless_that_is_refused(self) -> None:
        for _ in range(2):
            assert OutputFiles(Output("a.png"), {}).save(ONE) == [Path("a.png")]
        with pytest.raises(
            BadArgumentError, match=r"--output: 'a\.png' exists, and --no-clobber does not overwrite it"
        ):
            OutputFiles(Output("a.png", no_clobber=True), {})
        OutputFiles(Output("b.png", no_clobber=True), {}).save(RESULT)
        with pytest.raises(BadArgumentError, match=r"'b_0\.png' exists"):
            OutputFiles(Output("b.png", no_clobber=True), {"num_images": 2})

    def test_a_name_that_is_known_afterwards_is_numbered(self) -> None:
        output = Output("{seed}.png", no_clobber=True)
        saved = [OutputFiles(output, {}).save(ONE) for _ in range(2)]
        assert saved == [[Path("7.png")], [Path("7-2.png")]]


class TestPromptsFile:
    @pytest.mark.parametrize(
        ("name", "content", "rows"),
        [
            ("a.txt", "a fox\r\n\n  “雪” \n", [("a fox", {}), ("  “雪” ", {})]),
            ("a.TXT", "\ufeffa", [("a", {})]),
            (
                "a.jsonl",
                '{"prompt": "a", "size": "64x32", "seed": 3}\n\n{"prompt": "b", "steps": 2, "top_p": null}\n',
                [("a", {"seed": 3, "width": 64, "height": 32}), ("b", {"num_inference_steps": 2})],
            ),
            (
                "a.csv",
                'prompt,guidance,seed,negative_prompt\n"a, b\nc",2.5,-1,7\nd,,,\n',
                [("a, b\nc", {"guidance_scale": 2.5, "seed": -1, "negative_prompt": "7"}), ("d", {})],
            ),
        ],
    )
    def test_rows(self, name: str, content: str, rows: list[Any]) -> None:
        Path(name).write_text(content, encoding="utf-8", newline="")
        assert [(row.prompt, dict(row.options)) for row in read_rows(Path(name))] == rows
        assert [row.number for row in read_rows(Path(name))] == list(range(1, len(rows) + 1))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.yaml", b"a", r"allowed: a file that ends in \.txt, \.jsonl, \.csv"),
            ("a.txt", b"\n \n", "has no prompt"),
            ("a.txt", b"\xff", "cannot be read"),
            ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 7}', "line 2 of 'a.jsonl': the prompt is missing"),
            ("a.jsonl", b"[1]", "line 1 of 'a.jsonl': the prompt is missing"),
            ("a.jsonl", b"{", "line 1 of 'a.jsonl': the prompt is missing"),
            ("a.jsonl", b'{"prompt": "a", "colour": 1}', "'colour' is not known; allowed: prompt, size, seed, .*steps"),
            ("a.csv", b"prompt,seed\na,many", "line 2 of 'a.csv': seed is 'many'; allowed: a number"),
            ("a.csv", b"prompt,size\na,64", "line 2 of 'a.csv': --size is '64'"),
            ("a.csv", b"prompt\na,b\n", "line 2 of 'a.csv': "),
            ("a.csv", b'prompt\n"a', "line 1: unexpected end of data"),
            ("a.csv", b"words\na", "the prompt is missing"),
        ],
    )
    def test_a_malformed_file_is_refused_by_its_line(self, name: str, content: bytes, message: str) -> None:
        Path(name).write_bytes(content)
        with pytest.raises(BadArgumentError, match=f"^--prompts.*{message}"):
            read_rows(Path(name))

    def test_a_missing_file_is_refused(self) -> None:
        with pytest.raises(BadArgumentError, match=r"'none\.txt', which cannot be read: No such file"):
            read_rows(Path("none.txt"))


class TestManifest:
    ROWS = (Row(1, "a", {}), Row(2, "b", {"seed": 3}), Row(3, "c", {}))

    def test_resuming_skips_the_rows_whose_images_are_there(self) -> None:
        manifest = Manifest.at("out", Path("p.txt"), {"num_inference_steps": 2, "images": [b"source"]})
        assert manifest.begin(self.ROWS, resume=False) == set()
        for row in self.ROWS[:2]:
            manifest.add(row, ONE)
        manifest.fail(self.ROWS[2], RefusedError("no"))
        assert self.resumed() == {1, 2}
        Path("out/0001.png").unlink()
        assert self.resumed() == {2}
        assert self.resumed(num_inference_steps=3) == set()
        assert self.resumed(images=[b"another"]) == set()

    def resumed(self, **changed: Any) -> set[int]:
        options = {"num_inference_steps": 2, "images": [b"source"], **changed}
        return Manifest.at("out", Path("p.txt"), options).begin(self.ROWS, resume=True)

    def test_a_line_that_was_cut_off_is_not_counted(self) -> None:
        Manifest.at("out", Path("p.txt"), {}).begin(self.ROWS, resume=False)
        Path("out/manifest.jsonl").write_text('{"row": 1}\n[]\n7\n{"row": 2, "prom')
        assert Manifest.at("out", Path("p.txt"), {}).begin(self.ROWS, resume=True) == set()

    def test_an_earlier_manifest_is_not_overwritten(self) -> None:
        manifest = Manifest.at(None, Path("p.txt"), {})
        manifest.begin(self.ROWS, resume=False)
        manifest.add(self.ROWS[0], ONE)
        with pytest.raises(BadArgumentError, match=r"'p/manifest\.jsonl' exists; allowed: --resume"):
            Manifest.at(None, Path("p.txt"), {}).begin(self.ROWS, resume=False)

    @pytest.mark.parametrize(("output", "message"), [("a.png", "a name with {row}"), ("file", "cannot be used")])
    def test_where_images_cannot_go_is_refused(self, output: str, message: str) -> None:
        Path("file").touch()
        with pytest.raises(BadArgumentError, match=message):
            Manifest.at(output, Path("p.txt"), {}).begin(self.ROWS, resume=False)

    def test_names_with_a_placeholder(self) -> None:
        manifest = Manifest.at("out/{row}_{seed}.webp", Path("p.txt"), {})
        manifest.begin(self.ROWS, resume=False)
        manifest.add(self.ROWS[1], RESULT)
        assert [path.name for _, path in manifest.images()] == ["0002_7.webp", "0002_8.webp"]
        assert manifest.request(self.ROWS[1]) == {"seed": 3, "output_format": "webp"}


def test_the_contact_sheet_has_every_image() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for index, colour in enumerate(colours):
        Image.new("RGB", (40, 20), colour).save(f"{index}.png")
    sheet = write_contact_sheet(Path("sheet.png"), [(f"雪 {index}", Path(f"{index}.png")) for index in range(3)])
    assert sheet is not None
    pixels = {colour for _, colour in Image.open(sheet).getcolors(1 << 20) or ()}
    assert pixels.issuperset(colours)
    assert write_contact_sheet(Path("none.png"), []) is None


class TestDiagnosis:
    @contextmanager
    def answering(self, answers: dict[str, str]) -> Iterator[int]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path in answers else 404)
                self.end_headers()
                self.wfile.write(answers.get(self.path, "").encode())

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, serving(server):
            yield server.server_address[1]

    def message(self, url: str) -> str:
        fault = diagnose(Endpoint.parse(url))
        assert fault is not None
        return fault.message

    def test_another_http_server(self) -> None:
        with self.answering({"/": "hello"}) as port:
            for scheme in ("http", "grpc"):
                assert "is not a GLM-Image server" in self.message(f"{scheme}://127.0.0.1:{port}")

    def test_a_port_of_metrics(self) -> None:
        with self.answering({"/metrics": "nv_x 1"}) as port:
            for scheme in ("http", "grpc"):
                assert "is a port of metrics" in self.message(f"{scheme}://127.0.0.1:{port}")

    def test_a_triton_server_without_the_model(self) -> None:
        with self.answering({"/v2": '{"extensions": []}', "/v2/health/ready": ""}) as port:
            assert "does not serve glm_image" in self.message(f"http://127.0.0.1:{port}")
            assert f"speaks HTTP, not gRPC; use --url http://127.0.0.1:{port}" in self.message(f"127.0.0.1:{port}")
        with self.answering({"/v2": '{"extensions": []}', "/v2/health/ready": "", "/v2/models/glm_image": ""}) as port:
            assert diagnose(Endpoint.parse(f"http://127.0.0.1:{port}")) is None

    def test_a_server_that_is_not_ready(self) -> None:
        with self.answering({"/v2": '{"extensions": []}'}) as port:
            done = CliRunner().invoke(app, ["status", "x", "--url", f"http://127.0.0.1:{port}"])
            assert done.exit_code == 3
            assert f"the server at 127.0.0.1:{port} is not ready: it is loading its models, or stopping" in done.stderr

    def test_a_server_that_is_loading(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        (tmp_path / "glm-image-serve-x").mkdir()
        file = tmp_path / "glm-image-serve-x" / "ports.json"
        file.write_text(json.dumps({"pid": os.getpid(), "ports": [1]}))
        assert self.message("127.0.0.1:1") == (
            "the server at 127.0.0.1:1 is loading its models; wait for it with --wait"
        )
        for content in ('{"pid": 4194304, "ports": [1]}', "{", "[]", '{"pid": "x"}'):
            file.write_text(content)
            assert self.message("127.0.0.1:1").startswith("no server answers at 127.0.0.1:1: Connection refused; start")
