"""Launch configurations of split-KV decode attention: tuned on H100 and H200, fitted to another GPU's SMs and shared
memory."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from selective_kv.formats import TILE


class Plan(NamedTuple):
    """How the work of decode attention is cut into programs: by shapes, not by how many tokens there are."""

    heads: int  # query heads per program
    warps: int
    float_slice: int  # tokens per warp and block
    int_slice: int  # the same, of tokens in tiles
    float_stages: int  # of the software pipeline: stages - 1 blocks are being loaded while one is used
    int_stages: int
    per_processor: int  # programs resident on an SM (occupancy) that `sharing` counts on
    splits: int = 0  # programs that share a sequence and KV head; 0: see `sharing`
    ahead: int = 0  # tokens per program prefetched into L2 before the PDL wait
    halves: bool = False  # blocks that are whole tiles become halves where programs have few: see `tile_blocks`


def parts(k_bits: int, v_bits: int) -> int:
    """Tokens whose integers share a byte, of keys or of values: what `tile_softmax.py` calls PARTS."""
    least = min(k_bits, v_bits)
    return 1 if least in (0, 8) else 2 if least == 4 else 4


def early(batch_heads: int, n_processor: int, below_8: bool) -> bool:
    """Whether splits become resident and prefetch their first tokens into L2 while `append`, which then gives its PDL
    trigger at once, still waits for its token. Shared memory must cap such a plan at `per_processor` programs an SM:
    while some SMs are still busy, splits would otherwise crowd onto the others (8 x 32k tokens took 9% longer so).
    """
    return (2 * batch_heads <= 3 * n_processor) if below_8 else (4 * batch_heads <= n_processor)


def split_appends(batch_heads: int, n_processor: int) -> bool:
    """Whether splits write a step's token themselves, and `append` is no launch. They then become resident beside the
    launch that computes it; where there are more of them than that leaves room for, 8 x 32k tokens took 3% longer so.
    """
    return 4 * batch_heads <= n_processor


def plan(
    batch_heads: int, group: int, head_dim: int, itemsize: int, n_processor: int, k_bits: int = 0, v_bits: int = 0
) -> Plan:
    """The launch configuration that measured best on an H100 and an H200 (LOG.md, 2026-11-23 to 26).

    batch_heads: sequences times KV heads; itemsize: bytes of a number in a slot; k_bits, v_bits: those of tiles, 0 if
    nothing is quantised. With 8 bits it must be what it is with 0: two caches that hold the same slots must agree to
    the bit. A block of tiles is a tile or a part of one, and has at least 16 packed rows a warp.
    """
    below_8, n_part = 0 < k_bits + v_bits < 16, parts(k_bits, v_bits)
    heads = min(max(4, triton.next_power_of_2(group)), 16 if head_dim <= 128 else 8)
    few_heads = 2 * batch_heads <= 3 * n_processor
    one_warp = head_dim <= 128 and heads * head_dim <= 1024  # a warp has registers for what a query becomes for a tile
    # With one program a KV head, 1.75 to 2 an SM: an even load without split-KV.
    even = 7 * n_processor < 4 * batch_heads <= 8 * n_processor
    batched = k_bits == v_bits == 4 and head_dim <= 128 and few_heads and 4 * batch_heads > n_processor
    fewest_heads = 4 * batch_heads <= n_processor
    halves = fewest_heads and 64 < head_dim <= 128 and heads <= 4  # else registers run out
    # Fewer bytes on their way are faster where registers cap the programs of an SM, or the load is even without a cap.
    capped = head_dim > 64 and heads != 8
    # Whole tiles by one warp, where each of an SM's four schedulers has one: fewer instructions and no barriers.
    resident = 4 * n_processor // batch_heads * batch_heads
    one_each = n_processor < 4 * batch_heads <= 8 * n_processor and 16 * resident >= 15 * 4 * n_processor
    one_each = one_each and k_bits == v_bits == 4 and heads <= 4 and 64 < head_dim <= 128
    if 3 in (k_bits, v_bits) and not few_heads:
        p = Plan(heads, 2, 16, 64, 3, 4, 4)
    elif one_each or (3 in (k_bits, v_bits) and one_warp):
        # A block is a tile: what a query becomes for one is made once.
        p = Plan(heads, 1, 32, TILE, 4, 3, 4, halves=halves and k_bits == v_bits)
    elif below_8 and max(k_bits, v_bits) == 8:
        p = Plan(heads, 1, 32, 64, 4, 4, 4) if few_heads else Plan(heads, 4, 16, 32, 3, 3, 6, splits=1 if even else 0)
    elif below_8 and n_part == 2 and 64 < head_dim <= 128 and heads <= 4 and fewest_heads:
        p = Plan(heads, 1, 32, 64, 4, 3, 4)  # no barriers between warps, but a query's terms are made by each
    elif k_bits == v_bits == 4 and head_dim <= 64 and heads <= 8 and fewest_heads:
        p = Plan(heads, 1, 32, 64, 4, 3, 8) if heads <= 4 else Plan(heads, 1, 16, 64, 3, 3, 8)
    elif batched:  # short of instructions in flight, not of bytes: small programs, 4 an SM, or 6 of half the bytes
        p = Plan(heads, 2, 16, 64, 3, 4 if capped else 3, 4 if head_dim > 64 else 6)
    elif below_8 and few_heads:
        p = Plan(heads, 2, 32, 64, 4, 4, 2)
    elif below_8:
        p = Plan(heads, 2, 16, 64, 3, 3, 6, splits=1 if even else 0)
    elif few_heads:
        p = Plan(heads, 2, 32, 64, 4, 3, 2, halves=halves)  # 96 KiB a program; with 48, full is 1.6% slower at 128k
    else:
        p = Plan(heads, 1, 16, 64, 4, 3, 4)  # KV heads alone fill the SMs: small programs have the shortest tail
    if early(batch_heads, n_processor, below_8) and (capped or not batched):
        p = p._replace(ahead=64)
    # Plans of their own for half the bytes a token.
    small = batched or (k_bits == v_bits == 4 and heads <= 8 and fewest_heads)
    if head_dim <= 64 and not small:
        p = p._replace(warps=2 * p.warps, int_slice=min(p.int_slice, TILE // (2 * p.warps)))  # half the bytes a token
    if itemsize > 2:  # or registers run out, here and below
        p = p._replace(float_slice=16)
    if heads > 8 or heads * head_dim * itemsize > 2048 or (below_8 and heads > 4 and head_dim <= 64 and not small):
        p = p._replace(float_slice=16, int_slice=32)
    if n_part == 4 and head_dim <= 64:  # so that a warp has 32 rows
        p = p._replace(warps=1, int_slice=TILE, int_stages=3, per_processor=4, splits=0)
    int_slice = max(p.int_slice, 16 * n_part)
    return p._replace(int_slice=int_slice, warps=min(p.warps, TILE // int_slice))


def blocks(p: Plan) -> dict[str, int]:
    """Tokens per block of slots and of tiles, which programs take whole."""
    return {"FLOAT_BLOCK": p.warps * p.float_slice, "INT_BLOCK": p.warps * p.int_slice}


MOST_PARTIAL = 256  # partial results that a warp merges


def sharing(p: Plan, n_column: int, n_processor: int) -> int:
    """Split-KV: how many programs share each of n_column columns (sequences times KV heads, times ceil(group / heads)),
    so that as many are resident as the SMs have room for.

    Each of their warps has a partial result, and the program at the border of slots and tiles has two. `combine_kernel`
    pads their number to a power of two: where up to a sixteenth fewer programs halve that, there are fewer. (On an H200
    128 instead of 64 partial results cost 1 us a layer, and 31 programs instead of 33 nothing.)
    """
    n = max(2, n_processor * p.per_processor // n_column)
    half = triton.next_power_of_2((n + 1) * p.warps) // (2 * p.warps) - 1
    return min(half if 16 * half >= 15 * n else n, MOST_PARTIAL // p.warps - 1)


def merging(n_partial: int, head_dim: int) -> dict[str, int]:
    """What a program of `combine_kernel`, one warp, reduces: all partial results, for DIMS dims, a divisor of head_dim.

    At most 32 elements a thread, as far as that goes: twice that takes longer, and 92 registers a thread instead of 57.
    """
    chunk = triton.next_power_of_2(n_partial)
    return {"CHUNK": chunk, "DIMS": min(head_dim & -head_dim, max(1, 1024 // chunk))}


def rounds_later(p: Plan, k_bits: int, v_bits: int, v_rotation: int, dims: int) -> int:
    """The size of the rounds by which values are rotated back (`hadamard.butterfly`) that are left to `combine_kernel`,
    a program of which has `dims` neighbouring dims; 1: none.

    In a split these lowest bits of a dim are threads, and a meeting of threads is a shuffle, for each partial result
    and query head: half of the 500 instructions behind its loop. There it is done once, in 30. With 3 bits in programs
    of several warps the loop itself comes out slower for it: 32 x 8k tokens took 18% longer on an H100.
    """
    if 3 in (k_bits, v_bits) and p.warps > 1:
        return 1
    size = min(v_rotation, dims)
    return size if size >= 4 else 1  # of 3 bits the lowest two tell sums apart


class Processor(NamedTuple):
    """What a GPU offers to a launch."""

    multiprocessors: int  # streaming multiprocessors
    overlap: bool  # programmatic dependent launch (PDL): compute capability 9.0 and later
    shared: int  # bytes of shared memory that a program may have


@lru_cache
def processor(device: torch.device) -> Processor:
    """The meta device stands for the GPU in use: kernels are compiled for it ahead of a run."""
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda":
        return Processor(8, False, 1 << 30)  # the interpreter
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    shared: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Processor(properties.multi_processor_count, properties.major >= 9, shared)


SHARED_SLACK = 8 << 10  # what a program needs beside its blocks: scales, exchanges between warps


def fitting(p: Plan, shared: int, head_dim: int, itemsize: int, k_bits: int, v_bits: int) -> Plan:
    """The plan, with fewer pipeline stages and then smaller blocks where a program's shared memory is too little.

    A software pipeline of n stages keeps n - 1 blocks there. Slots are fitted apart from tiles: what a cache does with
    its slots must not depend on what it keeps beside them.
    """
    room = (shared - SHARED_SLACK) // p.warps
    dim = max(32, triton.next_power_of_2(head_dim))
    float_stages, float_slice = _fit(p.float_stages, p.float_slice, 16, dim * 2 * itemsize, room)
    int_stages, int_slice = _fit(
        p.int_stages, p.int_slice, 16 * parts(k_bits, v_bits), dim * (k_bits + v_bits) // 8 + 16, room
    )
    return p._replace(
        float_stages=float_stages, float_slice=float_slice, int_stages=int_stages, int_slice=int_slice
    )  # fmt: skip


def _fit(stages: int, tokens: int, fewest: int, n_bytes: int, room: int) -> tuple[int, int]:
    """Stages, and tokens a block, whose n_bytes a token fit a warp's room, if any down to `fewest` tokens do."""
    while (stages - 1) * tokens * n_bytes > room and (stages > 2 or tokens > fewest):
        stages, tokens = (stages - 1, tokens) if stages > 2 else (stages, tokens // 2)
    return stages, tokens
