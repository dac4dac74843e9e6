"""Profiles: their files match their declarations, are accepted by the stages, and fit the devices they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from glm_image.config import pbtxt
from glm_image.config.parameters import PARAMETERS
from glm_image.config.profiles import PROFILES, Profile, StageLayout
from glm_image.devices.discovery import Accelerators
from glm_image.devices.placement import assign_devices, check_memory_shares
from glm_image.request.declaration import check_names, read, write
from glm_image.request.geometry import Size
from glm_image.sizing.profile_memory import device_bytes, profile_memory

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
NAMES = [
    "cpu", "npu-1x32g", "npu-1x64g", "npu-2", "npu-8", "npu-8-latency",
    "cuda-1x80g", "cuda-2", "cuda-8", "cuda-8-latency",
]  # fmt: skip
GB = 10**9
SQUARE = Size(1024, 1024)
ALLOCATOR_HEADROOM = 0.4 * GB
CONTEXT_BYTES = 0.9 * GB
"""Room for the device's context of one process."""


def parsed(model: str, profile: str) -> Any:
    text = (REPOSITORY / model / "configs" / f"{profile}.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def layout(profile: Profile, model: str) -> StageLayout:
    return {"glm_ar": profile.ar, "glm_dit": profile.dit}[model]


def machine_of(profile: Profile) -> Accelerators:
    kind = profile.name.split("-")[0]
    return Accelerators("cpu") if kind == "cpu" else Accelerators(kind, tuple(map(str, range(len(profile.devices)))))


def test_profile_names() -> None:
    assert list(PROFILES) == NAMES
    assert [profile.name for profile in PROFILES.values()] == NAMES
    assert not list((REPOSITORY / "glm_image").glob("configs/*"))


@pytest.mark.parametrize("model", PARAMETERS)
@pytest.mark.parametrize("name", NAMES)
def test_file_differs_from_the_default_only_as_declared(name: str, model: str) -> None:
    config, declared = parsed(model, name), layout(PROFILES[name], model)
    assert config == pbtxt.profile_configs(PROFILES[name])[model]
    assert config.instance_group[0].count == len(declared.entries)
    for parameter, value in declared.values().items():
        assert config.parameters[parameter].string_value == value
        config.parameters[parameter].string_value = pbtxt.model_configs()[model].parameters[parameter].string_value
    config.instance_group[0].count = 1
    assert config == pbtxt.model_configs()[model]


@pytest.mark.parametrize("model", PARAMETERS)
@pytest.mark.parametrize("name", NAMES)
def test_profile_fits_the_devices_of_its_machine(name: str, model: str) -> None:
    profile = PROFILES[name]
    declared, machine = layout(profile, model), machine_of(profile)
    entries = assign_devices(declared.devices, len(declared.entries), machine)
    assert entries == declared.entries
    check_memory_shares(entries, float(declared.parameters.get("memory_utilization", "0.9")), machine)


def test_every_profile_limits_the_time_of_a_request() -> None:
    hours = {name: {layout.max_timeout_ms / 3_600_000 for layout in (p.ar, p.dit)} for name, p in PROFILES.items()}
    assert hours == {name: {24.0 if name == "cpu" else 1.0} for name in NAMES}
    for name in NAMES:
        values = {key: value.string_value for key, value in parsed("glm_dit", name).parameters.items()}
        assert read(PARAMETERS["glm_dit"], values).timeouts.of(0) > 0


def test_layouts_match_the_profile_names() -> None:
    processes = {name: sum(map(len, (*PROFILES[name].ar.entries, *PROFILES[name].dit.entries))) for name in NAMES}
    assert processes == {
        "cpu": 2, "npu-1x32g": 2, "npu-1x64g": 2, "npu-2": 2, "npu-8": 8, "npu-8-latency": 8,
        "cuda-1x80g": 2, "cuda-2": 2, "cuda-8": 8, "cuda-8-latency": 8,
    }  # fmt: skip
    for kind in ("npu", "cuda"):
        assert PROFILES[f"{kind}-8"].dit.entries == tuple((f"{kind}:{card}",) for card in range(1, 8))
        latency = PROFILES[f"{kind}-8-latency"]
        assert latency.ar.entries == (tuple(f"{kind}:{card}" for card in range(4)),)
        assert latency.dit.entries == (tuple(f"{kind}:{card}" for card in range(4, 8)),)
        assert all(len(entry) == 4 for stage in (latency.ar, latency.dit) for entry in stage.entries)
    for profile in PROFILES.values():
        kind = profile.name.split("-")[0]
        assert profile.devices == (
            ("cpu",) if kind == "cpu" else tuple(f"{kind}:{i}" for i in range(len(profile.devices)))
        )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cpu"])
def test_profile_fits_the_memory_of_its_devices(name: str) -> None:
    """Each instance fits its share, with room for the allocator; outside the shares is room for contexts."""
    profile = PROFILES[name]
    instances = profile_memory(profile, SQUARE)
    for instance in instances:
        assert instance.memory.total + ALLOCATOR_HEADROOM <= instance.share * profile.card_gigabytes * GB
        assert instance.fits(profile.card_gigabytes)
    for device in profile.devices:
        shares = [instance.share for instance in instances if device in instance.devices]
        assert sum(shares) <= 0.95
        assert (1 - sum(shares)) * profile.card_gigabytes * GB >= len(shares) * CONTEXT_BYTES


def test_only_int8_weights_fit_both_stages_on_the_smallest_card() -> None:
    fit = {name for name in NAMES if sum(device_bytes(PROFILES[name], SQUARE).values()) <= 32 * GB}
    assert fit == {"npu-1x32g"}


@pytest.mark.parametrize("model", PARAMETERS)
@pytest.mark.parametrize("name", NAMES)
def test_stages_accept_the_parameters_of_the_profiles(name: str, model: str) -> None:
    values = {key: value.string_value for key, value in parsed(model, name).parameters.items()}
    check_names(PARAMETERS[model], values)
    assert write(read(PARAMETERS[model], values)) == values


def rows_of_the_table() -> dict[str, list[str]]:
    text = (REPOSITORY.parent / "docs" / "placement.md").read_text(encoding="utf-8")
    lines = text.split("<!-- profiles -->\n")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_table_of_profiles_has_their_memory() -> None:
    rows = rows_of_the_table()
    assert list(rows) == NAMES
    for name, (_, card, ar, dit) in rows.items():
        profile = PROFILES[name]
        assert card == (str(profile.card_gigabytes) if profile.card_gigabytes else "host")
        memory = {instance.memory.stage: instance.memory.total for instance in profile_memory(profile, SQUARE)}
        assert [ar, dit] == [f"{memory[stage] / GB:.1f}" for stage in ("glm_ar", "glm_dit")]
