"""A decode step's matrix products in Triton, with the small operations around them in the same launch.

A step of a few tokens reads every weight once and computes next to nothing: it is memory-bound, and should run at the
memory's bandwidth. An RMSNorm, residual, SwiGLU or RoPE in a launch of its own would be three microseconds in which
memory idles. Here the norm is the prologue of the product after it (every program sums the squares itself:
W (g * x) / rms(x)); the residual, SwiGLU and RoPE are the epilogue of the product before them; and programs load their
first weights before the wait of programmatic dependent launch (PDL), since weights depend on no earlier launch.

That is for one token, a GEMV: a program multiplies and adds a few rows in registers. Up to 16 tokens are in
`small_gemm.py`; more go through cuBLAS, and only the small operations between the products are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.epilogue import Around, Turn, finish, load_epilogue, rows_of
from engine.kernels.small_gemm import plan_tokens, run_tokens, tokens_fit
from selective_kv.kernels.decode_config import processor
from selective_kv.kernels.launch import launch


@triton.jit(do_not_specialize=["n_out", "n_turned"])
def vector_kernel(
    x, weight, bias, norm, residual, cos, sin, out, n_out, n_turned, eps,
    K: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr,
    SWIGLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program: UNITS units of the output, for one token. x: [K]; weight: [n_out, K], with SWIGLU [2 * n_out, K]."""
    if OVERLAP:
        gdc_launch_dependents()
    PAIRED: tl.constexpr = SWIGLU or HEAD_DIM > 0
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    row, apart = rows_of(unit, n_out, HEAD_DIM, SWIGLU)
    there = row < n_out
    k = tl.arange(0, BLOCK)
    at = weight + tl.where(there, row, 0).to(tl.int64)[:, None] * K + k[None, :]
    other_at = at + apart.to(tl.int64) * K
    inside = (k < K)[None, :]
    weights = tl.load(at, inside, 0.0)
    other_weights = weights
    if PAIRED:
        other_weights = tl.load(other_at, inside, 0.0)
    if OVERLAP:
        gdc_wait()
    epilogue = load_epilogue(bias, residual, cos, sin, row, apart, row, 0, n_turned, there, HEAD_DIM, BIAS, ADD)
    total = tl.zeros((UNITS, BLOCK), tl.float32)
    other_total = tl.zeros((UNITS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        inside = (start + BLOCK + k < K)[None, :]
        after = tl.load(at + start + BLOCK, inside, 0.0)  # the next block's loads are in flight while this one is used
        other_after = after
        if PAIRED:
            other_after = tl.load(other_at + start + BLOCK, inside, 0.0)
        value = tl.load(x + start + k, start + k < K, 0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= tl.load(norm + start + k, start + k < K, 0.0).to(tl.float32)
        total += weights.to(tl.float32) * value[None, :]
        if PAIRED:
            other_total += other_weights.to(tl.float32) * value[None, :]
        weights, other_weights = after, other_after
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    other = tl.sum(other_total, 1) if PAIRED else 0.0
    finish(tl.sum(total, 1), other, scale, epilogue, out, row, apart, there, HEAD_DIM, SWIGLU, BIAS, ADD)


@triton.jit
def norm_kernel(x, weight, out, eps, K: tl.constexpr, OVERLAP: tl.constexpr):
    """Program: the RMSNorm of one token. x, out: [n_token, K]."""
    if OVERLAP:
        gdc_launch_dependents()
    k = tl.arange(0, triton.next_power_of_2(K))
    at = tl.program_id(0).to(tl.int64) * K + k
    g = tl.load(weight + k, k < K, 0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    value = tl.load(x + at, k < K, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / K + eps)
    tl.store(out + at, (value * scale * g).to(out.dtype.element_ty), k < K)


@triton.jit(do_not_specialize=["n"])
def swiglu_kernel(gate_up, out, n, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Program (block of elements, token): silu(gate) * up. gate_up: [n_token, 2 * n], the gate first; out: [n_token,
    n]."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    gate = tl.load(gate_up + token * 2 * n + i, i < n, 0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * n + n + i, i < n, 0.0).to(tl.float32)
    tl.store(out + token * n + i, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), i < n)


class Plan(NamedTuple):
    """What a program of `vector_kernel` takes on."""

    units: int
    block: int  # elements of a row at a time
    warps: int


def plan(n_row: int, k: int, itemsize: int, swiglu: bool, turned: bool) -> Plan:
    """What measured best on an H200 in bfloat16 for Llama 8B's shapes (LOG.md, 2026-11-24). With RoPE as many rows as
    without, which are half as many units.
    """
    if k * itemsize > 16384:
        return Plan(1, 16384 // itemsize, 16)
    widest = min(triton.next_power_of_2(k), 8192 // itemsize)
    units = 1 if turned else 2
    if n_row * k * itemsize < 40 << 20 and not swiglu:  # few programs: smaller ones
        return Plan(units, max(16, min(widest, 4096 // itemsize)), 8)
    return Plan(units, widest, 8)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`contract.Linear` for weights of 16 or 32 bits. The residual's memory may become the output's."""
    if norm is not None and not norm_fits(x):
        x, norm = normed(x, norm, eps), None
    if len(x) == 1 or tokens_fit(x):
        return product(x, weight, Around(bias, norm, eps, swiglu, residual))
    if residual is not None and not swiglu and bias is None:
        return residual.addmm_(x, weight.t())
    y = F.linear(x, weight, bias)
    if swiglu:
        y = gated(y)
    return y if residual is None else residual + y


def gated(gate_up: Tensor) -> Tensor:
    """SwiGLU in a launch of its own. gate_up: [n_token, 2 * n], the gate first; returns [n_token, n]."""
    overlap = processor(gate_up.device).overlap
    n_token, n = len(gate_up), gate_up.shape[1] // 2
    y = torch.empty(n_token, n, dtype=gate_up.dtype, device=gate_up.device)
    launch(swiglu_kernel, (triton.cdiv(n, 1024), n_token))(
        gate_up, y, n, BLOCK=1024, OVERLAP=overlap, launch_pdl=overlap, num_warps=4
    )
    return y


def qkv(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor, eps: float, cos: Tensor, sin: Tensor,
    n_head: int, n_qk: int, norms: tuple[Tensor, Tensor, float] | None,
) -> Tensor:  # fmt: skip
    """`contract.QKV` for weights of 16 or 32 bits."""
    head_dim = cos.shape[1]
    if norms is None and (len(x) == 1 or tokens_fit(x)):
        within: Tensor | None = norm
        if not norm_fits(x):
            x, within = normed(x, norm, eps), None
        return product(x, weight, Around(bias, within, eps, turn=Turn(cos, sin, n_qk))).view(len(x), -1, head_dim)
    y = linear(x, weight, bias, norm, eps).view(len(x), -1, head_dim)
    rotate_qk(y, n_head, n_qk, cos, sin, norms)
    return y


def norm_fits(x: Tensor) -> bool:
    """Whether the norm can be computed in the product's launch. With several tokens g * x is an operand before it is
    divided by rms(x), and float16 may overflow there.
    """
    return len(x) == 1 or (tokens_fit(x) and x.dtype == torch.bfloat16)


def normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """The RMSNorm of every token in a launch of its own. x: [n_token, k]."""
    overlap = processor(x.device).overlap
    y = x.new_empty(x.shape)
    launch(norm_kernel, (len(x),))(
        x, norm, y, eps, K=x.shape[1], OVERLAP=overlap, launch_pdl=overlap, num_warps=8
    )  # fmt: skip
    return y


def product(x: Tensor, weight: Tensor, around: Around) -> Tensor:
    """weight @ x with all that stands around it, in one launch."""
    if len(x) == 1:
        p = plan(len(weight), x.shape[1], x.element_size(), around.swiglu, around.turn is not None)
        return run(x, weight, around, p)
    here = processor(x.device)
    return run_tokens(x, weight, around, plan_tokens(len(weight), len(x), here.multiprocessors, here.shared))


def run(x: Tensor, weight: Tensor, around: Around, p: Plan) -> Tensor:
    """The product of one token by a given plan."""
    assert len(x) == 1
    around.check(x, weight)
    overlap = processor(x.device).overlap
    n_out = around.n_out(weight)
    out = torch.empty(1, n_out, dtype=x.dtype, device=x.device)
    launch(vector_kernel, (triton.cdiv(around.n_unit(weight), p.units),))(
        x, weight, *around.pointers(x), out, n_out, around.n_turned, around.eps,
        K=x.shape[1], UNITS=p.units, BLOCK=p.block, **around.constants, OVERLAP=overlap, launch_pdl=overlap,
        num_warps=p.warps,
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
    """`contract.RotateQK`."""
    batch, _, head_dim = qkv.shape
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    overlap = processor(qkv.device).overlap
    launch(rotate_kernel, (n_qk, batch))(
        qkv, cos, sin, q_norm, k_norm, n_head, n_qk, qkv.stride(0), eps, HEAD_DIM=head_dim,
        NORM=norms is not None, OVERLAP=overlap, launch_pdl=overlap, num_warps=1,
    )  # fmt: skip
