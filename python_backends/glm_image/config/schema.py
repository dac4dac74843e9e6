"""Inputs and outputs of the models, each declared once."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from glm_image.request.parameters import (
    ArStreamParameters,
    DitStreamParameters,
    GenerationParameters,
    PreviewParameters,
    SharedParameters,
)
from glm_image.request.tensors import TensorSpec, request_fields

# Optional for Triton, `prompt` too: if an ensemble's required input is missing, Triton reports a deadlock. The stages
# report the missing prompt.
REQUEST_INPUTS: Final = tuple(declared.spec for declared in request_fields(GenerationParameters))
"""The inputs of ``glm_image`` and ``glm_ar``, which validates all of them."""

SHARED_INPUTS: Final = tuple(declared.spec for declared in request_fields(SharedParameters))
"""The inputs of ``glm_image`` that ``glm_dit`` takes as well."""

STREAM_INPUTS: Final = (*REQUEST_INPUTS, *(declared.spec for declared in request_fields(PreviewParameters)))

STAGE_TENSORS: Final = (
    TensorSpec(
        "prior_token_ids", "INT32", (-1, -1), help="[n, rows * columns], ids of the codebook before upsampling."
    ),
    TensorSpec("prior_grid", "INT32", (2,), help="[2], rows and columns; a token covers 32x32 pixels."),
    TensorSpec("source_token_ids", "INT32", (-1,), help="[s], tokens of the source images; [0] without any."),
    TensorSpec(
        "source_grids",
        "INT32",
        (-1, 2),
        help="[k, 2], rows and columns of each source image's grid; [0, 2] without any.",
    ),
    TensorSpec("resolved_seed", "INT64", help="[1], seed of the first image."),
    TensorSpec("resolved_size", "INT32", (2,), help="[2], requested height and width."),
    TensorSpec("deadline_ns", "INT64", help="[1], deadline on the server's monotonic clock; 0 = none."),
    TensorSpec("ar_metadata", "STRING", help="[1], JSON object: token counts and durations of the AR stage."),
)
"""The outputs of ``glm_ar``: host tensors of plain types."""

DIT_INPUTS: Final = (
    *SHARED_INPUTS,
    *(replace(spec, optional=spec.name not in ("prior_token_ids", "prior_grid")) for spec in STAGE_TENSORS),
)
"""The inputs of ``glm_dit``, which clients may call with tokens alone."""

OUTPUTS: Final = (
    TensorSpec("images", "UINT8", (-1, -1, -1, 3), help="[n, height, width, 3] if raw, else [0, 0, 0, 3]."),
    TensorSpec("images_base64", "STRING", (-1,), help="[n], the encoded files as base64; [0] if raw."),
    TensorSpec("metadata", "STRING", help="[1], one JSON object."),
)
"""The outputs of ``glm_image`` and ``glm_dit``."""

STREAM_OUTPUTS: Final = (
    TensorSpec("event", "STRING", help="One JSON object."),
    *(replace(spec, dims=(-1,)) if spec.name == "metadata" else spec for spec in OUTPUTS),
)
"""The outputs of ``glm_image_stream``, with each response."""

AR_STREAM_INPUTS: Final = (*REQUEST_INPUTS, *(declared.spec for declared in request_fields(ArStreamParameters)))
AR_STREAM_OUTPUTS: Final = (STREAM_OUTPUTS[0], *STAGE_TENSORS)
"""The outputs of ``glm_ar_stream``: each response has an event, the last one the tensors too."""

DIT_STREAM_INPUTS: Final = (*DIT_INPUTS, *(declared.spec for declared in request_fields(DitStreamParameters)))

CONTROL_INPUTS: Final = (
    TensorSpec("request_id", "STRING", help="Id of the requests."),
    TensorSpec("action", "STRING", help="`cancel`, `status`, `defaults` or `describe`."),
)
CONTROL_OUTPUTS: Final = (TensorSpec("result", "STRING", help="One JSON object."),)
