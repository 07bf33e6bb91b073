"""What a decode step of the whole model calls besides its caches: matrix products with the small operations around
them, and the greedy choice. PyTorch and Triton implement it; a benchmark's gate wraps it with `dataclasses.replace`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from weights.modules import Weight

HeadNorms = tuple[Tensor, Tensor, float]  # weights of q's and k's RMSNorm, [head_dim] each, and their epsilon


class Linear(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        swiglu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """weight @ x, with an RMSNorm before it and a bias or SwiGLU (not both) and a residual after it, if given.

        x: [n_token, k], a float dtype, contiguous; weight: [n, k] in x's dtype or fewer bits, the gate's rows before
        the up projection's with swiglu; bias: [n]; norm: [k]; residual: like the output, and may become it.
        Returns [n_token, n] ([n_token, n / 2] with swiglu) in x's dtype.
        """
        ...


class QKV(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        norm: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        n_head: int,
        n_qk: int,
        norms: HeadNorms | None,
    ) -> Tensor:
        """A layer's queries, keys and values: RMSNorm, product, then `norms` and RoPE on q's and k's heads.

        x: [n_token, k]; weight: [heads * head_dim, k]; cos, sin: float32 [n_token, head_dim], as `model.Rope` has
        them; n_head: query heads; n_qk: heads of q and k together. Returns [n_token, head, head_dim] in x's dtype,
        the heads of q, k and v in order.
        """
        ...


class RotateQK(Protocol):
    def __call__(self, qkv: Tensor, n_head: int, n_qk: int, cos: Tensor, sin: Tensor, norms: HeadNorms | None) -> None:
        """RoPE, in place, of the first n_qk heads, of which n_head are q's; `norms` come before it.

        qkv: [batch, head, head_dim]; cos, sin: float32 [batch, head_dim].
        """
        ...


class Greedy(Protocol):
    def __call__(self, logits: Tensor) -> Tensor:
        """The index of each row's largest element; -1 where a row holds a NaN or an infinity.

        logits: [sequence, n], any float dtype. Returns int64 [sequence]. Does not wait for the device.
        """
        ...


class Best(Protocol):
    def __call__(self, logits: Tensor, start: int) -> Tensor:
        """The largest logit of each row and its index, in one number whose maximum over ranks is the largest of all.

        logits: [sequence, n], a float dtype of at most 32 bits, of the vocabulary's tokens from `start` on. Returns
        keys, int64 [sequence]: the number, in an order that integers have, above the index, the first one largest.
        Above the key of any number where a row holds a NaN or an infinity.
        """
        ...


class Chosen(Protocol):
    def __call__(self, keys: Tensor) -> Tensor:
        """The indices in keys of `Best`, int64 [sequence]; -1 where a row was not finite."""
        ...


class Embed(Protocol):
    def __call__(self, tokens: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """Rows of an embedding, [n_token, dim] in `dtype`. tokens: int64 [n_token]; weight: [vocab, dim] in `dtype`, or
        in 8 bits.
        """
        ...


@dataclass(frozen=True)
class StepKernels:
    """One implementation of a decode step's products. `name` is what a report shows."""

    name: str
    linear: Linear
    qkv: QKV
    rotate_qk: RotateQK
    greedy: Greedy
    best: Best
    chosen: Chosen
    embed: Embed
