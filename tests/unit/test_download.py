"""scripts/download through the real huggingface_hub, from a hub on this machine that holds the tiny checkpoint."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from helpers import serving

PROGRAM = Path(__file__).resolve().parents[2] / "scripts" / "download.py"
PROGRAM_SECONDS = 120
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "zai-org/GLM-Image"


class Hub(ThreadingHTTPServer):
    """Answers the requests of huggingface_hub: what a repository holds, and its files, whole or from a byte on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.changed: dict[str, dict[str, Any]] = {}
        self.cut: set[str] = set()
        self.fetched: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def siblings(self) -> list[dict[str, Any]]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [{**described(path, self.folder), **self.changed.get(path.name, {})} for path in files]


def described(path: Path, folder: Path) -> dict[str, Any]:
    """A file as the hub lists it: large ones by SHA-256, small ones by their id in git."""
    content = path.read_bytes()
    entry = {"rfilename": str(path.relative_to(folder)), "size": len(content), "blobId": git_id(content)}
    if path.suffix == ".safetensors":
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
    return entry


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def do_HEAD(self) -> None:
        self._answer_file(with_body=False)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            tree = [
                {"type": "file", "path": file["rfilename"], "size": file["size"], "oid": file["blobId"]}
                for file in self.hub.siblings()
            ]
            self._answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            info = {"id": REPOSITORY, "sha": COMMIT, "siblings": self.hub.siblings()}
            self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/"):
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self._answer_file(with_body=True)

    def _answer_file(self, with_body: bool) -> None:
        name = self.path.partition(f"/resolve/{COMMIT}/")[2]
        content = (self.hub.folder / name).read_bytes()
        headers = {"ETag": f'"{git_id(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not with_body:
            self._answer(200, content, headers, with_body=False)
            return
        byte_range = self.headers.get("Range")
        self.hub.fetched.append((name, byte_range))
        first = int(byte_range.removeprefix("bytes=").rstrip("-")) if byte_range else 0
        if byte_range:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if name in self.hub.cut:
            self.hub.cut.remove(name)
            self._answer(200, content, headers, cut=len(content) // 2)
        else:
            self._answer(206 if byte_range else 200, content[first:], headers)

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


@pytest.fixture
def hub(checkpoint_folder: Path) -> Iterator[Hub]:
    with Hub(checkpoint_folder) as made, serving(made):
        yield made


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def run(url: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    addresses = {"HF_ENDPOINT": url, "MODELSCOPE_ENDPOINT": url}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(folder.parent / "hf")}
    return subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), *arguments],
        env={**os.environ, **addresses, **quiet},
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )


def test_a_checkpoint_is_downloaded_verified_and_reported(hub: Hub, checkpoint_folder: Path, tmp_path: Path) -> None:
    done = run(hub.url, tmp_path / "got", "--card", "24")
    assert done.returncode == 0, done.stderr
    for path in (path for path in checkpoint_folder.rglob("*") if path.is_file()):
        assert (tmp_path / "got" / path.relative_to(checkpoint_folder)).read_bytes() == path.read_bytes()
    assert f"{REPOSITORY} at {COMMIT}" in done.stderr
    assert "AutoencoderKL: 262,803 parameters, 1 of 1 files, float32" in done.stdout
    again = len(hub.fetched)
    assert run(hub.url, tmp_path / "got").returncode == 0
    assert len(hub.fetched) == again


def test_an_interrupted_download_resumes(hub: Hub, checkpoint_folder: Path, tmp_path: Path) -> None:
    hub.folder = Path(shutil.copytree(checkpoint_folder, tmp_path / "remote"))
    # The library keeps what it has by blocks of ten megabytes.
    (hub.folder / "README.md").write_bytes(bytes(range(256)) * 100_000)
    hub.cut = {"README.md"}
    done = run(hub.url, tmp_path / "got")
    if done.returncode:  # if the library gives up, the next run resumes
        done = run(hub.url, tmp_path / "got")
    assert done.returncode == 0, done.stderr
    first, second = [byte_range for name, byte_range in hub.fetched if name == "README.md"]
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").rstrip("-")) >= 10**7


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("config.json", {"blobId": git_id(b"other")}),
        ("model.safetensors", {"lfs": {"sha256": "0" * 64, "size": 1, "pointerSize": 130}}),
    ],
)
def test_a_file_with_other_content_is_removed(hub: Hub, tmp_path: Path, file: str, changed: dict[str, Any]) -> None:
    hub.changed = {file: changed}
    done = run(hub.url, tmp_path / "got")
    assert done.returncode == 1
    assert "removed files that differ from the hub's: " in done.stderr
    assert not list((tmp_path / "got" / "text_encoder").glob(file))
    assert (tmp_path / "got" / "model_index.json").is_file()
    hub.changed = {}
    assert run(hub.url, tmp_path / "got").returncode == 0


def test_a_full_disk_is_reported_before_downloading(hub: Hub, tmp_path: Path) -> None:
    hub.changed = {"model.safetensors": {"size": 10**16}}
    done = run(hub.url, tmp_path / "got")
    assert done.returncode == 1
    assert "GB more and 1 GB to spare, and its disk has" in done.stderr
    assert hub.fetched == []
    assert not (tmp_path / "got").exists()


def test_an_unknown_repository_is_reported(hub: Hub, tmp_path: Path) -> None:
    done = run(hub.url, tmp_path / "got", "--repository", "unknown/repository")
    assert done.returncode == 1
    assert "has no revision main of unknown/repository for you" in done.stderr


def test_a_path_out_of_the_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.changed = {"config.json": {"rfilename": "vae/../../evil.json"}}
    done = run(hub.url, tmp_path / "got")
    assert done.returncode == 1
    assert "'vae/../../evil.json', which would leave the folder" in done.stderr
    assert hub.fetched == []


@pytest.mark.parametrize(("name", "package"), [("huggingface", "huggingface_hub"), ("modelscope", "modelscope_hub")])
def test_a_missing_network_is_reported(closed_port: int, tmp_path: Path, name: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    done = run(f"http://127.0.0.1:{closed_port}", tmp_path / "got", "--from", name)
    assert (done.returncode, done.stdout) == (1, "")
    message = done.stderr.splitlines()[-1]
    assert "cannot be reached" in message
    assert "this needs a network" in message
    assert "Traceback" not in done.stderr


def test_a_missing_package_is_reported(tmp_path: Path) -> None:
    if importlib.util.find_spec("modelscope_hub") is not None:
        pytest.skip("modelscope_hub is installed")
    done = run("http://127.0.0.1:9", tmp_path / "got", "--from", "modelscope")
    assert done.returncode == 2
    assert "modelscope_hub is not installed: install this project with its extra 'download'" in done.stderr
