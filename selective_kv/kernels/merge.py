"""Merge attention over several sets of keys, by log-sum-exps, in Triton: one pass over all partial results.

Softmax over two sets of keys is a weighted mean of the softmaxes over each (Milakov & Gimelshein 2018,
arXiv:1805.02867): each set's weight is the exponential of the log-sum-exp of its scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_kv.formats import rotation_size
from selective_kv.kernels.basics import INTERPRET
from selective_kv.kernels.hadamard import rotated_rows
from selective_kv.kernels.launch import launch

TOKENS = 32  # of a program
MOST = 7  # partial results of a launch: a chunk of 8,192 after 120k tokens has as many
# Attention over one set of keys: the output [batch, n_head, token, head_dim] and its log-sum-exp [batch, n_head, token]
PartialResult = tuple[Tensor, Tensor]


@triton.jit
def add_partial(sums, total, out, lse, row, at, top, there, mask):
    """Add a partial output by its weight. row: offsets of the elements [TOKENS, D]; at: of the tokens [TOKENS]; top:
    the largest log-sum-exp of each token; there: which tokens exist; mask: which elements."""
    weight = tl.exp(tl.load(lse + at, there, 0.0) - top)
    return sums + weight[:, None] * tl.load(out + row, mask, 0.0).to(tl.float32), total + weight


@triton.jit(do_not_specialize=["n_token"])
def merge_kernel(
    out0, out1, out2, out3, out4, out5, out6, lse0, lse1, lse2, lse3, lse4, lse5, lse6,
    merged, merged_lse, rotation, n_token, stride_b, stride_h, stride_t,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, ROTATION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, head, sequence): merge the first N partial results. With ROTATION > 1 all outputs but
    the first are still rotated, by Hadamard blocks of that size. Strides: of all outputs' sequences, heads and tokens;
    log-sum-exps are contiguous."""
    outs, lses = (out0, out1, out2, out3, out4, out5, out6), (lse0, lse1, lse2, lse3, lse4, lse5, lse6)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    there = token < n_token
    at = (batch * tl.num_programs(1) + head) * n_token + token
    top = tl.full((TOKENS,), float("-inf"), tl.float32)
    for i in tl.static_range(N):
        top = tl.maximum(top, tl.load(lses[i] + at, there, 0.0))
    top = tl.where(top == float("-inf"), 0.0, top)  # no set of keys had any for this token
    d = tl.arange(0, triton.next_power_of_2(max(HEAD_DIM, 16)))
    mask = there[:, None] & (d < HEAD_DIM)[None, :]
    row = batch * stride_b + head * stride_h + token[:, None].to(tl.int64) * stride_t + d[None, :]
    total, first = tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS, d.shape[0]), tl.float32)
    first, total = add_partial(first, total, out0, lse0, row, at, top, there, mask)
    rest = tl.zeros_like(first)
    for i in tl.static_range(1, N):
        rest, total = add_partial(rest, total, outs[i], lses[i], row, at, top, there, mask)
    whole = tl.where(total == 0, 1.0, total)[:, None]
    if ROTATION > 1:
        dtype: tl.constexpr = tl.float32 if INTERPRET else rotation.dtype.element_ty
        z = first / whole + rotated_rows(rest / whole, rotation, HEAD_DIM, ROTATION, dtype)
    else:
        z = (first + rest) / whole
    tl.store(merged_lse + at, top + tl.log(total), there)
    tl.store(merged + row, z.to(merged.dtype.element_ty), mask)


def empty_output(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for an output of attention, [batch, n_head, token, head_dim] as `like`, in which a token's heads lie side
    by side, as the projection after attention reads them."""
    batch, n_head, n_token, head_dim = like.shape
    return torch.empty(batch, n_token, n_head, head_dim, dtype=dtype, device=like.device).transpose(1, 2)


def merge(partials: Sequence[PartialResult], dtype: torch.dtype, rotation: Tensor | None = None) -> PartialResult:
    """Attention over several sets of keys together, from that over each: the output in `dtype`, in memory of
    `empty_output`, and its log-sum-exp. A log-sum-exp of -inf says that a token saw no key of a set.

    rotation: [head_dim, head_dim] of 1, -1 and 0 (`formats.rotation_matrix`), if all outputs but the first are still
    rotated by it.
    """
    own, rest = partials[0], partials[1:]
    while len(rest) >= MOST:  # results of several launches stay in float32 between them
        rest = [_merge(rest[:MOST], torch.float32, None), *rest[MOST:]]
    return _merge([own, *rest], dtype, rotation)


def _merge(partials: Sequence[PartialResult], dtype: torch.dtype, rotation: Tensor | None) -> PartialResult:
    """`merge` of at most MOST partial results."""
    if len(partials) == 1:
        return partials[0][0].to(dtype), partials[0][1]
    batch, n_head, n_token, head_dim = partials[0][0].shape
    merged = empty_output(partials[0][0], dtype)
    merged_lse = torch.empty(batch, n_head, n_token, dtype=torch.float32, device=merged.device)
    stride = merged.stride()
    outs = [out if out.stride() == stride else empty_output(out, out.dtype).copy_(out) for out, _ in partials]
    lses = [lse.contiguous() for _, lse in partials]
    for each in (outs, lses):
        each += each[:1] * (MOST - len(partials))  # never read
    size = 1 if rotation is None else rotation_size(head_dim)
    tokens = TOKENS if rotation is None else 2 * TOKENS  # each program reads the matrix
    launch(merge_kernel, (triton.cdiv(n_token, tokens), n_head, batch))(
        *outs, *lses, merged, merged_lse, merged if rotation is None else rotation, n_token, *stride[:3],
        HEAD_DIM=head_dim, TOKENS=tokens, N=len(partials), ROTATION=size, INTERPRET=INTERPRET, num_warps=4,
    )  # fmt: skip
    return merged, merged_lse
