from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from glm_image.config import pbtxt, schema
from glm_image.config.schema import AR_PARAMETERS, DIT_PARAMETERS, ParameterSpec, TensorSpec, read_parameters
from glm_image.errors import ConfigurationError
from glm_image.request.limits import Limits

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"


def parsed(model: str) -> Any:
    text = (REPOSITORY / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def tensors(entries: Any) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    return {
        entry.name: (
            model_config_pb2.DataType.Name(entry.data_type).removeprefix("TYPE_"),
            tuple(entry.dims),
            getattr(entry, "optional", False),
        )
        for entry in entries
    }


def declared(specs: tuple[TensorSpec, ...]) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    return {spec.name: (spec.data_type, spec.dims, spec.optional) for spec in specs}


def test_checked_in_files_are_what_the_declaration_writes() -> None:
    files = pbtxt.config_files()
    assert {path: (REPOSITORY / path).read_text(encoding="utf-8") for path in files} == files
    assert set(files) == {path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*.pbtxt")}


@pytest.mark.parametrize("model", ["glm_image", "glm_ar", "glm_dit", "glm_image_stream", "glm_control"])
def test_files_parse_to_the_declared_message(model: str) -> None:
    config = parsed(model)
    assert config == pbtxt.model_configs()[model]
    assert config.name == model
    assert config.max_batch_size == 0
    assert config.model_transaction_policy.decoupled == (model == "glm_image_stream")


def test_the_ensemble_takes_and_gives_what_clients_are_promised() -> None:
    config = parsed("glm_image")
    assert tensors(config.input) == {
        "prompt": ("STRING", (1,), True),  # the stages say that it is missing
        "image": ("STRING", (-1,), True),
        "height": ("INT32", (1,), True),
        "width": ("INT32", (1,), True),
        "num_inference_steps": ("INT32", (1,), True),
        "guidance_scale": ("FP32", (1,), True),
        "seed": ("INT64", (1,), True),
        "num_images": ("INT32", (1,), True),
        "negative_prompt": ("STRING", (1,), True),
        "temperature": ("FP32", (1,), True),
        "top_p": ("FP32", (1,), True),
        "top_k": ("INT32", (1,), True),
        "output_format": ("STRING", (1,), True),
    }
    assert tensors(config.output) == {
        "images": ("UINT8", (-1, -1, -1, 3), False),
        "images_base64": ("STRING", (-1,), False),
        "metadata": ("STRING", (1,), False),
    }


def test_the_stages_hand_on_plain_host_tensors() -> None:
    assert tensors(parsed("glm_ar").output) == {
        "prior_token_ids": ("INT32", (-1, -1), False),
        "prior_grid": ("INT32", (2,), False),
        "source_token_ids": ("INT32", (-1,), False),
        "source_grids": ("INT32", (-1, 2), False),
        "resolved_seed": ("INT64", (1,), False),
        "resolved_size": ("INT32", (2,), False),
        "deadline_ns": ("INT64", (1,), False),
        "ar_metadata": ("STRING", (1,), False),
    }
    required = {name for name, (_, _, optional) in tensors(parsed("glm_dit").input).items() if not optional}
    assert required == {"prior_token_ids", "prior_grid"}


def test_no_two_tensors_of_the_ensemble_share_a_name() -> None:
    spaces = [[spec.name for spec in specs] for specs in (
        schema.REQUEST_INPUTS, schema.STAGE_TENSORS, schema.OUTPUTS)]  # fmt: skip
    names = [name for space in spaces for name in space]
    assert len(names) == len(set(names))


def test_the_ensembles_steps_fit_the_models() -> None:
    ensemble = parsed("glm_image")
    steps = ensemble.ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["glm_ar", "glm_dit"]
    known = tensors(ensemble.input)
    for step in steps:
        model = parsed(step.model_name)
        assert set(step.input_map) == set(tensors(model.input))
        assert set(step.output_map) == set(tensors(model.output))
        for name, (data_type, dims, optional) in tensors(model.input).items():
            their_type, their_dims, may_be_missing = known[step.input_map[name]]
            assert (data_type, dims) == (their_type, their_dims)
            assert optional or not may_be_missing
        known |= {step.output_map[name]: spec for name, spec in tensors(model.output).items()}
    assert {name: known[name] for name in tensors(ensemble.output)} == tensors(ensemble.output)


def test_both_stages_have_the_same_limits_and_declared_defaults() -> None:
    limits = Limits().parameters()
    for model, specs in (("glm_ar", AR_PARAMETERS), ("glm_dit", DIT_PARAMETERS)):
        values = {name: value.string_value for name, value in parsed(model).parameters.items()}
        assert values == {spec.name: spec.default for spec in specs} | limits
        assert read_parameters(specs, values) == {spec.name: spec.default for spec in specs}
    assert parsed("glm_ar").instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU


def test_parameters_left_out_have_their_defaults_and_tritons_own_are_let_by() -> None:
    given = {
        "dtype": "bfloat16",
        "limit_max_side": "512",
        "EXECUTION_ENV_PATH": "x",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
    }
    values = read_parameters(AR_PARAMETERS, given)
    assert values["dtype"] == "bfloat16"
    assert values["max_num_seqs"] == "8"
    assert values.keys() == {spec.name for spec in AR_PARAMETERS}


@pytest.mark.parametrize("name", ["max_num_seq", "Dtype", "limit_max_sides", "", "cache"])
def test_an_unknown_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"parameter '{name}' is not known") as refused:
        read_parameters(AR_PARAMETERS, {name: "1"})
    assert "max_num_seqs" in str(refused.value)


@pytest.mark.parametrize(
    ("specs", "name", "value"),
    [
        (AR_PARAMETERS, "dtype", "fp16"),
        (AR_PARAMETERS, "load_format", ""),
        (AR_PARAMETERS, "quantization", "int4"),
        (AR_PARAMETERS, "graph_mode", "full"),
        (DIT_PARAMETERS, "cache", "on"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(specs: tuple[ParameterSpec, ...], name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} is '{value}'; allowed: "):
        read_parameters(specs, {name: value})


def test_the_writer_writes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["configs", str(tmp_path)])
    pbtxt.main()
    for path, text in pbtxt.config_files().items():
        assert (tmp_path / path).read_text(encoding="utf-8") == text
