"""Requests of 40 MB: refused within seconds, and no more kept than the largest of them takes."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bad_input.wire import (
    GENERATE,
    Case,
    Tensor,
    binary_send,
    grpc_send,
    http_send,
    json_body,
    json_input,
    numbers,
    strings,
    tensor,
    with_small,
)
from bench.soak import processes, resident_bytes
from glm_image.supervisor import TritonServer
from server.kserve import Values, grpc_infer

BYTES = 40_000_000
"""More than 32 MiB: the C library maps each such buffer on its own and returns it, so that growth is a leak."""

SECONDS = 60
"""The longest for one of them on a slow machine; work that grows with the square of the size takes hours."""

MOST_ROUNDS = 4

PICTURE: Values = {"prompt": "a fox", "height": 40, "width": 64, "num_inference_steps": 2, "seed": 3}
TOKENS = Tensor("prior_token_ids", "INT32", [1, BYTES // 4], bytes(BYTES))
GRID = tensor("prior_grid", "INT32", 1, 1)
TEXT = b"x" * BYTES
TOO_LONG = f"prompt is {BYTES} characters long; allowed: 1 to 8192 characters"
INVALID, BAD_REQUEST = ("INVALID_ARGUMENT",), ("400", "500")


def _large() -> dict[str, Case]:
    text = tensor("prompt", "BYTES", TEXT)
    height = Tensor("height", "INT32", [BYTES // 4], bytes(BYTES))
    files = Tensor("image", "BYTES", [BYTES // 4], bytes(BYTES))
    metadata = tensor("ar_metadata", "BYTES", b"[" * BYTES)
    one_token = Tensor("prior_token_ids", "INT32", [1, 1], numbers("INT32", 0))
    prompt = tensor("prompt", "BYTES", b"a fox")
    return {
        "prompt grpc": Case(grpc_send(with_small(text)), TOO_LONG, INVALID),
        "prompt http": Case(binary_send(with_small(text)), TOO_LONG, BAD_REQUEST),
        "prompt json": Case(
            http_send(json_body(json_input("prompt", "BYTES", [TEXT.decode()]))), TOO_LONG, BAD_REQUEST
        ),
        "prompt generate": Case(
            http_send(json.dumps({"prompt": TEXT.decode()}).encode(), GENERATE), TOO_LONG, BAD_REQUEST
        ),
        "quotes": Case(
            grpc_send(with_small(tensor("negative_prompt", "BYTES", b"'" * BYTES))), "negative_prompt is", INVALID
        ),
        "no text": Case(grpc_send(with_small(tensor("prompt", "BYTES", b"\xff" * BYTES))), "prompt is", INVALID),
        "format": Case(
            grpc_send(with_small(tensor("output_format", "BYTES", TEXT))), "output_format is x+...; allowed", INVALID
        ),
        "numbers": Case(grpc_send(with_small(height)), "input 'height'", INVALID),
        "files without a byte": Case(
            grpc_send(with_small(files)), f"image is {BYTES // 4} files; allowed: 1 to 4", INVALID
        ),
        "files without a byte, second stage": Case(
            grpc_send([prompt, one_token, GRID, files], "glm_dit"),
            f"image is {BYTES // 4} files; allowed: 1 to 4",
            INVALID,
        ),
        "string longer than the request": Case(
            grpc_send(with_small(Tensor("prompt", "BYTES", [1], struct.pack("<I", 2**31) + TEXT))), "'prompt'", INVALID
        ),
        "strings for one": Case(
            grpc_send(with_small(Tensor("prompt", "BYTES", [1], strings(b"abcd") * (BYTES // 8)))), "'prompt'", INVALID
        ),
        "tokens": Case(grpc_send([prompt, TOKENS, GRID], "glm_dit"), f"columns is {BYTES // 4}; allowed: 1", INVALID),
        "rows of tokens": Case(
            grpc_send([prompt, Tensor("prior_token_ids", "INT32", [BYTES // 4, 1], bytes(BYTES)), GRID], "glm_dit"),
            f"rows is {BYTES // 4}; allowed: 1 to 8",
            INVALID,
        ),
        "ar_metadata": Case(grpc_send([prompt, one_token, GRID, metadata], "glm_dit"), "ar_metadata is", INVALID),
        "source_grids": Case(
            grpc_send(
                [prompt, one_token, GRID, Tensor("source_grids", "INT32", [BYTES // 8, 2], bytes(BYTES))], "glm_dit"
            ),
            f"source_grids. number of rows is {BYTES // 8}; allowed: one for each image",
            INVALID,
        ),
        "not JSON": Case(http_send(TEXT), "JSON", BAD_REQUEST),
        "blanks": Case(http_send(b" " * BYTES), "JSON", BAD_REQUEST),
    }


@pytest.fixture(scope="module")
def large() -> dict[str, Case]:
    return _large()


@dataclass(frozen=True)
class Held:
    """The memory of a server: bytes of each process, and of each of its regions in /dev/shm."""

    resident: dict[str, int]
    shared: dict[str, int]

    @classmethod
    def by(cls, server: TritonServer) -> Held:
        return cls(
            {name: resident_bytes(pid) for name, pid in processes(server).items()},
            {path.name: path.stat().st_size for path in Path("/dev/shm").glob(f"{server.shm_prefix}*")},
        )

    def grown_since(self, before: Held) -> dict[str, int]:
        """Returns the processes that have grown by half a request or more, and by how much."""
        grown = {name: resident - before.resident[name] for name, resident in self.resident.items()}
        return {name: size for name, size in grown.items() if size >= BYTES / 2}


def send_all(server: TritonServer, large: dict[str, Case]) -> Held:
    for name, case in large.items():
        answer = case.send(server)
        assert answer.status in case.statuses, (name, answer)
        assert re.search(case.pattern, answer.message), (name, answer)
        assert answer.seconds < SECONDS, (name, answer)
    return Held.by(server)


def test_large_requests_are_refused_and_their_memory_is_returned(triton: TritonServer, large: dict[str, Case]) -> None:
    """After the first round, /dev/shm and the stages keep the size that one such request needs.

    An allocator may sometimes keep the pieces of one more request, which the next round reuses; a leak of a single one
    of these requests makes every round grow. Regions that earlier tests made larger keep their size.
    """
    image = grpc_infer(triton, PICTURE)["images"]
    pids = processes(triton)
    before = Held.by(triton)
    curve = [send_all(triton, large), send_all(triton, large)]
    while curve[-1].grown_since(curve[-2]) and len(curve) < MOST_ROUNDS:
        curve.append(send_all(triton, large))
    assert not curve[-1].grown_since(curve[-2]), curve
    assert processes(triton) == pids
    assert curve[-1].shared == curve[0].shared
    assert all(size < 2.5 * BYTES or size == before.shared[name] for name, size in curve[-1].shared.items())
    np.testing.assert_array_equal(grpc_infer(triton, PICTURE)["images"], image)
