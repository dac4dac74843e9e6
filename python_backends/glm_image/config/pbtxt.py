"""Writes the models' ``config.pbtxt`` files and the profiles from their declarations.

Run as ``python -m glm_image.config.pbtxt MODEL_REPOSITORY``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from glm_image.config import schema
from glm_image.config.parameters import PARAMETERS, ArParameters, DitParameters
from glm_image.config.profiles import PROFILES, Profile
from glm_image.request.declaration import parameters, write
from glm_image.request.tensors import TensorSpec

MAX_DIT_QUEUE = 64
"""Requests that may wait in Triton for ``glm_dit``. Nothing is batched: ``max_batch_size`` is 0."""

HEADER = """\
# Edit instance_group, max_queue_size and the parameters to place and size the model. The parameters are declared in
# glm_image/config/parameters.py, the tensors in glm_image/config/schema.py; this file is written by
# `python -m glm_image.config.pbtxt model_repository`.
"""

PROFILE_HEADER = """\
# Profile {name}: {meaning}.
# Selected by `serve --profile {name}`. Declared in glm_image/config/profiles.py and written by
# `python -m glm_image.config.pbtxt model_repository`.
"""


def _stage(
    name: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], parameters: ArParameters | DitParameters
) -> Any:
    config = _python_model(name, inputs, outputs)
    for parameter, value in write(parameters).items():
        config.parameters[parameter].string_value = value
    return config


def _python_model(name: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> Any:
    config = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=0)
    _add_tensors(config, inputs, outputs)
    kind = model_config_pb2.ModelInstanceGroup.KIND_CPU  # `devices` chooses the devices: Triton knows no NPU
    config.instance_group.add(count=1, kind=kind)
    return config


def _dit() -> Any:
    config = _stage("glm_dit", schema.DIT_INPUTS, schema.OUTPUTS, DitParameters())
    config.dynamic_batching.default_queue_policy.max_queue_size = MAX_DIT_QUEUE
    return config


def _stream(name: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> Any:
    config = _python_model(name, inputs, outputs)
    config.model_transaction_policy.decoupled = True
    return config


def _ensemble() -> Any:
    config = model_config_pb2.ModelConfig(name="glm_image", platform="ensemble", max_batch_size=0)
    _add_tensors(config, schema.REQUEST_INPUTS, schema.OUTPUTS)
    steps = (
        ("glm_ar", schema.REQUEST_INPUTS, schema.STAGE_TENSORS),
        ("glm_dit", schema.DIT_INPUTS, schema.OUTPUTS),
    )
    for model, inputs, outputs in steps:
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        for spec in inputs:
            step.input_map[spec.name] = spec.name
        for spec in outputs:
            step.output_map[spec.name] = spec.name
    return config


def _add_tensors(config: Any, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
    for specs, entries in ((inputs, config.input), (outputs, config.output)):
        for spec in specs:
            data_type = model_config_pb2.DataType.Value(f"TYPE_{spec.data_type}")
            entry = entries.add(name=spec.name, data_type=data_type, dims=spec.dims)
            if spec.optional:
                entry.optional = True


def model_configs() -> dict[str, Any]:
    """Returns every model's ``ModelConfig`` message."""
    return {
        "glm_image": _ensemble(),
        "glm_ar": _stage("glm_ar", schema.REQUEST_INPUTS, schema.STAGE_TENSORS, ArParameters()),
        "glm_dit": _dit(),
        "glm_image_stream": _stream("glm_image_stream", schema.STREAM_INPUTS, schema.STREAM_OUTPUTS),
        "glm_ar_stream": _stream("glm_ar_stream", schema.AR_STREAM_INPUTS, schema.AR_STREAM_OUTPUTS),
        "glm_dit_stream": _stream("glm_dit_stream", schema.DIT_STREAM_INPUTS, schema.STREAM_OUTPUTS),
        "glm_control": _python_model("glm_control", schema.CONTROL_INPUTS, schema.CONTROL_OUTPUTS),
    }


def profile_configs(profile: Profile) -> dict[str, Any]:
    """Returns the ``ModelConfig`` message of each stage in a profile; the other models have no profiles."""
    configs = {}
    for model, layout in (("glm_ar", profile.ar), ("glm_dit", profile.dit)):
        config = configs[model] = model_configs()[model]
        config.instance_group[0].count = len(layout.entries)
        for name, value in layout.values().items():
            config.parameters[name].string_value = value
    return configs


def config_text(config: Any) -> str:
    """Returns a message in protobuf's text format, one entry a line; the entries that operators edit come first."""
    names = ("name", "backend", "platform")
    lines = [f'{field}: "{getattr(config, field)}"' for field in names if getattr(config, field)]
    lines += _entries("instance_group", config.instance_group)
    for field in ("model_transaction_policy", "dynamic_batching"):
        if config.HasField(field):
            lines += _entries(field, [getattr(config, field)])
    kind = PARAMETERS.get(config.name)
    for name, _, _ in parameters(kind) if kind else ():
        value = json.dumps(config.parameters[name].string_value)
        lines.append(f'parameters {{ key: "{name}" value {{ string_value: {value} }} }}')
    lines += _entries("input", config.input) + _entries("output", config.output)
    if config.ensemble_scheduling.step:
        lines += ["ensemble_scheduling {", *map(_step_text, config.ensemble_scheduling.step), "}"]
    return "\n".join(lines) + "\n"


def _step_text(step: Any) -> str:
    lines = [f'  step {{ model_name: "{step.model_name}" model_version: {step.model_version}']
    for field in ("input_map", "output_map"):
        tensors = getattr(step, field)
        lines += [f'    {field} {{ key: "{name}" value: "{tensors[name]}" }}' for name in sorted(tensors)]
    return "\n".join([*lines, "  }"])


def _entries(field: str, messages: Iterable[Any]) -> list[str]:
    return [f"{field} {{ {text_format.MessageToString(message, as_one_line=True)} }}" for message in messages]


def config_files() -> dict[Path, str]:
    """Returns the text of every configuration file, by its path in the model repository."""
    files = {Path(name, "config.pbtxt"): HEADER + config_text(config) for name, config in model_configs().items()}
    for profile in PROFILES.values():
        for model, config in profile_configs(profile).items():
            header = PROFILE_HEADER.format(name=profile.name, meaning=profile.meaning)
            files[Path(model, "configs", f"{profile.name}.pbtxt")] = header + config_text(config)
    return files


def main() -> None:
    """Writes the files into the model repository given on the command line."""
    (repository,) = sys.argv[1:]
    for path, text in config_files().items():
        target = Path(repository) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
