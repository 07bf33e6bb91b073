"""The products of a decode step in Triton: of weights as they are, and of those in 8 and 4 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import gemv, quantised
from engine.kernels.argmax import best, chosen, greedy
from engine.kernels.contract import HeadNorms, StepKernels
from engine.kernels.gemv import rotate_qk
from weights.modules import QuantizedWeight, Weight

__all__ = ["TRITON", "best", "chosen", "embed", "greedy", "linear", "qkv", "rotate_qk"]


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """As the contract says."""
    if isinstance(weight, QuantizedWeight):
        return quantised.linear(x, weight, bias, norm, eps, swiglu, residual)
    return gemv.linear(x, weight, bias, norm, eps, swiglu, residual)


def qkv(
    x: Tensor, weight: Weight, bias: Tensor | None, norm: Tensor, eps: float, cos: Tensor, sin: Tensor,
    n_head: int, n_qk: int, norms: HeadNorms | None,
) -> Tensor:  # fmt: skip
    """As the contract says."""
    if isinstance(weight, QuantizedWeight):
        return quantised.qkv(x, weight, bias, norm, eps, cos, sin, n_head, n_qk, norms)
    return gemv.qkv(x, weight, bias, norm, eps, cos, sin, n_head, n_qk, norms)


def embed(tokens: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """As the contract says."""
    if isinstance(weight, QuantizedWeight):
        return quantised.embed(tokens, weight, dtype)
    if weight.is_meta:  # compiling ahead, where `F.embedding` would import sympy
        return weight.new_empty(*tokens.shape, weight.shape[1])
    return F.embedding(tokens, weight)


TRITON = StepKernels("Triton products", linear, qkv, rotate_qk, greedy, best, chosen, embed)
