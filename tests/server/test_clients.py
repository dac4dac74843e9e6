"""Common clients: each gets the image that the engines generate without a server."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import Queue
from threading import Barrier
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio

from glm_image.pipeline import LocalPipeline
from glm_image.request.parameters import GenerationParameters
from glm_image.supervisor import TritonServer
from glm_image_client import AsyncGlmImageClient, GlmImageClient, RefusedError, RequestTimeout
from server.kserve import infer_inputs

REQUEST: dict[str, Any] = {
    "prompt": "A fox reading “NEWS” 雪",
    "height": 64,
    "width": 96,
    "num_inference_steps": 2,
    "guidance_scale": 1.5,
    "seed": 23,
    "output_format": "png",
}
PROTOCOLS = ("grpc", "http")
THREADS = 8
PROGRAM_SECONDS = 120
NODE_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "node_fetch.mjs"


@pytest.fixture(scope="module")
def png(pipeline: LocalPipeline) -> bytes:
    (file,) = pipeline.generate(GenerationParameters(**REQUEST)).encoded
    return file


def file_of(result: Any) -> bytes:
    return base64.b64decode(result.as_numpy("images_base64")[0])


def address(server: TritonServer, protocol: str) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


class TestTritonclient:
    @pytest.mark.parametrize("binary", [True, False])
    def test_http_with_binary_and_json_data_both_ways(self, triton: TritonServer, png: bytes, binary: bool) -> None:
        outputs = [tritonclient.http.InferRequestedOutput("images_base64", binary_data=binary)]
        inputs = infer_inputs(tritonclient.http, REQUEST, binary_data=binary)
        with closing(tritonclient.http.InferenceServerClient(triton.http_url)) as client:
            result = client.infer("glm_image", inputs, outputs=outputs)
        assert file_of(result) == png
        assert [output["name"] for output in result.get_response()["outputs"]] == ["images_base64"]

    def test_grpc_calls_a_callback(self, triton: TritonServer, png: bytes) -> None:
        with closing(tritonclient.grpc.InferenceServerClient(triton.grpc_url)) as client:
            answers: Queue[tuple[Any, Any]] = Queue()
            client.async_infer(
                "glm_image",
                infer_inputs(tritonclient.grpc, REQUEST),
                lambda result, error: answers.put((result, error)),
            )
            result, error = answers.get(timeout=PROGRAM_SECONDS)
        assert error is None
        assert file_of(result) == png

    @pytest.mark.parametrize("compression", ["gzip", "deflate"])
    def test_grpc_compression(self, triton: TritonServer, png: bytes, compression: str) -> None:
        with closing(tritonclient.grpc.InferenceServerClient(triton.grpc_url)) as client:
            inputs = infer_inputs(tritonclient.grpc, REQUEST)
            assert file_of(client.infer("glm_image", inputs, compression_algorithm=compression)) == png

    @pytest.mark.parametrize("compression", ["gzip", "deflate"])
    def test_http_compression(self, triton: TritonServer, png: bytes, compression: str) -> None:
        with closing(tritonclient.http.InferenceServerClient(triton.http_url)) as client:
            result = client.infer(
                "glm_image",
                infer_inputs(tritonclient.http, REQUEST),
                request_compression_algorithm=compression,
                response_compression_algorithm=compression,
            )
        assert file_of(result) == png

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_asyncio_with_concurrent_requests(self, triton: TritonServer, png: bytes, protocol: str) -> None:
        library = tritonclient.grpc.aio if protocol == "grpc" else tritonclient.http.aio

        async def send() -> list[bytes]:
            async with library.InferenceServerClient(address(triton, protocol)) as client:
                calls = [client.infer("glm_image", infer_inputs(library, REQUEST)) for _ in range(4)]
                return [file_of(result) for result in await asyncio.gather(*calls)]

        assert asyncio.run(send()) == [png] * 4

    def test_asyncio_with_json_data(self, triton: TritonServer, png: bytes) -> None:
        library = tritonclient.http.aio

        async def send() -> bytes:
            async with library.InferenceServerClient(triton.http_url) as client:
                outputs = [library.InferRequestedOutput("images_base64", binary_data=False)]
                inputs = infer_inputs(library, REQUEST, binary_data=False)
                return file_of(await client.infer("glm_image", inputs, outputs=outputs))

        assert asyncio.run(send()) == png

    def test_threads_share_one_grpc_client(self, triton: TritonServer, png: bytes) -> None:
        with closing(tritonclient.grpc.InferenceServerClient(triton.grpc_url)) as client:
            answers = at_once(lambda: client.infer("glm_image", infer_inputs(tritonclient.grpc, REQUEST)))
        assert [file_of(answer) for answer in answers] == [png] * THREADS


class TestOurClient:
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_threads_share_one_client(self, triton: TritonServer, png: bytes, protocol: str) -> None:
        with GlmImageClient(f"{protocol}://{address(triton, protocol)}", timeout=PROGRAM_SECONDS) as client:
            answers = at_once(lambda: client.generate(**REQUEST))
        assert [answer.encoded for answer in answers] == [[png]] * THREADS

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_asyncio_client_has_the_same_methods_and_results(
        self, triton: TritonServer, png: bytes, protocol: str
    ) -> None:
        async def send() -> None:
            url = f"{protocol}://{address(triton, protocol)}"
            async with AsyncGlmImageClient(url, timeout=PROGRAM_SECONDS) as client:
                assert await client.server_ready()
                assert (await client.model_metadata())["name"] == "glm_image"
                first = {name: REQUEST[name] for name in ("prompt", "height", "width", "seed")}
                prior, *answers = await asyncio.gather(
                    client.prior_tokens(**first), *(client.generate(**REQUEST) for _ in range(3))
                )
                painted = await client.paint(REQUEST["prompt"], prior, num_inference_steps=2, guidance_scale=1.5)
                assert [answer.encoded for answer in (painted, *answers)] == [[png]] * 4

        asyncio.run(send())
        methods = {name for name in vars(GlmImageClient) if not name.startswith("_")}
        assert methods == {name for name in vars(AsyncGlmImageClient) if not name.startswith("_")}

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_both_clients_raise_a_refusal_with_the_same_message(self, triton: TritonServer, protocol: str) -> None:
        url = f"{protocol}://{address(triton, protocol)}"

        async def send() -> None:
            async with AsyncGlmImageClient(url) as client:
                await client.generate("x", height=0)

        with pytest.raises(RefusedError, match=r"^height is 0; allowed: 32 to 2048$"):
            asyncio.run(send())
        with GlmImageClient(url) as client, pytest.raises(RefusedError, match=r"^height is 0; allowed: 32 to 2048$"):
            client.generate("x", height=0)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_both_clients_time_out(self, triton: TritonServer, protocol: str) -> None:
        """By this side's clock or the server's, whichever is first; the server keeps working."""
        url, long = f"{protocol}://{address(triton, protocol)}", {"width": 512, "height": 512, "timeout": 0.1}

        async def send() -> None:
            async with AsyncGlmImageClient(url) as client:
                await client.generate("x", **long)

        with pytest.raises(RequestTimeout):
            asyncio.run(send())
        with GlmImageClient(url) as client:
            with pytest.raises(RequestTimeout):
                client.generate("x", **long)
            assert client.server_ready()


class TestPrograms:
    def test_curl_with_json_from_a_file(self, triton: TritonServer, png: bytes, tmp_path: Path) -> None:
        body = tmp_path / "body.json"
        body.write_text(json.dumps(REQUEST))
        url = f"http://{triton.http_url}/v2/models/glm_image/generate"
        answer = json.loads(run("curl", "-sSf", "--data-binary", f"@{body}", url))
        assert base64.b64decode(answer["images_base64"]) == png

    def test_curl_gets_the_reason_of_a_refusal(self, triton: TritonServer) -> None:
        url = f"http://{triton.http_url}/v2/models/glm_image/generate"
        answer = run("curl", "-sS", "-w", " %{http_code}", "-d", '{"prompt": "x", "height": 0}', url)
        assert answer.endswith(" 400")
        assert "height is 0; allowed: 32 to 2048" in answer

    def test_node_without_a_library(self, triton: TritonServer, png: bytes, tmp_path: Path) -> None:
        program = str(NODE_EXAMPLE)
        output = run("node", program, f"http://{triton.http_url}", json.dumps(REQUEST), str(tmp_path / "node.png"))
        assert (tmp_path / "node.png").read_bytes() == png
        assert json.loads(output)["seeds"] == [REQUEST["seed"]]

    def test_node_gets_the_reason_of_a_refusal(self, triton: TritonServer, tmp_path: Path) -> None:
        program, request = str(NODE_EXAMPLE), json.dumps({**REQUEST, "height": 31})
        with pytest.raises(subprocess.CalledProcessError) as failed:
            run("node", program, f"http://{triton.http_url}", request, str(tmp_path / "none.png"))
        assert "height is 31; allowed: 32 to 2048" in failed.value.stderr

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_perf_analyzer(self, triton: TritonServer, tmp_path: Path, protocol: str) -> None:
        data, report = tmp_path / "data.json", tmp_path / "report.csv"
        data.write_text(json.dumps({"data": [{name: [value] for name, value in REQUEST.items()}]}))
        run(
            *(os.environ.get("PERF_ANALYZER") or "perf_analyzer", "-m", "glm_image"),
            *("-i", protocol, "-u", address(triton, protocol), "--input-data", str(data), "-f", str(report)),
            *("--concurrency-range", "2", "--request-count", "8"),
        )
        _, row = report.read_text().splitlines()[:2]
        assert float(row.split(",")[1]) > 0


def run(program: str, *arguments: str) -> str:
    """Runs a program and returns its output; skips the test if the program is not installed."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"this machine has no {program}")
    return subprocess.run(
        [found, *arguments], capture_output=True, text=True, check=True, timeout=PROGRAM_SECONDS
    ).stdout


def at_once(call: Callable[[], Any]) -> list[Any]:
    barrier = Barrier(THREADS)

    def call_together(_: int) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call_together, range(THREADS)))
