from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from glm_image.config import docs, pbtxt, schema
from glm_image.config.parameters import PARAMETERS, ArParameters, DitParameters
from glm_image.errors import ConfigurationError
from glm_image.request.declaration import check_names, parameters, read, write
from glm_image.request.limits import LIMIT_PREFIX, Limits

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = ROOT / "model_repository"
PAGES = [ROOT / "docs" / name for name in docs.PAGES if (ROOT / "docs" / name).exists()]


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


def test_checked_in_files_match_the_declaration() -> None:
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


def test_ensemble_has_the_tensors_of_the_contract() -> None:
    config = parsed("glm_image")
    assert tensors(config.input) == {
        "prompt": ("STRING", (1,), True),  # the stages report that it is missing
        "image": ("STRING", (-1,), True),
        "glyph_text": ("STRING", (-1,), True),
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
        "revision": ("STRING", (1,), True),
    }
    assert tensors(config.output) == {
        "images": ("UINT8", (-1, -1, -1, 3), False),
        "images_base64": ("STRING", (-1,), False),
        "metadata": ("STRING", (1,), False),
    }


def test_stage_tensors_are_plain_host_tensors() -> None:
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


def test_ensemble_tensor_names_are_unique() -> None:
    spaces = [[spec.name for spec in specs] for specs in (
        schema.REQUEST_INPUTS, schema.STAGE_TENSORS, schema.OUTPUTS)]  # fmt: skip
    names = [name for space in spaces for name in space]
    assert len(names) == len(set(names))


def test_ensemble_steps_match_the_models() -> None:
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


@pytest.mark.parametrize("model", PARAMETERS)
def test_config_files_have_the_declared_defaults(model: str) -> None:
    kind = PARAMETERS[model]
    values = {name: value.string_value for name, value in parsed(model).parameters.items()}
    assert values == write(kind()) == {name: default for name, _, default in parameters(kind)}
    check_names(kind, values)
    assert read(kind, values) == kind()
    assert parsed(model).instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU


def test_both_stages_have_the_same_limits() -> None:
    limits = write(Limits(), LIMIT_PREFIX)
    for model in PARAMETERS:
        values = {name: value.string_value for name, value in parsed(model).parameters.items()}
        assert {name: value for name, value in values.items() if name.startswith(LIMIT_PREFIX)} == limits


def test_omitted_parameters_have_their_defaults_and_triton_parameters_are_ignored() -> None:
    given = {
        "dtype": "bfloat16",
        "limit_max_side": "512",
        "EXECUTION_ENV_PATH": "x",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
    }
    check_names(ArParameters, given)
    values = read(ArParameters, given)
    assert values.engine.dtype == "bfloat16"
    assert values.engine.max_num_seqs == 8
    assert values.limits == Limits(max_side=512)
    assert write(values) == {**write(ArParameters()), "dtype": "bfloat16", "limit_max_side": "512"}


@pytest.mark.parametrize("name", ["max_num_seq", "Dtype", "limit_max_sides", "", "cache"])
def test_unknown_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"parameter '{name}' is not known") as refused:
        check_names(ArParameters, {name: "1"})
    assert "max_num_seqs" in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (ArParameters, "dtype", "fp16"),
        (ArParameters, "load_format", ""),
        (ArParameters, "quantization", "int4"),
        (ArParameters, "graph_mode", "full"),
        (DitParameters, "cache", "on"),
    ],
)
def test_value_that_is_not_allowed_is_refused(kind: type, name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} is '{value}'; allowed: "):
        read(kind, {name: value})


@pytest.mark.parametrize("kind", PARAMETERS.values())
def test_every_parameter_has_help_and_allowed_values(kind: type) -> None:
    for name, declared, default in parameters(kind):
        assert declared.help.endswith("."), name
        assert declared.allowed, name
        assert declared.text(declared.read(name, default)) == default


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_of_the_documentation_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert docs.rendered(text) == text, "run `python -m glm_image.config.docs docs`"


def test_a_page_gets_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in docs.PAGES:
        text = "# Title\n\n<!-- BEGIN GENERATED: limits -->\nold\n<!-- END GENERATED -->\n\nafter\n"
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["docs", str(tmp_path)])
    docs.main()
    for name in docs.PAGES:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.startswith("# Title\n\n<!-- BEGIN GENERATED: limits -->\n| parameter | default |")
        assert "| `limit_max_side` | `2048` |" in text
        assert text.endswith("|\n<!-- END GENERATED -->\n\nafter\n")


def test_every_table_has_a_row_for_each_declared_name() -> None:
    tables = {name: table() for name, table in docs.TABLES.items()}
    for kind in PARAMETERS.values():
        shown = "".join(tables[name] for name in ("stage-parameters", "ar-parameters", "dit-parameters", "limits"))
        assert all(f"| `{name}` | " in shown for name, _, _ in parameters(kind))
    assert all(f"| `{spec.name}` | " in tables["inputs"] for spec in schema.REQUEST_INPUTS)
    assert "| `num_images` | INT32 | `1` | " in tables["inputs"]
    assert "| 1 to 8 |" in tables["inputs"]


def test_writer_writes_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["configs", str(tmp_path)])
    pbtxt.main()
    for path, text in pbtxt.config_files().items():
        assert (tmp_path / path).read_text(encoding="utf-8") == text
