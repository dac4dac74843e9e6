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
from glm_image.dit.metrics import IMAGE_CHECKS, PROMPT_CHECKS
from glm_image.dit.settings import DitSettings
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.metadata import ar_metadata, request_metadata
from glm_image.parallel.rank_group import WorkerConfig
from glm_image.provenance.settings import ProvenanceSettings
from glm_image.request.limits import Limits
from glm_image.request.parameters import ArMetadata, GenerationParameters, PaintRequest, ResolvedRequest
from glm_image.safety.checks import SafetyChecks
from glm_image.safety.settings import SafetySettings


@dataclass(frozen=True)
class GeneratedImages(DitResult):
    """The images of a request, and the server's ``metadata`` output."""

    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalSettings:
    """The settings of the pipeline.

    Attributes:
        limits: what a request may ask for.
        load_format: ``auto``, or ``dummy`` for random weights.
        provenance: what files say about their origin.
        safety: the checks of prompts and images.
    """

    ar: ArSettings = field(default_factory=ArSettings)
    dit: DitSettings = field(default_factory=lambda: DitSettings(parallel="auto", warmup_sizes=()))
    limits: Limits = field(default_factory=Limits)
    load_format: str = "auto"
    provenance: ProvenanceSettings = field(default_factory=ProvenanceSettings)
    safety: SafetySettings = field(default_factory=SafetySettings)


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
        first, *others = device.split(",")
        opened, workers = open_device(instance_device(first, 0)), WorkerConfig(tuple(others))
        self._safety = SafetyChecks(settings.safety, PROMPT_CHECKS, IMAGE_CHECKS)
        self.dit = DitEngine(
            self.checkpoint,
            opened,
            settings.dit,
            workers=workers,
            provenance=settings.provenance,
            safety=self._safety,
        )
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
        self._safety.check_prompt(context, parameters)
        prior = self.prior(resolved, context)
        reported = ar_metadata(context, prior.tokens, prior.steps, resolved.sampling, self.ar.token_settings)
        return self.paint(paint_request(resolved, prior, reported), context)

    def paint(self, request: PaintRequest, context: RequestContext | None = None) -> GeneratedImages:
        """Renders the images of prior tokens; see ``DitEngine.paint``."""
        context = context or RequestContext()
        result = self.dit.paint(context, request, self._limits).result()
        metadata = request_metadata(
            context, request, self.dit.model, self.dit.attention_backend, result.labels, result.blurred
        )
        return GeneratedImages(**vars(result), metadata=metadata)


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
