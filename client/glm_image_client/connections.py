"""Opens a transport for an endpoint.

Each half of tritonclient is an optional part of it and slow to import, so only the one in use is imported.
"""

from __future__ import annotations

from glm_image_client.transport import Endpoint, Transport


def connect(endpoint: Endpoint) -> Transport:
    """Returns a blocking transport; it connects with the first call."""
    if endpoint.protocol == "http":
        from glm_image_client.http_transport import HttpTransport  # noqa: PLC0415

        return HttpTransport(endpoint)
    from glm_image_client.grpc_transport import GrpcTransport  # noqa: PLC0415

    return GrpcTransport(endpoint)


def connect_async(endpoint: Endpoint) -> Transport:
    """Returns a transport for asyncio; it connects with the first call."""
    if endpoint.protocol == "http":
        from glm_image_client.async_http_transport import AsyncHttpTransport  # noqa: PLC0415

        return AsyncHttpTransport(endpoint)
    from glm_image_client.async_grpc_transport import AsyncGrpcTransport  # noqa: PLC0415

    return AsyncGrpcTransport(endpoint)
