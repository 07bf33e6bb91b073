"""A chunk's attention over tiles of at most 4 bits, computed in 8: int8 products of queries and keys, fp8 ones of
probabilities and values.

The recipe is SageAttention's (Zhang et al. 2024, arXiv:2411.10958). After the Hadamard rotation no channel of a query
or key stands out, so an int8 scale of a query and one of a tile of keys suffice (one of each key made the loop a tenth
slower); values are float8 (e4m3) under a scale of a tile. On the bundled model it adds an error of 0.010 to the 0.043
that 4 bits themselves make in attention's output, which comes to 0.044; 8 bits' own is 0.0026, so those are attended
to in 16 bits (LOG.md). Matrix units are twice as fast in 8 bits and take less power, by which a long prompt on
an H100 is limited: 720 TFLOP/s where cuDNN's bfloat16 kernel sustains 600 to 630.

The products of a tile are summed by themselves: matrix units add fp8 products in some 14 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_kv.formats import TILE as TILE_TOKENS
from selective_kv.formats import rotation_size
from selective_kv.kernels.basics import INTERPRET, LN_2, LOG2_E, NEGATIVE, TILE
from selective_kv.kernels.dense import dequantized
from selective_kv.kernels.hadamard import rotated_rows
from selective_kv.kernels.launch import launch
from selective_kv.kernels.merge import PartialResult, empty_output
from selective_kv.kernels.operands import stored_bits, tile_operands
from selective_kv.regions import Regions

MOST_BITS = 4
LEAST_TOKENS = 512  # of a chunk
HEAD_DIMS = (64, 128)
QUERIES = 64  # of a program
FLOAT8 = torch.float32 if INTERPRET else torch.float8_e4m3fn  # the interpreter has none
LARGEST = 448.0  # of e4m3
LOG2_LARGEST = tl.constexpr(8.0)  # probabilities are below 2**8


def takes_8bit(q: Tensor, regions: Regions) -> bool:
    """Whether a chunk's queries meet these tiles in 8 bits: rotated ones of at most 4 bits, from which no key bias was
    taken, on a GPU that has fp8 products (and where this was measured), if there are enough queries."""
    formats = regions.k_format, regions.v_format
    if regions.key_bias is not None or any(
        form is None or form.bits > MOST_BITS or not form.rotated for form in formats
    ):
        return False
    if q.shape[2] < LEAST_TOKENS or q.shape[3] not in HEAD_DIMS or q.element_size() > 2:
        return False
    if q.is_meta:  # kernels compiled ahead, for the GPU that is current
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)


@triton.jit
def int8_step(x):
    """The int8 scales of the rows of x [N, D]. NaN if an element is NaN, which int8 itself cannot express."""
    largest = tl.max(tl.abs(x), 1)
    return tl.where(largest > 0, largest / 127.0, 1.0) + tl.sum(x * 0.0, 1)


@triton.jit
def rounded(x):
    """x, of at most 127 in magnitude, rounded to the nearest int8."""
    return tl.floor(x + 0.5).to(tl.int8)


@triton.jit(do_not_specialize=["n_token"])
def quantize_queries_kernel(
    q, out, scales, rotation, n_token, stride_b, stride_h, stride_t, softmax_scale,
    HEAD_DIM: tl.constexpr, ROTATION: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, head, sequence): rotated queries as int8 [sequence, head, n_token, HEAD_DIM], and what
    a product with them is to be multiplied by."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HEAD_DIM)
    mask = (token < n_token)[:, None] & (d >= 0)[None, :]
    dtype: tl.constexpr = tl.float32 if INTERPRET else q.dtype.element_ty
    x = tl.load(q + batch * stride_b + head * stride_h + token[:, None].to(tl.int64) * stride_t + d[None, :], mask, 0.0)
    y = rotated_rows(x, rotation, HEAD_DIM, ROTATION, dtype)
    step = int8_step(y)
    at = (batch * tl.num_programs(1) + head) * n_token + token
    tl.store(out + at[:, None] * HEAD_DIM + d[None, :], rounded(y / step[:, None]), mask)
    tl.store(scales + at, step * softmax_scale * LOG2_E, token < n_token)


def quantize_queries(q: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """q [batch, n_head, token, head_dim], rotated: int8, and float32 scales [batch, n_head, token], which hold
    softmax's own and log2(e)."""
    batch, n_head, n_token, head_dim = q.shape
    out = torch.empty(batch, n_head, n_token, head_dim, dtype=torch.int8, device=q.device)
    scales = torch.empty(batch, n_head, n_token, dtype=torch.float32, device=q.device)
    launch(quantize_queries_kernel, (triton.cdiv(n_token, 128), n_head, batch))(
        q, out, scales, rotation, n_token, *q.stride()[:3], head_dim**-0.5,
        HEAD_DIM=head_dim, ROTATION=rotation_size(head_dim), BLOCK=128, INTERPRET=INTERPRET, num_warps=8,
    )  # fmt: skip
    return out, scales


