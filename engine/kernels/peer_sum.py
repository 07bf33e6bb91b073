"""Every rank's partial result and a residual, summed over GPUs that write into each other's memory, in one launch; and
the choice of a token among all ranks' logits, in the same way.

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

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.argmax import LAST, SPOILED, parts
from selective_kv.kernels.decode_config import processor
from selective_kv.kernels.launch import launch

BLOCK = 1024
MOST_ELEMENTS = 256 * BLOCK  # 64 tokens of 4,096: 256 programs, about two an SM
MOST_ROWS = 1024  # sequences that a token is chosen for
MOST_RANKS = 8
ITEM_BYTES = 4  # of the widest dtype


def places(n_rank: int) -> tuple[int, int, int, int]:
    """Where in a rank's memory what the others write begins, in bytes: flags of sums (the parts come before them), best
    keys, flags of choices, and the end. Parts and keys have two halves with a place for each rank's.
    """
    flags = 2 * n_rank * MOST_ELEMENTS * ITEM_BYTES
    keys = flags + n_rank * (MOST_ELEMENTS // BLOCK) * 4
    key_flags = keys + 2 * n_rank * MOST_ROWS * 8
    return flags, keys, key_flags, key_flags + n_rank * MOST_ROWS * 4


@triton.jit
def memory_of(RANK: tl.constexpr, p0, p1, p2, p3, p4, p5, p6, p7):
    """A rank's address, of those that a launch was given: nothing has to be read for it."""
    p = p0
    if RANK == 1:
        p = p1
    if RANK == 2:
        p = p2
    if RANK == 3:
        p = p3
    if RANK == 4:
        p = p4
    if RANK == 5:
        p = p5
    if RANK == 6:
        p = p6
    if RANK == 7:
        p = p7
    return p


@triton.jit
def wait_for(flag, count):
    """Until what comes before the flag of sum `count` is here."""
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while seen - count < 0:  # a difference: counts may wrap around
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")


@triton.jit(do_not_specialize=["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"])
def sum_kernel(
    x, residual, out, counts, p0, p1, p2, p3, p4, p5, p6, p7, n,
    RANK: tl.constexpr, N_RANK: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, FLAGS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK elements of x [n]. p0...: addresses of the ranks' memory; counts: int32 [program], sums so far.
    MOST: elements of a part; FLAGS: where they are.
    """
    if OVERLAP:
        gdc_launch_dependents()
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    own = memory_of(RANK, p0, p1, p2, p3, p4, p5, p6, p7)
    if OVERLAP:
        gdc_wait()
    mine = tl.load(x + i, inside, 0.0)
    count = tl.load(counts + program) + 1
    half = (count & 1) * N_RANK
    for far in tl.static_range(1, N_RANK):
        memory = memory_of((RANK + far) % N_RANK, p0, p1, p2, p3, p4, p5, p6, p7)
        part = (memory + (half + RANK) * (MOST * 4)).to(tl.pointer_type(x.dtype.element_ty))
        tl.store(tl.multiple_of(part, 16) + i, mine, inside)
    tl.debug_barrier()  # all threads have written before one sets the flag
    for far in tl.static_range(1, N_RANK):
        memory = memory_of((RANK + far) % N_RANK, p0, p1, p2, p3, p4, p5, p6, p7)
        flags = (memory + FLAGS).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + RANK * (MOST // BLOCK) + program, count, sem="release", scope="sys")
    added = tl.load(residual + i, inside, 0.0).to(tl.float32)
    for far in tl.static_range(1, N_RANK):
        flags = (own + FLAGS).to(tl.pointer_type(tl.int32))
        wait_for(flags + (RANK + far) % N_RANK * (MOST // BLOCK) + program, count)
    total = tl.zeros((BLOCK,), tl.float32)
    for r in tl.static_range(N_RANK):
        if r == RANK:
            total += mine.to(tl.float32)
        else:
            part = (own + (half + r) * (MOST * 4)).to(tl.pointer_type(x.dtype.element_ty))
            total += tl.load(tl.multiple_of(part, 16) + i, inside, 0.0, volatile=True).to(tl.float32)
    tl.store(out + i, (total + added).to(out.dtype.element_ty), inside)
    tl.store(counts + program, count)


@triton.jit(do_not_specialize=["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7", "n_part"])
def choose_kernel(
    keys, out, counts, p0, p1, p2, p3, p4, p5, p6, p7, n_part,
    RANK: tl.constexpr, N_RANK: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, KEYS: tl.constexpr,
    FLAGS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program: one sequence. keys: int64 [sequence, n_part] of this rank's logits, n_part <= BLOCK; out: int64
    [sequence], the index in the largest of all ranks' keys; counts: int32 [sequence]. MOST: the most sequences.
    """
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    own = memory_of(RANK, p0, p1, p2, p3, p4, p5, p6, p7)
    if OVERLAP:
        gdc_wait()
    best = tl.max(tl.load(keys + row * n_part + tl.minimum(i, n_part - 1)), 0)
    count = tl.load(counts + row) + 1
    half = (count & 1) * N_RANK
    for far in tl.static_range(1, N_RANK):
        memory = memory_of((RANK + far) % N_RANK, p0, p1, p2, p3, p4, p5, p6, p7)
        tl.store((memory + KEYS).to(tl.pointer_type(tl.int64)) + (half + RANK) * MOST + row, best)
    tl.debug_barrier()
    for far in tl.static_range(1, N_RANK):
        memory = memory_of((RANK + far) % N_RANK, p0, p1, p2, p3, p4, p5, p6, p7)
        flags = (memory + FLAGS).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + RANK * MOST + row, count, sem="release", scope="sys")
    for far in tl.static_range(1, N_RANK):
        r = (RANK + far) % N_RANK
        wait_for((own + FLAGS).to(tl.pointer_type(tl.int32)) + r * MOST + row, count)
        theirs = (own + KEYS).to(tl.pointer_type(tl.int64)) + (half + r) * MOST + row
        best = tl.maximum(best, tl.load(theirs, volatile=True))
    tl.store(out + row, tl.where(best == SPOILED, -1, (best & LAST) ^ LAST))
    tl.store(counts + row, count)


