"""Unpack the integers of planes (formats.py) into operands of matrix units, several elements an instruction.

Keys become int8, values float16. A field of bits masked out of a 16-bit lane is a float16 as it stands: its bits are
among the mantissa's lowest, which makes it a subnormal number, u * 2**-24 times the field's place value. Matrix units
multiply subnormal numbers exactly, and the powers of two are undone in the weights and once at the end. So unpacking
two elements takes one `and`, and no conversion.

Every function has a second form for Triton's interpreter, which cannot run assembly.
"""

from __future__ import annotations

import triton
import triton.language as tl

SUBNORMAL = tl.constexpr(5.960464477539063e-08)  # 2**-24, the float16 whose bits are 1


@triton.jit
def key_bytes_4(x, INTERPRET: tl.constexpr):
    """int8 elements, each integers of 4 bits of two tokens, to an int8 tensor for each of the two."""
    if INTERPRET:
        low, high = x & 15, (x >> 4) & 15
    else:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up;
            and.b32 $0, $2, 0x0F0F0F0F;
            shr.u32 up, $2, 4;
            and.b32 $1, up, 0x0F0F0F0F;
            }
            """,
            "=r,=r,r",
            [x],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def key_bytes_2(x, INTERPRET: tl.constexpr):
    """int8 elements, each integers of 2 bits of four tokens, to four int8 tensors."""
    if INTERPRET:
        a, b, c, d = x & 3, (x >> 2) & 3, (x >> 4) & 3, (x >> 6) & 3
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up;
            and.b32 $0, $4, 0x03030303;
            shr.u32 up, $4, 2;
            and.b32 $1, up, 0x03030303;
            shr.u32 up, $4, 4;
            and.b32 $2, up, 0x03030303;
            shr.u32 up, $4, 6;
            and.b32 $3, up, 0x03030303;
            }
            """,
            "=r,=r,=r,=r,r",
            [x],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return a, b, c, d


@triton.jit
def last_six_bits(a, b, c):
    """int32 bytes of the three planes of 3 bits: the six bits of the last token, which stand in their upper two
    bits."""
    return ((a >> 6) & 3) | ((b >> 4) & 12) | ((c >> 2) & 48)


