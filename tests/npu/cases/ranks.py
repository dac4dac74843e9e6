"""Two processes with one device each: every collective that the models use. A rank's own index is the argument."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401 - registers torch.npu


def main(rank: int, port: int) -> None:
    torch.npu.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("hccl", store=store, rank=rank, world_size=2, device_id=torch.device(f"npu:{rank}"))
    device = torch.device(f"npu:{rank}")
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        mine = torch.arange(5, device=device).to(dtype) + 10 * rank
        both = [torch.arange(5).to(dtype) + 10 * other for other in range(2)]
        total = mine.clone()
        dist.all_reduce(total)
        assert torch.equal(total.cpu(), both[0] + both[1])
        gathered = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(gathered, mine)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(gathered, both, strict=True))
    smallest = torch.tensor([7 - rank], device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    assert smallest.item() == 6
    rows = torch.full((3, 4), float(rank), device=device)
    whole = torch.empty(6, 4, device=device)
    dist.all_gather_into_tensor(whole, rows)
    assert torch.equal(whole.cpu()[:, 0], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    sent, counts = rows, ([1, 2], [2, 1])
    received = torch.empty(2 * counts[0][rank], 4, device=device)
    sizes = [counts[0][rank]] * 2
    dist.all_to_all_single(received, sent, sizes, counts[0])
    assert received.cpu()[:, 0].tolist() == sorted(received.cpu()[:, 0].tolist())
    other = torch.empty_like(rows)
    transfers = [dist.P2POp(dist.isend, rows, 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    assert torch.equal(other.cpu(), torch.full((3, 4), 1.0 - rank))
    large = torch.ones(3 << 20, device=device)  # in several parts
    dist.all_reduce(large)
    assert large.sum().item() == 6 << 20
    dist.broadcast(rows, 1)
    assert rows.cpu().unique().item() == 1.0
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
