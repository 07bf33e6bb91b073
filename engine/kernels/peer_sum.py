"""Every rank's partial result and a residual, summed over GPUs that write into each other's memory, in one launch.

On two H100s NCCL's all-reduce of a token's 8 KiB and the residual's launch take 9.3 us, PyTorch's one-shot all-reduce
over symmetric memory 9.7, this 4.0 (LOG.md, 2026-11-26), and a step has two a layer. Here a program has BLOCK elements
and nothing to do with other programs. It

    1. writes its part of x into the other ranks' memory, and after it a flag, released to the whole system;
    2. waits for the flags of the others' parts, which come into its own memory meanwhile: no value is asked for from
       afar, so what is waited for is one way of the link and not two;
    3. adds up all parts in the order of ranks, in float32, and the residual, and rounds once: every rank has the same
       bits.

There are two halves of that memory, used in turns, and no wait at the end: whoever writes sum e + 2 has the others'
flags of sum e + 1, which they set after sum e was read. A program counts its own sums in device memory, so that a
captured graph can be replayed; a flag is that count. Programs spin on flags, so all must be resident (`MOST_ELEMENTS`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from selective_kv.kernels.decode_config import processor
from selective_kv.kernels.launch import launch

BLOCK = 1024
MOST_ELEMENTS = 256 * BLOCK  # 64 tokens of 4,096: 256 programs, about two an SM
ITEM_BYTES = 4  # of the widest dtype


def memory_bytes(n_rank: int) -> int:
    """Of a rank's memory that the others write into: two halves with a part of each rank's, then their flags."""
    return 2 * n_rank * MOST_ELEMENTS * ITEM_BYTES + n_rank * (MOST_ELEMENTS // BLOCK) * 4


@triton.jit(do_not_specialize=["rank"])
def sum_kernel(
    x, residual, out, peers, counts, n, rank,
    N_RANK: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, PROGRAMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK elements of x [n]. peers: int64 [N_RANK], addresses of the ranks' memory; counts: int32 [program],
    sums so far. MOST: elements of a part; PROGRAMS: the most there are.
    """
    if OVERLAP:
        gdc_launch_dependents()
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    FLAGS: tl.constexpr = 2 * N_RANK * MOST * 4  # bytes before the flags
    own = tl.load(peers + rank)
    if OVERLAP:
        gdc_wait()
    count = tl.load(counts + program) + 1
    half = (count & 1) * N_RANK
    mine = tl.load(x + i, inside, 0.0)
    for far in tl.static_range(1, N_RANK):
        memory = tl.load(peers + (rank + far) % N_RANK)
        part = (memory + (half + rank) * (MOST * 4)).to(tl.pointer_type(x.dtype.element_ty))
        tl.store(tl.multiple_of(part, 16) + i, mine, inside)
    tl.debug_barrier()  # all threads have written before one sets the flag
    for far in tl.static_range(1, N_RANK):
        memory = tl.load(peers + (rank + far) % N_RANK)
        flags = (memory + FLAGS).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + rank * PROGRAMS + program, count, sem="release", scope="sys")
    added = tl.load(residual + i, inside, 0.0).to(tl.float32)
    for far in tl.static_range(1, N_RANK):
        flag = (own + FLAGS).to(tl.pointer_type(tl.int32)) + (rank + far) % N_RANK * PROGRAMS + program
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        while seen - count < 0:  # a difference: counts may wrap around
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    total = tl.zeros((BLOCK,), tl.float32)
    for r in tl.static_range(N_RANK):
        part = (own + (half + r) * (MOST * 4)).to(tl.pointer_type(x.dtype.element_ty))
        is_own = i * 0 + r == rank
        theirs = tl.load(tl.multiple_of(part, 16) + i, inside & (is_own == 0), 0.0, volatile=True)
        total += tl.where(is_own, mine, theirs).to(tl.float32)
    tl.store(out + i, (total + added).to(out.dtype.element_ty), inside)
    tl.store(counts + program, count)


def peer_sum(x: Tensor, residual: Tensor, peers: Tensor, counts: Tensor, rank: int) -> Tensor:
    """residual plus every rank's x, in x's dtype. x, residual: contiguous, of at most MOST_ELEMENTS elements.

    peers: int64 [n_rank], on the device, addresses of each rank's `memory_bytes`, zeros at first; counts: int32
    [MOST_ELEMENTS / BLOCK], zeros at first. Every rank makes the same calls in the same order.
    """
    n = x.numel()
    assert n <= MOST_ELEMENTS and residual.shape == x.shape and x.is_contiguous() and residual.is_contiguous()
    out = torch.empty_like(x)
    overlap = processor(x.device).overlap
    launch(sum_kernel, (triton.cdiv(n, BLOCK),))(
        x, residual, out, peers, counts, n, rank, N_RANK=len(peers), BLOCK=BLOCK, MOST=MOST_ELEMENTS,
        PROGRAMS=MOST_ELEMENTS // BLOCK, OVERLAP=overlap, launch_pdl=overlap, num_warps=4,
    )  # fmt: skip
    return out
