"""``mkdocs build --strict``: every link, anchor and docstring reference resolves, and the site needs no other site."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
EXTERNAL_ASSET = re.compile(
    r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?https?://[^>]*>|@import url\(https?:"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        logging.getLogger("mkdocs").setLevel(logging.WARNING)
        build(load_config(str(REPOSITORY_ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_every_document_is_a_page(site: Path) -> None:
    pages = {path.stem for path in (REPOSITORY_ROOT / "docs").glob("*.md")} | {"SECURITY", "CONTRIBUTING", "CHANGELOG"}
    assert [page for page in sorted(pages) if not (site / page / "index.html").is_file()] == []
    assert "GLM-Image on Triton" in (site / "index.html").read_text(encoding="utf-8")


def test_linked_files_of_the_repository_are_in_the_site(site: Path) -> None:
    for target in re.findall(r'href="\.\./(examples/[^"]+)"', (site / "clients" / "index.html").read_text("utf-8")):
        assert (site / target).read_bytes() == (REPOSITORY_ROOT / target).read_bytes()
    assert (site / "examples" / "client_sync.py").is_file()


def test_the_client_reference_has_signatures_and_descriptions(site: Path) -> None:
    api = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("GlmImageClient", "AsyncGlmImageClient", "Retries", "PriorTokens", "StreamEvent", "RefusedError"):
        assert f'id="glm_image_client.{name}"' in api, name


def test_pages_load_nothing_from_other_sites(site: Path) -> None:
    for page in (*site.rglob("*.html"), *site.rglob("*.css")):
        assert EXTERNAL_ASSET.search(page.read_text(encoding="utf-8")) is None, page.relative_to(site)
