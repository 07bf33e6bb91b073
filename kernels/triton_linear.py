"""A decode step's matrix products in Triton, with the small operations around them in the same launch.

A step of a few tokens reads every weight once and computes next to nothing, so it should take as long as
the reading. What gets in the way is everything else: an RMSNorm, a residual, SwiGLU or RoPE is a launch of
its own, three microseconds of an idle memory. Here the norm is part of the product that follows it (every
program sums the squares itself: W (g * x) / rms(x)), the residual and SwiGLU are part of the product
before them, and programs load their first weights while the previous launch is still at work
(programmatic dependent launch): weights depend on nobody.

That is for one token: a program multiplies and adds ROWS rows in registers. For several tokens a library's
products are as fast as ours were (LOG.md), and only the small operations between them are here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_plan import processor


@triton.jit
def finish(y, up, scale, bias, residual, row, there, SWIGLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr):
    """What follows the product y, float32, of the rows `row`."""
    y *= scale
    if BIAS:
        y += tl.load(bias + row, there, 0.0).to(tl.float32)
    if SWIGLU:
        y = y / (1.0 + tl.exp(-y)) * (up * scale)
    if ADD:
        y += tl.load(residual + row, there, 0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["n_out"])
def vector_kernel(
    x, weight, bias, norm, residual, out, n_out, eps,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, SWIGLU: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program: ROWS elements of the output, for one token. x: [K]; weight: [n_out, K], with SWIGLU [2 * n_out, K]."""
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    at = weight + tl.minimum(row, n_out - 1)[:, None] * K + k[None, :]
    up_at = at + n_out.to(tl.int64) * K
    there = (k < K)[None, :]
    tile = tl.load(at, there, 0.0)
    up_tile = tile
    if SWIGLU:
        up_tile = tl.load(up_at, there, 0.0)
    if OVERLAP:
        gdc_wait()
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    up_total = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        there = (start + BLOCK + k < K)[None, :]
        after = tl.load(at + start + BLOCK, there, 0.0)  # the next weights, while these are at work
        up_after = after
        if SWIGLU:
            up_after = tl.load(up_at + start + BLOCK, there, 0.0)
        value = tl.load(x + start + k, start + k < K, 0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= tl.load(norm + start + k, start + k < K, 0.0).to(tl.float32)
        total += tile.to(tl.float32) * value[None, :]
        if SWIGLU:
            up_total += up_tile.to(tl.float32) * value[None, :]
        tile, up_tile = after, up_after
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    up = tl.sum(up_total, 1) if SWIGLU else 0.0
    y = finish(tl.sum(total, 1), up, scale, bias, residual, row, row < n_out, SWIGLU, BIAS, ADD)
    tl.store(out + row, y.to(out.dtype.element_ty), row < n_out)


@triton.jit
def norm_kernel(x, weight, out, eps, K: tl.constexpr):
    """Program: the RMSNorm of one token. x, out: [n_token, K]."""
    k = tl.arange(0, triton.next_power_of_2(K))
    at = tl.program_id(0).to(tl.int64) * K + k
    value = tl.load(x + at, k < K, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / K + eps)
    y = value * scale * tl.load(weight + k, k < K, 0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), k < K)


