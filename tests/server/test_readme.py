"""README.md: short, complete, and in step with the repository."""

from __future__ import annotations

import os
import re

from server.documents import REPOSITORY_ROOT, RUNNABLE, blocks_of, links_of

README = (REPOSITORY_ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 200
SECTIONS = [
    "Features",
    "Performance",
    "Quick start",
    "Serve a checkpoint",
    "Generate an image",
    "Streaming, cancellation, prior tokens",
    "Deploy",
    "Architecture",
    "Reproducibility",
    "Security",
    "Contributing",
    "License",
]


def test_readme_has_the_outline_and_at_most_200_lines() -> None:
    assert len(README.splitlines()) <= MAX_LINES
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == SECTIONS


def test_runnable_blocks_are_examples_or_scripts() -> None:
    """Examples are run by ``test_examples``; the scripts have tests of their own."""
    blocks = [block for block in blocks_of(README) if block.language in RUNNABLE]
    assert sum(bool(block.example) for block in blocks) >= 4
    lines = [line for block in blocks if not block.example for line in block.text.splitlines()]
    commands = {line.split()[0] for line in lines if line and not line.startswith("#")}
    assert commands == {"./scripts/quickstart", "./scripts/test", "./scripts/serve", "./scripts/download", "source"}
    for command in commands - {"source"}:
        assert os.access(REPOSITORY_ROOT / command, os.X_OK)


def test_every_page_is_reachable() -> None:
    """From the README, or from a page that it links to."""
    reached, queue = set(), [REPOSITORY_ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = (target.partition("#")[0] for target in links_of(page.read_text(encoding="utf-8")))
        queue += [
            (page.parent / target).resolve() for target in targets if target.endswith(".md") and "://" not in target
        ]
    assert set(REPOSITORY_ROOT.glob("docs/*.md")) <= reached


def test_figures_of_this_project_are_those_of_the_performance_page() -> None:
    page = (REPOSITORY_ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    figures = re.findall(r"\*\*([\d.]+)\*\*", README.split("## Performance")[1].split("\n## ")[0])
    assert len(figures) == 10
    assert [figure for figure in figures if f" {figure} " not in page] == []
