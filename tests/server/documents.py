"""README.md, docs/ and examples/: their blocks, tables and links, and the examples run against a server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from glm_image.supervisor import TritonServer

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY_ROOT / "docs"
EXAMPLES = REPOSITORY_ROOT / "examples"
DOCUMENTS = {
    path.relative_to(REPOSITORY_ROOT).as_posix(): path
    for path in (*sorted(REPOSITORY_ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")))
}
RUNNABLE = {"bash", "python", "javascript"}
EXAMPLE_SECONDS = 120

BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
GENERATED = re.compile(
    r"<!-- BEGIN GENERATED: (?P<name>[^\n]+) -->\n+(?P<text>.*?)\n+<!-- END GENERATED -->", re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document; ``mark`` is the comment on the line above it, "" without one."""

    mark: str
    language: str
    text: str

    @property
    def example(self) -> str:
        """The file that the block shows, relative to the repository; "" if it shows none."""
        return self.mark.removeprefix("example: ") if self.mark.startswith("example: ") else ""


def blocks_of(document: str) -> list[Block]:
    return [Block(found["mark"] or "", found["language"], found["text"]) for found in BLOCK.finditer(document)]


def marked_block(document: str, mark: str) -> str:
    (text,) = (block.text for block in blocks_of(document) if block.mark == mark)
    return text


def is_excerpt(block: str, file: str) -> bool:
    """Whether consecutive lines of a file, less their common indentation, are the block."""
    lines, wanted = file.splitlines(), dedent(block).strip("\n").splitlines()
    spans = ("\n".join(lines[start : start + len(wanted)]) for start in range(len(lines)))
    return any(dedent(span) == "\n".join(wanted) for span in spans)


def rows_of(lines: str) -> dict[str, list[str]]:
    """A Markdown table: the first cell of each row, without its backticks, and the other cells."""
    rows = (line.strip()[1:-1].split("|") for line in lines.strip().splitlines()[2:])
    return {first.strip(" `"): [cell.strip() for cell in cells] for first, *cells in rows}


def generated_table(document: str, name: str) -> dict[str, list[str]]:
    """The rows of the table between the markers of a generated block."""
    (text,) = (found["text"] for found in GENERATED.finditer(document) if found["name"] == name)
    return rows_of(text)


def table_after(document: str, header: str) -> dict[str, list[str]]:
    """The rows of the table whose header begins with ``| header |``."""
    return rows_of(f"| {header} |" + document.split(f"| {header} |")[1].split("\n\n", maxsplit=1)[0])


def run_example(
    name: str, triton: TritonServer, folder: Path, *, gateway_url: str = "", python: str = sys.executable
) -> str:
    """Runs a file of examples/ in ``folder``, with the server's ports in place of the default ones."""
    file = EXAMPLES / name
    text = file.read_text(encoding="utf-8")
    if "curl" in text and shutil.which("curl") is None:
        pytest.skip("this machine has no curl")
    text = text.replace("127.0.0.1:8000", triton.http_url).replace("127.0.0.1:8001", triton.grpc_url)
    text = text.replace("http://127.0.0.1:8080", gateway_url)
    command = ["bash", "-c", text] if file.suffix == ".sh" else [python, "-c", text]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=EXAMPLE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def links_of(document: str) -> Iterator[str]:
    """The targets of a document's links and images, fenced blocks left out."""
    yield from re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", document, flags=re.MULTILINE | re.DOTALL))


def anchor_of(heading: str) -> str:
    """The anchor that GitHub and mkdocs give a heading of letters, digits, spaces and simple punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def check_links(document: Path) -> None:
    """Every link of a document leads to a path of the repository, a heading of a page, or another site."""
    for target in links_of(document.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert file.is_relative_to(REPOSITORY_ROOT), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {anchor_of(text) for text in headings}, target
