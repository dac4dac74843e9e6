from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PRELOADS = """
import sys
from glm_image.preload import COMPILER, preload

preload("glm_image.dit.engine")
print(COMPILER in sys.modules)

import torch

print(torch.compile(lambda tensor: tensor + 1, backend="eager")(torch.ones(1)).item())
print(COMPILER in sys.modules)
"""

WANTS_MORE = """
import sys
from glm_image.preload import preload

preload("wants_more")
print(sys.modules["wants_more"].mark_dynamic is sys.modules["torch._dynamo"].mark_dynamic)
"""


def said_by(program: str, folder: Path) -> list[str]:
    """What a Python of its own prints, in which nothing has been imported."""
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()


def test_an_engine_is_imported_without_the_compiler_which_works_when_it_is_wanted(tmp_path: Path) -> None:
    assert said_by(PRELOADS, tmp_path) == ["False", "2.0", "True"]


def test_who_wants_more_than_marks_gets_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "wants_more.py").write_text("from torch._dynamo import mark_dynamic")
    assert said_by(WANTS_MORE, tmp_path) == ["True"]