def peer_sum(x: Tensor, residual: Tensor, peers: Sequence[int], counts: Tensor, rank: int) -> Tensor:
    """residual plus every rank's x, in x's dtype. x, residual: contiguous, of at most MOST_ELEMENTS elements.

    peers: addresses of each rank's memory (`places` has its size), zeros at first; counts: int32
    [MOST_ELEMENTS / BLOCK], zeros at first. Every rank makes the same calls in the same order.
    """
    n = x.numel()
    assert n <= MOST_ELEMENTS and residual.shape == x.shape and x.is_contiguous() and residual.is_contiguous()
    out = torch.empty_like(x)
    overlap = processor(x.device).overlap
    launch(sum_kernel, (triton.cdiv(n, BLOCK),))(
        x, residual, out, counts, *_all(peers), n, RANK=rank, N_RANK=len(peers), BLOCK=BLOCK, MOST=MOST_ELEMENTS,
        FLAGS=places(len(peers))[0], OVERLAP=overlap, launch_pdl=overlap, num_warps=4,
    )  # fmt: skip
    return out


def peer_choice(logits: Tensor, start: int, peers: Sequence[int], counts: Tensor, rank: int) -> Tensor:
    """The index of each sequence's largest logit on any rank; -1 where some rank's are not finite. int64 [sequence].

    logits: [sequence, n], of at most MOST_ROWS sequences, this rank's, of tokens from `start` on; counts: int32
    [MOST_ROWS]. Otherwise as `peer_sum`.
    """
    keys = parts(logits, start)
    n_sequence, n_part = keys.shape
    assert n_sequence <= MOST_ROWS
    out = torch.empty(n_sequence, dtype=torch.int64, device=keys.device)
    overlap = processor(keys.device).overlap
    _, at, flags, _ = places(len(peers))
    launch(choose_kernel, (n_sequence,))(
        keys, out, counts, *_all(peers), n_part, RANK=rank, N_RANK=len(peers), BLOCK=triton.next_power_of_2(n_part),
        MOST=MOST_ROWS, KEYS=at, FLAGS=flags, OVERLAP=overlap, launch_pdl=overlap, num_warps=1,
    )  # fmt: skip
    return out


def _all(peers: Sequence[int]) -> list[int]:
    """MOST_RANKS addresses."""
    return [*peers, *[peers[0]] * (MOST_RANKS - len(peers))]
