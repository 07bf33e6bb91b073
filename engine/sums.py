"""How the ranks' partial results are summed: by the backend's all-reduce, or through each other's memory.

A decode step's sums are small and there are two a layer, so there what counts is how long the first byte takes:
`PeerSums` (`kernels/peer_sum.py`). What it cannot take, a prompt's chunk above all, goes through the backend.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.chunk_sums import ChunkSums, Memory, n_byte
from engine.kernels import step_kernels


class Sums(Protocol):
    """One way to sum partial results over ranks, and to choose tokens from all ranks' logits.

    name: what reports call it; nbytes: its own memory on this device, which PyTorch's allocator does not count.
    """

    name: str

    @property
    def nbytes(self) -> int: ...

    def fits(self, x: Tensor) -> bool:
        """Whether `sum` takes x."""
        ...

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual plus every rank's x, in x's shape and dtype; x may be overwritten."""
        ...

    def chooses(self, logits: Tensor) -> bool:
        """Whether `choose` takes these logits."""
        ...

    def choose(self, logits: Tensor, start: int) -> Tensor:
        """The likeliest token of the whole vocabulary for each sequence, int64 [sequence]; -1 where a logit of some
        rank is not finite.

        logits: [sequence, n], this rank's, of the tokens from `start` on.
        """
        ...


class BackendSums:
    """By gloo's or NCCL's all-reduce; a launch of its own adds the residual."""

    nbytes = 0

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.name = group, str(dist.get_backend(group))

    def fits(self, x: Tensor) -> bool:
        return True

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x.add_(residual)

    def chooses(self, logits: Tensor) -> bool:
        return True

    def choose(self, logits: Tensor, start: int) -> Tensor:
        """A rank packs its largest logit and that logit's token into one integer: only those are exchanged."""
        kernels = step_kernels(logits.device)
        keys = kernels.best(logits, start)
        dist.all_reduce(keys, dist.ReduceOp.MAX, self.group)
        return kernels.chosen(keys)


class PeerSums:
    """By GPUs that write into each other's memory; the residual is added in the same launch. All ranks must construct
    it at the same time. Raises RuntimeError where memory cannot be shared.
    """

    name = "peers' memory"

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        from engine.kernels import peer_sum

        self.kernel, self.symmetric, self.rank = peer_sum, symmetric, group.rank()
        self.memory = symmetric.empty(peer_sum.places(group.size())[-1], dtype=torch.uint8, device=device)
        self.handle = symmetric.rendezvous(self.memory, group)
        self.memory.zero_()
        self.peers = tuple(self.handle.buffer_ptrs)
        n_program = peer_sum.MOST_WORDS // peer_sum.WORDS
        self.sums = torch.zeros(n_program, dtype=torch.int32, device=device)  # so far, of each program
        self.choices = torch.zeros(peer_sum.MOST_ROWS, dtype=torch.int32, device=device)  # so far, of each sequence
        self.group = group
        self.chunk_sums: ChunkSums | None = None
        self.chunk_memory: tuple[Tensor, object] | None = None
        self.meet()  # no rank may write before all memory is zero

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes + (0 if self.chunk_memory is None else self.chunk_memory[0].nbytes)

    def meet(self) -> None:
        """A barrier: wait until every rank's GPU has done all work before this call."""
        device = self.memory.device
        torch.cuda.synchronize(device)
        dist.all_reduce(torch.zeros(1, device=device), group=self.group)
        torch.cuda.synchronize(device)

    def of_chunk(self, x: Tensor) -> ChunkSums:
        """The sums of a long chunk x, [token, dim]. Their memory is made when a chunk is longer than all before it."""
        size, (n_token, dim), dtype = self.group.size(), x.shape, x.dtype
        n = n_byte(size, n_token, dim, dtype)

        def of(memory: Tensor) -> Memory:
            return Memory.in_bytes(memory, size, n_token, dim, dtype)

        if x.is_meta:
            return ChunkSums(self.rank, [of(torch.empty(n, dtype=torch.uint8, device=x.device))] * size).begin(n_token)
        made = self.chunk_sums
        if made is None or not made.fits(x):
            self.meet()
            self.chunk_sums, self.chunk_memory = None, None
            torch.cuda.empty_cache()  # give back PyTorch's spare memory: shared memory comes from elsewhere
            memory = self.symmetric.empty(n, dtype=torch.uint8, device=x.device)
            handle = self.symmetric.rendezvous(memory, self.group)
            memory.zero_()
            every = [memory if r == self.rank else handle.get_buffer(r, (n,), torch.uint8) for r in range(size)]
            self.chunk_sums = made = ChunkSums(self.rank, [of(m) for m in every])
            self.chunk_memory = memory, handle  # as long as it is in use
            self.meet()
        return made.begin(n_token)

    def fits(self, x: Tensor) -> bool:
        return self.kernel.summable(x)

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        counts = self.sums.to(x.device)  # the meta device's, where it is only compiled
        return self.kernel.peer_sum(x.contiguous(), residual.contiguous(), self.peers, counts, self.rank)

    def chooses(self, logits: Tensor) -> bool:
        return len(logits) <= self.kernel.MOST_ROWS

    def choose(self, logits: Tensor, start: int) -> Tensor:
        counts = self.choices.to(logits.device)
        return self.kernel.peer_choice(logits, start, self.peers, counts, self.rank)
