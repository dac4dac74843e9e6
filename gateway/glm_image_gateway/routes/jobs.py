"""``/v1/images/jobs``: requests whose results are fetched later."""

from __future__ import annotations

import base64
import re
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glm_image_gateway.answers import json_response, slot
from glm_image_gateway.documentation import ERRORS, body_of
from glm_image_gateway.errors import ApiError, not_allowed
from glm_image_gateway.job_store import Job
from glm_image_gateway.keys import Caller
from glm_image_gateway.routes.images import file_url
from glm_image_gateway.schemas import JobAnswer, JobBody
from glm_image_gateway.services import Authenticated, Services, request_id_of, services_of

ACCEPTED: Final = 202
JOB_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")

router = APIRouter(prefix="/v1/images/jobs", tags=["jobs"], responses=ERRORS)


@router.post("", status_code=ACCEPTED, response_model=JobAnswer, openapi_extra=body_of(JobBody))
async def add(request: Request, caller: Authenticated) -> Response:
    """Adds a job."""
    return await _submit(request, caller, None)


@router.put("/{job_id}", status_code=ACCEPTED, response_model=JobAnswer, openapi_extra=body_of(JobBody))
async def put(request: Request, job_id: str, caller: Authenticated) -> Response:
    """Adds a job of an id; the same request again returns the same job."""
    if not JOB_ID.fullmatch(job_id):
        raise not_allowed("id", job_id, "1 to 128 letters, digits, ., _ and -")
    return await _submit(request, caller, job_id)


@router.get("/{job_id}", response_model=JobAnswer)
async def find(request: Request, job_id: str, caller: Authenticated) -> Response:
    """Returns a job's state, and its result once it is done."""
    services = services_of(request)
    return await _response(request, services, await services.jobs.find(caller.name, job_id), 200)


@router.delete("/{job_id}", response_model=JobAnswer)
async def cancel(request: Request, job_id: str, caller: Authenticated) -> Response:
    """Cancels a job if it has not ended, and returns its state."""
    services = services_of(request)
    return await _response(request, services, await services.jobs.cancel(caller.name, job_id), 200)


async def _submit(request: Request, caller: Caller, job_id: str | None) -> Response:
    services = services_of(request)
    job, is_new = await services.jobs.submit(await services.read(request), caller, job_id, request_id_of(request))
    return await _response(request, services, job, ACCEPTED if is_new else 200)


async def _response(request: Request, services: Services, job: Job, status: int) -> Response:
    answer: dict[str, Any] = {
        "id": job.id,
        "object": "image.job",
        "status": job.status,
        "created": int(job.created),
        "request_id": job.request_id,
    }
    progress = services.jobs.progress(job)
    if progress is not None and not job.has_ended:
        answer |= progress.state()
    if job.finished is not None:
        answer["finished"] = int(job.finished)
    if job.error is not None:
        answer["error"] = job.error
    files: list[bytes] = []
    if job.result is not None:
        answer["result"], files = await _result(request, services, job.result)
    return json_response(answer, files, status)


async def _result(
    request: Request, services: Services, stored: dict[str, Any]
) -> tuple[dict[str, Any] | None, list[bytes]]:
    """Returns a job's result with its images as URLs or, with the files, in the answer."""
    result = {name: value for name, value in stored.items() if name != "response_format"}
    names = [item["file"] for item in stored["data"]]
    if stored["response_format"] == "url":
        return {**result, "data": [{"url": file_url(request, services, name)} for name in names]}, []
    try:
        files = [base64.b64encode((await services.storage.read(name))[1]) for name in names]
    except ApiError:
        raise ApiError(410, "the job's result has expired", "result_expired") from None
    return {**result, "data": [{"b64_json": slot(index)} for index in range(len(files))]}, files
