"""Integers of packed planes to what matrix units take, several elements an instruction (formats.py has the planes).

Keys become int8, values float16. A masked field of a 16-bit lane IS a float16: its bits stand in the lowest ones,
which makes it a subnormal number, u * 2**-24 times the field's place value. Matrix units take those exactly, and the
powers of two are undone in the weights and once at the end: an `and` for two elements, and no conversion.

Every function has a second form for Triton's interpreter, which knows no assembly.
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
def key_bytes_3(x, y, odd, INTERPRET: tl.constexpr):
    """3 bits: x as in `key_bytes_2`; y: bytes of the plane of upper bits, of which token j of the four has bit 2 j, or
    the next one where `odd` (int8, 0 or 1, the same in four neighbours) is 1."""
    if INTERPRET:
        up = y.to(tl.int32) >> odd.to(tl.int32)
        low = x.to(tl.int32)
        a = ((low & 3) | ((up << 2) & 4)).to(tl.int8)
        b = (((low >> 2) & 3) | (up & 4)).to(tl.int8)
        c = (((low >> 4) & 3) | ((up >> 2) & 4)).to(tl.int8)
        d = (((low >> 6) & 3) | ((up >> 4) & 4)).to(tl.int8)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up, one, high;
            and.b32 one, $6, 1;
            shr.u32 up, $5, one;
            shl.b32 high, up, 2;
            and.b32 high, high, 0x04040404;
            and.b32 $0, $4, 0x03030303;
            or.b32 $0, $0, high;
            and.b32 high, up, 0x04040404;
            shr.u32 one, $4, 2;
            and.b32 $1, one, 0x03030303;
            or.b32 $1, $1, high;
            shr.u32 high, up, 2;
            and.b32 high, high, 0x04040404;
            shr.u32 one, $4, 4;
            and.b32 $2, one, 0x03030303;
            or.b32 $2, $2, high;
            shr.u32 high, up, 4;
            and.b32 high, high, 0x04040404;
            shr.u32 one, $4, 6;
            and.b32 $3, one, 0x03030303;
            or.b32 $3, $3, high;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r",
            [x, y, odd],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return a, b, c, d


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
    """In the interpreter: the float16 whose bits are those of x in MASK."""
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
def field_3(x, up, LOW: tl.constexpr, HIGH: tl.constexpr):
    return (((x & LOW) | (up & HIGH)).to(tl.float32) * SUBNORMAL).to(tl.float16)


@triton.jit
def value_pairs_3(x, y, odd, INTERPRET: tl.constexpr):
    """3 bits: x as in `value_pairs_2`; y: the same dims in the plane of upper bits, of which token j of the four has
    bit 2 j, or the next one where `odd` (int16, 0 or 1, the same in two neighbours) is 1."""
    if INTERPRET:
        even, even_up = x.to(tl.int32) & 255, ((y.to(tl.int32) & 255) << 2) >> odd.to(tl.int32)
        rest, rest_up = (x.to(tl.int32) >> 8) & 255, (((y.to(tl.int32) >> 8) & 255) << 2) >> odd.to(tl.int32)
        a, b = field_3(even, even_up, 3, 4), field_3(even, even_up, 12, 16)
        c, d = field_3(even, even_up, 48, 64), field_3(even, even_up, 192, 256)
        e, f = field_3(rest, rest_up, 3, 4), field_3(rest, rest_up, 12, 16)
        g, h = field_3(rest, rest_up, 48, 64), field_3(rest, rest_up, 192, 256)
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 by, up, low, high;
            and.b32 by, $10, 1;
            sub.u32 by, 2, by;
            shl.b32 up, $9, by;
            and.b32 low, $8, 0x00030003;
            and.b32 high, up, 0x00040004;
            or.b32 $0, low, high;
            and.b32 low, $8, 0x000C000C;
            and.b32 high, up, 0x00100010;
            or.b32 $1, low, high;
            and.b32 low, $8, 0x00300030;
            and.b32 high, up, 0x00400040;
            or.b32 $2, low, high;
            and.b32 low, $8, 0x00C000C0;
            and.b32 high, up, 0x01000100;
            or.b32 $3, low, high;
            shr.u32 up, $9, 8;
            shl.b32 up, up, by;
            shr.u32 by, $8, 8;
            and.b32 low, by, 0x00030003;
            and.b32 high, up, 0x00040004;
            or.b32 $4, low, high;
            and.b32 low, by, 0x000C000C;
            and.b32 high, up, 0x00100010;
            or.b32 $5, low, high;
            and.b32 low, by, 0x00300030;
            and.b32 high, up, 0x00400040;
            or.b32 $6, low, high;
            and.b32 low, by, 0x00C000C0;
            and.b32 high, up, 0x01000100;
            or.b32 $7, low, high;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [x, y, odd],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d, e, f, g, h


@triton.jit
def scale_and_base(x):
    """An int32 that holds two bfloat16, the scale first; both as float32."""
    return (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
