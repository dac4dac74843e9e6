"""The gateway's parts that need no server: fairness, budgets, keys, settings, storage, answers."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_image_client import BadArgumentError, BusyError, RefusedError, RequestCancelled, RequestTimeout, ServerFailure
from glm_image_gateway.answers import json_bytes, slot
from glm_image_gateway.bodies import Read
from glm_image_gateway.database import Database
from glm_image_gateway.errors import ApiError, api_error
from glm_image_gateway.fair_queue import FairQueue, Window
from glm_image_gateway.generation import _parts, _preview_options, merged_metadata
from glm_image_gateway.keys import Caller, Keys, digest, new_key
from glm_image_gateway.metrics import Metrics
from glm_image_gateway.schemas import GenerationBody
from glm_image_gateway.settings import GatewaySettings, SettingsError, parse_settings
from glm_image_gateway.storage import Storage
from glm_image_gateway.translation import ImageRequest, edit, folded, generation
from glm_image_gateway.webhooks import checked
from glm_image_gateway.work import MinuteBudget, SpeedEstimate
from server.documents import REPOSITORY_ROOT, rows_of, table_after


def caller(name: str, **limits: Any) -> Caller:
    return Caller(name=name, sha256="0" * 64, **limits)


class TestFairQueue:
    def served(self, queue: FairQueue, requests: list[tuple[Caller, float]]) -> list[str]:
        """Admits requests, then ends them one after the other; returns the order in which they began."""

        async def run() -> list[str]:
            tickets = [queue.admit(caller, seconds, seconds) for caller, seconds in requests]
            order: list[str] = []
            while len(order) < len(tickets):
                running = [ticket for ticket in tickets if ticket in queue._running]
                order += [ticket.caller.name for ticket in running if ticket.order not in seen]
                seen.update(ticket.order for ticket in running)
                running[0].release()
            return order

        seen: set[int] = set()
        return asyncio.run(run())

    def test_a_small_request_overtakes_the_large_ones_of_another_key(self) -> None:
        queue = FairQueue(Window(max_running=8, seconds=30, max_waiting=100))
        order = self.served(queue, [*[(caller("large"), 60.0)] * 8, (caller("small"), 4.0)])
        assert order == ["large", "large", "small", *["large"] * 6]

    def test_weights_are_shares(self) -> None:
        queue = FairQueue(Window(max_running=1, seconds=1, max_waiting=100))
        heavy, light = caller("heavy", weight=3.0), caller("light")
        order = self.served(queue, [*[(light, 1.0)] * 8, *[(heavy, 1.0)] * 24])
        for end in range(8, 32, 4):
            assert abs(order[:end].count("heavy") - 3 * end // 4) <= 1

    def test_one_key_is_served_in_order(self) -> None:
        queue = FairQueue(Window(max_running=2, seconds=10, max_waiting=100))
        assert self.served(queue, [(caller("a"), float(index + 1)) for index in range(6)]) == ["a"] * 6

    def test_without_a_window_all_run(self) -> None:
        async def run() -> None:
            queue = FairQueue(None)
            for _ in range(50):
                await queue.admit(caller("a"), 100.0, 1.0).wait()
            assert queue.running == 50

        asyncio.run(run())

    def test_limits(self) -> None:
        async def run() -> None:
            queue = FairQueue(Window(max_running=1, seconds=1, max_waiting=1))
            first = queue.admit(caller("a", max_in_flight=1), 10.0, 1.0)
            with pytest.raises(ApiError, match="1 requests in flight; allowed: 1") as refused:
                queue.admit(caller("a", max_in_flight=1), 10.0, 1.0)
            assert (refused.value.status, refused.value.retry_after) == (429, 10.0)
            second = queue.admit(caller("b"), 5.0, 1.0)
            with pytest.raises(ApiError, match="as many as --max-queue allows") as refused:
                queue.admit(caller("c"), 1.0, 1.0)
            assert (refused.value.code, refused.value.retry_after) == ("queue_full", 15.0)
            second.release()
            queue.admit(caller("c"), 1.0, 1.0)
            first.release()

        asyncio.run(run())

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 100), st.booleans()), max_size=40))
    def test_every_request_has_its_turn(self, requests: list[tuple[str, float, bool]]) -> None:
        async def run() -> None:
            queue = FairQueue(Window(max_running=3, seconds=20, max_waiting=100))
            tickets = []
            for name, seconds, leaves in requests:
                ticket = queue.admit(caller(name), seconds, seconds)
                if leaves:
                    ticket.release()
                else:
                    tickets.append(ticket)
            while any(not ticket.turn.done() for ticket in tickets):
                running = [ticket for ticket in tickets if ticket in queue._running]
                assert running
                running[-1].release()
            for ticket in tickets:
                ticket.release()
            assert (queue.waiting, queue.running, queue.expected_wait()) == (0, 0, 0)

        asyncio.run(run())


def test_minute_budget() -> None:
    now = 0.0
    budget = MinuteBudget(60.0, lambda: now)
    assert budget.take(50) == 0
    assert budget.take(20) == pytest.approx(10)
    now = 10.0
    assert budget.take(20) == 0
    assert budget.take(600) == pytest.approx(60)
    now = 70.0
    assert budget.take(600) == 0  # from a full bucket, which it leaves in debt
    assert budget.take(1) == pytest.approx(541)


def test_speed_is_learned() -> None:
    speed = SpeedEstimate()
    speed.add(10, 20)
    assert speed.seconds(5) == pytest.approx(10)
    speed.add(10, 10)
    assert speed.seconds(10) == pytest.approx(17)
    speed.add(0, 10)
    speed.add(10, 0)
    assert speed.seconds(10) == pytest.approx(17)


class TestKeys:
    def test_the_file_holds_no_key(self, tmp_path: Path) -> None:
        file = tmp_path / "keys.json"
        key = new_key(file, "fox")
        assert key not in file.read_text()
        assert file.stat().st_mode & 0o777 == 0o600
        keys = Keys(file)
        assert keys.caller(f"Bearer {key}").name == "fox"
        assert keys.caller(f"bearer  {key} ").sha256 == digest(key)
        with pytest.raises(ApiError, match="not known"):
            keys.caller(f"Bearer {key}x")
        with pytest.raises(SettingsError, match="has a key named 'fox'"):
            new_key(file, "fox")

    @pytest.mark.parametrize(
        "content",
        ["", "[]", '{"keys": [{"name": "a"}]}', '{"keys": [{"name": "a", "sha256": "x"}]}', '{"keys": [], "x": 1}'],
    )
    def test_refused_files(self, tmp_path: Path, content: str) -> None:
        file = tmp_path / "keys.json"
        file.write_text(content)
        with pytest.raises(SettingsError, match="which is no file of keys"):
            Keys(file)
        with pytest.raises(SettingsError, match="cannot be read"):
            Keys(tmp_path / "missing")

    def test_without_a_file_everyone_is_admitted(self) -> None:
        assert Keys(None).caller(None).name == "anonymous"


class TestSettings:
    def test_flags_and_variables(self, tmp_path: Path) -> None:
        variables = {"GLM_IMAGE_GATEWAY_PORT": "1", "GLM_IMAGE_GATEWAY_STRICT": "1", "GLM_IMAGE_GATEWAY_API_KEYS": "k"}
        settings = parse_settings(["--port", "2", "--model-alias", "a, b", "--host", "0.0.0.0"], variables)
        assert (settings.port, settings.strict, settings.model_alias, settings.host) == (2, True, ("a", "b"), "0.0.0.0")
        assert parse_settings([], {}).model_alias == ("glm-image", "zai-org/GLM-Image", "gpt-image-1")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--host", "0.0.0.0"], "--host is '0.0.0.0'; allowed without --api-keys: 127.0.0.1"),
            (["--url", "http://x"], "--url is 'http://x'; allowed: grpc://HOST:PORT"),
            (["--port", "70000"], "--port is 70000; allowed: 0"),
            (["--port", "x"], "--port is 'x'; allowed: a number"),
            (["--store", "s3://bucket"], "--store is 's3://bucket', no folder; allowed: together with --state"),
            (["--file-hours", "nan"], "--file-hours is nan; allowed: above 0"),
            (["--model-alias", ","], "--model-alias is empty; allowed"),
            (["--public-url", "x"], "--public-url is 'x'; allowed: http"),
        ],
    )
    def test_refusals(self, arguments: list[str], message: str) -> None:
        with pytest.raises(SettingsError) as refused:
            parse_settings(arguments, {})
        assert str(refused.value).startswith(message)


class TestStorage:
    def test_expiry_and_size_in_a_store_that_is_no_folder(self, tmp_path: Path) -> None:
        settings = GatewaySettings(store="memory://results", state=tmp_path, store_bytes=250, file_hours=1)

        async def run() -> None:
            database = Database(tmp_path)
            storage = Storage(settings, database, Metrics())
            files = [(await storage.save(bytes(100), "png")).name for _ in range(3)]
            assert len({*files}) == 3
            with pytest.raises(ApiError, match="no such file"):
                await storage.read(files[0])  # the oldest, above the limit of size
            stored, content = await storage.read(files[2])
            assert (stored.media_type, content) == ("image/png", bytes(100))
            await database.run(lambda db: db.execute("UPDATE files SET expires = ?", (time.time() - 1,)))
            with pytest.raises(ApiError, match="no such file"):
                await storage.read(files[2])
            await storage.delete_old()
            assert storage._files.ls(storage._folder) == []
            await database.close()

        asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after", "should_retry"),
    [
        (RefusedError("height is 1; allowed: 32 to 2048"), 400, "invalid_value", None, None),
        (BadArgumentError("seed is 1.5; allowed: an integer"), 400, "invalid_value", None, None),
        (RequestTimeout("time ran out"), 504, "deadline_exceeded", None, False),
        (RequestCancelled("cancelled"), 499, "request_cancelled", None, False),
        (BusyError("out of memory on cuda:0 during denoise: 1 GB"), 503, "out_of_memory", None, False),
        (
            BusyError(
                "glm_ar has 64 requests waiting, as many as max_queue allows; "
                "one more would wait about 42 s; try again later"
            ),
            429, "queue_full", 42, None,
        ),
        (BusyError("glm_image_stream has 128 streams, as many as may be; try again later"), 429, "queue_full", 5, None),
        (BusyError("glm_ar is stopping; no new requests are taken"), 503, "server_unavailable", 5, None),
        (ServerFailure("broken", "INTERNAL"), 500, "server_error", None, None),
    ],
)  # fmt: skip
def test_errors_of_the_client(
    error: Any, status: int, code: str, retry_after: float | None, should_retry: bool | None
) -> None:
    found = api_error(error)
    assert (found.status, found.code, found.retry_after, found.should_retry) == (
        status, code, retry_after, should_retry,
    )  # fmt: skip
    assert found.body()["error"]["message"] == str(error)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("height is 1; allowed: 32 to 2048", "height"),
        ("num_images is 9; allowed: 1 to 8", "n"),
        ("image[1] is 3x3; allowed: x", "image"),
        ("prompt's number of tokens is 3; allowed: x", "prompt"),
        ("something else", None),
    ],
)
def test_the_field_of_a_refusal(message: str, param: str | None) -> None:
    assert api_error(RefusedError(message)).param == param


@given(st.lists(st.binary(max_size=40), max_size=4), st.text())
def test_images_are_inserted_as_they_are(files: list[bytes], text: str) -> None:
    encoded = [base64.b64encode(file) for file in files]
    value = {"text": text.replace("\0", ""), "data": [{"b64_json": slot(index)} for index in range(len(files))]}
    found = json.loads(json_bytes(value, encoded))
    assert [item["b64_json"].encode() for item in found["data"]] == encoded


@given(st.integers(-(2**63), 2**64 - 1))
def test_seeds_are_folded_modulo_two_to_the_64(seed: int) -> None:
    found = folded(seed)
    assert found is not None
    assert -(2**63) <= found < 2**63
    assert (found - seed) % 2**64 == 0


@pytest.mark.parametrize("size", [None, "auto"])
def test_the_size_auto_is_left_to_the_server(size: str | None) -> None:
    fields = {"prompt": "x", "image": b"\x89PNG", "size": size}
    _, request = edit(
        Read({name: value for name, value in fields.items() if value is not None}, frozenset()), strict=True
    )
    assert (request.options.get("width"), request.options.get("height")) == (None, None)


@pytest.mark.parametrize(
    ("model", "asked", "expected"),
    [
        (None, None, "b64_json"),
        ("gpt-image-1", None, "b64_json"),
        ("dall-e-3", None, "url"),
        ("dall-e-3", "b64_json", "b64_json"),
    ],
)
def test_the_default_form_of_results_is_that_of_the_models_name(model: str | None, asked: Any, expected: str) -> None:
    body = GenerationBody(prompt="x", model=model, response_format=asked)
    assert generation(body, strict=True).response_format == expected


def test_parts_of_a_large_request() -> None:
    (one,) = _parts(ImageRequest("x", {"seed": 3}, count=8))
    assert (one["num_images"], one["seed"]) == (8, 3)
    first, second = _parts(ImageRequest("x", {"seed": 2**63 - 4}, count=10))
    assert (first["num_images"], second["num_images"]) == (8, 2)
    assert second["seed"] == -(2**63) + 4
    first, second = _parts(ImageRequest("x", {}, count=9))
    assert second["seed"] == first["seed"] + 8


def test_intermediate_images_are_at_equal_distances() -> None:
    def options(partial_images: int, **values: Any) -> tuple[int, int]:
        found = _preview_options(
            ImageRequest("x", {"num_inference_steps": 48, **values}, partial_images=partial_images)
        )
        return found["preview_steps"], found["preview_every"]

    assert [options(count) for count in range(4)] == [(0, 0), (6, 0), (6, 24), (6, 16)]
    assert options(3, width=256, height=256) == (6, 12)  # without a preview


def test_metadata_of_two_parts() -> None:
    parts = [{"seeds": [1], "cached_steps": [0], "seconds": {"vae": 1.0}, "width": 5} for _ in range(2)]
    assert merged_metadata(parts) == {"seeds": [1, 1], "cached_steps": [0, 0], "seconds": {"vae": 2.0}, "width": 5}


@pytest.mark.parametrize(
    "url", ["http://other/", "ftp://hooks.example/", "http://hooks.example@other/", "http://hooks.example:1/", 5]
)
def test_webhooks_go_to_listed_hosts_alone(url: object) -> None:
    assert checked("https://hooks.example/a", ["hooks.example"]) == "https://hooks.example/a"
    with pytest.raises(ApiError, match="webhook is"):
        checked(url, ["hooks.example"])


class TestDocuments:
    def test_flags_have_the_documented_defaults(self) -> None:
        text = (REPOSITORY_ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
        rows = table_after(text, "flag of `gateway`")
        shown = {}
        for declared in fields(GatewaySettings):
            value = declared.default
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            shown[f"--{declared.name.replace('_', '-')}"] = {"None": "none", "": "none", "False": "off"}.get(
                text, f"`{text}`"
            )
        assert {name: cells[0] for name, cells in rows.items()} == shown

    def test_every_metric_is_documented(self) -> None:
        text = (REPOSITORY_ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
        rows = rows_of(text.split("<!-- gateway -->\n")[1].split("\n\n", maxsplit=1)[0])
        documented = {name.removesuffix("_total"): cells[0] for name, cells in rows.items()}
        assert documented == {family.name: family.type for family in Metrics().registry.collect()}
