"""Several devices that hold one model together: tensor parallelism by torch.distributed, started by torchrun.

Each rank has its share of every layer (`checkpoint.Share`) and the cache of its own KV heads. All of them read the same
tokens and take the same steps; what a layer's second product gives is summed over the ranks, twice a layer, and the
next token is chosen from all logits by every rank alike, so that nothing has to be sent between steps. What only
rank 0 knows (a line of standard input) it hands to the others with `from_first`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint import parse_device
from common.errors import UserError
from common.messages import say
from engine.chunk_sums import ChunkSums, by_rows
from engine.link import Link
from engine.sums import BackendSums, PeerSums, Sums

T = TypeVar("T")
MOST_PEERS = 8  # ranks that sum through each other's memory
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # a newer name, without which it warns
FOREVER = timedelta(days=365)  # collectives wait as long as a person types: the link's threads know who has died


@dataclass(frozen=True)
class Parallel:
    """One of `size` ranks. group: for the device's tensors; control: for the host's objects."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup
    control: dist.ProcessGroup
    sums: tuple[Sums, ...]  # the first that a tensor fits sums it

    # --- Tensors of the device: these are in a captured step ---

    @property
    def path(self) -> str:
        """How sums go between the ranks, for reports."""
        return f"sums over {self.size} ranks by {self.sums[0].name}"

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual plus every rank's x, which may be overwritten."""
        return next(sums for sums in self.sums if sums.fits(x)).sum(x, residual)

    def chunk(self, x: Tensor) -> ChunkSums | None:
        """Sums of a prompt's chunk beside its products, where it is long and memory is shared. x: [token, dim]."""
        first = self.sums[0]
        n_token, dim = x.shape
        return first.of_chunk(x) if isinstance(first, PeerSums) and by_rows(n_token, dim, self.size) else None

    def greedy(self, logits: Tensor, start: int) -> Tensor:
        """The likeliest token of the whole vocabulary; -1 where a row is not finite on some rank. int64 [batch].

        logits: [batch, n], of this rank's part of the vocabulary, which begins at `start`.
        """
        return next(sums for sums in self.sums if sums.chooses(logits)).choose(logits, start)

    def gather(self, logits: Tensor, n_vocab: int) -> Tensor:
        """All logits [batch, n_vocab], on every rank. logits: this rank's, [batch, at most ceil(n_vocab / size)]."""
        most = -(-n_vocab // self.size)  # Share gives the last ranks fewer, where they do not come out even
        mine = logits if logits.shape[1] == most else torch.nn.functional.pad(logits, (0, most - logits.shape[1]))
        every = mine.new_empty(self.size * len(mine), most)
        _gather(every, mine.contiguous(), self.group)
        return every.view(self.size, len(mine), most).transpose(0, 1).reshape(len(mine), -1)[:, :n_vocab]

    @property
    def nbytes(self) -> int:
        """Of the device's memory that the ranks' sums have, which PyTorch's allocator does not count."""
        return sum(sums.nbytes for sums in self.sums)

    # --- Objects of the host ---

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, which alone calls it; or everywhere the UserError that it raises there."""
        box: list[T | UserError | None] = [None]
        if self.rank == 0:
            try:
                box = [make()]
            except UserError as error:
                box = [error]
        dist.broadcast_object_list(box, 0, self.control)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]  # type: ignore[return-value]

    def from_all(self, value: T) -> list[T]:
        """Every rank's value, in order."""
        found: list[T] = [value] * self.size
        dist.all_gather_object(found, value, self.control)
        return found


def rank_device(name: str, link: Link | None, elsewhere: bool = False) -> torch.device:
    """`--device` for one of several ranks: a GPU each, or the CPU they share. Raises UserError."""
    if link is None:
        return parse_device(name, elsewhere)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: of several ranks each takes its own GPU (cuda), or all share the cpu")
    n_device = torch.cuda.device_count() if name == "cuda" and torch.cuda.is_available() else 0
    if name == "cuda" and 0 < n_device <= link.local_rank:
        raise UserError(f"rank {link.rank} is without a GPU: {n_device} here (--nproc_per_node {n_device})")
    return parse_device(f"cuda:{link.local_rank}" if name == "cuda" else name)


def connect(link: Link, device: torch.device, how: str = "auto") -> Parallel:
    """Make the groups that tensors and objects go through. Every rank calls it. how: one of SUMS, for a step's."""
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("parallel", link.store),
        rank=link.rank,
        world_size=link.size,
        timeout=FOREVER,
    )
    control = group = dist.group.WORLD
    if device.type == "cuda":
        group = dist.new_group(backend="nccl", timeout=FOREVER)
    assert control is not None and group is not None
    backend_sums: Sums = BackendSums(group)
    alone = Parallel(link.rank, link.size, device, group, control, (backend_sums,))
    if device.type != "cuda" or how == "backend":
        return alone
    return replace(alone, sums=(*fast_sums(alone), backend_sums))


def fast_sums(ranks: Parallel) -> tuple[Sums, ...]:
    """Sums through each other's memory, where all ranks can. Where they cannot it is said, once."""
    made: Sums | None = None
    problem = f"{ranks.size} ranks" if ranks.size > MOST_PEERS else None
    try:
        here = [d for d in range(torch.cuda.device_count()) if d != ranks.device.index]
        if not all(torch.cuda.can_device_access_peer(ranks.device, d) for d in here[: ranks.size - 1]):
            problem = "GPUs that cannot reach each other's memory"
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    if not any(ranks.from_all(problem)):
        try:
            made = PeerSums(ranks.group, ranks.device)
        except (RuntimeError, ImportError) as error:
            problem = str(error).splitlines()[0]
    problem = next((p for p in ranks.from_all(problem) if p), None)
    if problem is None and made is not None:
        return (made,)
    say(f"a step's sums go by {ranks.sums[0].name}, which takes longer: {problem}")
    return ()
