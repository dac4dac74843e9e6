"""Joins this process to the process groups of its instance."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from glm_image.devices.base import Device
from glm_image.parallel.collectives import ALONE, Group
from glm_image.parallel.layout import MEMBERS, ParallelLayout

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
"""Select the interface on which gloo, NCCL and HCCL listen; only the loopback is not reachable from outside."""


@dataclass(frozen=True)
class Ranks:
    """The groups that this process belongs to, one per kind of parallelism.

    Attributes:
        world: all ranks of the instance.
        cfg: the ranks that compute the other guidance branch for the same tokens and heads.
        tp: the ranks that hold the other heads and MLP columns for the same tokens.
        ring: the ranks whose keys and values circulate among them.
        ulysses: the ranks that exchange heads for tokens at attention.
    """

    world: Group = ALONE
    cfg: Group = ALONE
    tp: Group = ALONE
    ring: Group = ALONE
    ulysses: Group = ALONE


ONE_RANK = Ranks()


@dataclass(frozen=True)
class Rendezvous:
    """How a rank joins its instance.

    Attributes:
        port: of rank 0's store.
        layout: the groups of ranks.
        timeout_seconds: the timeout of collectives.
        first_group: torch names the instance's process groups by numbers from here on.
    """

    port: int
    layout: ParallelLayout
    timeout_seconds: float
    first_group: int = 0


def bind_store() -> socket.socket:
    """Returns a listening socket for rank 0's store, on a free port of the loopback."""
    store_socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    store_socket.bind((HOST, 0))
    store_socket.listen()
    return store_socket


def init_process_group(
    rank: int, device: Device, rendezvous: Rendezvous, store_socket: socket.socket | None = None
) -> Ranks:
    """Joins the instance's process group and creates its subgroups; collective over all ranks.

    On rank 0 the store takes over ``store_socket``, the result of ``bind_store``.
    """
    for variable in INTERFACES:
        os.environ.setdefault(variable, "lo")
    layout, timeout = rendezvous.layout, timedelta(seconds=rendezvous.timeout_seconds)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        HOST,
        rendezvous.port,
        layout.size,
        is_master=store_socket is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if store_socket is None else store_socket.detach(),
    )
    place = device.torch_device
    # torch names groups by a counter of its own in each process: the ranks would wait for each other under different
    # names if rank 0 has had other instances.
    dist.distributed_c10d._world.group_count = rendezvous.first_group
    dist.init_process_group(
        BACKENDS[place.type],
        store=store,
        rank=rank,
        world_size=layout.size,
        timeout=timeout,
        device_id=None if place.type == "cpu" else place,
    )
    groups = {name: _own_group(rank, layout.members(name)) for name in MEMBERS}
    world = tuple(range(layout.size))
    return Ranks(world=Group(world, rank, dist.group.WORLD), **groups)


def destroy() -> None:
    """Destroys the instance's process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abort(port: int) -> None:
    """Ends every wait of this process for ranks that have ended, and aborts the instance's process group.

    Waits on the store, which no timeout set from another thread ends, end as its connections are shut down.
    """
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):  # closed meanwhile, or not connected
            if entry.is_socket():
                _shut_down_connection(int(entry.name), port)
    if dist.is_initialized():
        # NCCL's and HCCL's collectives end only by an abort; gloo's end when the other process does.
        try:
            dist.distributed_c10d._abort_process_group()
        except (AttributeError, RuntimeError, ValueError) as error:
            logger.warning("cannot abort the process group: %s", error)
            destroy()


def _shut_down_connection(descriptor: int, port: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.getpeername()[:2] in {(HOST, port), (f"::ffff:{HOST}", port)}:
            connection.shutdown(socket.SHUT_RDWR)


def _own_group(rank: int, members: list[tuple[int, ...]]) -> Group:
    own = ALONE
    for ranks in members:
        if len(ranks) == 1:
            continue
        group = dist.new_group(list(ranks))  # must be called by every rank, also by those outside the group
        if rank in ranks:
            own = Group(ranks, ranks.index(rank), group)
    return own
