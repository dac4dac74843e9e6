"""Files are encoded while the next image is denoised, in the served DiT as in the engine."""

from __future__ import annotations

import os
import select
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glm_image.supervisor import ServerSettings, TritonServer
from server.kserve import Values, files, grpc_infer

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
WAIT_SECONDS = 120
PRIOR: Values = {"prompt": "a", "prior_token_ids": [[1, 2, 3, 4]], "prior_grid": [2, 2], "num_inference_steps": 2}

# The stage's own model; it reports the end of denoising and the begin of encoding, and encodes only when released.
MODEL = """
from glm_image.devices.cpu import CpuDevice
from glm_image.dit.scheduler import Scheduler
from glm_image.request import images
from glm_image.serving.dit_backend import DitBackend as TritonPythonModel

FOLDER = {folder!r}
encode, denoise = images.encode, Scheduler.denoise


def held_encode(*given):
    open(FOLDER + "/encoding", "w").write("-")
    open(FOLDER + "/may_go_on").read()
    return encode(*given)


def reporting_denoise(*given):
    denoised = denoise(*given)
    open(FOLDER + "/denoised", "w").write("-")
    return denoised


images.encode, Scheduler.denoise = held_encode, reporting_denoise
CpuDevice.is_host = False  # requests are finished in a thread of their own, as on an accelerator
"""


class Signal:
    """The reading end of a named pipe, to which the model writes."""

    def __init__(self, path: Path) -> None:
        self._pipe = os.open(path, os.O_RDWR)  # a writer as well, so that it never ends

    def wait(self) -> None:
        ready, _, _ = select.select([self._pipe], [], [], WAIT_SECONDS)
        assert ready
        assert os.read(self._pipe, 1) == b"-"


@pytest.mark.full
def test_next_request_is_denoised_while_the_last_is_encoded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(REPOSITORY / "glm_dit", repository / "glm_dit")
    (repository / "glm_dit" / "1" / "model.py").write_text(MODEL.format(folder=str(tmp_path)))
    for name in ("encoding", "denoised", "may_go_on"):
        os.mkfifo(tmp_path / name)
    encoding, denoised = Signal(tmp_path / "encoding"), Signal(tmp_path / "denoised")
    with (
        TritonServer(ServerSettings(tiny_checkpoint, model_repository=repository, drain_seconds=5)) as server,
        ThreadPoolExecutor(2) as clients,
    ):
        first = clients.submit(grpc_infer, server, {**PRIOR, "output_format": "png"}, "glm_dit")
        denoised.wait()
        encoding.wait()
        second = clients.submit(grpc_infer, server, {**PRIOR, "output_format": "raw"}, "glm_dit")
        try:
            denoised.wait()
            assert not first.done()
        finally:
            with (tmp_path / "may_go_on").open("w"):
                pass  # its end is what the model waits for
        assert files(first.result(WAIT_SECONDS))[0].startswith(b"\x89PNG")
        assert second.result(WAIT_SECONDS)["images"].shape == (1, 64, 64, 3)
