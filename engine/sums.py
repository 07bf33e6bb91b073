"""How the ranks' partial results are summed: by the backend's all-reduce, or through each other's memory.

A decode step's sums are small and there are two a layer, so there what counts is how long the first byte takes:
`PeerSums` (`kernels/peer_sum.py`). What it cannot take, a prompt's chunk above all, goes through the backend.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Sums(Protocol):
    """name: how reports call it."""

    name: str

    def fits(self, x: Tensor) -> bool: ...

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual plus every rank's x, which it may overwrite."""
        ...


class BackendSums:
    """gloo's or NCCL's all-reduce, and the residual added by a launch of its own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.name = group, str(dist.get_backend(group))

    def fits(self, x: Tensor) -> bool:
        return True

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x.add_(residual)


class PeerSums:
    """Sums with the residual in them, by GPUs that write into each other's memory. Every rank makes it at once.

    Raises RuntimeError where memory cannot be shared.
    """

    name = "peers' memory"

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        from engine.kernels import peer_sum

        self.kernel, self.rank = peer_sum, group.rank()
        self.memory = symmetric.empty(peer_sum.memory_bytes(group.size()), dtype=torch.uint8, device=device)
        self.handle = symmetric.rendezvous(self.memory, group)
        self.memory.zero_()
        self.peers = torch.tensor(list(self.handle.buffer_ptrs), dtype=torch.int64, device=device)
        n_program = peer_sum.MOST_ELEMENTS // peer_sum.BLOCK
        self.counts = torch.zeros(n_program, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # nobody writes before all memory is zero
        torch.cuda.synchronize(device)

    def fits(self, x: Tensor) -> bool:
        return x.numel() <= self.kernel.MOST_ELEMENTS

    def on_meta(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same call on the meta device: to compile the kernel."""
        peers, counts = (t.to("meta") for t in (self.peers, self.counts))
        return self.kernel.peer_sum(x.contiguous(), residual.contiguous(), peers, counts, self.rank)

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.kernel.peer_sum(x.contiguous(), residual.contiguous(), self.peers, self.counts, self.rank)
