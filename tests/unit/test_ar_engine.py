from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm_image.ar.engine import ArEngine
from glm_image.ar.metrics import KV_CACHE_BYTES
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device, Memory
from glm_image.devices.cpu import CpuDevice
from glm_image.devices.open import open_device
from glm_image.errors import ConfigurationError, InvalidInputError, UnavailableError
from glm_image.lifecycle.context import RequestContext
from glm_image.request.geometry import Size
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, ResolvedRequest

WAIT_SECONDS = 60


def engine_of(folder: Path, device: Device | None = None, **settings: object) -> ArEngine:
    return ArEngine(Checkpoint.open(folder), device or open_device("cpu"), ArSettings(**settings))  # type: ignore[arg-type]


def resolved(engine: ArEngine, prompt: str) -> ResolvedRequest:
    return GenerationParameters(prompt=prompt, height=32, width=64, seed=1).resolve(Limits(), engine.sampling)


def test_prompt_may_fill_the_rest_of_a_slot(checkpoint_folder: Path) -> None:
    # Preview 11 x 22, image 1 x 2, and the 13 tokens around the prompt.
    engine = engine_of(checkpoint_folder, max_sequence_tokens=11 * 22 + 2 + 13 + 5, max_num_seqs=1)
    with pytest.raises(
        InvalidInputError, match=r"^prompt is 19 tokens long; allowed: at most 18 .*max_sequence_tokens"
    ):
        engine.submit(RequestContext(), resolved(engine, "x" * 6))
    result = engine.submit(RequestContext(), resolved(engine, "x" * 5)).result(WAIT_SECONDS)
    assert result.tokens == {"prompt": 18, "source": 0, "preview": 242, "image": 2}
    assert result.prior_token_ids.shape == (1, 2)
    assert result.prior_token_ids.dtype.name == "int32"
    engine.close()


def test_closed_engine_refuses_requests(checkpoint_folder: Path) -> None:
    engine = engine_of(checkpoint_folder, max_num_seqs=1, max_sequence_tokens=512)
    running = engine.submit(RequestContext(), resolved(engine, "x"))
    engine.close()
    assert running.done()
    with pytest.raises(UnavailableError, match="stopping"):
        engine.submit(RequestContext(), resolved(engine, "x"))


class SmallDevice(CpuDevice):
    def memory(self) -> Memory:
        return Memory(free=4_500_000, total=8_000_000)


def test_too_small_device_is_refused_before_loading(checkpoint_folder: Path) -> None:
    small = SmallDevice(torch.device("cpu"))
    with pytest.raises(ConfigurationError, match=r"memory_utilization 0\.9 allows.*lower max_num_seqs"):
        engine_of(checkpoint_folder, small, max_sequence_tokens=8192)
    engine_of(checkpoint_folder, small, max_sequence_tokens=256, max_num_seqs=1).close()
    with pytest.raises(ConfigurationError, match=r"memory_utilization 0\.01 allows"):
        engine_of(checkpoint_folder, small, max_sequence_tokens=256, max_num_seqs=1, memory_utilization=0.01)


class LazyDevice(CpuDevice):
    warmup_sizes = (Size(64, 96), Size(2048, 2048))


def test_warmup_does_not_change_tokens(checkpoint_folder: Path) -> None:
    records: list[str] = []
    lazy = LazyDevice(torch.device("cpu"))
    settings = ArSettings(max_num_seqs=2, max_sequence_tokens=640)
    warm = ArEngine(Checkpoint.open(checkpoint_folder), lazy, settings, lambda name, *_: records.append(name))
    assert records == [KV_CACHE_BYTES]
    cold = engine_of(checkpoint_folder, max_num_seqs=2, max_sequence_tokens=640)
    tokens = [engine.submit(RequestContext(), resolved(engine, "x")).result(WAIT_SECONDS) for engine in (warm, cold)]
    assert tokens[0].prior_token_ids.tolist() == tokens[1].prior_token_ids.tolist()
    warm.close()
    cold.close()


def test_bfloat16_on_the_cpu_is_deterministic(checkpoint_folder: Path) -> None:
    engine = engine_of(checkpoint_folder, dtype="bfloat16", max_num_seqs=2, max_sequence_tokens=512)
    first, again = (engine.submit(RequestContext(), resolved(engine, "x")).result(WAIT_SECONDS) for _ in range(2))
    assert first.prior_token_ids.tolist() == again.prior_token_ids.tolist()
    assert first.prior_token_ids.max() < engine.config.codebook_size
    engine.close()