@triton.jit
def key_bytes_3(a, b, c, INTERPRET: tl.constexpr):
    """int8 elements of the three planes of 3 bits, each integers of two dims of four tokens, to eight int8 tensors: of
    token 0 the even dim and the odd one (this one 8 times as large), and so on."""
    if INTERPRET:
        a, b, c = a.to(tl.int32), b.to(tl.int32), c.to(tl.int32)
        d = last_six_bits(a, b, c)
        e, f, g, h = (a & 7).to(tl.int8), (a & 56).to(tl.int8), (b & 7).to(tl.int8), (b & 56).to(tl.int8)
        i, j, k, l = (c & 7).to(tl.int8), (c & 56).to(tl.int8), (d & 7).to(tl.int8), (d & 56).to(tl.int8)  # noqa: E741
    else:
        e, f, g, h, i, j, k, l = tl.inline_asm_elementwise(  # noqa: E741
            """
            {
            .reg .b32 all, part;
            and.b32 $0, $8, 0x07070707;
            and.b32 $1, $8, 0x38383838;
            and.b32 $2, $9, 0x07070707;
            and.b32 $3, $9, 0x38383838;
            and.b32 $4, $10, 0x07070707;
            and.b32 $5, $10, 0x38383838;
            shr.u32 all, $8, 6;
            and.b32 all, all, 0x03030303;
            shr.u32 part, $9, 4;
            lop3.b32 all, part, 0x0C0C0C0C, all, 0xEA;
            shr.u32 part, $10, 2;
            lop3.b32 all, part, 0x30303030, all, 0xEA;
            and.b32 $6, all, 0x07070707;
            and.b32 $7, all, 0x38383838;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [a, b, c],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return e, f, g, h, i, j, k, l


@triton.jit
def value_pairs_8(x, INTERPRET: tl.constexpr):
    """int16 elements, each two int8 (low byte first), to two float16 tensors of the same values: a byte permutation
    puts an integer under the exponent of 1024, and subtracting is exact."""
    if INTERPRET:
        even = ((x << 8).to(tl.int16) >> 8).to(tl.float16)
        odd = (x >> 8).to(tl.float16)
    else:
        even, odd = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 u, e, o, bias;
            xor.b32 u, $2, 0x80808080;
            prmt.b32 e, u, 0x64646464, 0x4240;
            prmt.b32 o, u, 0x64646464, 0x4341;
            mov.b32 bias, 0x64806480;
            sub.f16x2 $0, e, bias;
            sub.f16x2 $1, o, bias;
            }
            """,
            "=r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


@triton.jit
def field(x, MASK: tl.constexpr):
    """The float16 whose bits are those of x in MASK; for the interpreter."""
    return ((x & MASK).to(tl.float32) * SUBNORMAL).to(tl.float16)


@triton.jit
def value_pairs_4(x, INTERPRET: tl.constexpr):
    """int16 elements, two dims (a byte each) of two tokens, to float16: the even dim of token 0 and of token 1 (this
    one 16 times as large), then the odd dim's two."""
    if INTERPRET:
        y = (x >> 8) & 255
        a, b, c, d = field(x, 15), field(x, 240), field(y, 15), field(y, 240)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up;
            and.b32 $0, $4, 0x000F000F;
            and.b32 $1, $4, 0x00F000F0;
            shr.u32 up, $4, 8;
            and.b32 $2, up, 0x000F000F;
            and.b32 $3, up, 0x00F000F0;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@triton.jit
def value_pairs_2(x, INTERPRET: tl.constexpr):
    """int16 elements, two dims of four tokens, to float16: the even dim of tokens 0 to 3 (4**j times as large), then
    the odd dim's four."""
    if INTERPRET:
        y = (x >> 8) & 255
        a, b, c, d = field(x, 3), field(x, 12), field(x, 48), field(x, 192)
        e, f, g, h = field(y, 3), field(y, 12), field(y, 48), field(y, 192)
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up;
            and.b32 $0, $8, 0x00030003;
            and.b32 $1, $8, 0x000C000C;
            and.b32 $2, $8, 0x00300030;
            and.b32 $3, $8, 0x00C000C0;
            shr.u32 up, $8, 8;
            and.b32 $4, up, 0x00030003;
            and.b32 $5, up, 0x000C000C;
            and.b32 $6, up, 0x00300030;
            and.b32 $7, up, 0x00C000C0;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d, e, f, g, h


@triton.jit
def quad_3(x):
    """The four dims of int32 elements, two bytes of two dims each, as `value_quads_3` has them; for the interpreter."""
    y = x >> 8
    return field(x, 7), field(x, 56), field(y, 7), field(y, 56)


@triton.jit
def value_quads_3(a, b, c, INTERPRET: tl.constexpr):
    """int16 elements of the three planes of 3 bits, each integers of four dims of four tokens, to float16: the four
    dims of token 0 (every second one 8 times as large), then those of tokens 1 to 3."""
    if INTERPRET:
        a, b, c = a.to(tl.int32) & 0xFFFF, b.to(tl.int32) & 0xFFFF, c.to(tl.int32) & 0xFFFF
        d = ((a >> 6) & 0x0303) | ((b >> 4) & 0x0C0C) | ((c >> 2) & 0x3030)
        quads = quad_3(a) + quad_3(b) + quad_3(c) + quad_3(d)
    else:
        quads = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 all, part;
            and.b32 $0, $16, 0x00070007;
            and.b32 $1, $16, 0x00380038;
            shr.u32 part, $16, 8;
            and.b32 $2, part, 0x00070007;
            and.b32 $3, part, 0x00380038;
            and.b32 $4, $17, 0x00070007;
            and.b32 $5, $17, 0x00380038;
            shr.u32 part, $17, 8;
            and.b32 $6, part, 0x00070007;
            and.b32 $7, part, 0x00380038;
            and.b32 $8, $18, 0x00070007;
            and.b32 $9, $18, 0x00380038;
            shr.u32 part, $18, 8;
            and.b32 $10, part, 0x00070007;
            and.b32 $11, part, 0x00380038;
            shr.u32 all, $16, 6;
            and.b32 all, all, 0x03030303;
            shr.u32 part, $17, 4;
            lop3.b32 all, part, 0x0C0C0C0C, all, 0xEA;
            shr.u32 part, $18, 2;
            lop3.b32 all, part, 0x30303030, all, 0xEA;
            and.b32 $12, all, 0x00070007;
            and.b32 $13, all, 0x00380038;
            shr.u32 part, all, 8;
            and.b32 $14, part, 0x00070007;
            and.b32 $15, part, 0x00380038;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [a, b, c],
            dtype=(
                tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
                tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
            ),
            is_pure=True,
            pack=2,
        )  # fmt: skip
    return quads


@triton.jit
def scale_and_base(x):
    """An int32 that holds two bfloat16, the scale first; both as float32."""
    return (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
