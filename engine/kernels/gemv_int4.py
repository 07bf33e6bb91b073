"""A decode step's matrix products for one token where weights are integers of 4 bits in groups of 128: matrix units.

`gemv_integers.py` needs 72 instructions for 16 bytes of a row; with a matrix unit it is 27. `mma.m16n8k32` multiplies
16 rows of 32 int8 by 32 rows of 8, exactly, in int32:

- 16 rows are as many rows of the weight, or (SPLIT 2) 8 rows in two halves each, which makes smaller programs. Nibbles
  become int8 in their register: low ones as u, high ones as 16 * (u - 8), which takes one instruction and no shift.
- 8 columns are the token: four groups of it, in two int8 terms each (`gemv_integers.py` has them). A block of 64 bytes
  of a row is one group, and of its product the two columns of that group are kept. So the sums of four groups are in
  four lanes when groups' scales multiply them.

A part of a row is four groups, 512 elements. Each part has a warp, and the warps' sums are added once for 16 rows.

**Lanes.** PTX defines which lane holds what of an operand: lane 4 * g + t has bytes of row g, row g + 8 and column g.
Which bytes of them is free, as long as both operands agree; here they are 16 consecutive ones, one wide load. Triton
distributes a tensor [8 * parts, 16 words] just so, but does not promise it: the assembly compares the lane that it runs
in with the one that it expects, and traps if they differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.epilogue import Around, finish, load_epilogue, rows_of
from engine.kernels.gemv_integers import byte, halves, words_of
from engine.kernels.token_columns import load_token, token_columns
from selective_kv.kernels.basics import INTERPRET, prefetch
from selective_kv.kernels.decode_config import processor
from selective_kv.kernels.launch import launch
from weights.modules import QuantizedWeight

GROUP = 128
PART = 512  # elements of a row that a warp has at a time: four groups
MOST_PARTS = 8  # a warp each; of longer rows `gemv_integers.py` was faster


@triton.jit
def block_product(low, high, even, odd, lane, PARTS: tl.constexpr, INTERPRET: tl.constexpr):
    """16 times the products of 16 rows' blocks of 64 bytes with the token's 8 columns.

    low, high: int32 [8 * PARTS, 16], of rows g and g + 8; even, odd: the columns' terms that meet low and high nibbles,
    less 8 for the latter. lane: of [8 * PARTS, 16], the lane that must have an element. Returns int32 [8 * PARTS, 16]:
    of row g its column 2t and 2t + 1, then of row g + 8, for t of 0 to 3.
    """
    if INTERPRET:
        low_rows, high_rows = tl.reshape(low, (PARTS, 8, 1, 16)), tl.reshape(high, (PARTS, 8, 1, 16))
        even, odd = tl.reshape(even, (PARTS, 1, 8, 16)), tl.reshape(odd, (PARTS, 1, 8, 16))
        first = tl.zeros((PARTS, 8, 8), tl.int32)
        second = tl.zeros((PARTS, 8, 8), tl.int32)
        for n in tl.static_range(4):
            e, o = 16 * byte(even, n), 16 * byte(odd, n)
            first += tl.sum(((low_rows >> (8 * n)) & 15) * e + (((low_rows >> (8 * n + 4)) & 15) - 8) * o, 3)
            second += tl.sum(((high_rows >> (8 * n)) & 15) * e + (((high_rows >> (8 * n + 4)) & 15) - 8) * o, 3)
        both = tl.reshape(tl.join(first, second), (PARTS, 8, 4, 2, 2))
        product = tl.reshape(tl.permute(both, (0, 1, 2, 4, 3)), (8 * PARTS, 16))
    else:
        product = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a<4>, u<4>, v<4>, here;
            .reg .pred elsewhere;
            mov.u32 here, %laneid;
            setp.ne.u32 elsewhere, here, $20;
            @elsewhere trap;
            and.b32 a0, $4, 0x0F0F0F0F;
            and.b32 a1, $8, 0x0F0F0F0F;
            and.b32 a2, $5, 0x0F0F0F0F;
            and.b32 a3, $9, 0x0F0F0F0F;
            mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
                {u0, u1, u2, u3}, {a0, a1, a2, a3}, {$12, $13}, {0, 0, 0, 0};
            and.b32 a0, $6, 0x0F0F0F0F;
            and.b32 a1, $10, 0x0F0F0F0F;
            and.b32 a2, $7, 0x0F0F0F0F;
            and.b32 a3, $11, 0x0F0F0F0F;
            mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
                {u0, u1, u2, u3}, {a0, a1, a2, a3}, {$14, $15}, {u0, u1, u2, u3};
            lop3.b32 a0, $4, 0xF0F0F0F0, 0x80808080, 0x6A;
            lop3.b32 a1, $8, 0xF0F0F0F0, 0x80808080, 0x6A;
            lop3.b32 a2, $5, 0xF0F0F0F0, 0x80808080, 0x6A;
            lop3.b32 a3, $9, 0xF0F0F0F0, 0x80808080, 0x6A;
            mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
                {v0, v1, v2, v3}, {a0, a1, a2, a3}, {$16, $17}, {0, 0, 0, 0};
            lop3.b32 a0, $6, 0xF0F0F0F0, 0x80808080, 0x6A;
            lop3.b32 a1, $10, 0xF0F0F0F0, 0x80808080, 0x6A;
            lop3.b32 a2, $7, 0xF0F0F0F0, 0x80808080, 0x6A;
            lop3.b32 a3, $11, 0xF0F0F0F0, 0x80808080, 0x6A;
            mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
                {v0, v1, v2, v3}, {a0, a1, a2, a3}, {$18, $19}, {v0, v1, v2, v3};
            mad.lo.s32 $0, u0, 16, v0;
            mad.lo.s32 $1, u1, 16, v1;
            mad.lo.s32 $2, u2, 16, v2;
            mad.lo.s32 $3, u3, 16, v3;
            }
            """,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [low, high, even, odd, lane],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    return product