@triton.jit(do_not_specialize=["n"])
def swiglu_kernel(x, out, n, BLOCK: tl.constexpr):
    """Program (block, token): silu(x[:n]) * x[n:]. x: [n_token, 2 * n]; out: [n_token, n]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    gate = tl.load(x + token * 2 * n + i, i < n, 0.0).to(tl.float32)
    up = tl.load(x + token * 2 * n + n + i, i < n, 0.0).to(tl.float32)
    tl.store(out + token * n + i, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), i < n)


class Plan(NamedTuple):
    """What a program of `vector_kernel` takes on."""

    rows: int
    block: int  # elements of a row at a time
    warps: int


def plan(n_out: int, k: int, swiglu: bool, itemsize: int) -> Plan:
    """What measured best on an H200 in bfloat16 for Llama 8B's shapes (LOG.md, 2026-11-24)."""
    if k * itemsize > 16384:
        return Plan(1, 16384 // itemsize, 16)
    widest = min(triton.next_power_of_2(k), 8192 // itemsize)
    if n_out * k * itemsize < 40 << 20 and not swiglu:  # few programs: smaller ones
        return Plan(2, max(16, min(widest, 4096 // itemsize)), 8)
    return Plan(2, widest, 8)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """weight @ x with what stands around it; the twin says exactly what. x: [n_token, k].

    The residual's memory may become the output's.
    """
    assert bias is None or not swiglu
    n_token, k = x.shape
    if n_token == 1:
        n_out = weight.shape[0] // (2 if swiglu else 1)
        return run(x, weight, bias, norm, eps, swiglu, residual, plan(n_out, k, swiglu, x.element_size()))
    if norm is not None:
        normed = torch.empty_like(x)
        norm_kernel[(n_token,)](x, norm, normed, eps, K=k, num_warps=8)
        x = normed
    if residual is not None and not swiglu and bias is None:
        return residual.addmm_(x, weight.t())
    y = F.linear(x, weight, bias)
    if swiglu:
        n = weight.shape[0] // 2
        wide, y = y, torch.empty(n_token, n, dtype=x.dtype, device=x.device)
        swiglu_kernel[(triton.cdiv(n, 1024), n_token)](wide, y, n, BLOCK=1024, num_warps=4)
    return y if residual is None else residual + y


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, swiglu: bool,
    residual: Tensor | None, p: Plan,
) -> Tensor:  # fmt: skip
    """`linear` of one token by a given plan."""
    k = x.shape[1]
    assert len(x) == 1 and x.stride(1) == 1 and weight.is_contiguous()
    n_out = weight.shape[0] // (2 if swiglu else 1)
    overlap = processor(x.device).overlap
    out = torch.empty(1, n_out, dtype=x.dtype, device=x.device)
    vector_kernel[(triton.cdiv(n_out, p.rows),)](
        x, weight, *(x if t is None else t for t in (bias, norm, residual)), out, n_out, eps,
        K=k, ROWS=p.rows, BLOCK=p.block, NORM=norm is not None, SWIGLU=swiglu, BIAS=bias is not None,
        ADD=residual is not None, OVERLAP=overlap, launch_pdl=overlap, num_warps=p.warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_head", "n_qk"])
def rotate_kernel(
    qkv, cos, sin, q_norm, k_norm, n_head, n_qk, qkv_stride, eps,
    HEAD_DIM: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (head of q or k, sequence): its norm, if there is one, and RoPE, in place."""
    if OVERLAP:
        gdc_launch_dependents()
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    there = d < HEAD_DIM
    partner = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
    turn_at = batch * HEAD_DIM + d
    if OVERLAP:
        gdc_wait()
    at = qkv + batch * qkv_stride + head * HEAD_DIM
    own, other = tl.load(at + d, there, 0.0).to(tl.float32), tl.load(at + partner, there, 0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(own * own, 0) / HEAD_DIM + eps)
        norm = q_norm
        if head >= n_head:
            norm = k_norm
        own *= scale * tl.load(norm + d, there, 0.0).to(tl.float32)
        other *= scale * tl.load(norm + partner, there, 0.0).to(tl.float32)
    y = own * tl.load(cos + turn_at, there, 0.0) + other * tl.load(sin + turn_at, there, 0.0)
    tl.debug_barrier()  # both halves have been read before either is overwritten
    tl.store(at + d, y.to(qkv.dtype.element_ty), there)


def rotate_qk(
    qkv: Tensor, n_head: int, n_qk: int, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor, float] | None
) -> None:
    """RoPE, in place, of the first n_qk heads of qkv; the twin says exactly what."""
    batch, _, head_dim = qkv.shape
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    overlap = processor(qkv.device).overlap
    rotate_kernel[(n_qk, batch)](
        qkv, cos, sin, q_norm, k_norm, n_head, n_qk, qkv.stride(0), eps, HEAD_DIM=head_dim,
        NORM=norms is not None, OVERLAP=overlap, launch_pdl=overlap, num_warps=1,
    )  # fmt: skip
