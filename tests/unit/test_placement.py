"""Assignment of devices to instances, and what a process may see of them."""

from __future__ import annotations

import os
import re

import pytest
import torch

from glm_image.devices import discovery
from glm_image.devices.discovery import Accelerators, find_accelerators
from glm_image.devices.open import count_accelerators, instance_device, named_dtype, open_device
from glm_image.devices.placement import Entry, assign_devices, check_memory_shares, parse_devices, place_instance
from glm_image.errors import ConfigurationError

NPUS = Accelerators("npu", tuple("01234567"))
GPUS = Accelerators("cuda", ("2", "GPU-b", "7", "8"))
NONE = Accelerators("cpu")


def devices_of(
    devices: str, instances: int, accelerators: Accelerators = NPUS, *, reserve_first: bool = False
) -> list[str]:
    return [",".join(entry) for entry in assign_devices(devices, instances, accelerators, reserve_first=reserve_first)]


@pytest.mark.parametrize(
    ("devices", "accelerators", "expected"),
    [
        ("cpu", NPUS, ["cpu", "cpu", "cpu"]),
        ("npu:0", NPUS, ["npu:0"]),
        ("npu:1;npu:2", NPUS, ["npu:1", "npu:2"]),
        (" cuda:3 ; cpu ", GPUS, ["cuda:3", "cpu"]),
        ("cpu:0;cpu:1;cpu:1", NONE, ["cpu:0", "cpu:1", "cpu:1"]),
    ],
)
def test_entries_are_assigned_in_order(devices: str, accelerators: Accelerators, expected: list[str]) -> None:
    assert devices_of(devices, len(expected), accelerators) == expected


@pytest.mark.parametrize("devices", ["", "gpu:0", "npu", "npu:-1", "npu:0;", "npu:0;what", "npu:0,", "cpu:x"])
def test_invalid_device_name_is_refused(devices: str) -> None:
    entry = devices.rpartition(";")[2]
    with pytest.raises(ConfigurationError, match=f"^devices has the entry '{entry}'; allowed: auto, or cpu, npu:N"):
        devices_of(devices, 1)


@pytest.mark.parametrize(
    ("devices", "instances", "message"),
    [
        ("npu:1;npu:8", 2, "devices has the entry 'npu:8'; found on this machine: npu:0 to npu:7"),
        ("cuda:0", 1, "devices has the entry 'cuda:0'; found on this machine: npu:0 to npu:7"),
        ("npu:1;npu:2", 3, "devices is 'npu:1;npu:2': 2 for 3 instances; allowed: as many entries as instance_group"),
        ("npu:1;npu:2", 1, "devices is 'npu:1;npu:2': 2 for 1 instances; allowed: as many entries as instance_group"),
        ("cpu:0", 2, "devices is 'cpu:0': 1 for 2 instances; allowed: as many entries as instance_group"),
        ("npu:0,npu:0", 1, "devices has the entry 'npu:0,npu:0'; allowed: each device once in an entry"),
    ],
)
def test_missing_devices_and_wrong_number_of_entries_are_refused(devices: str, instances: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}"):
        devices_of(devices, instances)


def test_entry_may_hold_several_devices() -> None:
    assert parse_devices("npu:0,npu:1 ; npu:2, npu:3") == (("npu:0", "npu:1"), ("npu:2", "npu:3"))


@pytest.mark.parametrize(
    ("accelerators", "first", "second"),
    [
        (NPUS, ["npu:0"], [f"npu:{card}" for card in range(1, 8)]),
        (Accelerators("cuda", ("0", "1")), ["cuda:0"], ["cuda:1", "cuda:1"]),
        (Accelerators("npu", ("0",)), ["npu:0"], ["npu:0"]),
        (NONE, ["cpu"], ["cpu", "cpu"]),
    ],
)
def test_auto_reserves_the_first_accelerator_for_the_first_stage(
    accelerators: Accelerators, first: list[str], second: list[str]
) -> None:
    assert devices_of("auto", len(first), accelerators) == first
    assert devices_of("auto", len(second), accelerators, reserve_first=True) == second


@pytest.mark.parametrize(("devices", "share"), [("npu:1;npu:1", 0.5), ("npu:1;npu:2", 1.0), ("cpu:0;cpu:0", 0.9)])
def test_instances_may_share_an_accelerators_memory(devices: str, share: float) -> None:
    check_memory_shares(assign_devices(devices, 2, NPUS), share, NPUS)


def test_shares_above_an_accelerators_memory_are_refused() -> None:
    message = (
        "devices has 'npu:1' for 2 instances, whose memory_utilization of 0.6 each comes to 1.2 of its memory; "
        "allowed: at most 1 in all; found on this machine: npu:0 to npu:7"
    )
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        check_memory_shares(assign_devices("npu:0;npu:1;npu:1", 3, NPUS), 0.6, NPUS)
    with pytest.raises(ConfigurationError, match="'npu:0' for 2 instances"):
        check_memory_shares(assign_devices("auto", 9, NPUS), 0.9, NPUS)


