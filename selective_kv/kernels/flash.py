"""Attention of a chunk's queries by a library's flash kernel, with the log-sum-exps that let parts be merged.

Softmax over two sets of keys is a weighted mean of the softmaxes over each (Milakov & Gimelshein 2018,
arXiv:1805.02867), so what a cache holds can be looked at part by part, each in the form it is held in.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = 1 << 24  # of one sequence at a time, where no flash kernel is


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """q: [batch, n_head, token, head_dim]; k, v: [batch, n_kv_head, key, head_dim], in q's dtype, at least one key.

    causal: queries and keys are the same tokens, and a query sees none after itself. Returns the output, like q,
    and the log-sum-exp of its scores, natural, float32 [batch, n_head, token].
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
        return out, lse
    if q.is_meta:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    group = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and not causal:  # the group as so many tokens of one head: each key is read once
        tile = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(tile, k, v, 0.0, False)[:2]
        return out.reshape(q.shape), lse.reshape(q.shape[:3])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[:2]
        return out, lse
    return plain(q, k, v, causal)


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The same where there is no flash kernel (float32 on CUDA, MPS), a block of queries at a time."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    n_query = max(1, SCORES // (q.shape[1] * k.shape[2]))
    for lo in range(0, q.shape[2], n_query):
        block = slice(lo, lo + n_query)
        score = (q[:, :, block].float() * q.shape[3] ** -0.5) @ k.float().transpose(-1, -2)
        if causal:
            at = torch.arange(k.shape[2], device=q.device)
            score.masked_fill_(at > at[block, None], float("-inf"))
        lse[:, :, block] = score.logsumexp(-1)
        out[:, :, block] = (score.softmax(-1) @ v.float()).to(q.dtype)
    return out, lse


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: outputs [..., head_dim], log-sum-exps [...]. float32.

    One of the two may have seen nothing: a log-sum-exp of -inf.
    """
    share = torch.sigmoid(more_lse.float() - lse.float())[..., None]  # of the softmax's mass
    return torch.lerp(out.float(), more.float(), share), torch.logaddexp(lse.float(), more_lse.float())
