"""What a prompt's chunk does between its matrix products, in Triton: each operation is a single pass over memory.

For 8,192 tokens of Llama 3.1 8B PyTorch's operators take 72 ms, beside 145 ms of products: a chunk's activations are
hundreds of megabytes, and SwiGLU as two operators reads and writes them twice, RoPE as three operators four times.
Results are rounded to the activations' dtype once, at the end, as PyTorch's are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.contract import HeadNorms
from engine.kernels.gemv import swiglu_kernel
from selective_kv.kernels.launch import launch

SWIGLU_BLOCK = 2048
MOST = 65535  # programs along a grid's second dimension
HEADS = 8  # that a program rotates at once


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [n_token, 2 * n], contiguous, the gate first. Returns [n_token, n]."""
    assert gate_up.is_contiguous()
    n_token, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n_token, n)
    for first in range(0, n_token, MOST):
        part = slice(first, first + MOST)
        launch(swiglu_kernel, (triton.cdiv(n, SWIGLU_BLOCK), len(out[part])))(
            gate_up[part], out[part], n, BLOCK=SWIGLU_BLOCK, OVERLAP=False, num_warps=4
        )
    return out


@triton.jit
def add_norm_kernel(x, y, norm, out, eps, N: tl.constexpr):
    """Program: a token. x += y, and out is the RMSNorm of that. All [n_token, N] but for norm, [N]."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, triton.next_power_of_2(N))
    there = i < N
    at = token * N + i
    total = tl.load(x + at, there, 0.0).to(tl.float32) + tl.load(y + at, there, 0.0).to(tl.float32)
    total = total.to(x.dtype.element_ty)
    tl.store(x + at, total, there)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / N + eps)
    y = total * scale * tl.load(norm + i, there, 0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), there)


def add_norm(x: Tensor, y: Tensor, norm: Tensor, eps: float) -> Tensor:
    """x += y, in place. Returns the RMSNorm of x. x, y: [n_token, n], contiguous; norm: [n]."""
    assert x.is_contiguous() and y.is_contiguous()
    out = x.new_empty(x.shape)
    launch(add_norm_kernel, (len(x),))(x, y, norm, out, eps, N=x.shape[1], num_warps=8)
    return out


@triton.jit(do_not_specialize=["n_head", "n_qk"])
def rotate_kernel(
    qkv, cos, sin, q_norm, k_norm, n_head, n_qk, token_stride, eps,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Program: a token. Norms, if any, and RoPE of its first n_qk heads, in place."""
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = HEAD_DIM // 2
    d = tl.arange(0, triton.next_power_of_2(HALF))
    there = d < HALF
    c = tl.load(cos + token * HEAD_DIM + d, there, 0.0)[None, :]
    s = tl.load(sin + token * HEAD_DIM + d, there, 0.0)[None, :]  # of the first half: the other's has the other sign
    for first in range(0, n_qk, HEADS):
        head = first + tl.arange(0, HEADS)
        mask = (head < n_qk)[:, None] & there[None, :]
        at = qkv + token * token_stride + head[:, None] * HEAD_DIM + d[None, :]
        low, high = tl.load(at, mask, 0.0).to(tl.float32), tl.load(at + HALF, mask, 0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)[:, None]
            q = (head < n_head)[:, None]
            first_half = tl.where(q, tl.load(q_norm + d, there, 0.0)[None, :], tl.load(k_norm + d, there, 0.0)[None, :])
            other_half = tl.where(
                q, tl.load(q_norm + HALF + d, there, 0.0)[None, :], tl.load(k_norm + HALF + d, there, 0.0)[None, :]
            )
            low, high = low * scale * first_half.to(tl.float32), high * scale * other_half.to(tl.float32)
        tl.store(at, (low * c + high * s).to(qkv.dtype.element_ty), mask)
        tl.store(at + HALF, (high * c - low * s).to(qkv.dtype.element_ty), mask)


def rotate_qk(qkv: Tensor, n_head: int, n_qk: int, cos: Tensor, sin: Tensor, norms: HeadNorms | None) -> None:
    """RoPE of a chunk's queries and keys, in place; `norms` come before it.

    qkv: [n_token, head, head_dim], a token's heads together, of which the first n_qk turn and n_head are q's; cos, sin:
    float32 [n_token, head_dim], contiguous, as `model.Rope` has them.
    """
    n_token, _, head_dim = qkv.shape
    assert qkv.stride(1) == head_dim and qkv.stride(2) == 1 and cos.is_contiguous() and sin.is_contiguous()
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)  # never looked at there
    launch(rotate_kernel, (n_token,))(
        qkv, cos, sin, q_norm, k_norm, n_head, n_qk, qkv.stride(0), eps,
        HEAD_DIM=head_dim, HEADS=HEADS, NORM=norms is not None, num_warps=4,
    )  # fmt: skip
