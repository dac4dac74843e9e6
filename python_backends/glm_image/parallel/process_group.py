"""Joins this process to the others of its instance."""

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
# What the collectives' libraries listen on; nothing of an instance is to be reached from outside.
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
LOOPBACK = "lo"


@dataclass(frozen=True)
class Ranks:
    """The groups this process belongs to.

    Attributes:
        world: all ranks of the instance.
        cfg: those that differ in the branch of guidance only.
        tp: those that differ in the heads and channels only.
        ring: those that differ in the tokens only, whose keys and values go around.
        ulysses: those that differ in the tokens only, which exchange heads for tokens.
    """

    world: Group = ALONE
    cfg: Group = ALONE
    tp: Group = ALONE
    ring: Group = ALONE
    ulysses: Group = ALONE


ONE_RANK = Ranks()


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of an instance meet.

    Attributes:
        port: of rank 0's store, on the loopback.
        layout: who belongs to which group.
        patience: seconds after which a collective that not all ranks have joined is an error.
    """

    port: int
    layout: ParallelLayout
    patience: float


def bind_store() -> socket.socket:
    """Returns a socket of rank 0's store on a free port of the loopback."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.bind((HOST, 0))
    listening.listen()
    return listening


def init_process_group(
    rank: int, device: Device, rendezvous: Rendezvous, listening: socket.socket | None = None
) -> Ranks:
    """Joins the instance's process group and makes its groups; all ranks must do so.

    Args:
        rank: this process's.
        device: where it computes.
        rendezvous: where to meet.
        listening: rank 0's socket, which its store takes over.
    """
    for variable in INTERFACES:
        os.environ.setdefault(variable, LOOPBACK)
    layout, patience = rendezvous.layout, timedelta(seconds=rendezvous.patience)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        HOST,
        rendezvous.port,
        layout.size,
        is_master=listening is not None,
        timeout=patience,
        wait_for_workers=False,
        master_listen_fd=None if listening is None else listening.detach(),
    )
    place = device.torch_device
    # torch names groups by a count, which an attempt that failed leaves behind: the ranks would wait for each other
    # under different names, and for ever.
    dist.distributed_c10d._world.group_count = 0
    dist.init_process_group(
        BACKENDS[place.type],
        store=store,
        rank=rank,
        world_size=layout.size,
        timeout=patience,
        device_id=None if place.type == "cpu" else place,
    )
    groups = {name: _own_group(rank, layout.members(name)) for name in MEMBERS}
    world = tuple(range(layout.size))
    return Ranks(world=Group(world, rank, dist.group.WORLD), **groups)


def destroy() -> None:
    """Leaves the instance's process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abort(port: int) -> None:
    """Ends what waits in this process for ranks that are gone, and leaves the instance's process group.

    Args:
        port: of the store. What waits for something in it fails once its connections are shut; no timeout does that
            from another thread.
    """
    for connection in _connections(port):
        with connection, suppress(OSError):  # it may have been shut meanwhile
            connection.shutdown(socket.SHUT_RDWR)
    if dist.is_initialized():
        # Communicators of devices end their collectives only so. gloo's end by themselves with the other process.
        try:
            dist.distributed_c10d._abort_process_group()
        except (AttributeError, RuntimeError, ValueError) as error:
            logger.warning("the process group cannot be aborted: %s", error)
            destroy()


def _connections(port: int) -> list[socket.socket]:
    """Returns copies of this process's sockets that are connected to a port of the loopback."""
    found = []
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            copy = os.dup(int(entry.name)) if entry.is_socket() else None
        except OSError:  # closed since
            continue
        if copy is None:
            continue
        connection = socket.socket(fileno=copy)
        if _peer_of(connection) in {(HOST, port), (f"::ffff:{HOST}", port)}:
            found.append(connection)
        else:
            connection.close()
    return found


def _peer_of(connection: socket.socket) -> object:
    try:
        return connection.getpeername()[:2]
    except OSError:
        return None


def _own_group(rank: int, members: list[tuple[int, ...]]) -> Group:
    own = ALONE
    for ranks in members:
        if len(ranks) == 1:
            continue
        group = dist.new_group(list(ranks))  # by every rank, whether it belongs to it or not
        if rank in ranks:
            own = Group(ranks, ranks.index(rank), group)
    return own
