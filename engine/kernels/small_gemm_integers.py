"""Products of a few tokens with weights of 8 or 4 bits, on the matrix units: `small_gemm.py` over integers.

Matrix units want 16-bit operands. An integer becomes one in its register without a conversion: its bits are put into
the mantissa of a float whose lowest mantissa bit is worth 1.

- 8 bits, bfloat16: the lower seven bits in 128's mantissa are 128 to 255; subtracting 128, or 256 if the sign bit is
  set, gives the integer. Both steps are exact.
- 4 bits, bfloat16: u in 128's mantissa is 128 + u. The 128 is subtracted from the sum of products, which takes the sum
  of the group's activations; so does the group's base. That sum is one more product, with a constant.
- float16: 1024 takes 128's place, and 8 bits subtract 1152.

Groups: a warp's slice of a block of K is one group. Its product begins at zero, is multiplied by the scale (with 8
bits, the step) and added to the total (as in `gemv_integers.py`; `quantize.py` has the formula). The next block's
scales are loaded while this one is multiplied.

A norm is a launch of its own here; bias, SwiGLU, RoPE and residual are in the product's launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.epilogue import Around, finish, load_epilogue, rows_of, unit_sums, weight_rows
from engine.kernels.gemv_integers import halves, step_of, steps_as_loaded
from engine.kernels.small_gemm import padded
from selective_kv.kernels.basics import INTERPRET, prefetch
from selective_kv.kernels.decode_config import SHARED_SLACK, processor
from selective_kv.kernels.launch import launch
from weights.modules import QuantizedWeight

MOST_TOKENS = 64  # beyond, a weight made dense and a library's product


@triton.jit
def bytes_to_16_bits(w, FLOAT16: tl.constexpr, INTERPRET: tl.constexpr):
    """int8 as bfloat16 or float16: the same values."""
    if INTERPRET:
        value = w.to(tl.float32)
    elif FLOAT16:
        value = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 u, low, high;
            xor.b32 u, $2, 0x80808080;
            prmt.b32 low, u, 0x64646464, 0x4140;
            prmt.b32 high, u, 0x64646464, 0x4342;
            mov.b32 u, 0x64806480;
            sub.f16x2 $0, low, u;
            sub.f16x2 $1, high, u;
            }
            """,
            "=r,=r,r",
            [w],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        value = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, a, b, one;
            prmt.b32 low, $2, 0, 0x4140;
            prmt.b32 high, $2, 0, 0x4342;
            mov.b32 one, 0x3F803F80;
            lop3.b32 a, low, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 b, low, 0x00800080, 0xC300C300, 0xEA;
            fma.rn.bf16x2 $0, a, one, b;
            lop3.b32 a, high, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 b, high, 0x00800080, 0xC300C300, 0xEA;
            fma.rn.bf16x2 $1, a, one, b;
            }
            """,
            "=r,=r,r",
            [w],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return value


@triton.jit
def nibbles_to_16_bits(w, FLOAT16: tl.constexpr, INTERPRET: tl.constexpr):
    """int16 elements, four integers of 4 bits each, lowest first: four tensors of 128 + u; 1024 + u in float16."""
    if INTERPRET:
        offset = 1024.0 if FLOAT16 else 128.0
        a, b = (w & 15).to(tl.float32) + offset, ((w >> 4) & 15).to(tl.float32) + offset
        c, d = ((w >> 8) & 15).to(tl.float32) + offset, ((w >> 12) & 15).to(tl.float32) + offset
    elif FLOAT16:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up;
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 up, $4, 4;
            lop3.b32 $1, up, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 up, $4, 8;
            lop3.b32 $2, up, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 up, $4, 12;
            lop3.b32 $3, up, 0x000F000F, 0x64006400, 0xEA;
            }
            """,
            "=r,=r,=r,=r,r",
            [w],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 up;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 up, $4, 4;
            lop3.b32 $1, up, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 up, $4, 8;
            lop3.b32 $2, up, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 up, $4, 12;
            lop3.b32 $3, up, 0x000F000F, 0x43004300, 0xEA;
            }
            """,
            "=r,=r,=r,=r,r",
            [w],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@triton.jit
def operand(at, mask, MASKED: tl.constexpr, INTERPRET: tl.constexpr):
    """Activations for the matrix units. (The interpreter's bfloat16 arithmetic is wrong.)"""
    value = tl.load(at, mask, 0.0)
    if INTERPRET:
        value = value.to(tl.float32)
    return value


@triton.jit(do_not_specialize=["n_out", "n_token", "n_turned", "end"])
def tokens_integers_kernel(
    x, ints, row_scale, pairs, bias, norm, residual, cos, sin, out, n_out, n_turned, n_token, end, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    SLICE: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr,
    SWIGLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, FLOAT16: tl.constexpr, OVERLAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program: the units of ROWS rows, for all tokens. x: [n_token, K], n_token <= N; out: [n_token, n_out].

    BITS 8: ints is int8 [n_row, K] and SLICE elements of K are a warp's: a group, if there are any, and pairs then are
    their steps (`steps_as_loaded`). BITS 4: ints is int16 [n_row, n_group * GROUP / 4], pairs int32 [n_row,
    n_group], and SLICE is GROUP / 4. end: elements or words of a row, to loop over: a
    compiler that knows how often unrolls all of it. EARLY: bytes of a row prefetched into L2 before the PDL wait. NORM,
    eps: none.
    """
    if OVERLAP:
        gdc_launch_dependents()
    PAIRED: tl.constexpr = SWIGLU or HEAD_DIM > 0
    UNITS: tl.constexpr = ROWS // 2 if PAIRED else ROWS
    N_GROUP: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    LENGTH: tl.constexpr = N_GROUP * SLICE if BITS == 4 else K  # elements of `ints` in a row
    BLOCK: tl.constexpr = WARPS * SLICE
    row = weight_rows(n_out, ROWS, UNITS, HEAD_DIM, SWIGLU)
    start_of_row = row.to(tl.int64) * LENGTH
    warp = tl.arange(0, WARPS)
    FOURS: tl.constexpr = 4 if BITS == 8 and N_GROUP % 4 == 0 else 1  # steps of groups that a load brings
    scales_at = pairs + row.to(tl.int64)[None, :] * (N_GROUP // FOURS)  # [1, ROWS]: the rows' first groups
    scales = warp  # never read without groups
    if GROUP > 0:
        scales = tl.load(scales_at + (warp // FOURS)[:, None], (warp < N_GROUP)[:, None], 0)
    if OVERLAP:
        if EARLY > 0:
            PER_LINE: tl.constexpr = 64 if BITS == 4 else 128  # elements of 128 bytes
            LINES: tl.constexpr = EARLY // 128
            at = tl.arange(0, LINES) * PER_LINE
            prefetch(ints + start_of_row[:, None] + tl.minimum(at, LENGTH - 1)[None, :])
        gdc_wait()

    first, apart = rows_of(tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None], n_out, HEAD_DIM, SWIGLU)
    token = tl.arange(0, N)
    there = (first < n_out) & (token < n_token)[None, :]
    at = token[None, :].to(tl.int64) * n_out + first
    epilogue = load_epilogue(
        bias, residual, cos, sin, first, apart, at, token[None, :], n_turned, there, HEAD_DIM, BIAS, ADD
    )
    own_scale = tl.load(row_scale + first, first < n_out, 0.0)
    other_scale = own_scale
    if PAIRED:
        other_scale = tl.load(row_scale + first + apart, first < n_out, 0.0)
    k = (warp * SLICE)[:, None] + tl.arange(0, SLICE)[None, :]
    ints_at = ints + start_of_row[None, :, None] + k[:, None, :]
    given = (token < n_token)[None, None, :]
    total = tl.zeros((WARPS, ROWS, N), tl.float32)
    WHOLE: tl.constexpr = LENGTH % BLOCK == 0
    if BITS == 4:
        # Quarter i of a group meets nibble i of its words.
        x_at = x + token[None, None, :] * K + (warp * GROUP)[:, None, None] + tl.arange(0, SLICE)[None, :, None]
        left = K - (warp * GROUP)[:, None, None] - tl.arange(0, SLICE)[None, :, None]
        OFFSET: tl.constexpr = 1024.0 if FLOAT16 else 128.0
        OPERAND: tl.constexpr = tl.float32 if INTERPRET else (tl.float16 if FLOAT16 else tl.bfloat16)
        constant = tl.full((WARPS, ROWS, SLICE), OFFSET, OPERAND)
        EVEN: tl.constexpr = WHOLE and K % GROUP == 0
        for start in tl.range(0, end, BLOCK, num_stages=STAGES):
            words = tl.load(ints_at + start) if WHOLE else tl.load(ints_at + start, (start + k < LENGTH)[:, None, :], 0)
            after = start // SLICE + WARPS
            scales_after = tl.load(scales_at + (after + warp)[:, None], (after + warp < N_GROUP)[:, None], 0)
            nibbles = nibbles_to_16_bits(words, FLOAT16, INTERPRET)
            part = tl.zeros((WARPS, ROWS, N), tl.float32)
            sums = tl.zeros((WARPS, ROWS, N), tl.float32)
            for n in tl.static_range(4):  # quarters of the groups
                there_x = given if EVEN else given & (left - start * 4 > n * SLICE)
                value = operand(x_at + (start * 4 + n * SLICE), there_x, not EVEN, INTERPRET)
                part = tl.dot(nibbles[n], value, part, input_precision="ieee")
                sums = tl.dot(constant, value, sums, input_precision="ieee")
            scale, base = halves(scales, True)
            total += part * scale[:, :, None]
            total += sums * (base * (1.0 / OFFSET) - scale)[:, :, None]
            scales = scales_after
    else:
        x_at = x + token[None, None, :] * K + k[:, :, None]
        for start in tl.range(0, end, BLOCK, num_stages=STAGES):
            inside = start + k < K
            weights = tl.load(ints_at + start) if WHOLE else tl.load(ints_at + start, inside[:, None, :], 0)
            value = operand(x_at + start, given if WHOLE else inside[:, :, None] & given, not WHOLE, INTERPRET)
            if GROUP > 0:
                group = start // SLICE + warp
                after = group + WARPS
                scales_after = tl.load(scales_at + (after // FOURS)[:, None], (after < N_GROUP)[:, None], 0)
                part = tl.dot(bytes_to_16_bits(weights, FLOAT16, INTERPRET), value, input_precision="ieee")
                total += part * step_of(scales, group[:, None], FOURS == 4)[:, :, None]
                scales = scales_after
            else:
                total = tl.dot(bytes_to_16_bits(weights, FLOAT16, INTERPRET), value, total, input_precision="ieee")
    y, other = unit_sums(total, UNITS, PAIRED)
    finish(y * own_scale, other * other_scale, 1.0, epilogue, out, at, apart, there, HEAD_DIM, SWIGLU, BIAS, ADD)


class Plan(NamedTuple):
    """What a program of `tokens_integers_kernel` takes on."""

    rows: int  # of the weight: both rows of a unit count
    warps: int
    slice: int  # elements of 8 bits a warp has of a block of K (in groups, a group); of 4 bits it is a group's words
    stages: int  # of the software pipeline: stages - 1 blocks are being loaded while one is multiplied
    early: int = 512  # bytes of a row prefetched into L2 before the PDL wait; 0: none

    def shared(self, n: int, four: bool) -> int:
        """Bytes of shared memory for n tokens."""
        row = self.slice * (2 if four else 1)
        return (self.stages - 1) * self.warps * (self.rows * row + n * 2 * self.slice * (4 if four else 1))


def plan_tokens(weight: QuantizedWeight, n_token: int, n_processor: int, shared: int) -> Plan:
    """What measured best on an H100 for Llama 8B's shapes and 8 tokens (LOG.md, 2026-11-26)."""
    four = weight.bits == 4
    if four and len(weight) > 64 * n_processor:
        p = Plan(64, 4, weight.group // 4, 3)
    elif four:
        p = Plan(32, 16, weight.group // 4, 3)
    elif len(weight) <= 64 * n_processor:
        p = Plan(32, 8, 128, 4)
    else:
        p = Plan(32, 4, 128, 4)
    if not four and weight.group > 0:
        p = p._replace(slice=weight.group, warps=min(16, p.warps * 128 // weight.group))
    n = padded(n_token)
    if n > 32:
        p = p._replace(warps=4)
    while p.shared(n, four) > shared - SHARED_SLACK:
        if p.stages > 2:
            p = p._replace(stages=p.stages - 1)
        else:
            p = p._replace(warps=p.warps // 2) if weight.group else p._replace(slice=p.slice // 2)
    return p


def integers_fit_tokens(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether `run_tokens_integers` is for these tokens: 16-bit activations; of 4 bits, not groups of 32."""
    fits = weight.k % 16 == 0 if weight.bits == 8 else weight.group >= 64
    return 1 <= len(x) <= MOST_TOKENS and x.element_size() == 2 and fits and weight.k % 8 == 0


def run_tokens_integers(x: Tensor, weight: QuantizedWeight, around: Around, p: Plan) -> Tensor:
    """A product with what stands around it by a given plan. x: [n_token, k]; returns [n_token, n_out]."""
    assert around.norm is None
    around.check(x, weight.ints)
    n_token, k = x.shape
    n_out = around.n_out(weight.ints)
    overlap = processor(x.device).overlap
    out = torch.empty(n_token, n_out, dtype=x.dtype, device=x.device)
    units = p.rows // 2 if around.paired else p.rows
    pairs = x if weight.steps is None else steps_as_loaded(weight)
    if weight.pairs is not None:
        pairs = weight.pairs.view(torch.int32)
    launch(tokens_integers_kernel, (triton.cdiv(around.n_unit(weight.ints), units),))(
        x, weight.ints, weight.scale, pairs, *around.pointers(x), out, n_out, around.n_turned, n_token,
        weight.ints.shape[1], around.eps, K=k, BITS=weight.bits, GROUP=weight.group, N=padded(n_token), ROWS=p.rows,
        WARPS=p.warps, SLICE=p.slice, STAGES=p.stages, EARLY=p.early, **around.constants,
        FLOAT16=x.dtype == torch.float16, OVERLAP=overlap, INTERPRET=INTERPRET, launch_pdl=overlap, num_warps=p.warps,
    )  # fmt: skip
    return out
