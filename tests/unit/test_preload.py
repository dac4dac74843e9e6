from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PRELOADS = """
import sys
from glm_image.preload import COMPILER, preload

preload("glm_image.dit.engine")
print("glm_image.dit.engine" in sys.modules, COMPILER in sys.modules)
"""

WANTS_MORE = """
import torch
from glm_image.preload import preload

preload("wants_more")
import wants_more

print(wants_more.mark_dynamic is torch._dynamo.mark_dynamic)
print(torch.compile(wants_more.add_one, backend="eager")(torch.ones(1)).item())
"""


def said_by(program: str, folder: Path) -> list[str]:
    """What a Python of its own prints, in which nothing has been imported."""
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()


def test_an_engine_is_imported_without_the_compiler(tmp_path: Path) -> None:
    assert said_by(PRELOADS, tmp_path) == ["True", "False"]


def test_who_wants_more_than_marks_gets_the_compiler_which_works(tmp_path: Path) -> None:
    lines = ["from torch._dynamo import mark_dynamic", "def add_one(tensor):", "    return tensor + 1"]
    (tmp_path / "wants_more.py").write_text("\n".join(lines))
    assert said_by(WANTS_MORE, tmp_path) == ["True", "2.0"]
