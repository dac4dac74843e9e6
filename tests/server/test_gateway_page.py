"""The gateway's page in a real Chromium: generate, preview, cancel, edit, history, keys, a restart of the server."""

from __future__ import annotations

import base64
import io
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from glm_image.request.stages import Stage
from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from glm_image_gateway import connections
from glm_image_gateway.keys import new_key
from glm_image_gateway.routes.page import PAGE
from pictures import encoded, picture
from running_gateway import RunningGateway, running_gateway
from server.browser import chromium

WAIT_SECONDS = 120
SMALL = {"width": 64, "height": 64, "steps": 40, "seed": 7}
# Replaces the values that a test looks at later: intermediate images come and go.
RECORD = """
window.partials = []; window.fractions = []; window.times = [];
new MutationObserver(() => {
  const image = document.querySelector("img.partial");
  if (image && partials.at(-1) !== image.src) partials.push(image.src);
  const bar = document.getElementById("progress");
  if (bar.hasAttribute("value") && fractions.at(-1) !== bar.value) fractions.push(bar.value);
  times.push(document.getElementById("eta").textContent);
}).observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
"""
LATEST_RUN = """
const done = arguments[0];
const {allRuns} = await import("/history.js");
const [run] = await allRuns();
const files = [];
for (const image of run.images) {
  const bytes = new Uint8Array(await image.file.arrayBuffer());
  files.push(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}
const seeds = run.images.map((each) => each.seed);
done({options: run.options, sources: run.sources.length, seeds, files: files.map(btoa)});
"""
# The contrast of each visible text to what is behind it.
LOW_CONTRAST = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = (color) => {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = channels(color).map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const color = getComputedStyle(each).backgroundColor;
    if ((channels(color)[3] ?? 1) === 1) return color;
  }
  return "rgb(255, 255, 255)";
};
return [...document.body.querySelectorAll("*")]
  .filter((element) => element.checkVisibility() && !element.disabled)
  .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
  .map((element) => {
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), element.outerHTML];
  })
  .filter(([contrast]) => contrast < 4.5);
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def gateway(driver: Any, triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(f"grpc://{triton.grpc_url}", tmp_path_factory.mktemp("store")) as running:
        yield running


class Page:
    """What a user does on the page and sees there."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self.state == "ready")

    def __getitem__(self, element_id: str) -> Any:
        return self.driver.find_element("id", element_id)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def wait(self, condition: Callable[[], Any]) -> None:
        until = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < until, self["form"].get_property("outerText") + self["error"].text
            time.sleep(0.02)

    @property
    def state(self) -> str:
        return str(self["state"].get_attribute("data-state"))

    def fill(self, **values: Any) -> None:
        for element_id, value in values.items():
            self[element_id].clear()
            self[element_id].send_keys(str(value))

    def press(self, key: str) -> None:
        self.driver.switch_to.active_element.send_keys(key)

    def generate(self) -> dict[str, Any]:
        """Starts a request and returns the run that the history then has."""
        before = len(self.all("#history-list li"))
        self["generate"].click()
        self.wait(lambda: len(self.all("#history-list li")) > before)
        return self.latest()

    def latest(self) -> dict[str, Any]:
        run: dict[str, Any] = self.driver.execute_async_script(
            f"(async (...arguments) => {{{LATEST_RUN}}})(...arguments)"
        )
        return run

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)


@pytest.fixture
def page(driver: Any, gateway: RunningGateway) -> Page:
    return Page(driver, gateway.url)


def test_generates_and_shows_intermediate_images_and_progress(
    page: Page, gateway: RunningGateway, triton: TritonServer
) -> None:
    with GlmImageClient(triton.grpc_url) as client:
        defaults = client.defaults()
    shown = {name: float(page[name].get_property("value")) for name in ("width", "height", "steps", "guidance")}
    assert list(shown.values()) == list(defaults.values())
    page.fill(**SMALL, count=2)
    page.script(RECORD)
    page["prompt"].send_keys("A red fox")
    page["prompt"].send_keys("\ue009\ue007")  # Control and Enter
    page.wait(lambda: len(page.all("figure")) == 2)
    page.wait(lambda: page.all("#history-list li"))
    assert page.script("return partials.length") >= 1
    assert all(url.startswith("data:image/png;base64,") for url in page.script("return partials"))
    run = page.latest()
    assert run["seeds"] == ["7", "8"]
    body = {"prompt": "A red fox", "size": "64x64", "num_inference_steps": 40, "seed": 7, "n": 2}
    answer = gateway.post("/v1/images/generations", body).json()
    assert run["files"] == [item["b64_json"] for item in answer["data"]]
    assert page.driver.switch_to.active_element.get_attribute("id") == "prompt"
    assert "64 × 64 · 40 steps · guidance" in page.all(".facts")[0].text


def test_progress_has_the_servers_estimate(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HOLD_SECONDS", 0)
    page.script(RECORD)
    page.fill(prompt="A red fox", width=256, height=256, steps=200)
    page["generate"].click()
    page.wait(lambda: any("left" in text for text in page.script("return times")))
    fractions = page.script("return fractions")
    assert fractions
    assert all(0 <= fraction <= 1 for fraction in fractions)
    page.press("\ue00c")  # Escape
    page.wait(lambda: not page["running"].is_displayed())


def test_escape_cancels_the_request_on_the_server(page: Page, triton: TritonServer) -> None:
    page.fill(prompt="A red fox", width=512, height=512, steps=200)
    page.script(
        "const send = window.fetch;"
        "window.fetch = (url, options) => (window.sentId ??= options?.headers?.['x-request-id'], send(url, options))"
    )
    page["generate"].click()
    page.wait(lambda: any(word in page["stage"].text for word in ("Composing", "Rendering")))
    assert page.driver.switch_to.active_element.get_attribute("id") == "cancel"
    page.press("\ue00c")  # Escape
    page.wait(lambda: not page["running"].is_displayed())
    assert page["live"].get_property("textContent") == "Cancelled."
    assert not page["error"].is_displayed()
    request_id = page.script("return window.sentId")
    with GlmImageClient(triton.grpc_url) as client:
        page.wait(lambda: client.status(request_id)["state"] == "cancelled")


def test_edits_images_that_are_chosen_pasted_and_dropped(page: Page, gateway: RunningGateway, tmp_path: Path) -> None:
    (tmp_path / "source.png").write_bytes(encoded(picture(96, 64)))
    page["files"].send_keys(str(tmp_path / "source.png"))
    page.wait(lambda: len(page.all("#sources li")) == 1)
    for kind, field in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.script(
            """
            const [kind, field, base64] = arguments;
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));
            transfer.items.add(new File([bytes], "added.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true, [field]: transfer};
            const Type = kind === "paste" ? ClipboardEvent : DragEvent;
            document.body.dispatchEvent(new Type(kind, options));
            """,
            kind,
            field,
            base64.b64encode(encoded(picture(64, 64, seed=1))).decode(),
        )
    assert len(page.all("#sources li")) == 3
    for _ in range(2):
        page.all("#sources .remove")[-1].click()
    page.fill(prompt="Make it winter", steps=1, seed=3)
    run = page.generate()
    assert (run["sources"], run["options"]["size"]) == (1, "auto")
    assert gateway.metric("glm_image_gateway_requests_total", route="/v1/images/edits", status="200") == 1
    with Image.open(io.BytesIO(base64.b64decode(run["files"][0]))) as image:
        assert image.width * 64 == image.height * 96  # the source's proportions


def test_history_outlives_a_reload(page: Page, driver: Any, gateway: RunningGateway) -> None:
    page.fill(prompt="A blue star", width=64, height=96, steps=2, guidance=2.5, seed=2**64 - 5)
    done = page.generate()
    page = Page(driver, gateway.url)
    page.all("#history-list .show")[0].click()
    assert page.all("figure img")[0].get_attribute("alt") == "A blue star"
    page.all("figure .actions button")[1].click()  # again with this seed
    shown = {
        name: page[name].get_property("value") for name in ("prompt", "width", "height", "steps", "guidance", "seed")
    }
    assert list(shown.values()) == ["A blue star", "64", "96", "2", "2.5", str(2**64 - 5)]
    assert page.generate()["files"] == done["files"]
    entries = len(page.all("#history-list li"))
    page.all("#history-list .remove")[0].click()
    page.wait(lambda: len(page.all("#history-list li")) == entries - 1)
    with Image.open(io.BytesIO(base64.b64decode(done["files"][0]))) as image:
        assert image.size == (64, 96)


def test_refused_values_show_the_servers_sentence(page: Page, gateway: RunningGateway) -> None:
    page.fill(prompt="A red fox", **SMALL, guidance=99)
    page["generate"].click()
    page.wait(page["error"].is_displayed)
    body = {"prompt": "A red fox", "size": "64x64", "guidance_scale": 99}
    assert page["error-text"].text == gateway.post("/v1/images/generations", body).json()["error"]["message"]
    assert page["guidance"].get_attribute("aria-invalid") == "true"
    assert page.driver.switch_to.active_element.get_attribute("id") == "guidance"
    page["error-close"].click()
    assert not page["error"].is_displayed()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_readable_in_both_languages(page: Page, theme: str) -> None:
    page.all("#history-list .show")[0].click()
    if page.script("return document.documentElement.dataset.theme") != theme:
        page["theme"].click()
    languages = set()
    for _ in range(2):
        page["language"].click()
        language = page.script("return document.documentElement.lang")
        languages.add(language)
        assert page.script(LOW_CONTRAST) == []
        assert ("提示词" in page["form"].text) == (language == "zh")
        controls = page.all("button, input, select, textarea")
        assert [each.get_attribute("id") for each in controls if each.is_displayed() and not each.accessible_name] == []
    assert languages == {"en", "zh"}


def test_the_languages_have_the_same_texts() -> None:
    source = (PAGE / "i18n.js").read_text(encoding="utf-8")
    english, chinese = (set(re.findall(r"^    (\w+): ", part, re.M)) for part in source.split("  zh: {"))
    assert english == chinese
    others = "".join(path.read_text(encoding="utf-8") for path in PAGE.iterdir() if path.name != "i18n.js")
    used = set(re.findall(r"\w+", others + source.split("\n};\n")[1]))
    assert english <= used | {stage.value for stage in Stage}


def test_a_key_is_asked_for(driver: Any, triton: TritonServer, tmp_path: Path) -> None:
    key = new_key(tmp_path / "keys.json", "alice")
    with running_gateway(f"grpc://{triton.grpc_url}", tmp_path / "store", api_keys=tmp_path / "keys.json") as running:
        page = Page.__new__(Page)
        page.driver = driver
        driver.get(running.url)
        page.wait(lambda: page.state == "needsKey")
        page.fill(prompt="A red fox", **SMALL)
        for given, sentence in (("wrong", "the request has no API key"), (key, "the API key is not known")):
            page["generate"].click()
            page.wait(page["key-dialog"].is_displayed)
            assert page["key-hint"].text.startswith(sentence)
            page.fill(key=given)
            page["key"].send_keys("\ue007")  # Enter
            page.wait(lambda: page.state == "ready")
        assert page.generate()["seeds"] == ["7"]
        assert page.script("return [sessionStorage.length, localStorage.apiKey]") == [1, None]


def test_a_restart_of_the_server_and_of_the_gateway(driver: Any, triton: TritonServer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        away = f"grpc://127.0.0.1:{closed.getsockname()[1]}"
    there = f"grpc://{triton.grpc_url}"
    with running_gateway(there, tmp_path) as running:
        port = urlsplit(running.url).port or 0
        page = Page(driver, running.url)
        page.fill(prompt="A red fox", **SMALL)
        before = len(page.all("#history-list li"))
    page["generate"].click()
    page.wait(lambda: page.state == "unreachable")
    with running_gateway(away, tmp_path, port):
        page.wait(lambda: page.state == "notReady")
        assert "Waiting for the server" in page["stage"].text
        assert not page["error"].is_displayed()
    with running_gateway(there, tmp_path, port):
        page.wait(lambda: page.state == "ready")
        page.wait(lambda: len(page.all("#history-list li")) > before)  # sent again
        assert page.latest()["seeds"] == ["7"]
        driver.get("about:blank")  # its connections would delay the gateway's end


def test_parts_of_the_page(page: Page) -> None:
    """Events that come in pieces, the history's limits, and the remaining time."""
    result = page.driver.execute_async_script(
        """
        (async (done) => {
          const {EventSplitter} = await import("/api.js");
          const {beyondLimits} = await import("/history.js");
          const {Progress} = await import("/progress.js");
          const text = ': progress {"x":0}\\n\\n: keep-alive\\n\\nevent: a\\ndata: {"x":1}\\n\\ndata: {"x":2}\\n\\n';
          const split = [1, 2, 7, text.length].map((size) => {
            const events = new EventSplitter();
            const found = [];
            for (let at = 0; at < text.length; at += size) found.push(...events.add(text.slice(at, at + size)));
            return found.map((event) => event.x);
          });
          const runs = [5, 4, 3, 2].map((size) => ({images: [{file: {size}}], sources: []}));
          const over = [[2, 99], [9, 9], [9, 1]].map((limits) => beyondLimits(runs, ...limits).length);
          const progress = new Progress();
          const seen = [progress.at(1), progress.at(2)];
          const report = (stage, done, eta_seconds, now) => {
            progress.report({stage, done, total: 10, eta_seconds}, now);
            seen.push(progress.at(now));
          };
          report("decode", 0, null, 2);
          report("decode", 1, 18, 2);
          seen.push(progress.at(8));
          report("decode", 2, null, 10);
          report("denoise", 0, null, 20);
          report("denoise", 9, 1, 21);
          seen.push(progress.at(30));
          const etas = seen.map(({eta}) => eta);
          const fractions = seen.map(({fraction}) => fraction);
          const stages = seen.map(({stage}) => stage);
          done({split, over, etas, fractions, stages});
        })(arguments[0]);
        """
    )
    assert result["split"] == [[0, 1, 2]] * 4
    assert result["over"] == [2, 2, 3]
    # The server's latest estimate, counted down; a report without one keeps that of its stage.
    assert result["etas"] == [None, None, None, 18, 12, 10, None, 1, 0]
    assert result["stages"][:3] == ["sent", "gateway_queue", "decode"]
    assert result["fractions"] == [None, None, None, 0.1, 0.4, 0.5, None, 21 / 22, 1]


def test_no_script_or_style_was_blocked_and_none_came_from_elsewhere(page: Page) -> None:
    origins = page.script("return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)")
    assert set(origins) == {page.script("return location.origin")}
    messages = [entry["message"] for entry in page.driver.get_log("browser")]
    # Refused requests and those to a server that is away are logged by the browser itself.
    assert [text for text in messages if "Failed to load resource" not in text] == []
