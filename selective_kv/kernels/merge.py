"""Merging parts of an attention by their log-sum-exps, in Triton: one pass over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_kv.formats import rotation_size
from selective_kv.kernels.basics import INTERPRET
from selective_kv.kernels.launch import launch

TOKENS = 32  # of a program
MOST = 7  # parts of a launch: a chunk of 8,192 after 120k tokens has as many
Part = tuple[Tensor, Tensor]  # an output [batch, n_head, token, head_dim] and its log-sum-exp [batch, n_head, token]


@triton.jit
def largest(top, lse, at, seen):
    return tl.maximum(top, tl.load(lse + at, seen, 0.0))


@triton.jit
def add_part(sums, total, out, lse, row, at, top, seen, mask):
    """Add a part's output by its share. row: offsets of the elements [TOKENS, D]; at: of the tokens [TOKENS]."""
    share = tl.exp(tl.load(lse + at, seen, 0.0) - top)
    return sums + share[:, None] * tl.load(out + row, mask, 0.0).to(tl.float32), total + share


@triton.jit(do_not_specialize=["n_token"])
def merge_kernel(
    out0, out1, out2, out3, out4, out5, out6, lse0, lse1, lse2, lse3, lse4, lse5, lse6,
    merged, merged_lse, rotation, n_token, stride_b, stride_h, stride_t,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, ROTATION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, head, sequence): the first N of the parts. With ROTATION > 1 all but the first are
    still rotated by blocks of that size. Strides of all outputs' sequences, heads and tokens; log-sum-exps are
    contiguous."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    seen = token < n_token
    at = (batch * tl.num_programs(1) + head) * n_token + token
    top = largest(tl.full((TOKENS,), float("-inf"), tl.float32), lse0, at, seen)
    top = largest(top, lse1, at, seen)
    if N > 2:
        top = largest(top, lse2, at, seen)
    if N > 3:
        top = largest(top, lse3, at, seen)
    if N > 4:
        top = largest(top, lse4, at, seen)
    if N > 5:
        top = largest(top, lse5, at, seen)
    if N > 6:
        top = largest(top, lse6, at, seen)
    top = tl.where(top == float("-inf"), 0.0, top)  # none has seen anything
    d = tl.arange(0, triton.next_power_of_2(max(HEAD_DIM, 16)))
    mask = seen[:, None] & (d < HEAD_DIM)[None, :]
    row = batch * stride_b + head * stride_h + token[:, None].to(tl.int64) * stride_t + d[None, :]
    total, first = tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS, d.shape[0]), tl.float32)
    first, total = add_part(first, total, out0, lse0, row, at, top, seen, mask)
    rest, total = add_part(tl.zeros_like(first), total, out1, lse1, row, at, top, seen, mask)
    if N > 2:
        rest, total = add_part(rest, total, out2, lse2, row, at, top, seen, mask)
    if N > 3:
        rest, total = add_part(rest, total, out3, lse3, row, at, top, seen, mask)
    if N > 4:
        rest, total = add_part(rest, total, out4, lse4, row, at, top, seen, mask)
    if N > 5:
        rest, total = add_part(rest, total, out5, lse5, row, at, top, seen, mask)
    if N > 6:
        rest, total = add_part(rest, total, out6, lse6, row, at, top, seen, mask)
    whole = tl.where(total == 0, 1.0, total)[:, None]
    if ROTATION > 1:
        dtype: tl.constexpr = tl.float32 if INTERPRET else rotation.dtype.element_ty
        there = (d < HEAD_DIM)[:, None] & (d < HEAD_DIM)[None, :]
        hadamard = tl.load(rotation + d[:, None] * HEAD_DIM + d[None, :], there, 0.0).to(dtype)
        rest = tl.dot((rest / whole).to(dtype), hadamard, input_precision="ieee") * ROTATION**-0.5
        z = first / whole + rest
    else:
        z = (first + rest) / whole
    tl.store(merged_lse + at, top + tl.log(total), seen)
    tl.store(merged + row, z.to(merged.dtype.element_ty), mask)


def room(like: Tensor, dtype: torch.dtype) -> Tensor:
    """For an output [batch, n_head, token, head_dim]: a token's heads together, as the projection after it reads."""
    batch, n_head, n_token, head_dim = like.shape
    return torch.empty(batch, n_token, n_head, head_dim, dtype=dtype, device=like.device).transpose(1, 2)


def merge(parts: Sequence[Part], dtype: torch.dtype, rotation: Tensor | None = None) -> Part:
    """Attention over several sets of keys from that over each: the output in `dtype`, laid out as by `room`, and its
    log-sum-exp. A log-sum-exp of -inf: nothing was seen there.

    rotation: [head_dim, head_dim] of 1, -1 and 0 (`formats.rotation_matrix`), where the outputs of all parts but the
    first are still rotated by it.
    """
    own, rest = parts[0], parts[1:]
    while len(rest) >= MOST:  # what is folded stays in float32
        rest = [_merge(rest[:MOST], torch.float32, None), *rest[MOST:]]
    return _merge([own, *rest], dtype, rotation)


def _merge(parts: Sequence[Part], dtype: torch.dtype, rotation: Tensor | None) -> Part:
    """`merge` of at most MOST parts."""
    if len(parts) == 1:
        return parts[0][0].to(dtype), parts[0][1]
    batch, n_head, n_token, head_dim = parts[0][0].shape
    merged = room(parts[0][0], dtype)
    merged_lse = torch.empty(batch, n_head, n_token, dtype=torch.float32, device=merged.device)
    stride = merged.stride()
    outs = [out if out.stride() == stride else room(out, out.dtype).copy_(out) for out, _ in parts]
    lses = [lse.contiguous() for _, lse in parts]
    for each in (outs, lses):
        each += each[:1] * (MOST - len(parts))  # never looked at
    size = 1 if rotation is None else rotation_size(head_dim)
    tokens = TOKENS if rotation is None else 2 * TOKENS  # each program reads the matrix
    launch(merge_kernel, (triton.cdiv(n_token, tokens), n_head, batch))(
        *outs, *lses, merged, merged_lse, merged if rotation is None else rotation, n_token, *stride[:3],
        HEAD_DIM=head_dim, TOKENS=tokens, N=len(parts), ROTATION=size, INTERPRET=INTERPRET, num_warps=4,
    )  # fmt: skip
    return merged, merged_lse
