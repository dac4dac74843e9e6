from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_image.errors import ConfigurationError
from glm_image.request import Limits
from glm_image.serving.declaration import AR_PARAMETERS
from glm_image.serving.instance import Instance


def instance(name: str = "glm_ar_0_0", **parameters: str) -> Instance:
    config = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    args = {"model_name": "glm_ar", "model_instance_name": name, "model_config": json.dumps(config)}
    return Instance.read(args, AR_PARAMETERS)


@pytest.mark.parametrize(("name", "index"), [("glm_ar_0_0", 0), ("glm_ar_0_3", 3), ("glm_ar_0_12", 12)])
def test_an_instance_knows_its_index(name: str, index: int) -> None:
    read = instance(name)
    assert (read.model, read.index) == ("glm_ar", index)


def test_a_config_without_parameters_is_all_defaults() -> None:
    args = {"model_name": "glm_ar", "model_instance_name": "glm_ar_0_0", "model_config": "{}"}
    read = Instance.read(args, AR_PARAMETERS)
    assert read.parameters == {spec.name: spec.default for spec in AR_PARAMETERS}
    assert read.limits == Limits()


def test_limits_are_read() -> None:
    assert instance(limit_max_side="512", limit_guidance_scale="7.5").limits == Limits(max_side=512, guidance_scale=7.5)
    with pytest.raises(ConfigurationError, match="limit_max_side is 'big'"):
        instance(limit_max_side="big")


def test_an_unknown_parameter_stops_the_load() -> None:
    with pytest.raises(ConfigurationError, match="'max_batch'"):
        instance(max_batch="1")


def test_variables_in_the_checkpoints_path_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM_IMAGE_CHECKPOINT", "/models/glm")
    monkeypatch.setenv("REVISION", "a$b\\1")
    assert instance().checkpoint == Path("/models/glm")
    assert instance(checkpoint="/plain path").checkpoint == Path("/plain path")
    assert instance(checkpoint="${GLM_IMAGE_CHECKPOINT}/${REVISION}/x").checkpoint == Path("/models/glm/a$b\\1/x")


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_the_environment_lacks_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("GLM_IMAGE_CHECKPOINT", raising=False)
    if value is not None:
        monkeypatch.setenv("GLM_IMAGE_CHECKPOINT", value)
    with pytest.raises(ConfigurationError, match="no GLM_IMAGE_CHECKPOINT; set it"):
        _ = instance().checkpoint


@pytest.mark.parametrize("text", ["1", "8", "999999999"])
def test_whole_numbers_are_read(text: str) -> None:
    assert instance(max_num_seqs=text).integer("max_num_seqs", 1) == int(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "eight", "1e3", "1_000", " 8", "8\n", "9" * 5000])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^max_num_seqs is .*; allowed: a whole number of at least 1$"):
        instance(max_num_seqs=text).integer("max_num_seqs", 1)


@pytest.mark.parametrize("text", ["0.9", "1", "1.0", "1e-3"])
def test_shares_are_read(text: str) -> None:
    assert instance(memory_utilization=text).share("memory_utilization") == float(text)


@pytest.mark.parametrize("text", ["", "0", "-0.5", "1.01", "nan", "inf", "90%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^memory_utilization is .*; allowed: above 0, at most 1$"):
        instance(memory_utilization=text).share("memory_utilization")
