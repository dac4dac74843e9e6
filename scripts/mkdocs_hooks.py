"""Lets pages link to files outside docs/, as they do on GitHub: the documents become pages, other files are copied.

mkdocs calls ``on_files`` and ``on_page_markdown``; mkdocs.yml names this module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

from mkdocs.structure.files import File, Files

REPOSITORY_ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = REPOSITORY_ROOT / "docs"
DOCUMENTS: Final = {
    "README.md": "index.md",
    "SECURITY.md": "SECURITY.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
"""Documents at the top of the repository, and the pages they become."""

_LINK: Final = re.compile(r"(?P<text>\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the documents as pages, and every other file outside docs/ that a page links to."""
    for name, page in DOCUMENTS.items():
        files.append(File.generated(config, page, content=(REPOSITORY_ROOT / name).read_text(encoding="utf-8")))
    for path in sorted(set(_linked_files())):
        source = path.relative_to(REPOSITORY_ROOT).as_posix()
        files.append(File.generated(config, source, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrites a page's links from places in the repository to places in the site; what is not in it loses its link."""
    sources = {site: name for name, site in DOCUMENTS.items()}
    uri = page.file.src_uri
    source = REPOSITORY_ROOT / sources[uri] if uri in sources else DOCS / uri

    def rewrite(link: re.Match[str]) -> str:
        target = _resolve(source, link["target"])
        if target is None:
            return link[0]
        path, anchor = target
        if path.is_dir() or _is_hidden(path):
            return link["text"][1:-1]
        relative = os.path.relpath(_place(path), PurePosixPath("/", uri).parent)
        return f"{link['text']}({relative}{anchor})"

    return _LINK.sub(rewrite, markdown)


def _linked_files() -> Iterator[Path]:
    for document in (*(REPOSITORY_ROOT / name for name in DOCUMENTS), *DOCS.glob("*.md")):
        for link in _LINK.finditer(document.read_text(encoding="utf-8")):
            target = _resolve(document, link["target"])
            if target is None:
                continue
            path, _ = target
            if path.is_file() and not path.is_relative_to(DOCS) and path.name not in DOCUMENTS and not _is_hidden(path):
                yield path


def _resolve(document: Path, target: str) -> tuple[Path, str] | None:
    """The file that a link leads to and its anchor; None for other sites and for places in the same page."""
    path, hash_sign, anchor = target.partition("#")
    if "://" in path or not path:
        return None
    return (document.parent / path).resolve(), hash_sign + anchor


def _is_hidden(path: Path) -> bool:
    """Whether mkdocs would leave a file out of the site."""
    return any(part.startswith(".") for part in path.relative_to(REPOSITORY_ROOT).parts)


def _place(path: Path) -> str:
    """Where a file of the repository is in the site, as an absolute path of it."""
    if path.is_relative_to(DOCS):
        return f"/{path.relative_to(DOCS).as_posix()}"
    name = path.relative_to(REPOSITORY_ROOT).as_posix()
    return f"/{DOCUMENTS.get(name, name)}"
