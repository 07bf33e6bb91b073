"""One token as the matrix unit's second operand, for `gemv_int4.py`: int8 columns in the lanes that the unit wants.

A group of 128 activations is two columns, its two int8 terms (`gemv_integers.py` defines them). A column is in 4 lanes,
so what both columns need of the group (its largest, its sum) goes between 8 lanes by shuffles. After the PDL wait every
instruction counts: the first column's lanes compute both terms of the activations that meet low nibbles, the second
one's of those that meet high nibbles, and then they exchange terms.

The shuffles rely on which lane has which element. Triton does not promise that, so the assembly compares the lane that
it runs in with the one that it expects, and traps if they differ.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from engine.kernels.gemv_integers import SMALLEST, halves, largest, two_terms, words_of


def _between_lanes(lane: int, body: list[str]) -> str:
    """PTX: trap if the lane is not the one in operand `lane`, then body. Registers: f0 to f3, `to`, and the lane,
    `here`."""
    return "\n".join(
        [
            "{",
            ".reg .b32 here, to;",
            ".reg .f32 f<4>;",
            ".reg .pred elsewhere;",
            "mov.u32 here, %laneid;",
            f"setp.ne.u32 elsewhere, here, ${lane};",
            "@elsewhere trap;",
            *body,
            "}",
        ]
    )


def _over_four(do: str, first: int, distances: tuple[int, ...]) -> list[str]:
    """PTX: reduce 4 operands from the `first` on, and then the lanes at these distances, by instruction `do` into
    f0."""
    lines = [f"{do} f0, ${first}, ${first + 1};", f"{do} f1, ${first + 2}, ${first + 3};", f"{do} f0, f0, f1;"]
    for distance in distances:
        lines += [f"shfl.sync.bfly.b32 f1, f0, {distance}, 31, 0xFFFFFFFF;", f"{do} f0, f0, f1;"]
    return lines


def _float(value: float) -> str:
    """A float32 as PTX writes it."""
    return "0f" + struct.pack(">f", value).hex().upper()


def _four(name: str, first: int) -> list[str]:
    return [f"mov.b32 ${first + n}, {name};" for n in range(4)]


# A column is a row of 16 words, in 4 lanes; a group's two columns are 8 lanes, and group t's are 8t to 8t + 7.
LARGEST = tl.constexpr(
    _between_lanes(
        12,
        [
            *_over_four("max.f32", 8, (1, 2, 4)),
            f"max.f32 f0, f0, {_float(SMALLEST.value)};",
            *_four("f0", 0),
            "rcp.approx.ftz.f32 f1, f0;",
            f"mul.f32 f1, f1, {_float(127)};",
            *_four("f1", 4),
        ],
    )
)
SUMS = tl.constexpr(
    _between_lanes(
        20,
        [
            *_over_four("add.f32", 12, (1, 2)),
            "shfl.sync.bfly.b32 f1, f0, 4, 31, 0xFFFFFFFF;",
            "and.b32 to, here, 4;",
            "setp.ne.u32 elsewhere, to, 0;",
            "selp.f32 f2, f0, f1, elsewhere;",
            f"mul.f32 f2, f2, {_float(8)};",
            "add.f32 f0, f0, f1;",
            "sub.f32 f3, f0, f0;",  # NaN, if an activation is NaN or infinite
            f"fma.rn.f32 f1, $16, {_float(1 / (127 * 254 * 16))}, f3;",
            "and.b32 to, here, 3;",
            "shl.b32 to, to, 3;",
            *(f"shfl.sync.idx.b32 {name}, {name}, to, 31, 0xFFFFFFFF;" for name in ("f0", "f1", "f2")),
            *_four("f1", 0),
            *_four("f2", 4),
            *_four("f0", 8),
        ],
    )
)
PARTNER = tl.constexpr(_between_lanes(8, [f"shfl.sync.bfly.b32 ${n}, ${4 + n}, 4, 31, 0xFFFFFFFF;" for n in range(4)]))


@triton.jit
def largest_of_group(value, lane, PARTS: tl.constexpr, INTERPRET: tl.constexpr):
    """The largest of `value` over both columns of a group, m, and 127 / m: float32 [8 * PARTS, 16] each."""
    if INTERPRET:
        found = tl.max(tl.reshape(value, (4 * PARTS, 32)), 1)
        found = tl.reshape(tl.broadcast_to(found[:, None], (4 * PARTS, 32)), (8 * PARTS, 16))
        most = tl.maximum(found, SMALLEST)
        inverse = 127.0 / most
    else:
        most, inverse = tl.inline_asm_elementwise(
            LARGEST, "=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,r,r,r,r", [value, lane], dtype=(tl.float32, tl.float32),
            is_pure=True, pack=4,
        )  # fmt: skip
    return most, inverse


@triton.jit
def sums_of_groups(value, most, lane, PARTS: tl.constexpr, INTERPRET: tl.constexpr):
    """value: activations that meet low nibbles in a group's first column, and high ones in its second, [8 * PARTS, 16].

    Returns for each group its step, 8 times the sum of the activations that meet high nibbles, and the sum of all:
    float32 [PARTS, 8, 4], equal along the 8. NaN, if an activation is NaN or infinite.
    """
    if INTERPRET:
        even, odd = tl.split(tl.reshape(tl.sum(value, 1), (PARTS, 4, 2)))
        sums = even + odd
        step = tl.max(tl.reshape(most, (PARTS, 4, 32)), 2) * (1.0 / (127.0 * 254.0 * 16.0)) + (sums - sums)
        step = tl.broadcast_to(step[:, None, :], (PARTS, 8, 4))
        eight = tl.broadcast_to(8 * odd[:, None, :], (PARTS, 8, 4))
        sums = tl.broadcast_to(sums[:, None, :], (PARTS, 8, 4))
    else:
        step, eight, sums = tl.inline_asm_elementwise(
            SUMS, "=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f,r,r,r,r", [value, most, lane],
            dtype=(tl.float32, tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
        step, eight, sums = first_of_four(step, PARTS), first_of_four(eight, PARTS), first_of_four(sums, PARTS)
    return step, eight, sums


@triton.jit
def first_of_four(value, PARTS: tl.constexpr):
    """The first of each lane's four elements: [8 * PARTS, 16] to [PARTS, 8, 4]."""
    pair, _ = tl.split(tl.reshape(value, (PARTS, 8, 4, 2, 2)))
    first, _ = tl.split(pair)
    return first


