"""The models as clients and operators see them: tensors and parameters, each declared once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from glm_image.ar.admission import ADMISSIONS
from glm_image.ar.graphs import GRAPH_MODES, WHY_NOT_PIECEWISE
from glm_image.dit.cache import SCM_MASK_POLICIES, SCM_POLICIES
from glm_image.errors import ConfigurationError
from glm_image.request.limits import Limits


@dataclass(frozen=True)
class TensorSpec:
    """An input or output.

    Attributes:
        name: its name.
        data_type: Triton's name of it, without ``TYPE_``; STRING is KServe's BYTES.
        dims: -1 = any.
        optional: an input that may be left out.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False


def _optional(name: str, data_type: str, dims: tuple[int, ...] = (1,)) -> TensorSpec:
    return TensorSpec(name, data_type, dims, optional=True)


# Optional to Triton alone, which for an ensemble tells of a deadlock when it is missing; the stages name it.
PROMPT: Final = _optional("prompt", "STRING")

REQUEST_INPUTS: Final = (
    PROMPT,
    _optional("image", "STRING", (-1,)),
    _optional("height", "INT32"),
    _optional("width", "INT32"),
    _optional("num_inference_steps", "INT32"),
    _optional("guidance_scale", "FP32"),
    _optional("seed", "INT64"),
    _optional("num_images", "INT32"),
    _optional("negative_prompt", "STRING"),
    _optional("temperature", "FP32"),
    _optional("top_p", "FP32"),
    _optional("top_k", "INT32"),
    _optional("output_format", "STRING"),
)
"""What clients of ``glm_image`` send; the first stage takes all of it, to validate it."""

PAINTING_INPUTS: Final = tuple(
    spec
    for spec in REQUEST_INPUTS
    if spec.name in {"prompt", "image", "num_inference_steps", "guidance_scale", "negative_prompt", "output_format"}
)
"""The part of a request that the second stage takes as it is."""

STAGE_TENSORS: Final = (
    TensorSpec("prior_token_ids", "INT32", (-1, -1)),
    TensorSpec("prior_grid", "INT32", (2,)),
    TensorSpec("source_token_ids", "INT32", (-1,)),
    TensorSpec("source_grids", "INT32", (-1, 2)),
    TensorSpec("resolved_seed", "INT64"),
    TensorSpec("resolved_size", "INT32", (2,)),
    TensorSpec("deadline_ns", "INT64"),
    TensorSpec("ar_metadata", "STRING"),
)
"""What the first stage hands to the second: host tensors of plain types."""

STAGE_INPUTS: Final = tuple(
    spec if spec.name in {"prior_token_ids", "prior_grid"} else _optional(spec.name, spec.data_type, spec.dims)
    for spec in STAGE_TENSORS
)
"""The same as inputs of the second stage, which can be called with tokens alone."""

OUTPUTS: Final = (
    TensorSpec("images", "UINT8", (-1, -1, -1, 3)),
    TensorSpec("images_base64", "STRING", (-1,)),
    TensorSpec("metadata", "STRING"),
)
"""What clients of ``glm_image`` get."""

STREAM_INPUTS: Final = (*REQUEST_INPUTS, _optional("preview_steps", "INT32"), _optional("preview_every", "INT32"))
"""What clients of ``glm_image_stream`` send."""

STREAM_OUTPUTS: Final = (
    TensorSpec("event", "STRING"),
    TensorSpec("images", "UINT8", (-1, -1, -1, 3)),
    TensorSpec("images_base64", "STRING", (-1,)),
    TensorSpec("metadata", "STRING", (-1,)),
)
"""What they get with each response."""

CONTROL_INPUTS: Final = (TensorSpec("request_id", "STRING"), TensorSpec("action", "STRING"))
"""What clients of ``glm_control`` send."""