@pytest.mark.parametrize(
    ("entries", "instance", "accelerators", "local_names", "variables"),
    [
        ((("npu:0",), ("npu:5",)), 1, NPUS, ("npu:0",), {"ASCEND_RT_VISIBLE_DEVICES": "5"}),
        # The Ascend runtime accepts ascending lists only.
        ((("npu:5", "npu:2"),), 0, NPUS, ("npu:1", "npu:0"), {"ASCEND_RT_VISIBLE_DEVICES": "2,5"}),
        # Numbers count the devices that are visible already.
        ((("cuda:1",),), 0, GPUS, ("cuda:0",), {"CUDA_VISIBLE_DEVICES": "GPU-b"}),
        ((("cpu",),), 0, GPUS, ("cpu",), {"CUDA_VISIBLE_DEVICES": ""}),
        ((("cpu",),), 0, NONE, ("cpu",), {}),
    ],
)
def test_process_sees_only_its_own_devices(
    entries: tuple[Entry, ...], instance: int, accelerators: Accelerators, local_names: Entry, variables: dict[str, str]
) -> None:
    placed = place_instance(entries, instance, accelerators, {"CUDA_VISIBLE_DEVICES": "2,GPU-b,7,8"})
    assert (placed.devices, placed.local_names, placed.environment) == (entries[instance], local_names, variables)


def test_gpus_are_numbered_in_nvidia_smi_order_by_default() -> None:
    gpus = Accelerators("cuda", ("0", "1"))
    assert place_instance((("cuda:1",),), 0, gpus, {}).environment == {
        "CUDA_VISIBLE_DEVICES": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    chosen = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert place_instance((("cuda:1",),), 0, gpus, chosen).environment == {"CUDA_VISIBLE_DEVICES": "1", **chosen}


def test_numbered_cpus_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    single, pair = (("cpu:0",),), (("cpu:0",), ("cpu:3",))
    many = tuple((f"cpu:{index}",) for index in range(4 * cores))
    assert place_instance(single, 0, NONE, {}).environment == {"OMP_NUM_THREADS": str(cores)}
    assert place_instance(pair, 1, NONE, {}).environment == {"OMP_NUM_THREADS": str(max(1, cores // 2))}
    assert place_instance(many, 1, NONE, {}).environment == {"OMP_NUM_THREADS": "1"}
    assert place_instance(pair, 1, NONE, {"OMP_NUM_THREADS": "3"}).environment == {}


@pytest.mark.parametrize(
    ("variable", "ids"),
    [
        (None, ("0", "1", "2")),
        ("2,0", ("2", "0")),
        ("GPU-x, 1", ("GPU-x", "1")),
        ("1,-1,0", ("1",)),
        ("", ()),
        ("-1", ()),
    ],
)
def test_hidden_devices_are_not_found(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, ids: tuple[str, ...]
) -> None:
    monkeypatch.setattr(discovery, "_count_gpus", lambda: 3)
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert find_accelerators(environment) == (Accelerators("cuda", ids) if ids else Accelerators("cpu"))


def test_discovery_without_torch_matches_torch() -> None:
    kind, count = count_accelerators()
    found = find_accelerators()
    assert (found.kind, len(found.ids)) == (kind, count)


def test_accelerators_are_described_as_a_range() -> None:
    assert [str(found) for found in (NPUS, Accelerators("cuda", ("3",)), NONE)] == [
        "npu:0 to npu:7",
        "cuda:0",
        "cpu only",
    ]
    assert instance_device("cpu;cpu:1", 1) == "cpu:1"


@pytest.mark.parametrize("name", ["cuda", "CPU", "npu:999", "cuda:999", ""])
def test_missing_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="device is"):
        open_device(name)


def test_cpu_defaults_to_fp32_and_accepts_every_seed() -> None:
    device = open_device("cpu")
    assert (str(device), device.default_dtype) == ("cpu", torch.float32)
    assert (str(open_device("cpu:1")), open_device("cpu:1").torch_device) == ("cpu:1", torch.device("cpu"))
    assert str(open_device("cpu", display_name="cpu:7")) == "cpu:7"
    assert 0 < device.memory().free <= device.memory().total
    for seed in (-(2**63), -1, 0, 2**63 - 1, 2**64 - 1):
        noise = torch.rand(4, generator=device.generator(seed))
        assert torch.equal(noise, torch.rand(4, generator=torch.Generator().manual_seed(seed)))
    ran: list[int] = []
    replay = device.capture(lambda: ran.append(1))
    replay()
    device.record_event().synchronize()
    assert ran == [1]


def test_dtypes_by_name() -> None:
    assert [named_dtype(name) for name in ("auto", "float32", "bfloat16")] == [None, torch.float32, torch.bfloat16]
