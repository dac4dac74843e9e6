"""The engines' metrics on the metrics port of a real server, and the page that explains them."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import tritonclient.grpc

from glm_image.ar.config import ArConfig
from glm_image.ar.metrics import AR_METRICS, AR_OUTCOMES
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.dit.metrics import DIT_METRICS, DIT_OUTCOMES
from glm_image.supervisor import TritonServer
from glm_image.telemetry.metrics import OUTCOMES as LATENCY_OUTCOMES
from glm_image.telemetry.metrics import REFUSALS, Kind, MetricSpec
from helpers import wait_until
from server.kserve import KServeError, Values, at_once, grpc_infer, grpc_start, metadata

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
COMMENT = re.compile(r"^# (?P<what>TYPE|HELP) (?P<name>\w+) (?P<text>.*)$")
SAMPLE = re.compile(r"^(?P<name>\w+)\{(?P<labels>.*)\} (?P<value>\S+)$")
LABELS = re.compile(r'(\w+)="([^"]*)"')
METRICS: dict[str, tuple[MetricSpec, ...]] = {"glm_ar": AR_METRICS, "glm_dit": DIT_METRICS}
OUTCOMES = {"glm_ar": AR_OUTCOMES, "glm_dit": DIT_OUTCOMES}
RESTARTS, LOST_LINES = "glm_image_restarts_total", "glm_image_request_log_lost_lines_total"
UNITS = {RESTARTS: "restarts", LOST_LINES: "lines"}
SETTLE_SECONDS = 60
SLOTS = 8
STEPS = 3
REQUEST: Values = {"prompt": "A fox reading 'NEWS'", "height": 64, "width": 64, "num_inference_steps": STEPS}


class Page:
    """The metrics at one moment."""

    def __init__(self, text: str) -> None:
        self.types: dict[str, str] = {}
        self.helps: dict[str, str] = {}
        self.samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for line in text.splitlines():
            if comment := COMMENT.match(line):
                (self.types if comment["what"] == "TYPE" else self.helps)[comment["name"]] = comment["text"]
            elif sample := SAMPLE.match(line):
                labels = dict(LABELS.findall(sample["labels"]))
                self.samples.setdefault(sample["name"], []).append((labels, float(sample["value"])))

    def __getitem__(self, name: str) -> float:
        """The one sample of an engine's metric."""
        ((_, value),) = self.samples[f"glm_image_{name}"]
        return value

    def load(self) -> tuple[float, float]:
        """Running and waiting sequences."""
        return self["ar_running_sequences"], self["ar_waiting_sequences"]


def page_when(server: TritonServer, expected: Callable[[Page], bool]) -> Page:
    """Waits until the page is as expected, since metrics follow responses with a delay; returns the last page."""
    pages: list[Page] = []

    def is_expected() -> bool:
        with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=SETTLE_SECONDS) as answer:
            pages.append(Page(answer.read().decode()))
        return expected(pages[-1])

    wait_until(is_expected, SETTLE_SECONDS)
    return pages[-1]


@pytest.fixture(scope="module")
def watched(bare_triton: TritonServer) -> TritonServer:
    """A server without earlier requests: their late counts would appear here."""
    return bare_triton


@pytest.fixture(scope="module")
def fresh(watched: TritonServer) -> Page:
    return page_when(watched, lambda page: page["dit_peak_memory_bytes"] > 0 and page["ar_kv_cache_bytes"] > 0)


def documented(mark: str) -> dict[str, list[str]]:
    """The rows of the table after a comment: the code in the first cell, and the other cells."""
    lines = DOCUMENT.split(f"<!-- {mark} -->\n")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.parametrize("model", METRICS)
