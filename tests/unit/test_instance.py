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
from glm_image.config.parameters import ArParameters, DitParameters
from glm_image.devices.discovery import Accelerators
from glm_image.devices.open import open_device
from glm_image.errors import ConfigurationError
from glm_image.lifecycle.timeouts import Timeouts
from glm_image.request.declaration import read
from glm_image.request.geometry import Size
from glm_image.request.limits import Limits


def instance(
    name: str = "glm_ar_0_0", groups: tuple[dict[str, Any], ...] = (), **parameters: str
) -> Instance[ArParameters]:
    given = {key: {"string_value": value} for key, value in parameters.items()}
    config = {"parameters": given, "instance_group": groups}
    args = {"model_name": "glm_ar", "model_instance_name": name, "model_config": json.dumps(config)}
    return Instance.read(args, ArParameters)


@pytest.mark.parametrize(
    ("name", "groups", "position"),
    [
        ("glm_ar_0_0", (), (0, 1)),
        ("glm_ar_0_0", ({"name": "glm_ar_0", "count": 1},), (0, 1)),
        ("glm_ar_0_12", ({"name": "glm_ar_0", "count": 13},), (12, 13)),
        ("glm_ar_1_1", ({"name": "glm_ar_0", "count": 2}, {"name": "glm_ar_1", "count": 3}), (3, 5)),
        ("renderers_0", ({"name": "", "count": 1}, {"name": "renderers", "count": 1}), (1, 2)),
    ],
)
def test_instance_has_its_index_over_all_groups(
    name: str, groups: tuple[dict[str, Any], ...], position: tuple[int, int]
) -> None:
    made = instance(name, groups)
    assert (made.model, made.index, made.siblings) == ("glm_ar", *position)


def test_instance_name_of_no_group_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'glm_ar_0_2', which no group of instance_group gives"):
        instance("glm_ar_0_2", ({"name": "glm_ar_0", "count": 2},))


def test_config_without_parameters_has_the_defaults() -> None:
    args = {"model_name": "glm_ar", "model_instance_name": "glm_ar_0_0", "model_config": "{}"}
    made = Instance.read(args, ArParameters)
    assert made.parameters == ArParameters()
    assert made.parameters.limits == Limits()


def test_limits_are_read() -> None:
    assert instance(limit_max_side="512", limit_guidance_scale="7.5").parameters.limits == Limits(
        max_side=512, guidance_scale=7.5
    )
    with pytest.raises(ConfigurationError, match="limit_max_side is 'big'"):
        instance(limit_max_side="big")


def test_unknown_parameter_stops_the_load() -> None:
    with pytest.raises(ConfigurationError, match="'max_batch'"):
        instance(max_batch="1")


def test_checkpoint_path_has_its_variables_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM_IMAGE_CHECKPOINT", "/models/glm")
    monkeypatch.setenv("REVISION", "a$b\\1")
    assert instance().parameters.checkpoint_folder == Path("/models/glm")
    assert instance(checkpoint="/plain path").parameters.checkpoint_folder == Path("/plain path")
    nested = instance(checkpoint="${GLM_IMAGE_CHECKPOINT}/${REVISION}/x")
    assert nested.parameters.checkpoint_folder == Path("/models/glm/a$b\\1/x")


@pytest.mark.parametrize("value", [None, ""])
def test_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("GLM_IMAGE_CHECKPOINT", raising=False)
    if value is not None:
        monkeypatch.setenv("GLM_IMAGE_CHECKPOINT", value)
    with pytest.raises(ConfigurationError, match="no GLM_IMAGE_CHECKPOINT; set it"):
        _ = instance().parameters.checkpoint_folder


@pytest.mark.parametrize("text", ["1", "8", "999999999"])
def test_whole_numbers_are_read(text: str) -> None:
    assert instance(max_num_seqs=text).parameters.engine.max_num_seqs == int(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "eight", "1e3", "1_000", " 8", "8\n", "9" * 5000])
def test_invalid_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^max_num_seqs is .*; allowed: a whole number of at least 1$"):
        instance(max_num_seqs=text)


@pytest.mark.parametrize("text", ["0.9", "1", "1.0", "1e-3"])
def test_shares_are_read(text: str) -> None:
    assert instance(memory_utilization=text).parameters.engine.memory_utilization == float(text)


@pytest.mark.parametrize("text", ["", "0", "-0.5", "1.01", "nan", "inf", "90%"])
def test_invalid_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^memory_utilization is .*; allowed: above 0, at most 1$"):
        instance(memory_utilization=text)


@pytest.mark.parametrize(("text", "expected"), [("auto", None), ("0", 0.0), ("60", 60.0), ("0.5", 0.5)])
def test_hang_seconds_are_read(text: str, expected: float | None) -> None:
    assert instance(hang_seconds=text).parameters.hang_seconds == expected
    assert instance(hang_seconds=text).hang_seconds(open_device("cpu")) == (600 if expected is None else expected)


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "none", "a minute"])
def test_invalid_hang_seconds_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^hang_seconds is '.*'; allowed: auto, or a number of at least 0$"):
        instance(hang_seconds=text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", None),
        ("none", ()),
        ("1024x768", (Size(768, 1024),)),
        ("64x32, 2048x2048", (Size(32, 64), Size(2048, 2048))),
    ],
)
def test_warmup_sizes_are_read(text: str, expected: tuple[Size, ...] | None) -> None:
    assert read(DitParameters, {"warmup_sizes": text}).engine.warmup_sizes == expected


@pytest.mark.parametrize("text", ["", "1024", "1024x", "x1024", "1024x1024;64x64", "16x64", "64x4096", "64x64,"])
def test_invalid_warmup_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^warmup_sizes is '.*'; allowed: auto, none, or WIDTHxHEIGHT "):
        read(DitParameters, {"warmup_sizes": text})


def test_warmup_sizes_are_checked_against_the_configured_limits() -> None:
    with pytest.raises(ConfigurationError, match=r"^warmup_sizes is '64x1024'; allowed: .* of 32 to 512, with commas"):
        read(DitParameters, {"warmup_sizes": "64x1024", "limit_max_side": "512"})


def test_largest_side_is_the_configured_limit() -> None:
    assert read(DitParameters, {"limit_max_side": "512"}).engine.largest_side == 512


def test_timeouts_are_read_in_milliseconds() -> None:
    assert instance(default_timeout_ms="5", max_timeout_ms="70").parameters.timeouts == Timeouts(5000, 70_000)


def test_take_place_sets_the_variables_of_the_runtime(
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


def test_backends_import_no_framework_before_take_place() -> None:
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
