"""Both engines in one process, without Triton: for tests and offline generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_image.ar.engine import ArEngine, ArResult
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import instance_device, open_device
from glm_image.dit.engine import DitEngine, DitResult
from glm_image.dit.settings import DitSettings
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.metadata import ar_metadata, request_metadata
from glm_image.parallel.rank_group import WorkerConfig
from glm_image.request.limits import Limits
from glm_image.request.parameters import ArMetadata, GenerationParameters, PaintRequest, ResolvedRequest


@dataclass(frozen=True)
class GeneratedImages(DitResult):
    """The images of a request, and the server's ``metadata`` output."""

    metadata: dict[str, Any]


@dataclass(frozen=True)
class LocalSettings:
    """The settings of the pipeline.

    Attributes:
        limits: what a request may ask for.
        load_format: ``auto``, or ``dummy`` for random weights.
    """

    ar: ArSettings = field(default_factory=ArSettings)
    dit: DitSettings = field(default_factory=lambda: DitSettings(parallel="auto", warmup_sizes=()))
    limits: Limits = field(default_factory=Limits)
    load_format: str = "auto"


class LocalPipeline:
    """Generates images in this process.

    Args:
        checkpoint: a folder with ``model_index.json``.
        device: ``auto``, ``cpu``, ``cuda:0`` or ``npu:0``, for both stages. The devices of a comma-separated list
            share the DiT; the AR is on the first of them.
        settings: of the stages.

    Raises:
        CheckpointError: the folder is not a whole GLM-Image checkpoint.
        ConfigurationError: the device does not exist, or is too small.
    """

    def __init__(self, checkpoint: Path, device: str = "auto", settings: LocalSettings | None = None) -> None:
        settings = settings or LocalSettings()
        self._limits = settings.limits
        self.checkpoint = Checkpoint.open(Path(checkpoint), settings.load_format)
        self._model = {"name": self.checkpoint.name, "revision": self.checkpoint.revision}
        first, *others = device.split(",")
        opened, workers = open_device(instance_device(first, 0)), WorkerConfig(tuple(others))
        self.dit = DitEngine(self.checkpoint, opened, settings.dit, workers=workers)
        self.ar = ArEngine(self.checkpoint, opened, settings.ar)

    def __enter__(self) -> LocalPipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            self.ar.close()
        finally:
            self.dit.close()

    def resolve(self, parameters: GenerationParameters) -> ResolvedRequest:
        """Validates a request; see ``GenerationParameters.resolve``."""
        return parameters.resolve(self._limits, self.ar.sampling, self.ar.source_rule)

    def prior(self, request: ResolvedRequest, context: RequestContext | None = None) -> ArResult:
        return self.ar.submit(context or RequestContext(), request).result()

    def generate(self, parameters: GenerationParameters, context: RequestContext | None = None) -> GeneratedImages:
        """Generates the images of a request.

        Raises:
            InvalidInputError: an input is not allowed.
        """
        context = context or RequestContext()
        resolved = self.resolve(parameters)
        prior = self.prior(resolved, context)
        return self.paint(paint_request(resolved, prior, ar_metadata(context, prior.tokens, prior.steps)), context)

    def paint(self, request: PaintRequest, context: RequestContext | None = None) -> GeneratedImages:
        """Renders the images of prior tokens; see ``DitEngine.paint``."""
        context = context or RequestContext()
        result = self.dit.paint(context, request, self._limits).result()
        metadata = request_metadata(context, request, self._model, self.dit.attention_backend)
        return GeneratedImages(result.pixels, result.encoded, metadata)


def paint_request(resolved: ResolvedRequest, prior: ArResult, metadata: ArMetadata) -> PaintRequest:
    """Returns the request for the DiT, given the resolved request and the AR's tokens."""
    return PaintRequest(
        **resolved.parameters.shared(),
        prior_token_ids=prior.prior_token_ids,
        grid=resolved.target,
        requested=resolved.requested,
        seeds=resolved.seeds,
        source_token_ids=prior.source_token_ids,
        source_grids=prior.source_grids,
        ar_metadata=metadata,
    )
