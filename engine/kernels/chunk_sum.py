"""A long chunk's partial results, summed over GPUs: each rank adds up and norms its own share of the rows.

Copy engines write the other ranks' partial results of those rows into this rank's memory, and then a flag, see
`engine/chunk_sums.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from selective_kv.kernels.launch import launch


@triton.jit
def wait_for(flags, count, N: tl.constexpr):
    """Return when N neighbouring int32 flags are `count`; what was written before them is then visible."""
    for i in tl.static_range(N):
        while tl.atomic_add(flags + i, 0, sem="acquire", scope="sys") != count:
            pass


@triton.jit(do_not_specialize=["count"])
def wait_kernel(flags, count, N: tl.constexpr):
    """One program that ends when all flags are `count`, and so holds up the stream."""
    wait_for(flags, count, N)


@triton.jit(do_not_specialize=["count", "stride"])
def add_rows_kernel(
    x, y, received, flags, norm, out, count, stride, eps, N: tl.constexpr, RANK: tl.constexpr, N_RANK: tl.constexpr
):
    """Program: one of the rows that this rank adds up. x += every rank's y; out: the RMSNorm of the new x.

    x, y, out: [n_row, N]; received: the other ranks' y in their order, N_RANK - 1 matrices `stride` elements apart;
    norm: [N].
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, triton.next_power_of_2(N))
    there = i < N
    at = row * N + i
    wait_for(flags, count, N_RANK - 1)
    total = tl.zeros((triton.next_power_of_2(N),), tl.float32)
    for r in tl.static_range(N_RANK):  # in the order of ranks, whichever of them adds up this row
        if r == RANK:
            part = tl.load(y + at, there, 0.0)
        else:
            part = tl.load(received + (r - (r > RANK)) * stride.to(tl.int64) + at, there, 0.0)
        total += part.to(tl.float32)
    total = (total + tl.load(x + at, there, 0.0).to(tl.float32)).to(x.dtype.element_ty)
    tl.store(x + at, total, there)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / N + eps)
    normed = total * scale * tl.load(norm + i, there, 0.0).to(tl.float32)
    tl.store(out + at, normed.to(out.dtype.element_ty), there)


def wait(flags: Tensor, count: int) -> None:
    """Have the stream wait until every flag, int32 [n], is `count`."""
    launch(wait_kernel, (1,))(flags, count, N=len(flags), num_warps=1)


def add_rows(
    x: Tensor, y: Tensor, received: Tensor, flags: Tensor, count: int, norm: Tensor, eps: float, out: Tensor, rank: int
) -> None:
    """x += y and what the other ranks sent, in place, once their flags are `count`; out becomes the RMSNorm of x.

    x, y, out: [n_row, dim], contiguous; received: [n_rank - 1, at least n_row, dim], of the other ranks in their
    order, each contiguous; flags: int32 [n_rank - 1]; norm: [dim].
    """
    assert x.is_contiguous() and y.is_contiguous() and out.is_contiguous() and x.shape == y.shape == out.shape
    if len(x):
        launch(add_rows_kernel, (len(x),))(
            x, y, received, flags, norm, out, count, received.stride(0), eps,
            N=x.shape[1], RANK=rank, N_RANK=len(received) + 1, num_warps=8,
        )  # fmt: skip