CONTROL_OUTPUTS: Final = (TensorSpec("result", "STRING"),)
"""What they get."""


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of ``config.pbtxt``.

    Attributes:
        name: its name.
        default: what holds where it is left out, and what the checked-in files say.
        allowed: the only values, or () for free ones.
        declined: values that are known elsewhere, and why they are not allowed here.
    """

    name: str
    default: str
    allowed: tuple[str, ...] = ()
    declined: tuple[tuple[str, str], ...] = ()


STAGE_PARAMETERS: Final = (
    ParameterSpec("checkpoint", "${GLM_IMAGE_CHECKPOINT}"),
    ParameterSpec("devices", "auto"),
    ParameterSpec("dtype", "auto", ("auto", "float32", "bfloat16")),
    ParameterSpec("load_format", "auto", ("auto", "dummy")),
    ParameterSpec("memory_utilization", "0.9"),
    ParameterSpec("default_timeout_ms", "0"),
    ParameterSpec("max_timeout_ms", "0"),
    ParameterSpec("hang_seconds", "auto"),
)

AR_PARAMETERS: Final = (
    *STAGE_PARAMETERS,
    ParameterSpec("quantization", "none", ("none", "int8")),
    ParameterSpec("max_num_seqs", "8"),
    ParameterSpec("max_sequence_tokens", "8192"),
    ParameterSpec("max_queue", "64"),
    ParameterSpec("admission", "at_once", ADMISSIONS),
    ParameterSpec("graph_mode", "FULL_DECODE_ONLY", GRAPH_MODES, (("PIECEWISE", WHY_NOT_PIECEWISE),)),
    ParameterSpec("graph_capture_sizes", ""),
)

# Named as in cache-dit, with its defaults of GLM-Image's guide.
CACHE_PARAMETERS: Final = (
    ParameterSpec("cache_Fn_compute_blocks", "1"),
    ParameterSpec("cache_Bn_compute_blocks", "0"),
    ParameterSpec("cache_max_warmup_steps", "4"),
    ParameterSpec("cache_residual_diff_threshold", "0.24"),
    ParameterSpec("cache_max_continuous_cached_steps", "3"),
    ParameterSpec("cache_max_cached_steps", "-1"),
    ParameterSpec("cache_enable_taylorseer", "false", ("false", "true")),
    ParameterSpec("cache_taylorseer_order", "1"),
    ParameterSpec("cache_scm_steps_mask_policy", "none", SCM_MASK_POLICIES),
    ParameterSpec("cache_scm_steps_policy", "dynamic", SCM_POLICIES),
    ParameterSpec("cache_force_refresh_step_hint", "none"),
)

DIT_PARAMETERS: Final = (
    *STAGE_PARAMETERS,
    ParameterSpec("quantization", "none", ("none", "int8", "fp8")),
    ParameterSpec("cache", "none", ("none", "cache_dit")),
    *CACHE_PARAMETERS,
    ParameterSpec("parallel", "none"),
    ParameterSpec("warmup_sizes", "auto"),
    ParameterSpec("vae_tiling", "off", ("off", "on", "auto")),
)


def read_parameters(specs: tuple[ParameterSpec, ...], given: Mapping[str, str]) -> dict[str, str]:
    """Returns every declared parameter's value, given or default.

    Args:
        specs: the declared ones.
        given: those of ``config.pbtxt``. Limits are read elsewhere; Triton's own names are in capitals.

    Raises:
        ConfigurationError: a parameter is not declared, or its value is not allowed.
    """
    values = {spec.name: given.get(spec.name, spec.default) for spec in specs}
    limits = Limits().parameters()
    for name in given:
        if name not in values and name not in limits and not name.isupper():
            raise ConfigurationError(f"parameter {name!r} is not known; allowed: {', '.join([*values, *limits])}")
    for spec in specs:
        if spec.allowed and values[spec.name] not in spec.allowed:
            why = "".join(f"; {reason}" for value, reason in spec.declined if value == values[spec.name])
            raise ConfigurationError(f"{spec.name} is {values[spec.name]!r}; allowed: {', '.join(spec.allowed)}{why}")
    return values