def test_metrics_page_lists_exactly_the_documented_metrics(fresh: Page, model: str) -> None:
    rows = documented(model)
    assert rows == {m.name: [m.kind.value, rows[m.name][1], m.meaning] for m in METRICS[model]}
    assert all(value == 0 for metric in OUTCOMES[model].values() for _, value in fresh.samples[metric.name])
    prefix = model.replace("glm_", "glm_image_")
    assert {name: kind for name, kind in fresh.types.items() if name.startswith(prefix)} == {
        name: cells[0] for name, cells in rows.items()
    }
    for metric in METRICS[model]:
        assert fresh.helps[metric.name] == metric.meaning
        suffix = "_count" if metric.kind is Kind.HISTOGRAM else ""
        labels = {"model": model, "instance": "0"} | metric.labels
        assert labels in [found for found, _ in fresh.samples[metric.name + suffix]]
    refusals = [OUTCOMES[model][reason] for reason in REFUSALS]
    assert sum(len(fresh.samples.get(metric.name, ())) for metric in refusals) == len(REFUSALS) ** 2


@pytest.mark.parametrize(
    "metric", [*AR_METRICS, *DIT_METRICS], ids=lambda metric: "-".join((metric.name, *metric.labels.values()))
)
def test_metric_name_ends_with_its_unit(metric: MetricSpec) -> None:
    unit = {**documented("glm_ar"), **documented("glm_dit")}[metric.name][1]
    assert metric.name.endswith(f"_{unit}" + "_total" * (metric.kind is Kind.COUNTER))
    assert list(metric.bounds) == sorted(set(metric.bounds))
    assert bool(metric.bounds) == (metric.kind is Kind.HISTOGRAM)


def test_restarts_and_lost_lines_are_reported_by_both_models(fresh: Page) -> None:
    assert documented("both") == {name: ["counter", unit, fresh.helps[name]] for name, unit in UNITS.items()}
    for name in UNITS:
        assert fresh.types[name] == "counter"
        assert sorted(labels["model"] for labels, _ in fresh.samples[name]) == list(METRICS)
        assert {value for _, value in fresh.samples[name]} == {0}


def test_triton_reports_the_documented_metrics(fresh: Page) -> None:
    for name, cells in documented("Triton's").items():
        assert fresh.types[name] == cells[0]
        assert {"glm_ar", "glm_dit"} <= {labels["model"] for labels, _ in fresh.samples[name]}


def test_histograms_have_the_declared_bounds(fresh: Page) -> None:
    for metric in (*AR_METRICS, *DIT_METRICS):
        if metric.kind is Kind.HISTOGRAM:
            bounds = [
                float(labels["le"])
                for labels, _ in fresh.samples[f"{metric.name}_bucket"]
                if metric.labels.items() <= labels.items()
            ]
            assert bounds == [*metric.bounds, float("inf")]


def test_memory_is_reported_from_the_start(fresh: Page, tiny_checkpoint: Path) -> None:
    config = ArConfig.read(Checkpoint.open(tiny_checkpoint))
    positions = ArSettings().max_sequence_tokens
    fp32 = 4
    keys = config.layers * SLOTS * config.kv_heads * positions * config.head_dim * fp32
    assert fresh["ar_kv_cache_bytes"] == 2 * keys
    assert fresh["dit_peak_memory_bytes"] > sum(file.stat().st_size for file in tiny_checkpoint.rglob("*.safetensors"))


def durations(page: Page, name: str) -> dict[tuple[str, str | None], float]:
    """The samples of a latency histogram, by outcome and stage."""
    return {(labels["outcome"], labels.get("stage")): value for labels, value in page.samples[f"glm_image_{name}"]}


