"""The examples of README.md and docs/: fenced blocks, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from glm_image.supervisor import TritonServer

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
EXAMPLE_SECONDS = 120


@dataclass(frozen=True)
class Example:
    """A fenced block that writes a picture, as the comment before it says."""

    language: str
    text: str
    file: str
    size: tuple[int, int]

    def run(self, triton: TritonServer, folder: Path) -> Path:
        """Runs it in a folder and returns its file; only the default ports become those of the server."""
        text = self.text.replace("127.0.0.1:8000", triton.http_url).replace("127.0.0.1:8001", triton.grpc_url)
        shell = self.language == "bash"
        command = ["bash", "-euo", "pipefail", "-c", text] if shell else [sys.executable, "-c", text]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        ended = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=EXAMPLE_SECONDS,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return folder / self.file


def examples_of(document: str) -> dict[str, Example]:
    """The examples of a document's text, by the file that each writes, in their order."""
    found = {}
    for block in BLOCK.finditer(document):
        if mark := re.fullmatch(r"writes (\S+) (\d+)x(\d+)", block["mark"] or ""):
            found[mark[1]] = Example(block["language"], block["text"], mark[1], (int(mark[2]), int(mark[3])))
    return found


def check_links(document: Path) -> None:
    """Every link of a document leads to a file of the repository, a heading of one, or another site."""
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = document.parent / path if path else document
        assert file.is_file(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {one.lower().replace(" ", "-") for one in headings}, target
