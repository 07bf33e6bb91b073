"""Products with weights in 8 and 4 bits, whatever the number of tokens, and an embedding's rows.

    tokens     groups of 128 in 4 bits     other weights
    1          gemv_int4.py                gemv_integers.py
    2 to 8     small_gemm_int4.py          small_gemm_integers.py
    to 64      small_gemm_integers.py      small_gemm_integers.py

For more tokens, and for what these do not take (float32, rows that are not whole 16 bytes, several tokens with groups
of 32 in 4 bits), a weight is made dense a few rows at a time, in memory that stays in the L2, and a library multiplies.
That reads 16 bits where 8 or 4 are stored, which does not show with a prompt's thousands of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.contract import HeadNorms
from engine.kernels.epilogue import Around, Turn
from engine.kernels.gemv import gated, normed, rotate_qk
from engine.kernels.gemv_int4 import int4_fits, run_int4
from engine.kernels.gemv_int4 import plan as plan_int4
from engine.kernels.gemv_integers import chunks_of, integers_fit, plan, run_integers
from engine.kernels.small_gemm_int4 import repeats_of, run_tokens_int4, tokens_int4_fit
from engine.kernels.small_gemm_integers import integers_fit_tokens, plan_tokens, run_tokens_integers
from selective_kv.kernels.decode_config import processor
from selective_kv.kernels.launch import launch
from weights.modules import QuantizedWeight, blocks


@triton.jit
def dense_kernel(
    ints, row_scale, pairs, out, n_row,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (rows, columns of `ints`): make them dense. ints, row_scale, pairs (with 8 bits in groups: their steps)
    as for the products; out: [n_row, K]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < n_row
    at = row.to(tl.int64)[:, None]
    scale = tl.load(row_scale + row, there, 0.0)[:, None]
    if BITS == 8:
        inside = there[:, None] & (column < K)[None, :]
        value = tl.load(ints + at * K + column[None, :], inside, 0).to(tl.float32)
        if GROUP > 0:  # exact, as the reference has it
            N_STEP: tl.constexpr = (K + GROUP - 1) // GROUP
            value *= tl.load(pairs + at * N_STEP + (column // GROUP)[None, :], inside, 0).to(tl.float32)
        value *= scale
        tl.store(out + at * K + column[None, :], value.to(out.dtype.element_ty), inside)
    else:
        QUARTER: tl.constexpr = GROUP // 4
        N_GROUP: tl.constexpr = (K + GROUP - 1) // GROUP
        group = column // QUARTER
        inside = there[:, None] & (group < N_GROUP)[None, :]
        word = tl.load(ints + at * (N_GROUP * QUARTER) + column[None, :], inside, 0).to(tl.int32)
        pair_at = pairs + (at * N_GROUP + group[None, :]) * 2
        step = tl.load(pair_at, inside, 0.0).to(tl.float32)
        base = tl.load(pair_at + 1, inside, 0.0).to(tl.float32)
        for n in tl.static_range(4):
            k = group * GROUP + n * QUARTER + column % QUARTER
            value = (((word >> (4 * n)) & 15).to(tl.float32) * step + base) * scale
            tl.store(out + at * K + k[None, :], value.to(out.dtype.element_ty), inside & (k < K)[None, :])


def make_dense(weight: QuantizedWeight, out: Tensor) -> None:
    """weight's values into out, [n, k], contiguous, a float dtype."""
    n, length = weight.ints.shape
    pairs = next(t for t in (weight.pairs, weight.steps, weight.scale) if t is not None)
    columns = min(1024, triton.next_power_of_2(length))
    rows = max(1, 4096 // columns)
    launch(dense_kernel, (triton.cdiv(n, rows), triton.cdiv(length, columns)))(
        weight.ints, weight.scale, pairs, out, n, K=weight.k, BITS=weight.bits, GROUP=weight.group, ROWS=rows,
        COLUMNS=columns, num_warps=4,
    )  # fmt: skip


def product_of_many(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """weight @ x + bias, a library's, of rows made dense. x: [n_token, k]."""
    n, k = weight.shape
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    parts = list(blocks(n, k))
    dense = torch.empty(parts[0][1], k, dtype=x.dtype, device=x.device)
    for start, stop in parts:
        rows = dense[: stop - start]
        make_dense(weight.rows(start, stop), rows)
        torch.mm(x, rows.t(), out=y[:, start:stop])
    return y if bias is None else y.add_(bias)


def in_one_launch(x: Tensor, weight: QuantizedWeight, around: Around) -> Tensor | None:
    """The product of a few tokens with its prologue and epilogue, fused; None where no kernel takes these operands.

    For more than one token the norm must have been computed already, unless `norm_fits`.
    """
    here = processor(x.device)
    n_unit = around.n_unit(weight.ints)
    if integers_fit(x, weight):
        if int4_fits(x, weight, around):
            return run_int4(x, weight, around, plan_int4(n_unit, weight.k, around.paired, here.multiprocessors))
        return run_integers(x, weight, around, plan(n_unit, chunks_of(weight), around.paired, here.multiprocessors))
    if tokens_int4_fit(x, weight, around):
        return run_tokens_int4(x, weight, around, repeats_of(n_unit, weight.k, around.paired, here.multiprocessors))
    if integers_fit_tokens(x, weight) and around.norm is None:
        return run_tokens_integers(x, weight, around, plan_tokens(weight, len(x), here.multiprocessors, here.shared))
    return None


def norm_fits(x: Tensor, weight: QuantizedWeight, around: Around) -> bool:
    """Whether a norm is part of the launch of the product after it."""
    return integers_fit(x, weight) or tokens_int4_fit(x, weight, around)


@triton.jit
def embed_kernel(
    tokens, ints, scale, steps, out,
    N: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program: a token's row of an embedding in 8 bits. tokens: int64; ints: [vocab, N]; steps: of its groups, where
    GROUP is not 0; out: [token, N]."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    k = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + at)
    value = tl.load(ints + token * N + k, k < N, 0).to(tl.float32)
    if GROUP > 0:
        value *= tl.load(steps + token * ((N + GROUP - 1) // GROUP) + k // GROUP, k < N, 0).to(tl.float32)
    value *= tl.load(scale + token)
    tl.store(out + at * N + k, value.to(out.dtype.element_ty), k < N)


def embed(tokens: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding in 8 bits. tokens: int64 [n]; returns [n, dim] in `dtype`."""
    overlap = processor(tokens.device).overlap
    out = torch.empty(len(tokens), weight.k, dtype=dtype, device=tokens.device)
    launch(embed_kernel, (len(tokens),))(
        tokens, weight.ints, weight.scale, weight.scale if weight.steps is None else weight.steps, out, N=weight.k,
        GROUP=weight.group, BLOCK=triton.next_power_of_2(weight.k), OVERLAP=overlap, launch_pdl=overlap, num_warps=8,
    )  # fmt: skip
    return out


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`contract.Linear` for weights of 8 or 4 bits."""
    x = x.contiguous()
    around = Around(bias, norm, eps, swiglu, residual)
    if norm is not None and not norm_fits(x, weight, around):
        x, around = normed(x, norm, eps), around._replace(norm=None)
    y = in_one_launch(x, weight, around)
    if y is not None:
        return y
    y = product_of_many(x, weight, bias)
    if swiglu:
        y = gated(y)
    return y if residual is None else residual + y


def qkv(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, norm: Tensor, eps: float, cos: Tensor, sin: Tensor,
    n_head: int, n_qk: int, norms: HeadNorms | None,
) -> Tensor:  # fmt: skip
    """`contract.QKV` for weights of 8 or 4 bits."""
    around = Around(bias, norm, eps, turn=Turn(cos, sin, n_qk))
    if not norm_fits(x, weight, around):
        x, around = normed(x, norm, eps), around._replace(norm=None)
    if norms is None:
        y = in_one_launch(x, weight, around)
        if y is not None:
            return y.view(len(x), -1, cos.shape[1])
    y = linear(x, weight, bias, around.norm, eps).view(len(x), -1, cos.shape[1])
    rotate_qk(y, n_head, n_qk, cos, sin, norms)
    return y