@triton.jit
def prefetch_rows(ints, first, apart, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Prefetch into L2 8 rows from `first` on and, of 16 ROWS, 8 more that are `apart` from these. ints: int32 [n,
    WORDS].
    """
    row = tl.arange(0, ROWS)[:, None]
    line = tl.arange(0, triton.next_power_of_2((WORDS + 31) // 32))[None, :]
    prefetch(ints + (first + row % 8 + row // 8 * apart).to(tl.int64) * WORDS + tl.minimum(line * 32, WORDS - 1))


@triton.jit
def load_weights(at, to_high, inside, SPLIT: tl.constexpr, MASKED: tl.constexpr):
    """Blocks of 64 bytes of rows g and of rows g + 8, one pair after the other: 4 pairs, or (SPLIT 2) 2 and these
    again."""
    l0, h0 = words_of(at, inside, MASKED), words_of(at + to_high, inside, MASKED)
    l1, h1 = words_of(at + 16, inside, MASKED), words_of(at + (to_high + 16), inside, MASKED)
    l2, h2, l3, h3 = l0, h0, l1, h1
    if SPLIT == 1:
        l2, h2 = words_of(at + 32, inside, MASKED), words_of(at + (to_high + 32), inside, MASKED)
        l3, h3 = words_of(at + 48, inside, MASKED), words_of(at + (to_high + 48), inside, MASKED)
    return l0, h0, l1, h1, l2, h2, l3, h3


@triton.jit
def row_sums(
    weights, at, to_high, inside, scales, scales_high, even, odd, lane, step, eight, sums,
    PARTS: tl.constexpr, SPLIT: tl.constexpr, MASKED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The products of 16 / SPLIT rows with the token, but for the rows' units: rows g, and rows g + 8 (SPLIT 2: the
    same again); and the next weights, at `at`, whose loads take the place of what has been multiplied.

    scales, scales_high: int32 [PARTS, 8, 4], the groups' scales and bases.
    """
    l0, h0, l1, h1, l2, h2, l3, h3 = weights
    column = tl.arange(0, 16)[None, :] // 4  # of four groups
    c = block_product(l0, h0, even, odd, lane, PARTS, INTERPRET)
    l0, h0 = words_of(at, inside, MASKED), words_of(at + to_high, inside, MASKED)
    c = tl.where(column % (4 // SPLIT) == 1, block_product(l1, h1, even, odd, lane, PARTS, INTERPRET), c)
    l1, h1 = words_of(at + 16, inside, MASKED), words_of(at + (to_high + 16), inside, MASKED)
    if SPLIT == 1:
        c = tl.where(column == 2, block_product(l2, h2, even, odd, lane, PARTS, INTERPRET), c)
        l2, h2 = words_of(at + 32, inside, MASKED), words_of(at + (to_high + 32), inside, MASKED)
        c = tl.where(column == 3, block_product(l3, h3, even, odd, lane, PARTS, INTERPRET), c)
        l3, h3 = words_of(at + 48, inside, MASKED), words_of(at + (to_high + 48), inside, MASKED)
    hi, lo = tl.split(tl.reshape(c, (PARTS, 8, 4, 2, 2)))
    low, high = tl.split((hi * 254 + lo).to(tl.float32))  # [PARTS, 8, 4]
    scale, base = halves(scales, True)
    if SPLIT == 2:  # the first two groups are of rows g, the others of rows g + 8
        low = tl.where(tl.arange(0, 4)[None, None, :] < 2, low, high)
    y = tl.sum((low * step + eight) * scale + base * sums, 2)
    if SPLIT == 1:
        scale, base = halves(scales_high, True)
        y, other = over_warps(tl.join(y, tl.sum((high * step + eight) * scale + base * sums, 2)), PARTS)
    else:
        y, other = over_warps(tl.join(y, y), PARTS)
    return y, other, (l0, h0, l1, h1, l2, h2, l3, h3)


@triton.jit
def over_warps(value, PARTS: tl.constexpr):
    """The sums over parts of [PARTS, 8, 2]: two of [8].

    Two warps' go to one thread and the others' to its neighbours: warps meet once for that, and twice in a `tl.sum`.
    """
    if PARTS > 1:
        value = tl.permute(tl.reshape(value, (PARTS // 2, 2, 8, 2)), (2, 3, 0, 1))
        value, other = tl.split(value)
        value = tl.sum(value + other, 2)
    else:
        value = tl.reshape(value, (8, 2))
    return tl.split(value)


@triton.jit
def load_scales(at, to_high, inside, SPLIT: tl.constexpr):
    """Scales and bases of rows g, and of rows g + 8 (SPLIT 1; else the same)."""
    scales = tl.load(at, inside, 0)
    scales_high = scales
    if SPLIT == 1:
        scales_high = tl.load(at + to_high, inside, 0)
    return scales, scales_high


@triton.jit(do_not_specialize=["n_out", "n_unit", "n_turned", "repeats"])
def int4_kernel(
    x, ints, row_scale, pairs, bias, norm, residual, cos, sin, out, n_out, n_unit, n_turned, repeats, eps,
    K: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, NORM: tl.constexpr, SWIGLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    FLOAT16: tl.constexpr, OVERLAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program: `repeats` times as many units as 16 / SPLIT rows have, for one token.

    x, norm: [K / 2] int32, two 16-bit floats each; ints: int32 [n_row, WORDS]; row_scale: float32 [n_row]; pairs: int32
    [n_row, n_group], scale and base in float16.
    """
    if OVERLAP:
        gdc_launch_dependents()
    PAIRED: tl.constexpr = SWIGLU or HEAD_DIM > 0  # rows g are first ones of 8 units, rows g + 8 second ones
    N_GROUP: tl.constexpr = (K + 127) // 128
    WORDS: tl.constexpr = N_GROUP * 16
    UNITS: tl.constexpr = 8 if PAIRED else 16 // SPLIT
    MASKED: tl.constexpr = PARTS * 64 > WORDS
    i, word = tl.arange(0, 8 * PARTS)[:, None], tl.arange(0, 16)[None, :]
    g, p = i % 8, i // 8
    lane = 4 * g + word // 4
    start = tl.program_id(0) * (UNITS * repeats)
    first, apart = rows_of(tl.minimum(start, n_unit - UNITS), n_out, HEAD_DIM, SWIGLU)
    rows_apart = apart if PAIRED else apart + (8 if SPLIT == 1 else 0)
    to_high = rows_apart * WORDS + (0 if SPLIT == 1 else 32)
    offset = g * WORDS + p * 64 + word
    inside = (p * 64 < WORDS) & (word >= 0)
    part, scale_row = tl.arange(0, PARTS)[:, None, None], tl.arange(0, 8)[None, :, None]
    group = 4 * part + tl.arange(0, 4)[None, None, :]
    scale_offset, scale_inside = scale_row * N_GROUP + group, (group < N_GROUP) & (scale_row >= 0)
    weights = load_weights(ints + first.to(tl.int64) * WORDS + offset, to_high, inside, SPLIT, MASKED)
    scales_at = pairs + first.to(tl.int64) * N_GROUP + scale_offset
    scales, scales_high = load_scales(scales_at, rows_apart * N_GROUP, scale_inside, SPLIT)
    if OVERLAP:
        gdc_wait()
    loaded = load_token(x, norm, K, PARTS, NORM)
    if OVERLAP:  # not before: the token would stand behind them
        second = tl.minimum(start + tl.minimum(1, repeats - 1) * UNITS, n_unit - UNITS)
        second = rows_of(second, n_out, HEAD_DIM, SWIGLU)[0]
        prefetch_rows(ints, second, rows_apart, 16 // SPLIT, WORDS)
    even, odd, step, eight, sums, scale = token_columns(loaded, lane, eps, K, PARTS, NORM, FLOAT16, INTERPRET)
    for n in range(repeats):
        first, _ = rows_of(tl.minimum(start + n * UNITS, n_unit - UNITS), n_out, HEAD_DIM, SWIGLU)
        row = first + tl.arange(0, UNITS)
        there = row < n_out
        epilogue = load_epilogue(bias, residual, cos, sin, row, apart, row, 0, n_turned, there, HEAD_DIM, BIAS, ADD)
        own_scale = tl.load(row_scale + row)
        other_scale = own_scale
        if PAIRED:
            other_scale = tl.load(row_scale + row + apart)
        # Behind the last rows come the last again: a mask would cost more than reading the L2.
        ahead = tl.minimum(start + tl.minimum(n + 1, repeats - 1) * UNITS, n_unit - UNITS)
        first_ahead = rows_of(ahead, n_out, HEAD_DIM, SWIGLU)[0].to(tl.int64)
        y, other, weights = row_sums(
            weights, ints + first_ahead * WORDS + offset, to_high, inside, scales, scales_high, even, odd, lane, step,
            eight, sums, PARTS, SPLIT, MASKED, INTERPRET,
        )  # fmt: skip
        scales_at = pairs + first_ahead * N_GROUP + scale_offset
        scales, scales_high = load_scales(scales_at, rows_apart * N_GROUP, scale_inside, SPLIT)
        if not PAIRED and SPLIT == 1:
            y = tl.reshape(tl.permute(tl.join(y, other), (1, 0)), (16,))
            other = y
        finish(
            y * own_scale, other * other_scale, scale, epilogue, out, row, apart, there, HEAD_DIM, SWIGLU, BIAS, ADD
        )  # fmt: skip


class Plan(NamedTuple):
    """What a program of `int4_kernel` takes on."""

    split: int  # parts of a row that are rows of the matrix unit: 1, or 2 where a unit of the output has one row
    repeats: int  # of 16 rows, one after the other
    warps: int


def units(paired: bool, split: int) -> int:
    """Units of the output that a program computes at a time."""
    return 8 if paired else 16 // split


def plan(n_unit: int, k: int, paired: bool, n_processor: int) -> Plan:
    """What measured best on an H100 for Llama 8B's shapes (LOG.md, 2026-11-26): 16 warps an SM, all at once."""
    split = 1 if paired or n_unit > 64 * n_processor else 2
    warps = min(8, parts_of(k))
    return Plan(split, triton.cdiv(n_unit, units(paired, split) * n_processor * (16 // warps)), warps)


def parts_of(k: int) -> int:
    """Parts of a row, filled up to a power of two."""
    return triton.next_power_of_2(triton.cdiv(k, PART))


def int4_fits(x: Tensor, weight: QuantizedWeight, around: Around) -> bool:
    """Whether `run_int4` is for this token: 16-bit activations, groups of 128, rows for the matrix unit, and a GPU on
    which it was measured (compute capability 9.0 and later). Operands that are not aligned would be loaded in smaller
    parts, and by other lanes.
    """
    n, k = weight.shape
    if (x.data_ptr() | weight.ints.data_ptr()) % 16:
        return False
    fits = weight.bits == 4 and weight.group == GROUP and k % 16 == 0 and parts_of(k) <= MOST_PARTS and n >= 16
    if around.turn is not None:
        fits = fits and around.turn.cos.shape[1] % 16 == 0
    return len(x) == 1 and x.element_size() == 2 and fits and (INTERPRET or processor(x.device).overlap)


def run_int4(x: Tensor, weight: QuantizedWeight, around: Around, p: Plan) -> Tensor:
    """The product of one token by a given plan. x: [1, k]; returns [1, n_out]."""
    around.check(x, weight.ints)
    assert weight.pairs is not None and (p.split == 1 or not around.paired)
    overlap = processor(x.device).overlap
    n_out, n_unit = around.n_out(weight.ints), around.n_unit(weight.ints)
    out = torch.empty(1, n_out, dtype=x.dtype, device=x.device)
    bias, norm, residual, cos, sin = around.pointers(x)
    launch(int4_kernel, (triton.cdiv(n_unit, units(around.paired, p.split) * p.repeats),))(
        x.view(torch.int32), weight.ints.view(torch.int32), weight.scale, weight.pairs.view(torch.int32), bias,
        norm.view(torch.int32), residual, cos, sin, out, n_out, n_unit, around.n_turned, p.repeats, around.eps,
        K=x.shape[1], PARTS=parts_of(x.shape[1]), SPLIT=p.split, **around.constants,
        FLOAT16=x.dtype == torch.float16, OVERLAP=overlap, INTERPRET=INTERPRET, launch_pdl=overlap, num_warps=p.warps,
    )  # fmt: skip
    return out
