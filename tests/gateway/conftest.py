from __future__ import annotations

from collections.abc import Iterator

import pytest

from glm_image.supervisor import TritonServer
from glm_image_gateway.settings import DEFAULT_ALIASES
from running_gateway import RunningGateway, running_gateway


@pytest.fixture(scope="session")
def gateway(triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """The gateway of all tests that need no settings of their own."""
    aliases = (*DEFAULT_ALIASES, "dall-e-2")
    store = tmp_path_factory.mktemp("store")
    with running_gateway(f"grpc://{triton.grpc_url}", store, model_alias=aliases) as running:
        yield running
