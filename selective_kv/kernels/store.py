"""Writing to the cache in Triton: new tokens into their slots, whole tiles that have left the window into integers.

A tile is quantised once: from its slots before the step that pushes its last token out of the window (`close`) or the
chunk that does (`evict`), or straight from the chunk it came with (`store_chunk`). Bit for bit as in `formats.py`, but
where a sum is made: after a rotation or in a token's norm the last bit may tip a rounding.
How a tile is quantised: `close.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from selective_kv.formats import TILE as TILE_TOKENS
from selective_kv.kernels.basics import INTERPRET, TILE, prefetch
from selective_kv.kernels.close import blocks_of, close_keys, close_values
from selective_kv.kernels.decode_config import processor
from selective_kv.kernels.launch import launch
from selective_kv.kernels.operands import bias_operands, rotations, stored_bits, tile_operands
from selective_kv.regions import N_ADDRESS, LayerGroup, Regions

ADDRESSES = tl.constexpr(N_ADDRESS)  # entries of a layer in `LayerGroup.offsets`


@triton.jit(do_not_specialize=["sink_size", "n_slot"])
def append_kernel(
    k_new, v_new, k, v, positions, new_stride_kb, new_stride_kh, new_stride_vb, new_stride_vh,
    slot_stride_b, slot_stride_h, sink_size, n_slot, HEAD_DIM: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (KV head, sequence, 0 for K and 1 for V): write the new token into its slot.

    Only a load and a store follow the PDL wait. EARLY: the PDL trigger comes at the top, so that the splits become
    resident meanwhile; otherwise after the wait.
    """
    if OVERLAP and EARLY:
        gdc_launch_dependents()
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pos = tl.load(positions + batch).to(tl.int32)
    slot = slot_of(pos, sink_size, n_slot).to(tl.int64)
    slot_at = batch * slot_stride_b + head * slot_stride_h + slot * HEAD_DIM
    if tl.program_id(2) == 0:
        new, slots = k_new + batch * new_stride_kb + head * new_stride_kh, k + slot_at
    else:
        new, slots = v_new + batch * new_stride_vb + head * new_stride_vh, v + slot_at
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    if OVERLAP:
        settle(new)
        settle(slots)
        gdc_wait()
    if OVERLAP and not EARLY:
        gdc_launch_dependents()  # not before: splits must find all SMs equally free, or they crowd onto some
    there = d < HEAD_DIM
    tl.store(slots + d, tl.load(new + d, there).to(slots.dtype.element_ty), there)


@triton.jit
def slot_of(pos, sink_size, n_slot):
    """The slot of the token at a position, int32: as `Regions.slot`."""
    # unsigned and of 32 bits: a division of 64 bits is ten times as long
    in_ring = (pos - sink_size).to(tl.uint32) % (n_slot - sink_size).to(tl.uint32)
    return tl.where(pos < n_slot, pos, sink_size + in_ring.to(tl.int32))


@triton.jit
def settle(at):
    """Have a scalar address computed, and its page translated (TLB), before the PDL wait: the compiler would otherwise
    sink the arithmetic below the wait, to where the address is used.
    """
    prefetch(at)


def append(regions: Regions, k: Tensor, v: Tensor, positions: Tensor, early: bool = False) -> None:
    """Write one token per sequence.

    k, v: [batch, n_kv_head, head_dim]; positions: int64 [batch], below 2**31, where the new tokens stand. early: the
    launch after this one may begin while this waits for its token, see `decode_config.early`.

    With PDL `positions` are read before the wait for the launch ahead, so a launch without PDL, which starts when all
    before it have ended, must stand between whatever writes them and this: a step's sampling is such.
    """
    batch, n_kv_head, head_dim = k.shape
    assert k.stride(2) == v.stride(2) == 1 and positions.is_contiguous()
    here = processor(k.device)
    launch(append_kernel, (n_kv_head, batch, 2))(
        k, v, regions.k, regions.v, positions, *k.stride()[:2], *v.stride()[:2], *regions.k.stride()[:2],
        regions.sink_size, regions.k.shape[2], HEAD_DIM=head_dim,
        EARLY=early,
        OVERLAP=here.overlap, launch_pdl=here.overlap, num_warps=1,
    )  # fmt: skip