@triton.jit(do_not_specialize=["first_tile", "n_tile", "n_dense"])
def requantize_kernel(
    k_codes, v_codes, k_scale, v_scale, k_factor, k, k_step, v, v_step, first_tile, n_tile, n_dense,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """Program (tile, sequence and KV head, 0 for K and 1 for V): of n_dense tiles, k int8 [one, token, HEAD_DIM] and
    v float8 [one, HEAD_DIM, token]; k_step, v_step: their scales, [one, tile]."""
    one, index = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tile = one * n_tile + first_tile + index
    token, d = tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    at = one * n_dense * TILE + index * TILE
    if tl.program_id(2) == 0:
        x = dequantized(k_codes, k_scale, k_factor, tile, token, HEAD_DIM, K_BITS, True, BALANCED)
        steps = int8_step(x)
        step = tl.max(steps, 0) + tl.sum(steps * 0.0, 0)  # NaN where one is
        tl.store(k + (at + token)[:, None] * HEAD_DIM + d[None, :], rounded(x / step))
        tl.store(k_step + one * n_dense + index, step)
    else:
        x = dequantized(v_codes, v_scale, k_factor, tile, token, HEAD_DIM, V_BITS, False, False)
        largest = tl.max(tl.max(tl.abs(x), 1), 0)
        unit = tl.where(largest > 0, largest / 448.0, 1.0)
        where = v + (one * HEAD_DIM + d)[:, None] * (n_dense * TILE) + index * TILE + token[None, :]
        tl.store(where, tl.trans(x / unit).to(v.dtype.element_ty))
        tl.store(v_step + one * n_dense + index, unit)


def requantize(regions: Regions, first: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tiles first to end - 1, rotated as they are: keys int8 [batch, n_kv_head, token, head_dim] and the tiles'
    scales; values float8 [batch, n_kv_head, head_dim, token] and the tiles' scales."""
    batch, n_kv_head, _, head_dim = regions.k.shape
    n, device = end - first, regions.k.device
    k = torch.empty(batch, n_kv_head, n * TILE_TOKENS, head_dim, dtype=torch.int8, device=device)
    v = torch.empty(batch, n_kv_head, head_dim, n * TILE_TOKENS, dtype=FLOAT8, device=device)
    k_step, v_step = (torch.empty(batch, n_kv_head, n, device=device, dtype=torch.float32) for _ in "kv")
    k_bits, v_bits = stored_bits(regions)
    stored = tile_operands(regions)
    launch(requantize_kernel, (n, batch * n_kv_head, 2))(
        *stored, k, k_step, v, v_step, first, stored[0].shape[2], n, HEAD_DIM=head_dim, K_BITS=k_bits, V_BITS=v_bits,
        BALANCED=regions.k_format is not None and regions.k_format.balanced, num_warps=8,
    )  # fmt: skip
    return k, k_step, v, v_step


@triton.jit(do_not_specialize=["group", "n_token"])
def attend_kernel(
    q, q_scale, k, k_step, v, v_step, rotation, out, lse, group, n_token, n_key, stride_b, stride_h, stride_t,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, ROTATION: tl.constexpr, STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, head, sequence). n_key: whole tiles; specialised, so that loads are 16 bytes wide.
    Strides: of out's sequences, heads, tokens."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_head = tl.num_programs(1)
    one = batch * (n_head // group) + head // group
    token, d, key = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, HEAD_DIM), tl.arange(0, TILE)
    there = token < n_token
    row = (batch * n_head + head) * n_token + token
    queries = tl.load(q + row[:, None] * HEAD_DIM + d[None, :], there[:, None], 0)
    scale = tl.load(q_scale + row, there, 0.0)
    k += one * n_key * HEAD_DIM
    k_step += one * (n_key // TILE)
    v += one * n_key * HEAD_DIM
    v_step += one * (n_key // TILE)
    top = tl.full((QUERIES,), NEGATIVE, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    for first in tl.range(0, n_key, TILE, num_stages=STAGES):
        keys = tl.load(k + (first + key)[:, None] * HEAD_DIM + d[None, :])
        step = scale * tl.load(k_step + first // TILE)
        values = tl.load(v + d[:, None] * n_key + (first + key)[None, :])
        score = tl.dot(queries, tl.trans(keys)).to(tl.float32)
        new_top = tl.maximum(top, tl.max(score, 1) * step)
        # below 2**8, where float8 ends soon
        prob = tl.exp2(score * step[:, None] - (new_top - LOG2_LARGEST)[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(prob, 1)
        met = tl.dot(prob.to(values.dtype), tl.trans(values), input_precision="ieee")
        sums = sums * keep[:, None] + met * tl.load(v_step + first // TILE)
        top = new_top
    y = sums * (1.0 / total)[:, None]
    dtype: tl.constexpr = tl.float32 if INTERPRET else rotation.dtype.element_ty
    y = rotated_rows(y, rotation, HEAD_DIM, ROTATION, dtype)
    at = out + batch * stride_b + head.to(tl.int64) * stride_h + token[:, None].to(tl.int64) * stride_t + d[None, :]
    tl.store(at, y.to(out.dtype.element_ty), there[:, None])
    tl.store(lse + row, (top - LOG2_LARGEST + tl.log2(total)) * LN_2, there)


def attend_8bit(queries: tuple[Tensor, Tensor], regions: Regions, first: int, end: int) -> PartialResult:
    """Attention of `quantize_queries`' queries over the tiles first to end - 1: the output in the slots' dtype, rotated
    back, and its log-sum-exp."""
    q, q_scale = queries
    k, k_step, v, v_step = requantize(regions, first, end)
    assert regions.rotation is not None
    batch, n_head, n_token, head_dim = q.shape
    out = empty_output(q, regions.k.dtype)
    lse = torch.empty(batch, n_head, n_token, dtype=torch.float32, device=q.device)
    launch(attend_kernel, (triton.cdiv(n_token, QUERIES), n_head, batch))(
        q, q_scale, k, k_step, v, v_step, regions.rotation, out, lse, n_head // k.shape[1], n_token, k.shape[2],
        *out.stride()[:3], HEAD_DIM=head_dim, QUERIES=QUERIES, ROTATION=rotation_size(head_dim), STAGES=3,
        INTERPRET=INTERPRET, num_warps=4,
    )  # fmt: skip
    return out, lse
