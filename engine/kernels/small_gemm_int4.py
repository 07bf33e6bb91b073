"""A decode step's matrix products for 2 to 8 tokens where weights are integers of 4 bits in groups of 128.

`small_gemm_integers.py` brings weights and tokens through shared memory, a block of a row at a time. Here a warp keeps
its part of the tokens, 256 elements of each, in registers, as the matrix unit's second operand, for all rows that its
program multiplies one after the other. Weights go from memory to registers to the matrix unit (`gemv_int4.py` says in
which lanes). So an RMSNorm costs a program one multiplication of its operand, and no launch of its own.

`mma.m16n8k16` multiplies 16 rows by 8 tokens. A word of 8 nibbles gives pairs of neighbours along k, in the order of
`quantize.py`. Put into 128's mantissa (in float16 1024's) a nibble u is 128 + u, so that a group's product has 128
times its sum of activations too much. A program computes that number once, as the product of a constant with the
tokens, to subtract it again; the same number multiplies the group's base.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.epilogue import Around, finish, load_epilogue, rows_of
from engine.kernels.gemv_int4 import prefetch_rows
from engine.kernels.gemv_integers import halves, words_of
from selective_kv.kernels.basics import INTERPRET
from selective_kv.kernels.decode_config import processor
from selective_kv.kernels.launch import launch
from weights.modules import QuantizedWeight

GROUP = 128
PART = 256  # elements of a row that a warp has: two groups
MOST_PARTS = 16  # a warp each
MOST_TOKENS = 8  # columns of the matrix unit


def _multiply(kind: str, low: int, high: int, quarters: tuple[int, ...], constant: bool = False) -> str:
    """PTX: 8 matrix instructions for a group, into c0 to c3. low, high, quarters: the operands, of 4 words each, by the
    number of their first. constant: instead of nibbles, the offset that they are set under.
    """
    ones = "0x64006400" if kind == "f16" else "0x43004300"
    lines = ["mov.f32 c0, 0f00000000;", "mov.f32 c1, c0;", "mov.f32 c2, c0;", "mov.f32 c3, c0;"]
    for word in (0, 2):  # two words at a time: k from 2t on, and from 2t + 8 on
        words = low + word, high + word, low + word + 1, high + word + 1
        for n, quarter in enumerate(quarters):
            for a, w in enumerate(words):
                if constant:
                    lines.append(f"mov.b32 a{a}, {ones};")
                elif n == 0:
                    lines.append(f"lop3.b32 a{a}, ${w}, 0x000F000F, {ones}, 0xEA;")
                else:
                    lines.append(f"shr.u32 a{a}, ${w}, {4 * n};")
                    lines.append(f"lop3.b32 a{a}, a{a}, 0x000F000F, {ones}, 0xEA;")
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{c0, c1, c2, c3}}, {{a0, a1, a2, a3}}, "
                f"{{${quarter + word}, ${quarter + word + 1}}}, {{c0, c1, c2, c3}};"
            )
    return "\n".join(lines)


def _assembly(body: str, lane: int) -> str:
    """PTX: trap in a lane that is not operand `lane`; body; results from c0 to c3."""
    return f"""
        {{
        .reg .b32 a<4>, here;
        .reg .f32 c<4>;
        .reg .pred elsewhere;
        mov.u32 here, %laneid;
        setp.ne.u32 elsewhere, here, ${lane};
        @elsewhere trap;
        {body}
        mov.f32 $0, c0;
        mov.f32 $1, c1;
        mov.f32 $2, c2;
        mov.f32 $3, c3;
        }}
        """


def _product(kind: str) -> str:
    return _assembly(_multiply(kind, 4, 8, (12, 16, 20, 24)), 28)


def _offset(kind: str) -> str:
    return _assembly(_multiply(kind, 4, 4, (4, 8, 12, 16), True), 20)


PRODUCT_BF16, PRODUCT_F16 = tl.constexpr(_product("bf16")), tl.constexpr(_product("f16"))
OFFSET_BF16, OFFSET_F16 = tl.constexpr(_offset("bf16")), tl.constexpr(_offset("f16"))


@triton.jit
def products_of_rows(rows, x0, x1, x2, x3, PARTS: tl.constexpr, FLOAT16: tl.constexpr):
    """`group_product` of 8 rows in plain Triton: float32 [PARTS, 8 rows, 8 tokens]."""
    rows = tl.reshape(rows, (PARTS, 8, 1, 16))
    total = tl.zeros((PARTS, 8, 8), tl.float32)
    OFFSET: tl.constexpr = 1024.0 if FLOAT16 else 128.0
    for n in tl.static_range(4):
        x = x0 if n == 0 else (x1 if n == 1 else (x2 if n == 2 else x3))
        a, b = halves(tl.reshape(x, (PARTS, 1, 8, 16)), FLOAT16)
        u, v = ((rows >> (4 * n)) & 15).to(tl.float32), ((rows >> (4 * n + 16)) & 15).to(tl.float32)
        total += tl.sum((u + OFFSET) * a + (v + OFFSET) * b, 3)
    return total


@triton.jit
def in_lanes(first, second, PARTS: tl.constexpr):
    """[PARTS, 8 rows, 8 tokens] of rows g and g + 8 as the matrix unit returns them, [8 * PARTS, 16]."""
    both = tl.reshape(tl.join(first, second), (PARTS, 8, 4, 2, 2))
    return tl.reshape(tl.permute(both, (0, 1, 2, 4, 3)), (8 * PARTS, 16))


@triton.jit
def group_product(low, high, x0, x1, x2, x3, lane, PARTS: tl.constexpr, FLOAT16: tl.constexpr, INTERPRET: tl.constexpr):
    """The products of 16 rows' group with 8 tokens, of 128 + u (in float16 1024 + u) for each of their nibbles u.

    low, high: int32 [8 * PARTS, 16], of rows g and g + 8; x0 to x3: the quarters of the group of token g, int32 [8 *
    PARTS, 16], two 16-bit floats each. lane: of [8 * PARTS, 16], the lane that must have an element. Returns float32
    [8 * PARTS, 16]: of row g tokens 2t and 2t + 1, then of row g + 8, for t of 0 to 3.
    """
    if INTERPRET:
        first = products_of_rows(low, x0, x1, x2, x3, PARTS, FLOAT16)
        product = in_lanes(first, products_of_rows(high, x0, x1, x2, x3, PARTS, FLOAT16), PARTS)
    else:
        product = tl.inline_asm_elementwise(
            PRODUCT_F16 if FLOAT16 else PRODUCT_BF16,
            "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [low, high, x0, x1, x2, x3, lane],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return product


@triton.jit
def offset_product(x0, x1, x2, x3, lane, PARTS: tl.constexpr, FLOAT16: tl.constexpr, INTERPRET: tl.constexpr):
    """What `group_product` returns where every nibble is 0."""
    if INTERPRET:
        first = products_of_rows(x0 * 0, x0, x1, x2, x3, PARTS, FLOAT16)
        product = in_lanes(first, first, PARTS)
    else:
        product = tl.inline_asm_elementwise(
            OFFSET_F16 if FLOAT16 else OFFSET_BF16,
            "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [x0, x1, x2, x3, lane],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return product


@triton.jit
def both_times(x, g, INTERPRET: tl.constexpr):
    """Products of two bfloat16 with two others, rounded to bfloat16. x, g: int32 of two each."""
    if INTERPRET:  # round to nearest, ties to even
        a, b = halves(x, False)
        c, d = halves(g, False)
        a, b = (a * c).to(tl.int32, bitcast=True), (b * d).to(tl.int32, bitcast=True)
        a += 0x7FFF + ((a >> 16) & 1)
        b += 0x7FFF + ((b >> 16) & 1)
        product = ((a >> 16) & 0xFFFF) | (b & -65536)
    else:
        product = tl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [x, g], dtype=tl.int32, is_pure=True, pack=1
        )
    return product


@triton.jit
def group_of_tokens(
    x, norm, at, inside, g, n_token, K: tl.constexpr, MASKED: tl.constexpr, NORM: tl.constexpr, FLOAT16: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """The quarters of a group of the tokens, times the norm's weight: four int32 [8 * PARTS, 16]; and the sum of
    squares of each element's quarters, before that.
    """
    HALF: tl.constexpr = K // 2
    token = g.to(tl.int64) * HALF
    given = (g < n_token) & (at >= 0)
    in0, in1, in2, in3 = given, given, given, given
    if MASKED:  # a group may end early: its integers there are some, and its activations none
        in0, in1, in2, in3 = in0 & (at < HALF), in1 & (at + 16 < HALF), in2 & (at + 32 < HALF), in3 & (at + 48 < HALF)
    x0, x1 = tl.load(x + token + at, in0, 0), tl.load(x + token + (at + 16), in1, 0)
    x2, x3 = tl.load(x + token + (at + 32), in2, 0), tl.load(x + token + (at + 48), in3, 0)
    squares = 0.0
    if NORM:
        a, b = halves(x0, FLOAT16)
        squares = a * a + b * b
        a, b = halves(x1, FLOAT16)
        squares += a * a + b * b
        a, b = halves(x2, FLOAT16)
        squares += a * a + b * b
        a, b = halves(x3, FLOAT16)
        squares += a * a + b * b
        x0 = both_times(x0, words_of(norm + at, at < HALF, MASKED), INTERPRET)
        x1 = both_times(x1, words_of(norm + at + 16, at + 16 < HALF, MASKED), INTERPRET)
        x2 = both_times(x2, words_of(norm + at + 32, at + 32 < HALF, MASKED), INTERPRET)
        x3 = both_times(x3, words_of(norm + at + 48, at + 48 < HALF, MASKED), INTERPRET)
    return x0, x1, x2, x3, squares


@triton.jit
def load_weights(at, scales_at, to_high, scales_to_high, inside, scale_inside, MASKED: tl.constexpr):
    """The words of both groups of rows g and of rows g + 8, and the groups' scales and bases."""
    l0, h0 = words_of(at, inside, MASKED), words_of(at + to_high, inside, MASKED)
    l1, h1 = words_of(at + 16, inside, MASKED), words_of(at + (to_high + 16), inside, MASKED)
    p0, q0 = tl.load(scales_at, scale_inside, 0), tl.load(scales_at + scales_to_high, scale_inside, 0)
    return l0, h0, l1, h1, p0, q0


