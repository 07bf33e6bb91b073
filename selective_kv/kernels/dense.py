"""What a cache holds made dense in Triton, for the many queries of a chunk: tiles and slots become one block of keys
and values.

Tiles of rotated formats stay rotated; slots are rotated like them, and so are the queries (`rotated_heads`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from selective_kv.formats import TILE as TILE_TOKENS
from selective_kv.formats import rotation_size
from selective_kv.kernels.basics import INTERPRET, TILE
from selective_kv.kernels.hadamard import rotated_rows
from selective_kv.kernels.launch import launch
from selective_kv.kernels.merge import empty_output
from selective_kv.kernels.online_softmax import at_slot
from selective_kv.kernels.operands import rotations, stored_bits, tile_operands
from selective_kv.kernels.unpack import last_six_bits, scale_and_base
from selective_kv.regions import Regions

TILE_BLOCK = 32  # tokens of a tile that a program dequantises
SLOTS = 32  # tokens that a program copies


@triton.jit
def load_plane(plane, token, d, mask, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Integers of the tokens `token` [N] of a tile in one of its planes: int32 [N, D]."""
    N_ROW: tl.constexpr = TILE * BITS // 8
    byte = tl.load(plane + (token % N_ROW)[:, None] * HEAD_DIM + d[None, :], mask, 0).to(tl.int32)
    return (byte >> (token // N_ROW * BITS)[:, None]) & (2**BITS - 1)


@triton.jit
def load_planes_3(codes, token, d, mask, HEAD_DIM: tl.constexpr):
    """Integers of 3 bits of the tokens `token` [N] of a tile: int32 [N, D]."""
    at = codes + (token % 32)[:, None] * (HEAD_DIM // 2) + (d // 2)[None, :]
    a = tl.load(at, mask, 0).to(tl.int32)
    b = tl.load(at + 16 * HEAD_DIM, mask, 0).to(tl.int32)
    c = tl.load(at + 32 * HEAD_DIM, mask, 0).to(tl.int32)
    group = (token // 32)[:, None]
    six = tl.where(group == 0, a, tl.where(group == 1, b, tl.where(group == 2, c, last_six_bits(a, b, c))))
    return (six >> (3 * (d % 2))[None, :]) & 7


@triton.jit
def dequantized(
    codes, scales, factors, tile, token,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """The tokens `token` [N] of a tile of keys or of values, still rotated if they are: float32 [N, D]."""
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    mask = (token < TILE)[:, None] & (d < HEAD_DIM)[None, :]
    codes += tile * (TILE * HEAD_DIM * BITS // 8)
    if BITS == 3:
        u = load_planes_3(codes, token, d, mask, HEAD_DIM)
    else:
        u = load_plane(codes, token, d, mask, BITS, HEAD_DIM)
    if BITS == 8:
        u ^= 128
    if KEYS:
        scale, base = scale_and_base(tl.load(scales + tile * HEAD_DIM + d, d < HEAD_DIM, 0))
        x = base[None, :] + scale[None, :] * u.to(tl.float32)
    else:
        scale, base = scale_and_base(tl.load(scales + tile * TILE + token))
        x = base[:, None] + scale[:, None] * u.to(tl.float32)
    if BALANCED:
        low, high = scale_and_base(tl.load(factors + tile * (TILE // 2) + token % (TILE // 2)))
        x *= tl.where(token < TILE // 2, low, high)[:, None]
    return x


@triton.jit
def dequantize_one(
    codes, scales, factors, out, one, first_tile, n_tile, n_token,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr, BALANCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of tokens of K or of V; `one` counts sequences and KV heads."""
    n = tl.program_id(0) * BLOCK
    token = n % TILE + tl.arange(0, BLOCK)  # within the tile
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    tile = one * n_tile + first_tile + n // TILE
    x = dequantized(codes, scales, factors, tile, token, HEAD_DIM, BITS, KEYS, BALANCED)
    at = out + (one * n_token + n + tl.arange(0, BLOCK))[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, x.to(out.dtype.element_ty), (token < TILE)[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["first_tile", "n_tile", "n_token"])
def dequantize_kernel(
    k_codes, v_codes, k_scale, v_scale, k_factor, k, v, first_tile, n_tile, n_token,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BALANCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, sequence and KV head, 0 for K and 1 for V): tokens from first_tile on into the
    beginning of k, v [sequence, KV head, n_token, HEAD_DIM]."""
    one = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        dequantize_one(
            k_codes, k_scale, k_factor, k, one, first_tile, n_tile, n_token, HEAD_DIM, K_BITS, True, BALANCED, BLOCK
        )
    else:
        dequantize_one(
            v_codes, v_scale, k_factor, v, one, first_tile, n_tile, n_token, HEAD_DIM, V_BITS, False, False, BLOCK
        )


@triton.jit
def copy_one(
    slots, out, rotation, one, n_kv_head, slot, at, seen, slot_stride_b, slot_stride_h, n_token,
    HEAD_DIM: tl.constexpr, ROTATION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Copy the tokens in the slots `slot` [N] of K or V to the places `at` of a dense block; rotated, if ROTATION
    is above 1."""
    d = tl.arange(0, triton.next_power_of_2(max(HEAD_DIM, 16)))
    there = d < HEAD_DIM
    slots += one // n_kv_head * slot_stride_b + one % n_kv_head * slot_stride_h
    mask = seen[:, None] & there[None, :]
    x = tl.load(slots + slot[:, None] * HEAD_DIM + d[None, :], mask, 0.0)
    if ROTATION > 1:
        dtype: tl.constexpr = tl.float32 if INTERPRET else slots.dtype.element_ty
        x = rotated_rows(x, rotation, HEAD_DIM, ROTATION, dtype)
    tl.store(out + (one * n_token + at)[:, None] * HEAD_DIM + d[None, :], x.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=[
    "first", "n_held", "n_stored", "n_token", "n_kv_head", "sink_size", "oldest", "n_slot",
])  # fmt: skip
def copy_slots_kernel(
    k_slots, v_slots, rotation, k, v, slot_stride_b, slot_stride_h,
    first, n_held, n_stored, n_token, n_kv_head, sink_size, oldest, n_slot,
    HEAD_DIM: tl.constexpr, K_ROTATION: tl.constexpr, V_ROTATION: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, sequence and KV head, 0 for K and 1 for V): of the tokens in slots (`at_slot`) those
    from `first` on, into k, v [sequence, KV head, n_token, HEAD_DIM] behind n_stored others."""
    one = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot, at = at_slot(first + index, sink_size, oldest, n_slot), n_stored + index
    seen = (first + index < n_held) & (at < n_token)
    if tl.program_id(2) == 0:
        copy_one(
            k_slots, k, rotation, one, n_kv_head, slot, at, seen, slot_stride_b, slot_stride_h, n_token,
            HEAD_DIM, K_ROTATION, INTERPRET,
        )  # fmt: skip
    else:
        copy_one(
            v_slots, v, rotation, one, n_kv_head, slot, at, seen, slot_stride_b, slot_stride_h, n_token,
            HEAD_DIM, V_ROTATION, INTERPRET,
        )  # fmt: skip


def dense_history(regions: Regions, start: int, first: int, end: int) -> tuple[Tensor, Tensor]:
    """K and V, [batch, n_kv_head, token, head_dim] in the slots' dtype and rotated if the format is, of the tokens
    `first` to `end` - 1 in the order tiles, sinks, ring. start: tokens that are held. No tile may be cut."""
    batch, n_kv_head, _, head_dim = regions.k.shape
    k, v = (regions.k.new_empty(batch, n_kv_head, end - first, head_dim) for _ in "kv")
    n_left = regions.n_left(start + 1)
    n_stored = max(0, min(end, n_left) - first)
    if n_stored:
        k_bits, v_bits = stored_bits(regions)
        stored = tile_operands(regions)
        launch(dequantize_kernel, (n_stored // TILE_BLOCK, batch * n_kv_head, 2))(
            *stored, k, v, first // TILE_TOKENS, stored[0].shape[2], end - first, HEAD_DIM=head_dim, K_BITS=k_bits,
            V_BITS=v_bits, BALANCED=regions.k_format is not None and regions.k_format.balanced, BLOCK=TILE_BLOCK,
            num_warps=4,
        )  # fmt: skip
        if regions.key_bias is not None and regions.k_format is not None and not k.is_meta:
            which = slice(first // TILE_TOKENS, (first + n_stored) // TILE_TOKENS)
            k[:, :, :n_stored] += (
                regions.k_format.rotate(regions.key_bias.dense(which, head_dim)).flatten(1, 2).to(k.dtype)
            )
    if n_exact := end - first - n_stored:
        launch(copy_slots_kernel, (triton.cdiv(n_exact, SLOTS), batch * n_kv_head, 2))(
            regions.k, regions.v, regions.k if regions.rotation is None else regions.rotation, k, v,
            *regions.k.stride()[:2], max(first, n_left) - n_left, start - n_left, n_stored, end - first, n_kv_head,
            regions.sink_size, n_left % max(1, regions.ring_size), regions.k.shape[2],
            HEAD_DIM=head_dim, **rotations(regions), BLOCK=SLOTS, INTERPRET=INTERPRET, num_warps=4,
        )  # fmt: skip
    return k, v


@triton.jit(do_not_specialize=["n_token"])
def rotate_heads_kernel(
    x, out, rotation, n_token, x_stride_b, x_stride_h, x_stride_t, stride_b, stride_h, stride_t,
    HEAD_DIM: tl.constexpr, ROTATION: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, head, sequence): out is x, rotated."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, triton.next_power_of_2(max(HEAD_DIM, 16)))
    there = d < HEAD_DIM
    mask, row = (token < n_token)[:, None] & there[None, :], token[:, None].to(tl.int64)
    dtype: tl.constexpr = tl.float32 if INTERPRET else x.dtype.element_ty
    y = tl.load(x + batch * x_stride_b + head * x_stride_h + row * x_stride_t + d[None, :], mask, 0.0)
    y = rotated_rows(y, rotation, HEAD_DIM, ROTATION, dtype)
    at = out + batch * stride_b + head * stride_h + row * stride_t + d[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask)


def rotated_heads(x: Tensor, rotation: Tensor) -> Tensor:
    """`formats.rotate(x)` in x's dtype, [batch, n_head, token, head_dim], by matrix units: products with 1 and -1 are
    exact and their sums float32, so that it is rounded once. rotation: [head_dim, head_dim] of 1, -1 and 0."""
    batch, n_head, n_token, head_dim = x.shape
    out = empty_output(x, x.dtype)
    block = 32 if x.element_size() > 2 else 128
    launch(rotate_heads_kernel, (triton.cdiv(n_token, block), n_head, batch))(
        x, out, rotation, n_token, *x.stride()[:3], *out.stride()[:3], HEAD_DIM=head_dim,
        ROTATION=rotation_size(head_dim), BLOCK=block, INTERPRET=INTERPRET, num_warps=8,
    )  # fmt: skip
    return out
