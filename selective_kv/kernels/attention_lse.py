"""Attention of many queries over dense keys, with log-sum-exps, by the best kernel that PyTorch has for the case.

Softmax over two sets of keys is a weighted mean of the softmaxes over each (Milakov & Gimelshein 2018,
arXiv:1805.02867), so what a cache holds can be looked at part by part, each in the form it is held in, if a kernel also
returns the log-sum-exp of its scores. `scaled_dot_product_attention` does not; the operators behind it do. They are
private, and all calls of them are here:

    kernel      dtypes     TFLOP/s on an H100, 32 heads of 128, 8192 queries over 8192 / 32,768 keys / itself
    cudnn       16 bits    677 / 689 / 610
    flash       16 bits    363 / 345 / 318
    efficient   any        45 in float32
    plain       any        PyTorch's own operators, a block of queries at a time

cuDNN makes a plan for every new shape, 40 to 60 ms each, and half a second for the first ones of a process (LOG.md,
2026-11-26). So it is asked only where there is much to do, and long sets of keys are cut into blocks of two sizes,
which recur from chunk to chunk. A chunk of such a size recurs too, so it is asked with less to do: with half or a
quarter of a model's heads, that a rank has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from selective_kv.warning import warn_once

SCORES = 1 << 24  # elements of the scores that `plain` holds at once, for one sequence
LARGEST_BLOCK = 32768
BLOCK_SIZES = (LARGEST_BLOCK, 8192)  # keys that cuDNN is given at once
WORTH_A_PLAN = 2e11  # multiply-adds of a call from which on its plan pays: a model's layers share the plan
RECURRING = 4  # chunks, at the least, that share the plan for a whole chunk: so it pays from a fraction on
OLDEST_CUDNN = 90000  # the oldest version that returns log-sum-exps
HALVES = (torch.float16, torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """q: [batch, n_head, token, head_dim]; k, v: [batch, n_kv_head, key, head_dim], in q's dtype, at least one key.

    causal: queries and keys are the same tokens, and a query sees none after itself. Returns the output, like q,
    and the log-sum-exp of its scores, natural, float32 [batch, n_head, token].
    """
    if q.is_meta:
        batch, n_head, n_token, head_dim = q.shape
        out = q.new_empty(batch, n_token, n_head, head_dim).transpose(1, 2)
        return out, q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.device.type == "cpu":
        return _cpu(q, k, v, causal)
    if q.device.type != "cuda":
        return plain(q, k, v, causal)
    if takes_cudnn(q, k, causal):
        try:
            return cudnn(q, k, v, causal)
        except RuntimeError as error:
            warn_once(f"cuDNN's attention refuses {_shape(q, k)}, and a slower kernel takes its place: {_line(error)}")
    if q.dtype in HALVES and takes_flash(q.device, q.shape[3]):
        return flash(q, k, v, causal)
    try:
        return efficient(q, k, v, causal)
    except RuntimeError as error:
        warn_once(f"no attention kernel takes {_shape(q, k)}, and PyTorch's operators do it slowly: {_line(error)}")
        return plain(q, k, v, causal)


def key_blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """The keys of k in blocks to attend over one by one: where cuDNN is asked, of the sizes that it has plans for, the
    largest first, and what is left; otherwise all at once."""
    first, n_key = 0, k.shape[2]
    for size in BLOCK_SIZES if q.is_meta or takes_cudnn(q, k, False) else ():
        while n_key - first >= size:
            yield slice(first, first + size)
            first += size
    if first < n_key:
        yield slice(first, n_key)


def takes_cudnn(q: Tensor, k: Tensor, causal: bool) -> bool:
    """Whether cuDNN is the better choice: on Hopper (measured there) and later, and where work is worth a plan."""
    work = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * 2 * q.shape[3] / (2 if causal else 1)
    worth = WORTH_A_PLAN / RECURRING if q.shape[2] in BLOCK_SIZES else WORTH_A_PLAN
    if q.dtype not in HALVES or work < worth or q.shape[3] % 8 or q.shape[3] > 128:
        return False
    if causal and q.shape[2] % 128:  # another program of cuDNN's, which takes half a second more to load
        return False
    return has_cudnn(q.device)


@functools.cache
def has_cudnn(device: torch.device) -> bool:
    """Whether cuDNN can return log-sum-exps on a device. If only its version is too old, a warning says so."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    version = torch.backends.cudnn.version() or 0
    if version < OLDEST_CUDNN:
        found = f"cuDNN {version}" if version else "no cuDNN"
        warn_once(f"{found} where {OLDEST_CUDNN} or later has the fastest attention: long prompts take a third longer")
    return version >= OLDEST_CUDNN


@functools.cache
def takes_flash(device: torch.device, head_dim: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0) and head_dim <= 256 and not head_dim % 8


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    return out, lse.view(q.shape[:3])  # [batch, n_head, token, 1], or without the last one, by version


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return out, lse


def efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    k, v = _expanded(q, k), _expanded(q, v)
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)[:2]
    return out, lse[:, :, : q.shape[2]]  # it is padded


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    if not causal:  # the group as so many tokens of one head: each key is read once
        tile = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(tile, k, v, 0.0, False)[:2]
        return out.reshape(q.shape), lse.reshape(q.shape[:3])
    k, v = _expanded(q, k), _expanded(q, v)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[:2]
    return out, lse


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """`attend` by PyTorch's operators, a block of queries at a time, where there is no kernel (MPS)."""
    k, v = _expanded(q, k), _expanded(q, v)
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


def merge(
    out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: outputs [batch, n_head, token, head_dim], log-sum-exps
    [batch, n_head, token]. Returns the output in `dtype` and the log-sum-exp in float32.

    One of the two may have seen nothing: a log-sum-exp of -inf.
    """
    share = torch.sigmoid(more_lse.float() - lse.float())[..., None]  # of the softmax's mass
    return torch.lerp(out.float(), more.float(), share).to(dtype), torch.logaddexp(lse.float(), more_lse.float())


def make_plans(
    device: torch.device, dtype: torch.dtype, n_head: int, n_kv_head: int, head_dim: int, chunk: int
) -> None:
    """Have cuDNN load its programs for prompts that are read `chunk` tokens at once: nearly a second, which another
    thread can spend while weights are being read. (The plans themselves belong to the thread that attends.)
    """
    q = torch.zeros(1, chunk, n_head, head_dim, dtype=dtype, device=device).transpose(1, 2)
    k = torch.zeros(1, n_kv_head, max(chunk, 1), head_dim, dtype=dtype, device=device)
    if takes_cudnn(q, k, True):
        attend(q, k, k, True)
        attend(q, k, k)


def _expanded(q: Tensor, k: Tensor) -> Tensor:
    """Keys or values for each head of q."""
    group = q.shape[1] // k.shape[1]
    return k.repeat_interleave(group, 1) if group > 1 else k


def _shape(q: Tensor, k: Tensor) -> str:
    return f"{q.shape[1]} heads of {q.shape[3]} in {str(q.dtype).removeprefix('torch.')} over {k.shape[1]}"


def _line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
