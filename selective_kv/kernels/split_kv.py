"""Split-KV: which tokens of a sequence each program of a decode step reads; and prefetching them into L2.

Full-precision slots and then tiles are one range, measured in blocks. n_split programs divide it evenly, at
the beginnings of blocks: none has more than a block above the mean, and the one at the border has slots and tiles. All
is computed from the number of tokens, in every program of `split_kernel` for itself; those of `combine_kernel` compute
the same to know which partial results were written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selective_kv.kernels.basics import prefetch

TILE = tl.constexpr(128)


@triton.jit
def count_left(n_token, sink_size, window_size):
    """How many of a sequence's n_token tokens are in tiles: as `Regions.n_left` has it."""
    return tl.maximum(n_token.to(tl.int32) - sink_size - window_size, 0) // TILE * TILE


@triton.jit
def partition(
    n_token, n_left, n_slot, n_split,
    FLOAT_BLOCK: tl.constexpr, INT_BLOCK: tl.constexpr, INT_COST: tl.constexpr, HAS_INT: tl.constexpr,
):  # fmt: skip
    """What n_split programs share of a sequence of n_token tokens: one range of work, slots before tiles.

    n_left: tokens in tiles, a multiple of INT_BLOCK; without tiles (HAS_INT) what does not fit n_slot slots is gone.
    A block of slots is 1 long there and one of a tile INT_COST, a power of two; program s takes the blocks that begin
    in [s * each, (s + 1) * each), see `first_blocks`. Returns each, the number of slots in use (where there are tiles,
    of all: those whose tokens are in a tile by now are masked), of their blocks and of the tiles' blocks. Exact while
    the whole range is below 2**29. As long as there are no tiles, `each` depends on neither n_slot nor INT_COST: the
    shares are the full cache's.
    """
    n_full = tl.minimum(n_token, n_slot).to(tl.int32)
    int_blocks = n_full * 0
    if HAS_INT:
        int_blocks = n_left // INT_BLOCK
    float_blocks = tl.cdiv(n_full, FLOAT_BLOCK)
    work = float_blocks + int_blocks * INT_COST
    each = ((work + n_split - 1).to(tl.uint32) // n_split.to(tl.uint32)).to(tl.int32)  # unsigned: half as long
    return each, n_full, float_blocks, int_blocks


@triton.jit
def first_tile_block(at, float_blocks, int_blocks, INT_COST: tl.constexpr):
    """The first block of a tile that begins at `at` of the range of work or after."""
    tile_at = tl.maximum(at - float_blocks + (INT_COST - 1), 0).to(tl.uint32) // INT_COST
    return tl.minimum(tile_at.to(tl.int32), int_blocks)


@triton.jit
def first_blocks(split, each, float_blocks, int_blocks, INT_COST: tl.constexpr):
    """Where the shares of `split` and of all programs after it begin: a block of slots and a block of tiles."""
    at = split * each
    return tl.minimum(at, float_blocks), first_tile_block(at, float_blocks, int_blocks, INT_COST)


@triton.jit
def written(entry, each, float_blocks, int_blocks, INT_COST: tl.constexpr):
    """Whether a partial result stands at `entry`: that of the slots of program `entry` or of the tiles of the one
    before. There are never both: tiles come after all slots. `combine_kernel` has no time for more than this.
    """
    at = entry * each
    slots = (entry >= 0) & (at < float_blocks)
    block = first_tile_block(at - each, float_blocks, int_blocks, INT_COST)
    return slots | ((block < int_blocks) & (block * INT_COST + float_blocks < at))


@triton.jit
def fetch(start, end, N_BYTES: tl.constexpr):
    """Prefetch about N_BYTES from `start` on into L2, nothing from `end` on. start, end: pointers."""
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(N_BYTES, 128))
    prefetch(tl.minimum(start.to(tl.int64) + tl.arange(0, LINES) * 128, end.to(tl.int64) - 1))
