from __future__ import annotations

import pytest
import torch

from glm_image.devices import named_dtype, open_device, placement, select
from glm_image.errors import ConfigurationError


@pytest.mark.parametrize(
    ("devices", "places"),
    [
        ("cpu", ["cpu", "cpu", "cpu"]),
        ("npu:0", ["npu:0"]),
        ("npu:1;npu:2", ["npu:1", "npu:2"]),
        (" cuda:3 ; cpu ", ["cuda:3", "cpu"]),
    ],
)
def test_an_instances_index_picks_its_entry(devices: str, places: list[str]) -> None:
    assert [placement(devices, instance) for instance in range(len(places))] == places


@pytest.mark.parametrize(
    ("devices", "instance", "named"),
    [
        ("", 0, "''"),
        ("gpu:0", 0, "'gpu:0'"),
        ("npu", 0, "'npu'"),
        ("npu:-1", 0, "'npu:-1'"),
        ("npu:0;", 0, "''"),
        ("npu:0;what", 0, "'what'"),
        ("cuda:0,cuda:1", 0, "several devices"),
        ("npu:1;npu:2", 2, "none for instance 2"),
        ("npu:1", 1, "none for instance 1"),
    ],
)
def test_what_is_no_device_is_refused(devices: str, instance: int, named: str) -> None:
    with pytest.raises(ConfigurationError, match="devices") as refused:
        placement(devices, instance)
    assert named in str(refused.value)


def test_auto_takes_the_cards_in_turn_and_the_cpu_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "accelerators", lambda: ("npu", 3))
    assert [placement("auto", instance) for instance in range(4)] == ["npu:0", "npu:1", "npu:2", "npu:0"]
    assert [placement("auto", instance, first=1) for instance in range(3)] == ["npu:1", "npu:2", "npu:0"]
    monkeypatch.setattr(select, "accelerators", lambda: ("cpu", 0))
    assert placement("auto", 5, first=1) == "cpu"


@pytest.mark.parametrize("name", ["cuda", "CPU", "npu:999", "cuda:999", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="device is"):
        open_device(name)


def test_the_cpu_is_exact_and_takes_every_seed() -> None:
    device = open_device("cpu")
    assert (str(device), device.default_dtype) == ("cpu", torch.float32)
    assert 0 < device.memory().free <= device.memory().total
    for seed in (-(2**63), -1, 0, 2**63 - 1, 2**64 - 1):
        drawn = torch.rand(4, generator=device.generator(seed))
        assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(seed)))
    ran: list[int] = []
    replay = device.capture(lambda: ran.append(1))
    replay()
    device.mark().wait()
    assert ran == [1]


def test_dtypes_by_name() -> None:
    assert [named_dtype(name) for name in ("auto", "float32", "bfloat16")] == [None, torch.float32, torch.bfloat16]
