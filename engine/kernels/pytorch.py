"""The products of a decode step in plain PyTorch: the reference that the Triton kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.contract import StepKernels
from selective_kv.kernels.pytorch import apply_rope
from weights.modules import QuantizedWeight, Weight, product


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """weight @ x, with an RMSNorm before it and a bias or SwiGLU (not both) and a residual after it, where given.

    x: [n_token, k]; weight: [n, k], the gate's rows before the up projection's with swiglu; bias: [n]; norm: [k];
    residual: like the output, [n_token, n] or [n_token, n / 2]. Returns x's dtype.
    """
    assert bias is None or not swiglu
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm, eps)
    y = product(x, weight, bias) if isinstance(weight, QuantizedWeight) else F.linear(x, weight, bias)
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def qkv(
    x: Tensor, weight: Weight, bias: Tensor | None, norm: Tensor, eps: float, cos: Tensor, sin: Tensor,
    n_head: int, n_qk: int, norms: tuple[Tensor, Tensor, float] | None,
) -> Tensor:  # fmt: skip
    """A layer's queries, keys and values, a norm before the product and RoPE after it: `linear`, then `rotate_qk`.

    Returns [n_token, head, head_dim], the heads of q, k and v in order.
    """
    y = linear(x, weight, bias, norm, eps).view(len(x), -1, cos.shape[1])
    rotate_qk(y, n_head, n_qk, cos, sin, norms)
    return y


def rotate_qk(
    qkv: Tensor, n_head: int, n_qk: int, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor, float] | None
) -> None:
    """RoPE, in place, of the first n_qk heads, of which n_head are q's; `norms` (q's, k's, eps) come before it.

    qkv: [batch, head, head_dim]; cos, sin: float32 [batch, head_dim], as `model.Rope` has them.
    """
    qk = qkv[:, :n_qk]
    if norms is not None:
        q_norm, k_norm, eps = norms
        q, k = qk.split([n_head, n_qk - n_head], 1)
        qk = torch.cat((F.rms_norm(q, q_norm.shape, q_norm, eps), F.rms_norm(k, k_norm.shape, k_norm, eps)), 1)
    qkv[:, :n_qk] = apply_rope(qk, cos[:, None], sin[:, None])


def greedy(logits: Tensor) -> Tensor:
    """The index of each row's largest element; -1 where a row holds a NaN or an infinity.

    logits: [sequence, n], any float dtype. Returns int64 [sequence].
    """
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)


_LAST = 0x7FFFFFFF  # no index is larger
_SPOILED = 0x7FFFFFFFFFFFFFFF  # above the key of any finite number


def best(logits: Tensor, start: int) -> Tensor:
    """The largest logit of each row above its index, as `contract.Best` says. logits: [sequence, n].

    The bits of a float32 are in order but for negative numbers, whose other bits are turned.
    """
    value, index = logits.float().max(-1)
    bits = (value + 0.0).view(torch.int32)  # -0 is no less than 0
    order = torch.where(bits < 0, bits ^ _LAST, bits).to(torch.int64)
    return torch.where(logits.isfinite().all(-1), (order << 32) | (_LAST - start - index), _SPOILED)


def chosen(keys: Tensor) -> Tensor:
    """The indices in keys of `best`, -1 where a row was not finite. keys: int64 [sequence]."""
    return torch.where(keys == _SPOILED, -1, _LAST - (keys & _LAST))


def embed(tokens: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding: see the contract."""
    if isinstance(weight, QuantizedWeight):
        return weight.of(tokens).dense(dtype)
    return F.embedding(tokens, weight)


PYTORCH = StepKernels("PyTorch products", linear, qkv, rotate_qk, greedy, best, chosen, embed)
