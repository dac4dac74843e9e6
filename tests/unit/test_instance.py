from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glm_image.config.instance import Instance
from glm_image.config.schema import AR_PARAMETERS
from glm_image.devices.discovery import Accelerators
from glm_image.errors import ConfigurationError
from glm_image.request.limits import Limits


def instance(name: str = "glm_ar_0_0", groups: tuple[dict[str, Any], ...] = (), **parameters: str) -> Instance:
    given = {key: {"string_value": value} for key, value in parameters.items()}
    config = {"parameters": given, "instance_group": groups}
    args = {"model_name": "glm_ar", "model_instance_name": name, "model_config": json.dumps(config)}
    return Instance.read(args, AR_PARAMETERS)


@pytest.mark.parametrize(
    ("name", "groups", "position"),
    [
        ("glm_ar_0_0", (), (0, 1)),
        ("glm_ar_0_0", ({"name": "glm_ar_0", "count": 1},), (0, 1)),
        ("glm_ar_0_12", ({"name": "glm_ar_0", "count": 13},), (12, 13)),
        ("glm_ar_1_1", ({"name": "glm_ar_0", "count": 2}, {"name": "glm_ar_1", "count": 3}), (3, 5)),
        ("painters_0", ({"name": "", "count": 1}, {"name": "painters", "count": 1}), (1, 2)),
    ],
)
def test_an_instance_knows_its_place_among_all(
    name: str, groups: tuple[dict[str, Any], ...], position: tuple[int, int]
) -> None:
    read = instance(name, groups)
    assert (read.model, read.index, read.siblings) == ("glm_ar", *position)


def test_a_name_that_no_group_gives_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'glm_ar_0_2', which instance_group"):
        instance("glm_ar_0_2", ({"name": "glm_ar_0", "count": 2},))


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


def test_taking_a_place_sets_what_the_runtime_reads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("glm_image.config.instance.find_accelerators", lambda: Accelerators("npu", ("4", "5", "6")))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5,6")
    groups = ({"name": "glm_ar_0", "count": 2},)
    caplog.set_level("INFO")
    place = instance("glm_ar_0_1", groups, devices="npu:0;npu:2").take_place(reserve_first=False)
    assert (place.devices, place.local_names) == (("npu:2",), ("npu:0",))
    assert os.environ["ASCEND_RT_VISIBLE_DEVICES"] == "6"
    assert "instance 1 of 2 takes npu:2: devices is npu:0;npu:2, found npu:0 to npu:2" in caplog.text
    assert "ASCEND_RT_VISIBLE_DEVICES=6" in caplog.text
    with pytest.raises(ConfigurationError, match="devices has 'npu:1' for 2 instances"):
        instance("glm_ar_0_0", groups, devices="npu:1;npu:1").take_place(reserve_first=False)


def test_no_backend_imports_the_framework_before_it_has_a_place() -> None:
    """Run as Triton's stub does: with Triton's utilities on the path."""
    package = importlib.util.find_spec("pytriton")
    if package is None or not package.submodule_search_locations:
        pytest.skip("this environment has no pytriton")
    utilities = Path(package.submodule_search_locations[0], "tritonserver", "backends", "python")
    program = """if True:
        import sys
        from glm_image.serving import ar_backend, dit_backend
        frameworks = {"torch", "torch_npu", "transformers", "diffusers"} & set(sys.modules)
        sys.exit(f"imported: {frameworks}" if frameworks else 0)
    """
    paths = [str(utilities), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
