from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WANTS_MORE = """
import torch
from glm_image.preload import preload

preload("wants_more")
import wants_more

print(wants_more.mark_dynamic is torch._dynamo.mark_dynamic)
print(torch.compile(wants_more.add_one, backend="eager")(torch.ones(1)).item())
"""


def test_who_wants_more_than_marks_gets_the_compiler_which_works(tmp_path: Path) -> None:
    lines = ["from torch._dynamo import mark_dynamic", "def add_one(tensor):", "    return tensor + 1"]
    (tmp_path / "wants_more.py").write_text("\n".join(lines))
    # A Python of its own, in which nothing has been imported.
    command = [sys.executable, "-c", WANTS_MORE]
    said = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said.split() == ["True", "2.0"]
