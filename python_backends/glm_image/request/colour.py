"""Colours of source images: from the profile of the file to sRGB, which the model was trained on."""

from __future__ import annotations

import io
import logging
from typing import Final

import numpy as np
from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

MAX_PROFILE_BYTES: Final = 4 << 20
"""Real profiles have up to some 2 MB; a larger one is ignored."""

PROFILE_MODES: Final = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""The image mode of each colour space that a profile may describe."""

PROBE_LEVELS: Final = 9
SAME_COLOUR: Final = 1
"""A profile that changes no probe by more than this, of 255, is that of sRGB; rounding makes a difference of 1."""


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Returns an opaque image in mode RGB, converted to sRGB by its ICC profile with perceptual intent.

    A profile that is broken, describes other channels than the image has, or is that of sRGB is ignored: the image has
    the same values as without it.
    """
    if profile is not None and len(profile) <= MAX_PROFILE_BYTES:
        coloured = image if image.mode in PROFILE_MODES.values() else image.convert("RGB")
        try:
            transform = _transform(profile, coloured.mode)
            if transform is not None:
                return ImageCms.applyTransform(coloured, transform) or coloured
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            logger.info("the colour profile of a source image is ignored: %s", error)
    return image.convert("RGB")


def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if PROFILE_MODES.get(source.profile.xcolor_space.strip()) != mode:
        return None
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    probe = _probe(mode)
    changed = np.asarray(ImageCms.applyTransform(probe, transform), np.int16)
    is_srgb = mode != "CMYK" and np.abs(changed - np.asarray(probe.convert("RGB"), np.int16)).max() <= SAME_COLOUR
    return None if is_srgb else transform


def _probe(mode: str) -> Image.Image:
    """Returns an image of colours from the whole space."""
    levels = np.linspace(0, 255, PROBE_LEVELS).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    return Image.fromarray(cube).convert(mode)