def test_counters_count_the_work_of_requests(watched: TritonServer, fresh: Page) -> None:
    started = time.monotonic()
    with pytest.raises(KServeError):
        grpc_infer(watched, {**REQUEST, "height": 0})
    requests = [{**REQUEST, "seed": 1}, {**REQUEST, "seed": 2, "num_images": 3, "output_format": "png"}]
    answers = [
        metadata(outputs) for outputs in at_once([partial(grpc_infer, watched, values) for values in requests]).outputs
    ]
    lengths = [answer["tokens"]["preview"] + answer["tokens"]["image"] for answer in answers]
    images, tokens = 4, lengths[0] + 3 * lengths[1]

    page = page_when(
        watched,
        lambda page: (
            page.load() == (0, 0)
            and (page["dit_images_total"], page["ar_tokens_total"]) == (images, tokens)
            and durations(page, "dit_stage_seconds_count")["ok", "encode"] == len(requests)  # recorded last
        ),
    )
    assert page["dit_images_total"] == images
    assert page["ar_tokens_total"] == tokens
    assert page["ar_prefill_seconds_count"] == images
    assert page["dit_step_seconds_count"] == images * STEPS
    assert page["dit_vae_seconds_count"] == images
    assert page["dit_encode_seconds_count"] == 3
    assert page["dit_cached_steps_total"] == 0
    assert page["ar_queue_seconds_count"] == page["dit_queue_seconds_count"] == len(requests)
    refused = {labels["reason"]: count for labels, count in page.samples["glm_image_ar_refused_requests_total"]}
    assert refused == {**dict.fromkeys(REFUSALS, 0), "invalid": 1}
    assert durations(page, "ar_request_seconds_count") == {
        **{(outcome, None): 0 for outcome in LATENCY_OUTCOMES},
        ("ok", None): len(requests),
        ("refused", None): 1,
    }
    assert durations(page, "dit_request_seconds_count")["ok", None] == len(requests)
    assert durations(page, "ar_stage_seconds_count")["ok", "decode"] == len(requests)
    assert durations(page, "dit_stage_seconds_count")["ok", "denoise"] == len(requests)
    assert durations(page, "dit_stage_seconds_count")["failed", "denoise"] == 0
    # From end to end: the time in the first stage is part of it.
    whole, first, denoise = (
        durations(page, name)["ok", stage]
        for name, stage in (
            ("dit_request_seconds_sum", None),
            ("ar_request_seconds_sum", None),
            ("dit_stage_seconds_sum", "denoise"),
        )
    )
    assert whole >= first + denoise > denoise > 0
    # Sequences decode together: at least the steps of one, at most those of all.
    steps = [answer["tokens"]["steps"] for answer in answers]
    assert max(map(max, steps)) <= page["ar_step_seconds_count"] <= sum(map(sum, steps))
    assert page["ar_accepted_tokens_count"] == sum(map(sum, steps))
    assert page["ar_accepted_tokens_sum"] == tokens - images
    for name, stage in (
        ("ar_prefill", "prefill"),
        ("dit_step", "denoise"),
        ("dit_vae", "vae"),
        ("dit_encode", "encode"),
    ):
        seconds = sum(answer["seconds"][stage] for answer in answers)
        assert page[f"{name}_seconds_sum"] == pytest.approx(seconds, rel=0.1, abs=0.05)
    assert 0 < page["ar_step_seconds_sum"] < time.monotonic() - started
    assert page["dit_peak_memory_bytes"] >= fresh["dit_peak_memory_bytes"]


def slots(page: Page) -> tuple[float, float, float]:
    """Running and waiting sequences, and the share of slots that are taken: set one after the other."""
    return *page.load(), page["ar_slot_occupancy_ratio"]


def test_load_is_reported_during_requests(watched: TritonServer) -> None:
    """Long requests, which are cancelled after the page has been read."""
    values: Values = {"prompt": "A fox", "height": 2048, "width": 2048, "num_images": SLOTS}
    with closing(tritonclient.grpc.InferenceServerClient(watched.grpc_url)) as client:
        calls = [grpc_start(client, values, "glm_ar") for _ in range(2)]
        page = page_when(watched, lambda page: slots(page) == (SLOTS, SLOTS, 1))
        assert slots(page) == (SLOTS, SLOTS, 1)
        for call in calls:
            call.cancel()
    page = page_when(watched, lambda page: slots(page) == (0, 0, 0))
    assert slots(page) == (0, 0, 0)
