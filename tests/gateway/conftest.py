from __future__ import annotations

from collections.abc import Iterator

import pytest

from glm_image.supervisor import TritonServer
from running_gateway import RunningGateway, running_gateway


@pytest.fixture(scope="session")
def gateway(triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """The gateway of all tests that need no settings of their own."""
    with running_gateway(f"grpc://{triton.grpc_url}", tmp_path_factory.mktemp("store")) as running:
        yield running