def flags_of(regions: Regions) -> dict[str, int]:
    """What kernels that quantise are told when they are compiled."""
    k_bits, v_bits = stored_bits(regions)
    keys, values, n_warp = blocks_of(regions.k.shape[3])
    return {
        "HEAD_DIM": regions.k.shape[3], "K_BITS": k_bits, "V_BITS": v_bits,
        "BALANCED": regions.k_format is not None and regions.k_format.balanced, **rotations(regions),
        "PAIRS": bias_operands(regions)[1], "K_ROWS": keys, "V_ROWS": values, "INTERPRET": INTERPRET,
        "num_warps": n_warp, "num_stages": 1,
    }  # fmt: skip


def blocks(regions: Regions) -> int:
    """Programs that share a tile of keys, or of values: the larger number."""
    keys, values, _ = blocks_of(regions.k.shape[3])
    return max(triton.cdiv(regions.k.shape[3], keys), TILE_TOKENS // values)


@triton.jit(do_not_specialize=["n_layer", "batch", "n_kv_head", "n_tile", "sink_size", "window_size", "n_slot"])
def close_kernel(
    k, v, k_codes, v_codes, k_scale, v_scale, k_factor, bias_pairs, bias_within, bias_turned, offsets, rotation,
    positions, slot_stride_b, slot_stride_h, n_layer, batch, n_kv_head, n_tile, sink_size, window_size, n_slot,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BALANCED: tl.constexpr,
    K_ROTATION: tl.constexpr, V_ROTATION: tl.constexpr, PAIRS: tl.constexpr, K_ROWS: tl.constexpr,
    V_ROWS: tl.constexpr, SEQUENCES: tl.constexpr, BLOCKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The programs share the blocks of all tiles that close, of every layer and KV head, keys and values; where none
    closes they return at once. Pointers: of the first layer; offsets: see `LayerGroup`. SEQUENCES: at least batch.
    """
    row = tl.arange(0, SEQUENCES)
    left = tl.load(positions + row, row < batch, 0).to(tl.int32) + 1 - sink_size - window_size
    closing = (left > 0) & (left % TILE == 0) & (row < batch)
    if tl.max(closing.to(tl.int32), 0) == 0:
        return
    n_item = n_layer * n_kv_head * (2 * BLOCKS)
    for b in range(batch):
        sequence = (batch * 0 + b).to(tl.int64)  # a tensor, in the interpreter too
        pos = tl.load(positions + sequence).to(tl.int32)
        n_left = pos + 1 - sink_size - window_size
        if (n_left > 0) & (n_left % TILE == 0):
            tile = n_left // TILE - 1
            first_pos = sink_size + tile * TILE
            for item in range(tl.program_id(0), n_item, tl.num_programs(0)):
                block, one = item // 2 % BLOCKS, item // (2 * BLOCKS)
                head, layer = (one % n_kv_head).to(tl.int64), offsets + one // n_kv_head * ADDRESSES
                slot_at = sequence * slot_stride_b + head * slot_stride_h
                tile_at = (sequence * n_kv_head + head) * n_tile + tile
                if item % 2 == 0:
                    if block * K_ROWS < HEAD_DIM:
                        close_keys(
                            moved(k, layer) + slot_at, k, 0, rotation,
                            moved(k_codes, layer + 2) + tile_at * (TILE * HEAD_DIM * K_BITS // 8),
                            moved(k_scale, layer + 4) + tile_at * HEAD_DIM,
                            moved(k_factor, layer + 6) + tile_at * (TILE // 2), first_pos, block, pos, sink_size,
                            n_slot - sink_size, moved(bias_pairs, layer + 7) + head * PAIRS,
                            moved(bias_within, layer + 8) + head * (2 * PAIRS * TILE),
                            moved(bias_turned, layer + 9) + (head * n_tile + tile) * (2 * PAIRS),
                            HEAD_DIM, K_ROWS, K_BITS, K_ROTATION, BALANCED, False, PAIRS, INTERPRET,
                        )  # fmt: skip
                elif block * V_ROWS < TILE:
                    close_values(
                        moved(v, layer + 1) + slot_at, v, 0, rotation,
                        moved(v_codes, layer + 3) + tile_at * (TILE * HEAD_DIM * V_BITS // 8),
                        moved(v_scale, layer + 5) + tile_at * TILE, first_pos, block, pos, sink_size,
                        n_slot - sink_size, HEAD_DIM, V_ROWS, V_BITS, V_ROTATION, False, INTERPRET,
                    )  # fmt: skip


@triton.jit
def moved(at, offset):
    """A pointer to the first layer's memory as one to another's: allocations begin at multiples of 16 elements."""
    return at + tl.multiple_of(tl.load(offset), 16)


def close(group: LayerGroup, positions: Tensor) -> None:
    """Before the tokens at `positions`, int64 [batch], are appended: quantise, in every layer, the tiles whose last
    tokens they push out of the window. One launch, without PDL.
    """
    regions = group.first
    if regions.k_tiles is None:
        return
    assert positions.is_contiguous()
    batch, n_kv_head = regions.k.shape[:2]
    stored, each = tile_operands(regions), blocks(regions)
    n_layer = len(group.offsets)
    rotation = regions.k if regions.rotation is None else regions.rotation
    n_program = min(n_layer * n_kv_head * 2 * each * batch, 2 * processor(regions.k.device).multiprocessors)
    launch(close_kernel, (n_program,))(
        regions.k, regions.v, *stored, *bias_operands(regions)[0], group.offsets, rotation, positions,
        *regions.k.stride()[:2], n_layer, batch, n_kv_head, stored[0].shape[2], regions.sink_size,
        regions.window_size, regions.k.shape[2], **flags_of(regions), SEQUENCES=triton.next_power_of_2(batch),
        BLOCKS=each,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "first_tile", "n_tile", "n_kv_head", "sink_size", "n_slot"])
def close_chunk_kernel(
    chunk_k, chunk_v, k, v, k_codes, v_codes, k_scale, v_scale, k_factor, rotation,
    bias_pairs, bias_within, bias_turned, start, first_tile,
    k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, slot_stride_b, slot_stride_h,
    n_tile, n_kv_head, sink_size, n_slot,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BALANCED: tl.constexpr,
    K_ROTATION: tl.constexpr, V_ROTATION: tl.constexpr, PAIRS: tl.constexpr, K_ROWS: tl.constexpr,
    V_ROWS: tl.constexpr, BLOCKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of a tile, sequence and KV head, 0 for K and 1 for V): tiles from first_tile on, whose tokens are
    in their slots if they are older than `start`, and in the chunk that begins there if not.
    """
    one = tl.program_id(1)
    batch, head = (one // n_kv_head).to(tl.int64), (one % n_kv_head).to(tl.int64)
    tile, block = first_tile + tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    first_pos = sink_size + tile * TILE
    slot_at = batch * slot_stride_b + head * slot_stride_h
    tile_at = one.to(tl.int64) * n_tile + tile
    if tl.program_id(2) == 0:
        if block * K_ROWS < HEAD_DIM:
            close_keys(
                k + slot_at, chunk_k + batch * k_stride_b + head * k_stride_h, k_stride_t, rotation,
                k_codes + tile_at * (TILE * HEAD_DIM * K_BITS // 8), k_scale + tile_at * HEAD_DIM,
                k_factor + tile_at * (TILE // 2), first_pos, block, start, sink_size, n_slot - sink_size,
                bias_pairs + head * PAIRS, bias_within + head * (2 * PAIRS * TILE),
                bias_turned + (head * n_tile + tile) * (2 * PAIRS),
                HEAD_DIM, K_ROWS, K_BITS, K_ROTATION, BALANCED, True, PAIRS, INTERPRET,
            )  # fmt: skip
    elif block * V_ROWS < TILE:
        close_values(
            v + slot_at, chunk_v + batch * v_stride_b + head * v_stride_h, v_stride_t, rotation,
            v_codes + tile_at * (TILE * HEAD_DIM * V_BITS // 8), v_scale + tile_at * TILE, first_pos, block, start,
            sink_size, n_slot - sink_size, HEAD_DIM, V_ROWS, V_BITS, V_ROTATION, True, INTERPRET,
        )  # fmt: skip


@triton.jit(do_not_specialize=["start", "end", "n_sink", "first_kept", "n_kv_head", "sink_size", "n_slot"])
def slots_kernel(
    chunk_k, chunk_v, k, v, start, end, n_sink, first_kept,
    k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, slot_stride_b, slot_stride_h,
    n_kv_head, sink_size, n_slot, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of kept tokens, sequence and KV head): write them into their slots.

    Of the chunk's tokens, positions start to end - 1, the first n_sink are kept (they are sinks) and those from
    first_kept on.
    """
    batch, head = (tl.program_id(1) // n_kv_head).to(tl.int64), (tl.program_id(1) % n_kv_head).to(tl.int64)
    kept = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pos = tl.where(kept < n_sink, start + kept, first_kept + kept - n_sink)
    slot = tl.where(kept < n_sink, pos, sink_size + (pos - sink_size) % (n_slot - sink_size))
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    wanted = (pos < end)[:, None] & (d < HEAD_DIM)
    k_at = batch * k_stride_b + head * k_stride_h + (pos - start)[:, None] * k_stride_t + d
    v_at = batch * v_stride_b + head * v_stride_h + (pos - start)[:, None] * v_stride_t + d
    slot_at = batch * slot_stride_b + head * slot_stride_h + slot[:, None] * HEAD_DIM + d
    tl.store(k + slot_at, tl.load(chunk_k + k_at, wanted, 0.0).to(k.dtype.element_ty), wanted)
    tl.store(v + slot_at, tl.load(chunk_v + v_at, wanted, 0.0).to(v.dtype.element_ty), wanted)


SLOTS = 16  # tokens per program
MOST_REGISTERS = 128  # of a thread that quantises a chunk, so that an SM has two programs: 14% faster, spills and all


def close_tiles(regions: Regions, k: Tensor, v: Tensor, start: int, first: int, end: int) -> None:
    """Quantise the tokens at positions sink_size + first to sink_size + end - 1, whole tiles. Those from `start` on are
    in k, v [batch, n_kv_head, token, head_dim], older ones in their slots."""
    if first >= end or regions.k_tiles is None:
        return
    assert k.stride(3) == v.stride(3) == 1
    batch, n_kv_head = k.shape[:2]
    stored = tile_operands(regions)
    rotation = regions.k if regions.rotation is None else regions.rotation
    each = blocks(regions)
    launch(close_chunk_kernel, ((end - first) // TILE_TOKENS * each, batch * n_kv_head, 2))(
        k, v, regions.k, regions.v, *stored, rotation, *bias_operands(regions)[0], start, first // TILE_TOKENS,
        *k.stride()[:3], *v.stride()[:3], *regions.k.stride()[:2], stored[0].shape[2],
        n_kv_head, regions.sink_size, regions.k.shape[2], **flags_of(regions), BLOCKS=each, maxnreg=MOST_REGISTERS,
    )  # fmt: skip


def evict(regions: Regions, start: int) -> None:
    """Before a chunk: quantise the tile that position `start` pushes out of the window, if it does."""
    # from its slots: no chunk is read
    close_tiles(regions, regions.k, regions.v, start, regions.n_left(start), regions.n_left(start + 1))


def store_chunk(regions: Regions, k: Tensor, v: Tensor, start: int) -> None:
    """After attention over a chunk: quantise the tiles that have left the window, keep the tokens that have not.

    k, v: [batch, n_kv_head, token, head_dim], the tokens at positions start, start + 1, ...
    `evict(regions, start)` came first. Two launches: every old token is read before a new one takes its slot.
    """
    sink = regions.sink_size
    batch, n_kv_head, n_token, head_dim = k.shape
    end = start + n_token
    n_left = regions.n_left(end)
    close_tiles(regions, k, v, start, regions.n_left(start + 1), n_left)
    n_sink = max(0, min(sink, end) - start)
    first_kept = max(start, sink + n_left)
    n_kept = n_sink + max(0, end - max(first_kept, sink))
    launch(slots_kernel, (triton.cdiv(n_kept, SLOTS), batch * n_kv_head))(
        k, v, regions.k, regions.v, start, end, n_sink, max(first_kept, sink),
        *k.stride()[:3], *v.stride()[:3], *regions.k.stride()[:2], n_kv_head, sink, regions.k.shape[2],
        HEAD_DIM=head_dim, BLOCK=SLOTS, num_warps=4,
    )  # fmt: skip
