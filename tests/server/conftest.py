"""The same engines without a server, as large as the served ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_image.pipeline import LocalPipeline


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint: Path) -> Iterator[LocalPipeline]:
    with LocalPipeline(tiny_checkpoint, "cpu") as engines:
        yield engines
