"""A decode step's matrix products for a few tokens (a batch), on tensor cores, in one launch each.

They are memory-bound: weights are read once, and bandwidth takes enough bytes in flight. So the loop over K is a
software pipeline of `stages` stages, which copies blocks to shared memory asynchronously. Weight rows are the M
dimension of the product and tokens its N. A block of K is cut into one slice per warp (`dot` over a batch of WARPS
slices): no warp loads what another one has loaded, and warps are reduced once, after the last block.

Prologue and epilogue are in the same launch (`epilogue.py`). A norm: g * x is the operand, and 1 / rms(x) a factor
afterwards; every program sums the squares itself, as the diagonal of x x^T: then x is an operand of tensor cores alone,
and one layout in shared memory serves. SwiGLU and RoPE: a program has both rows of its units.
Weights depend on no earlier launch, so a program prefetches its first blocks into L2 before the PDL wait.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.epilogue import Around, finish, load_epilogue, rows_of, unit_sums, weight_rows
from selective_kv.kernels.basics import INTERPRET, prefetch
from selective_kv.kernels.decode_config import SHARED_SLACK, processor
from selective_kv.kernels.launch import launch

MOST_TOKENS = 16  # beyond, a library's products


@triton.jit(do_not_specialize=["n_out", "n_token", "n_turned", "end"])
def tokens_kernel(
    x, weight, bias, norm, residual, cos, sin, out, n_out, n_turned, n_token, end, eps,
    K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, SLICE: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr, SWIGLU: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program: the units of ROWS rows, for all tokens. x: [n_token, K], n_token <= N; out: [n_token, n_out].

    EARLY: elements of a weight row prefetched into L2 before the PDL wait. end: K as a runtime value; with a constant
    trip count the compiler unrolls the whole loop into thousands of instructions, each fetched for one use.
    """
    if OVERLAP:
        gdc_launch_dependents()
    PAIRED: tl.constexpr = SWIGLU or HEAD_DIM > 0
    BLOCK: tl.constexpr = WARPS * SLICE
    UNITS: tl.constexpr = ROWS // 2 if PAIRED else ROWS
    row = weight_rows(n_out, ROWS, UNITS, HEAD_DIM, SWIGLU)
    start_of_row = row.to(tl.int64) * K
    if OVERLAP:
        if EARLY > 0:
            line = tl.arange(0, EARLY // 64) * 64
            prefetch(weight + start_of_row[:, None] + tl.minimum(line, K - 1)[None, :])
        gdc_wait()

    unit, apart = rows_of(tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None], n_out, HEAD_DIM, SWIGLU)
    token = tl.arange(0, N)
    there = (unit < n_out) & (token < n_token)[None, :]
    at = token[None, :].to(tl.int64) * n_out + unit
    epilogue = load_epilogue(
        bias, residual, cos, sin, unit, apart, at, token[None, :], n_turned, there, HEAD_DIM, BIAS, ADD
    )
    k = (tl.arange(0, WARPS) * SLICE)[:, None] + tl.arange(0, SLICE)[None, :]
    weight_at = weight + start_of_row[None, :, None] + k[:, None, :]
    x_at = x + token[None, None, :] * K + k[:, :, None]
    given = (token < n_token)[None, None, :]
    total = tl.zeros((WARPS, ROWS, N), tl.float32)
    squares = tl.zeros((WARPS, N, N), tl.float32)
    for start in tl.range(0, end, BLOCK, num_stages=STAGES):
        if K % BLOCK == 0:
            weights = tl.load(weight_at + start)
            value = tl.load(x_at + start, given, 0.0)
        else:
            inside = start + k < K
            weights = tl.load(weight_at + start, inside[:, None, :], 0.0)
            value = tl.load(x_at + start, inside[:, :, None] & given, 0.0)
        if INTERPRET:  # its bfloat16 arithmetic is wrong
            weights, value = weights.to(tl.float32), value.to(tl.float32)
        if NORM:
            g = tl.load(norm + start + k) if K % BLOCK == 0 else tl.load(norm + start + k, start + k < K, 0.0)
            squares = tl.dot(tl.permute(value, (0, 2, 1)), value, squares, input_precision="ieee")
            value = (value.to(tl.float32) * g.to(tl.float32)[:, :, None]).to(weights.dtype)
        total = tl.dot(weights, value, total, input_precision="ieee")
    scale = 1.0
    if NORM:
        own = (token[:, None] == token[None, :])[None]
        scale = tl.rsqrt(tl.sum(tl.sum(tl.where(own, squares, 0.0), 1), 0) / K + eps)[None, :]
    y, other = unit_sums(total, UNITS, PAIRED)
    finish(y, other, scale, epilogue, out, at, apart, there, HEAD_DIM, SWIGLU, BIAS, ADD)


