"""Webhooks of jobs: only to hosts that the operator has listed; redirects are not followed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

import httpx

from glm_image_gateway.errors import not_allowed
from glm_image_gateway.job_store import Job

logger = logging.getLogger(__name__)

PAUSES: Final = (1.0, 5.0, 25.0)
TIMEOUT_SECONDS: Final = 10.0


def checked(url: object, hosts: Collection[str]) -> str | None:
    """Returns the URL of a webhook.

    Raises:
        ApiError: it is no URL of a listed host.
    """
    if url is None:
        return None
    if not hosts:
        raise not_allowed("webhook", url, "none; this gateway has no --webhook-hosts", "webhook_not_allowed")
    allowed = f"http:// or https:// and one of the hosts {', '.join(hosts)}"
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    except ValueError:
        raise not_allowed("webhook", url, allowed, "webhook_not_allowed") from None
    if parts.scheme not in {"http", "https"} or parts.username is not None or host not in hosts:
        raise not_allowed("webhook", url, allowed, "webhook_not_allowed")
    return str(url)


async def post(job: Job) -> None:
    """Sends the state of a job that has ended, again after pauses if its receiver fails."""
    body = {"id": job.id, "object": "image.job", "status": job.status, "error": job.error}
    async with httpx.AsyncClient(follow_redirects=False, timeout=TIMEOUT_SECONDS, trust_env=False) as client:
        for pause in (*PAUSES, None):
            try:
                response = await client.post(job.webhook or "", json=body)
                if response.is_success:
                    return
                reason = f"status {response.status_code}"
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
            if pause is None:
                logger.error("the webhook of job %s was not accepted: %s", job.id, reason)
                return
            await asyncio.sleep(pause)
