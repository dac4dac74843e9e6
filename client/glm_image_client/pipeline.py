"""The client with the call of diffusers' ``GlmImagePipeline``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glm_image_client.calls import of_prompts
from glm_image_client.client import GlmImageClient, Prompts
from glm_image_client.core import run
from glm_image_client.errors import BadArgumentError, UnknownOptionError
from glm_image_client.options import GenerateOptions
from glm_image_client.result import GenerationResult
from glm_image_client.sources import SourceImage

ALLOWED: Final = (
    "prompt, image, height, width, num_inference_steps, guidance_scale, num_images_per_prompt, generator, output_type, "
    "return_dict, negative_prompt"
)


class Generator(Protocol):
    """A ``torch.Generator``, of which only the seed is used."""

    def initial_seed(self) -> int: ...


@dataclass(frozen=True, eq=False)
class PipelineOutput:
    """The output of a ``RemotePipeline``.

    Attributes:
        images: PIL images, RGB; with the output type ``np`` float32 [n, height, width, 3] from 0 to 1. The images of
            the first prompt come first.
    """

    images: list[Image.Image] | NDArray[np.float32]


class RemotePipeline:
    """Calls a server as diffusers' ``GlmImagePipeline`` is called: ``pipe(prompt, generator=...).images[0]``.

    Args:
        client: a client, or the URL of a server.
    """

    def __init__(self, client: GlmImageClient | str | None = None) -> None:
        self.client = client if isinstance(client, GlmImageClient) else GlmImageClient(client)

    def __call__(
        self,
        prompt: str | Prompts,
        image: SourceImage | Sequence[SourceImage] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | int | Sequence[Generator | int] | None = None,
        negative_prompt: str | None = None,
        output_type: Literal["pil", "np"] = "pil",
        return_dict: bool = True,
        **unsupported: Any,
    ) -> PipelineOutput | tuple[list[Image.Image] | NDArray[np.float32]]:
        """Generates images. An argument that is None has the server's default.

        Args:
            prompt: text to render, or a list of them.
            image: source image or images, for every prompt.
            height: pixels.
            width: pixels.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 and below disable it.
            num_images_per_prompt: images to generate for each prompt.
            generator: a ``torch.Generator`` or a seed. Image i of each prompt has the seed ``initial_seed() + i``. The
                generator is not advanced: the same call gives the same images. A list has one for each image.
            negative_prompt: its quoted text is the glyph condition of the unconditional branch.
            output_type: ``pil`` or ``np``.
            return_dict: False returns a tuple of the images alone.
            unsupported: other arguments of diffusers are refused.

        Raises:
            GlmImageClientError: as of ``GlmImageClient.generate``.
        """
        if unsupported:
            raise UnknownOptionError(f"unexpected keyword argument {min(unsupported)!r}; allowed: {ALLOWED}")
        if output_type not in ("pil", "np"):
            raise BadArgumentError(f"output_type is {output_type!r}; allowed: pil, np")
        options: GenerateOptions = {
            "images": image,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
        }
        if isinstance(generator, Sequence):
            results = self._with_seeds(prompt, num_images_per_prompt, [_seed(item) for item in generator], options)
        else:
            options |= {"num_images": num_images_per_prompt, "seed": _seed(generator)}
            several = self.client.generate(prompt, **options)
            results = several if isinstance(several, list) else [several]
        images = _images(results, output_type)
        return PipelineOutput(images) if return_dict else (images,)

    def _with_seeds(
        self, prompt: str | Prompts, count: int, seeds: list[int | None], options: GenerateOptions
    ) -> list[GenerationResult]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        repeated = [prompt for prompt in prompts for _ in range(count)]
        if len(seeds) != len(repeated):
            raise BadArgumentError(
                f"generator has {len(seeds)} elements; allowed: {len(repeated)}, one for each image, or a single one"
            )
        return run(self.client._core.answers(of_prompts(repeated, options, seeds)))


def _seed(generator: Generator | int | None) -> int | None:
    if generator is None or isinstance(generator, int):
        return generator
    if not hasattr(generator, "initial_seed"):
        raise BadArgumentError(f"generator is of type {type(generator).__name__}; allowed: a torch.Generator or a seed")
    return generator.initial_seed()


def _images(results: list[GenerationResult], output_type: str) -> list[Image.Image] | NDArray[np.float32]:
    if output_type == "pil":
        return [image for result in results for image in result.images]
    arrays = [array for result in results for array in result.arrays]
    return cast("NDArray[np.float32]", np.stack(arrays).astype(np.float32) / 255)