class Plan(NamedTuple):
    """What a program of `tokens_kernel` takes on."""

    rows: int  # of the weight: both rows of a unit count
    warps: int  # each sums its own slice of K; with more warps than slices two would compute the same products
    slice: int  # elements; below 64 a norm's part of a block is no asynchronous copy (those have 4 bytes a thread)
    stages: int  # of the software pipeline: stages - 1 blocks are being loaded while one is multiplied
    early: int = 512  # elements of a weight row prefetched into L2 before the PDL wait; 0: none

    def shared(self, n: int) -> int:
        """Bytes of shared memory for n tokens, with a norm."""
        return (self.stages - 1) * self.warps * self.slice * (self.rows + n + 1) * 2


def tokens_fit(x: Tensor) -> bool:
    """Whether `run_tokens` is for these tokens. Its operands have 16 bits."""
    return 1 < len(x) <= MOST_TOKENS and x.element_size() == 2


def padded(n_token: int) -> int:
    """The N dimension of the product: a tensor core's is at least 8."""
    return max(8, triton.next_power_of_2(n_token))


def plan_tokens(n_row: int, n_token: int, n_processor: int, shared: int) -> Plan:
    """The plan for a weight of n_row rows that measured best on an H200, for Llama 8B and 8 and 16 tokens (LOG.md,
    2026-11-25).

    About one program an SM with 120 KB in flight; or, for a larger weight, small programs with 38 KB or more each:
    several are resident on an SM, so that some load while others are in their prologue or epilogue.
    """
    if n_row <= 16 * n_processor:
        p = Plan(16, 8, 64, 4)
    elif n_row <= 32 * n_processor:
        p = Plan(32, 4, 128, 4)
    elif n_row <= 64 * n_processor:
        p = Plan(16, 4, 128, 4 if n_token <= 8 else 3)
    elif n_row <= 512 * n_processor:
        p = Plan(16, 2, 128, 4)
    else:
        p = Plan(32, 4, 64, 4)
    while p.shared(padded(n_token)) > shared - SHARED_SLACK:
        p = p._replace(stages=p.stages - 1) if p.stages > 3 else p._replace(slice=p.slice // 2)
    return p


def run_tokens(x: Tensor, weight: Tensor, around: Around, p: Plan) -> Tensor:
    """A product with what stands around it by a given plan. x: [n_token, k]; returns [n_token, n_out]."""
    around.check(x, weight)
    n_token, k = x.shape
    n_out = around.n_out(weight)
    overlap = processor(x.device).overlap
    out = torch.empty(n_token, n_out, dtype=x.dtype, device=x.device)
    units = p.rows // 2 if around.paired else p.rows
    launch(tokens_kernel, (triton.cdiv(around.n_unit(weight), units),))(
        x, weight, *around.pointers(x), out, n_out, around.n_turned, n_token, k, around.eps,
        K=k, N=padded(n_token), ROWS=p.rows, WARPS=p.warps, SLICE=p.slice, STAGES=p.stages, EARLY=p.early,
        **around.constants, OVERLAP=overlap, INTERPRET=INTERPRET, launch_pdl=overlap, num_warps=p.warps,
    )  # fmt: skip
    return out
