"""How an image was made: the JSON record of a file, and the text that ComfyUI and A1111 style tools read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from glm_image import __version__
from glm_image.request.parameters import PaintRequest

SOFTWARE: Final = "glm-image-triton"
SAMPLER: Final = "FlowMatchEuler"


def image_record(
    request: PaintRequest,
    index: int,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    sources: Sequence[str],
    *,
    has_texts: bool,
) -> dict[str, Any]:
    """Returns the record of image ``index``: what a request for it alone has to say, and what made it.

    ``model`` has the checkpoint's name and revision, ``settings`` are those of the DiT, ``sources`` the SHA-256 of each
    source image. It has no time and no id, so that the same seed gives the same file.
    """
    texts = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "glyph_text": None if request.glyph_text is None else list(request.glyph_text),
    }
    reported = request.ar_metadata
    return {
        "software": SOFTWARE,
        "version": __version__,
        "model": dict(model),
        **(texts if has_texts else {}),
        "seed": request.seeds[index],
        "width": request.requested.width,
        "height": request.requested.height,
        "steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "sampling": dict(reported.get("sampling", {})),
        "sources": {"count": len(sources), "sha256": list(sources)},
        "settings": {"glm_ar": dict(reported.get("settings", {})), "glm_dit": dict(settings)},
    }


def parameters_text(record: Mapping[str, Any]) -> str:
    """Returns a record in the form of A1111's ``parameters``: texts, then one line of named values."""
    lines = [record["prompt"]] if "prompt" in record else []
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    values = {
        "Steps": record["steps"],
        "Sampler": SAMPLER,
        "CFG scale": f"{record['guidance_scale']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": record["model"].get("name", ""),
        "Version": f"{SOFTWARE} {record['version']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in values.items()))
    return "\n".join(lines)
