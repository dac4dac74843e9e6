"""docs/architecture.md, docs/glossary.md and CONTRIBUTING.md name only packages, files and classes that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY_ROOT / "python_backends" / "glm_image"
GATEWAY = REPOSITORY_ROOT / "gateway" / "glm_image_gateway"
PACKAGES = (PACKAGE, REPOSITORY_ROOT / "client" / "glm_image_client", GATEWAY)
DOCUMENTS = {name: REPOSITORY_ROOT / name for name in ("docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md")}
CODE = re.compile(r"`([^`\n]+)`")
FOREIGN = {"GlmImagePipeline"}
"""Classes of other projects."""


@cache
def definitions(path: Path) -> frozenset[str]:
    """Classes, functions, their members, and assigned names of a module, without importing it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return frozenset(names)


def codes_of(document: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return CODE.findall(text)


def exists(path: str) -> bool:
    """Whether a path is one of the repository or of the server's package, or a model's ``config.pbtxt``."""
    return any(
        (root / path).exists()
        for root in (REPOSITORY_ROOT, PACKAGE, GATEWAY, REPOSITORY_ROOT / "model_repository/glm_ar")
    )


def is_defined(dotted: str) -> bool:
    """Whether ``glm_image.a.b.Name`` is a package, a module, or a name that a module defines."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        for source in ("python_backends", "client", "gateway"):
            place = REPOSITORY_ROOT.joinpath(source, *parts[:count])
            module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            if module.is_file():
                return set(parts[count:]) <= definitions(module)
    return False


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    paths = [code for code in codes_of(DOCUMENTS[name]) if re.fullmatch(r"[\w./-]+(/|\.(py|md|pbtxt|toml))", code)]
    assert [path for path in paths if not exists(path)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_dotted_names_exist(name: str) -> None:
    dotted = [code for code in codes_of(DOCUMENTS[name]) if re.fullmatch(r"glm_image(_client|_gateway)?(\.\w+)+", code)]
    assert [code for code in dotted if not is_defined(code)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_classes_and_methods_exist(name: str) -> None:
    known = frozenset().union(*(definitions(path) for package in PACKAGES for path in package.rglob("*.py")))
    codes = [code for code in codes_of(DOCUMENTS[name]) if re.fullmatch(r"[A-Z]\w*[a-z]\w*(\.\w+)?(\(\))?", code)]
    missing = [code for code in codes if not set(code.removesuffix("()").split(".")) <= known | FOREIGN]
    assert missing == []


def test_every_package_has_its_line() -> None:
    """In the order of the import rules in pyproject.toml."""
    text = DOCUMENTS["docs/architecture.md"].read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \|", text.split("<!-- packages -->")[1].split("\n\n")[0], re.MULTILINE)
    layers = re.search(r"layers = \[(.*?)\]", (REPOSITORY_ROOT / "pyproject.toml").read_text("utf-8"), re.DOTALL)
    assert layers is not None
    assert shown == re.findall(r"\w+", layers[1])
    present = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert set(shown) == present - {"__init__", "__pycache__", "py"}