@triton.jit
def of_partner(value, lane, PARTS: tl.constexpr, INTERPRET: tl.constexpr):
    """`value` of the other column of a group: int32 [8 * PARTS, 16]."""
    if INTERPRET:
        first, second = tl.split(tl.permute(tl.reshape(value, (4 * PARTS, 2, 16)), (0, 2, 1)))
        there = tl.reshape(tl.permute(tl.join(second, first), (0, 2, 1)), (8 * PARTS, 16))
    else:
        there = tl.inline_asm_elementwise(
            PARTNER, "=r,=r,=r,=r,r,r,r,r,r,r,r,r", [value, lane], dtype=tl.int32, is_pure=True, pack=4
        )
    return there


@triton.jit
def load_token(x, norm, K: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr):
    """The activations that each column's lanes load: the first and third quarter of its group, or the second and
    fourth; and the norm's weights there. Four int32 [8 * PARTS, 16], of two 16-bit floats each.
    """
    i = tl.arange(0, 8 * PARTS)[:, None]
    word = tl.arange(0, 16)[None, :]
    at = (4 * (i // 8) + i % 8 // 2) * 64 + 16 * (i % 2) + word  # in pairs: `quantize.py` has the order
    EXACT: tl.constexpr = PARTS * 512 == K
    first, second = words_of(x + at, at < K // 2, not EXACT), words_of(x + at + 32, at + 32 < K // 2, not EXACT)
    first_g, second_g = first, second
    if NORM:
        first_g = words_of(norm + at, at < K // 2, not EXACT)
        second_g = words_of(norm + at + 32, at + 32 < K // 2, not EXACT)
    return first, second, first_g, second_g


@triton.jit
def token_columns(
    loaded, lane, eps, K: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, FLOAT16: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """The token as the matrix unit's columns. loaded: from `load_token`.

    Returns the words that meet low nibbles and those that meet high ones, int32 [8 * PARTS, 16]; what `sums_of_groups`
    returns; and 1 / rms (1 without a norm).
    """
    first, second, first_g, second_g = loaded
    odd_column = tl.arange(0, 8 * PARTS)[:, None] % 2
    a0, a1 = halves(first, FLOAT16)
    c0, c1 = halves(second, FLOAT16)
    scale = 1.0
    if NORM:
        squares = a0 * a0 + a1 * a1 + c0 * c0 + c1 * c1
        g, h = halves(first_g, FLOAT16)
        a0, a1 = a0 * g, a1 * h
        g, h = halves(second_g, FLOAT16)
        c0, c1 = c0 * g, c1 * h
        scale = tl.rsqrt(tl.sum(tl.reshape(squares, (PARTS * 128,)), 0) / K + eps)
    most, inverse = largest_of_group(largest(a0, a1, c0, c1), lane, PARTS, INTERPRET)
    hi, lo = two_terms(a0, c0, a1, c1, inverse, INTERPRET)
    theirs = of_partner(tl.where(odd_column == 0, lo, hi), lane, PARTS, INTERPRET)
    even, odd = tl.where(odd_column == 0, hi, theirs), tl.where(odd_column == 0, theirs, lo)
    step, eight, sums = sums_of_groups((a0 + a1) + (c0 + c1), most, lane, PARTS, INTERPRET)
    return even, odd, step, eight, sums, scale
