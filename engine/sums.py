"""How the ranks' partial results are summed: by the backend's all-reduce, or through each other's memory.

A decode step's sums are small and there are two a layer, so there what counts is how long the first byte takes:
`PeerSums` (`kernels/peer_sum.py`). What it cannot take, a prompt's chunk above all, goes through the backend.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

SUMS = ("auto", "peer", "one_shot", "backend")


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


class OneShotSums:
    """PyTorch's one-shot all-reduce over symmetric memory, to compare with. Raises RuntimeError as `PeerSums`."""

    name = "one-shot all-reduce"

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self.group = group
        self.memory = {
            dtype: symmetric.empty(1 << 18, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32)
        }
        self.handles = [symmetric.rendezvous(memory, group) for memory in self.memory.values()]

    def fits(self, x: Tensor) -> bool:
        memory = self.memory.get(x.dtype)
        return memory is not None and x.numel() <= memory.numel() and x.nbytes % 16 == 0

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        memory = self.memory[x.dtype][: x.numel()]
        whole = torch.ops.symm_mem.one_shot_all_reduce_copy(memory, x.view(-1), "sum", self.group.group_name)
        return whole.view(x.shape).add_(residual)