@triton.jit(do_not_specialize=["n_out", "n_unit", "n_turned", "n_token", "repeats"])
def tokens_int4_kernel(
    x, ints, row_scale, pairs, bias, norm, residual, cos, sin, out, n_out, n_unit, n_turned, n_token, repeats, eps,
    K: tl.constexpr, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr, SWIGLU: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, FLOAT16: tl.constexpr, OVERLAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program: `repeats` times the units of 16 rows, for all tokens, of which there are at most 8.

    x: int32 [n_token, K / 2], norm: int32 [K / 2], two 16-bit floats each; ints: int32 [n_row, WORDS]; row_scale:
    float32 [n_row]; pairs: int64 [n_row, n_group / 2], scale and base in float16 of two groups; out: [n_token, n_out].
    """
    if OVERLAP:
        gdc_launch_dependents()
    PAIRED: tl.constexpr = SWIGLU or HEAD_DIM > 0  # rows g are first ones of 8 units, rows g + 8 second ones
    N_GROUP: tl.constexpr = (K + 127) // 128
    WORDS: tl.constexpr = N_GROUP * 16
    UNITS: tl.constexpr = 8 if PAIRED else 16
    MASKED: tl.constexpr = PARTS * 32 > WORDS
    UNEVEN: tl.constexpr = PARTS * 256 > K
    i, word = tl.arange(0, 8 * PARTS)[:, None], tl.arange(0, 16)[None, :]
    g, p = i % 8, i // 8
    lane = 4 * g + word // 4
    start = tl.program_id(0) * (UNITS * repeats)
    first, apart = rows_of(tl.minimum(start, n_unit - UNITS), n_out, HEAD_DIM, SWIGLU)
    rows_apart = apart if PAIRED else apart + 8
    to_high, scales_to_high = rows_apart * WORDS, rows_apart * (N_GROUP // 2)
    offset, scale_offset = g * WORDS + p * 32 + word, g * (N_GROUP // 2) + p
    inside = (p * 32 < WORDS) & (word >= 0)
    scale_inside = p * 2 < N_GROUP
    weights = load_weights(
        ints + first.to(tl.int64) * WORDS + offset, pairs + first.to(tl.int64) * (N_GROUP // 2) + scale_offset,
        to_high, scales_to_high, inside, scale_inside, MASKED,
    )  # fmt: skip
    second = tl.minimum(start + tl.minimum(1, repeats - 1) * UNITS, n_unit - UNITS)
    second = rows_of(second, n_out, HEAD_DIM, SWIGLU)[0].to(tl.int64)
    ahead = load_weights(
        ints + second * WORDS + offset, pairs + second * (N_GROUP // 2) + scale_offset, to_high, scales_to_high, inside,
        scale_inside, MASKED,
    )  # fmt: skip
    if OVERLAP:
        gdc_wait()
    at = p * 128 + word  # in pairs
    x0, x1, x2, x3, squares = group_of_tokens(x, norm, at, inside, g, n_token, K, UNEVEN, NORM, FLOAT16, INTERPRET)
    y0, y1, y2, y3, more = group_of_tokens(x, norm, at + 64, inside, g, n_token, K, UNEVEN, NORM, FLOAT16, INTERPRET)
    OFFSET: tl.constexpr = 1024.0 if FLOAT16 else 128.0
    if OVERLAP:  # not before: the tokens would stand behind them
        later = tl.minimum(start + tl.minimum(2, repeats - 1) * UNITS, n_unit - UNITS)
        prefetch_rows(ints, rows_of(later, n_out, HEAD_DIM, SWIGLU)[0], rows_apart, 16, WORDS)
    offset0 = offset_product(x0, x1, x2, x3, lane, PARTS, FLOAT16, INTERPRET)
    offset1 = offset_product(y0, y1, y2, y3, lane, PARTS, FLOAT16, INTERPRET)
    scale = tl.full((8,), 1.0, tl.float32)
    if NORM:
        of_token = tl.sum(tl.reshape(tl.sum(squares + more, 1), (PARTS, 8)), 0)
        scale = tl.rsqrt(of_token / K + eps)
    ROWS: tl.constexpr = 1 if PAIRED else 2  # of a program's, that are neither first nor second ones of a unit
    scale = tl.reshape(tl.broadcast_to(scale[None, :, None], (8, 8, ROWS)), (64 * ROWS,))
    e = tl.arange(0, 64 * ROWS)
    token, output_row = e // ROWS % 8, e // (8 * ROWS) + e % ROWS * 8
    given = token < n_token
    out_at = token.to(tl.int64) * n_out

    for n in range(repeats):
        first, _ = rows_of(tl.minimum(start + n * UNITS, n_unit - UNITS), n_out, HEAD_DIM, SWIGLU)
        row = first + output_row
        there, to = given & (row < n_out), out_at + row
        epilogue = load_epilogue(bias, residual, cos, sin, row, apart, to, token, n_turned, there, HEAD_DIM, BIAS, ADD)
        own_scale = tl.load(row_scale + row) * scale
        other_scale = own_scale
        if PAIRED:
            other_scale = tl.load(row_scale + row + apart) * scale
        l0, h0, l1, h1, low_scales, high_scales = weights
        c = group_product(l0, h0, x0, x1, x2, x3, lane, PARTS, FLOAT16, INTERPRET)
        d = group_product(l1, h1, y0, y1, y2, y3, lane, PARTS, FLOAT16, INTERPRET)
        third = tl.minimum(start + tl.minimum(n + 2, repeats - 1) * UNITS, n_unit - UNITS)
        third = rows_of(third, n_out, HEAD_DIM, SWIGLU)[0].to(tl.int64)
        # Behind the last rows come the last again: a mask would cost more than reading the L2.
        weights = ahead
        ahead = load_weights(
            ints + third * WORDS + offset, pairs + third * (N_GROUP // 2) + scale_offset, to_high, scales_to_high,
            inside, scale_inside, MASKED,
        )  # fmt: skip
        scales = tl.where(word // 2 % 2 == 0, low_scales, high_scales)
        step, base = halves(scales.to(tl.int32), True)
        total = c * step
        total += offset0 * (base * (1.0 / OFFSET) - step)
        step, base = halves((scales >> 32).to(tl.int32), True)
        total += d * step
        total += offset1 * (base * (1.0 / OFFSET) - step)
        own, other = over_warps(total, PARTS, PAIRED)
        finish(
            own * own_scale, other * other_scale, 1.0, epilogue, out, to, apart, there, HEAD_DIM, SWIGLU, BIAS, ADD
        )  # fmt: skip


@triton.jit
def over_warps(total, PARTS: tl.constexpr, PAIRED: tl.constexpr):
    """The sums over parts of [8 * PARTS, 16]: of rows g and rows g + 8, [8 rows * 8 tokens] each, or (not PAIRED) of
    both, [8 rows * 8 tokens * 2], twice.

    Two warps' go to one thread and the others' to its neighbours: warps meet once for that, and twice in a `tl.sum`.
    """
    if PARTS > 1:
        total = tl.permute(tl.reshape(total, (PARTS // 2, 2, 8, 4, 2, 2)), (2, 3, 5, 4, 0, 1))
        one, another = tl.split(total)
        total = tl.sum(one + another, 4)
    else:
        total = tl.permute(tl.reshape(total, (8, 4, 2, 2)), (0, 1, 3, 2))
    if PAIRED:
        own, other = tl.split(total)
        own, other = tl.reshape(own, (64,)), tl.reshape(other, (64,))
    else:
        own = tl.reshape(total, (128,))
        other = own
    return own, other


def parts_of(k: int) -> int:
    """Parts of a row, filled up to a power of two."""
    return triton.next_power_of_2(triton.cdiv(k, PART))


def repeats_of(n_unit: int, k: int, paired: bool, n_processor: int) -> int:
    """How many times 16 rows a program has: 16 warps an SM, all at once."""
    return triton.cdiv(n_unit, (8 if paired else 16) * n_processor * (MOST_PARTS // parts_of(k)))


def tokens_int4_fit(x: Tensor, weight: QuantizedWeight, around: Around) -> bool:
    """Whether `run_tokens_int4` is for these tokens: 2 to 8 of 16 bits, groups of 128, an even number of them a row,
    and a GPU on which it was measured. Of float16 no norm: x times its weight may not be one.
    """
    n, k = weight.shape
    if (x.data_ptr() | weight.ints.data_ptr()) % 16 or (around.norm is not None and x.dtype != torch.bfloat16):
        return False
    fits = weight.bits == 4 and weight.group == GROUP and k % 16 == 0
    fits = fits and triton.cdiv(k, GROUP) % 2 == 0 and parts_of(k) <= MOST_PARTS
    if around.turn is not None:
        fits = fits and around.turn.cos.shape[1] % 16 == 0
    here = INTERPRET or processor(x.device).overlap
    return 1 < len(x) <= MOST_TOKENS and x.element_size() == 2 and fits and n >= 16 and here


def run_tokens_int4(x: Tensor, weight: QuantizedWeight, around: Around, repeats: int) -> Tensor:
    """The product of 2 to 8 tokens, `repeats` times 16 rows a program. x: [n_token, k]; returns [n_token, n_out]."""
    around.check(x, weight.ints)
    assert weight.pairs is not None
    overlap = processor(x.device).overlap
    n_token, k = x.shape
    n_out, n_unit = around.n_out(weight.ints), around.n_unit(weight.ints)
    out = torch.empty(n_token, n_out, dtype=x.dtype, device=x.device)
    bias, norm, residual, cos, sin = around.pointers(x)
    launch(tokens_int4_kernel, (triton.cdiv(n_unit, (8 if around.paired else 16) * repeats),))(
        x.view(torch.int32), weight.ints.view(torch.int32), weight.scale, weight.pairs.flatten().view(torch.int64),
        bias, norm.view(torch.int32), residual, cos, sin, out, n_out, n_unit, around.n_turned, n_token, repeats,
        around.eps, K=k, PARTS=parts_of(k), **around.constants, FLOAT16=x.dtype == torch.float16, OVERLAP=overlap,
        INTERPRET=INTERPRET, launch_pdl=overlap, num_warps=parts_of(k),
    )  # fmt: skip
    return out
