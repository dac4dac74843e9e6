"""A process that has had other instances names the groups of the next one as its ranks do."""

from __future__ import annotations

import torch.distributed as dist

from glm_image.devices.open import open_device
from glm_image.parallel.layout import ParallelLayout
from glm_image.parallel.process_group import Rendezvous, bind_store, destroy, init_process_group


def test_groups_are_named_from_the_first_number_on() -> None:
    for first_group in (7, 1007):
        with bind_store() as store_socket:
            port = store_socket.getsockname()[1]
            rendezvous = Rendezvous(port, ParallelLayout(), timeout_seconds=30, first_group=first_group)
            ranks = init_process_group(0, open_device("cpu"), rendezvous, store_socket)
        try:
            assert ranks.world.process_group.group_name == str(first_group)
        finally:
            destroy()
    assert not dist.is_initialized()
