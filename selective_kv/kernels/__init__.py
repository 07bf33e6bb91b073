"""What the caches call: one contract (`contract.py`), in Triton for a GPU and in PyTorch for everything else.

`attention_kernels` chooses by device. Either implementation can stand in for the other, and tests compare them.

Words, each with one meaning here:
    slot         the place of one token's key and value in full precision; sinks come first, then a ring
    tile         128 consecutive tokens that left the window together and are stored as integers
    plane, row   a tile's packed integers: one plane, or three of 3 bits; a row has head_dim bytes, or half as many
    part         the tokens of a tile whose integers stand in the same bits of the bytes (2 parts at 4 bits)
    scale, base  value = base + scale * integer: one pair for a channel of keys over a tile, or for a token's value
    factor       what a balanced key was divided by before it was quantised (formats.py)
    rotate       multiply by a Hadamard matrix
    turn         rotate by position, as RoPE does
    block        the tokens that a program adds to its softmax at once
    slice        a warp's share of a block
    split        one of the programs that share the tokens of a sequence and KV head
    combine      merge the partial results of splits
    column       one KV head of one sequence with at most `heads` of its query heads: what a split computes for
    batch_heads  sequences times KV heads
    overlap      start a launch before the one ahead of it has ended (programmatic dependent launch, PDL)
    next weight  the one that is read right after attention, and is prefetched into L2 meanwhile
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_kv.kernels.attention_lse import attend
from selective_kv.kernels.contract import AttentionKernels
from selective_kv.kernels.pytorch import PYTORCH
from selective_kv.regions import Regions
from selective_kv.warning import warn_once

__all__ = ["PYTORCH", "AttentionKernels", "attention_kernels", "chunk_attention", "uses_triton"]


def uses_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device. If a GPU cannot run them, a warning says why, once.

    With SELECTIVE_KV_KERNELS=pytorch in the environment they do not, to compare or to debug.
    """
    if device.type != "cuda" or os.environ.get("SELECTIVE_KV_KERNELS") in ("pytorch", "eager"):
        return False
    missing = what_triton_lacks(device)
    if missing:
        warn_once(f"{missing}: decoding falls back on PyTorch kernels, slowly")
    return not missing


def attention_kernels(device: torch.device) -> AttentionKernels:
    """The kernels for a device: Triton's on a GPU that can run them, PyTorch's elsewhere."""
    if not uses_triton(device):
        return PYTORCH
    from selective_kv.kernels.triton_backend import TRITON

    return TRITON


def what_triton_lacks(device: torch.device) -> str:
    """Why the Triton kernels cannot run on a CUDA device; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):  # no asynchronous copies, no bfloat16 matrix units
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}, below 8.0"
        )
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler to launch its kernels, and there is none (CC names one)"
    return ""


def chunk_attention(
    kernels: AttentionKernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Regions,
    start: int,
    sink_rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of a chunk over itself, causally, and over what the cache held when it began.

    q: [batch, n_head, token, head_dim], or of the last token alone; k, v: [batch, n_kv_head, token, head_dim]; start:
    the chunk's first position; sink_rope: as for `decode_attention`. Writes nothing: `store_chunk` follows.
    Returns like q.
    """
    causal = q.shape[2] > 1  # the last token sees all of them
    if start == 0 and q.device.type in ("cuda", "meta"):
        return attend(q, k, v, causal)[0]
    if start == 0:
        group = q.shape[1] // k.shape[1]
        if q.device.type == "cpu" and group > 1:  # there, enable_gqa leaves the fast kernel
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return kernels.history_attention(q, regions, start, attend(q, k, v, causal), sink_rope)
