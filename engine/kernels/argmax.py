"""The most likely token of each sequence, in Triton: two launches where PyTorch's argmax and look for NaN take five.

Over 128,256 logits of one sequence those take 50 us of a step, for a quarter of a megabyte, and one program of ours
took 17 (LOG.md, 2026-11-25): many programs look at a part each, and a small one at what they found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from selective_kv.kernels.basics import in_order
from selective_kv.kernels.decode_config import processor
from selective_kv.kernels.launch import launch

PART = 4096  # logits that a program looks at
LAST = tl.constexpr(0x7FFFFFFF)  # no index is larger; i ^ LAST is LAST - i
SPOILED = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # above the key of any finite number


@triton.jit(do_not_specialize=["n", "stride", "n_part", "first"])
def part_kernel(logits, keys, n, stride, n_part, first, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Program (part, sequence): the largest key of BLOCK logits. A key has the number above and its index, the first
    one largest, below. logits: [sequence, n], floats of at most 32 bits, rows `stride` apart, of tokens from
    `first` on.

    keys: int64 [sequence, n_part].
    """
    if OVERLAP:
        gdc_launch_dependents()
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = part * BLOCK + tl.arange(0, BLOCK)
    if OVERLAP:
        gdc_wait()
    value = tl.load(logits + row * stride + i, i < n, 0.0).to(tl.float32)
    spoiled = (tl.abs(value) < float("inf")).to(tl.int32) ^ 1  # NaN compares as false
    value = tl.where(value == 0, 0.0, value)  # -0 is no less than 0
    key = (in_order(value.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | ((first + i) ^ LAST).to(tl.int64)
    best = tl.max(tl.where(i < n, key, -SPOILED), 0)
    tl.store(keys + row * n_part + part, tl.where(tl.max(spoiled, 0) > 0, SPOILED, best))


@triton.jit(do_not_specialize=["n_part"])
def pick_kernel(keys, out, n_part, KEY: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Program: one sequence. keys: int64 [sequence, n_part], n_part <= BLOCK; out: int64 [sequence], the index in the
    largest key, or that key itself (KEY).
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    if OVERLAP:
        gdc_wait()
    best = tl.max(tl.load(keys + row * n_part + tl.minimum(i, n_part - 1)), 0)
    tl.store(out + row, best if KEY else tl.where(best == SPOILED, -1, (best & LAST) ^ LAST))


def greedy(logits: Tensor) -> Tensor:
    """The index of each row's largest element; -1 where a row holds a NaN or an infinity.

    logits: [sequence, n], a float dtype of at most 32 bits. Returns int64 [sequence].
    """
    return _pick(parts(logits, 0), key=False)


def best(logits: Tensor, start: int) -> Tensor:
    """The largest key of each row, int64 [sequence]: `contract.Best`. logits: [sequence, n], of tokens from
    `start` on.
    """
    return _pick(parts(logits, start), key=True)


def chosen(keys: Tensor) -> Tensor:
    """The indices in keys of `best`, int64 [sequence]; -1 where a row was not finite."""
    return _pick(keys[:, None], key=False)


def parts(logits: Tensor, first: int) -> Tensor:
    """The largest key of each PART logits, int64 [sequence, part]."""
    assert logits.stride(1) == 1
    n_sequence, n = logits.shape
    n_part = triton.cdiv(n, PART)
    keys = torch.empty(n_sequence, n_part, dtype=torch.int64, device=logits.device)
    overlap = processor(logits.device).overlap
    launch(part_kernel, (n_part, n_sequence))(
        logits, keys, n, logits.stride(0), n_part, first, BLOCK=PART, OVERLAP=overlap, launch_pdl=overlap, num_warps=8
    )
    return keys


def _pick(keys: Tensor, key: bool) -> Tensor:
    """The largest key of each row of keys, int64 [sequence, part], or (not `key`) the index in it: int64 [sequence]."""
    n_sequence, n_part = keys.shape
    out = torch.empty(n_sequence, dtype=torch.int64, device=keys.device)
    overlap = processor(keys.device).overlap
    block = triton.next_power_of_2(n_part)
    launch(pick_kernel, (n_sequence,))(
        keys, out, n_part, KEY=key, BLOCK=block, OVERLAP=overlap, launch_pdl=overlap, num_warps=1
    )
    return out
