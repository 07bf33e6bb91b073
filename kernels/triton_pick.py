"""The most likely token of each sequence, in Triton: one launch where PyTorch's argmax and its look for NaN take five.

Over 128,256 logits of one sequence those take 50 us of a step, for a quarter of a megabyte (LOG.md, 2026-11-25).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch


@triton.jit(do_not_specialize=["n", "stride"])
def greedy_kernel(logits, out, n, stride, BLOCK: tl.constexpr):
    """Program: one sequence. logits: [sequence, n], any float dtype, rows `stride` apart; out: int64 [sequence]."""
    row = logits + tl.program_id(0).to(tl.int64) * stride
    i = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    found = tl.zeros((BLOCK,), tl.int32)  # in which block
    spoiled = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, n, BLOCK, num_stages=2):
        there = start + i < n
        value = tl.load(row + start + i, there, 0.0).to(tl.float32)
        spoiled |= (tl.abs(value) < float("inf")).to(tl.int32) ^ 1  # NaN compares as false
        better = there & (value > best)
        best = tl.where(better, value, best)
        found = tl.where(better, start, found)
    first = tl.min(tl.where(best == tl.max(best, 0), found + i, n), 0)  # of equals the first
    tl.store(out + tl.program_id(0), tl.where(tl.max(spoiled, 0) > 0, -1, first).to(tl.int64))


def greedy(logits: Tensor) -> Tensor:
    """The index of each row's largest element; -1 where a row holds a NaN or an infinity.

    logits: [sequence, n], any float dtype. Returns int64 [sequence].
    """
    assert logits.stride(1) == 1
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    block = min(8192, max(32, triton.next_power_of_2(logits.shape[1])))
    warps = max(1, block // 256)
    launch(greedy_kernel, (len(logits),))(logits, out, logits.shape[1], logits.stride(0), BLOCK=block, num_warps=warps)
    return out
