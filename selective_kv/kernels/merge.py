"""Merging two parts of an attention by their log-sum-exps, in Triton: one pass, where PyTorch's operators take six."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_kv.kernels.launch import launch

TOKENS = 32  # of a program


@triton.jit(do_not_specialize=["n_token"])
def merge_kernel(
    out, lse, more, more_lse, merged, merged_lse, n_token,
    out_b, out_h, out_t, lse_b, lse_h, more_b, more_h, more_t, more_lse_b, more_lse_h, merged_b, merged_h, merged_t,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, head, sequence). Strides of sequences, heads and tokens; merged_lse is contiguous."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    seen = token < n_token
    a = tl.load(lse + batch * lse_b + head * lse_h + token, seen, 0.0)
    b = tl.load(more_lse + batch * more_lse_b + head * more_lse_h + token, seen, 0.0)
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)  # neither has seen anything
    left, right = tl.exp(a - top), tl.exp(b - top)
    total = left + right
    share = right / tl.where(total == 0, 1.0, total)
    tl.store(merged_lse + (batch * tl.num_programs(1) + head) * n_token + token, top + tl.log(total), seen)
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    mask = seen[:, None] & (d < HEAD_DIM)[None, :]
    row = token[:, None].to(tl.int64)
    x = tl.load(out + batch * out_b + head * out_h + row * out_t + d[None, :], mask, 0.0).to(tl.float32)
    y = tl.load(more + batch * more_b + head * more_h + row * more_t + d[None, :], mask, 0.0).to(tl.float32)
    z = x + share[:, None] * (y - x)
    at = merged + batch * merged_b + head * merged_h + row * merged_t + d[None, :]
    tl.store(at, z.to(merged.dtype.element_ty), mask)


def merge(
    out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """As `attention_lse.merge`. A float32 `out` may become the result."""
    batch, n_head, n_token, head_dim = out.shape
    if dtype == out.dtype == torch.float32:
        merged = out
    else:  # a token's heads together, as the projection after it reads them
        merged = torch.empty(batch, n_token, n_head, head_dim, dtype=dtype, device=out.device).transpose(1, 2)
    merged_lse = torch.empty(batch, n_head, n_token, dtype=torch.float32, device=out.device)
    lse, more_lse = (x if x.stride(2) == 1 else x.contiguous() for x in (lse, more_lse))
    assert out.stride(3) == 1 and more.stride(3) == 1
    launch(merge_kernel, (triton.cdiv(n_token, TOKENS), n_head, batch))(
        out, lse, more, more_lse, merged, merged_lse, n_token,
        *out.stride()[:3], *lse.stride()[:2], *more.stride()[:3], *more_lse.stride()[:2], *merged.stride()[:3],
        HEAD_DIM=head_dim, TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip
    return merged, merged_lse
