"""A decode step of the whole model in seven launches a layer: `model.py`'s maths, its small operations fused.

    qkv = linear(x, norm before it)      rotate_qk(qkv)      attend: append, split, combine
    x = linear(y) + x      h = linear(x, norm before it, SwiGLU after it)      x = linear(h) + x

The cache sees what it always sees. `model.py` stays the definition, and reads the prompts.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from kv_cache import ModelCache
from model import Attention, Block, Transformer


class FusedStep:
    """The model for one token per sequence, through `kernels.linear` and `kernels.rotate_qk`."""

    def __init__(self, model: Transformer, kernels: ModuleType) -> None:
        self.model, self.kernels = model, kernels

    def __call__(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """tokens: int64 [batch, 1]. Returns logits [batch, vocab_size]."""
        model, linear = self.model, self.kernels.linear
        step = cache.begin(1)
        rope = model.rope(step.positions)
        turn = rope.cos[:, 0, 0], rope.sin[:, 0, 0]
        x = model.tok_embeddings(tokens[:, 0])
        for block, layer_cache in zip(model.layers, cache.layers, strict=True):
            assert isinstance(block, Block)
            attention, feed_forward = block.attention, block.feed_forward
            qkv = self._qkv(x, block)
            n_head, n_kv_head = model.config.n_head, model.config.n_kv_head
            self.kernels.rotate_qk(qkv, n_head, n_head + n_kv_head, *turn, self._norms(attention))
            q, k, v = qkv[:, :, None].split([n_head, n_kv_head, n_kv_head], 1)
            y = layer_cache.attend(q, k, v, step, rope).reshape(len(x), -1)
            x = linear(y, attention.wo.weight, residual=x)
            norm = block.ffn_norm
            h = linear(x, feed_forward.w13.weight, norm=norm.weight, eps=norm.eps, swiglu=True)
            x = linear(h, feed_forward.w2.weight, residual=x)
        cache.advance(step)
        return linear(x, model.output.weight, norm=model.norm.weight, eps=model.norm.eps)

    def _qkv(self, x: Tensor, block: Block) -> Tensor:
        """[batch, head, head_dim] of q's, k's and v's heads."""
        wqkv, norm = block.attention.wqkv, block.attention_norm
        qkv = self.kernels.linear(x, wqkv.weight, bias=wqkv.bias, norm=norm.weight, eps=norm.eps)
        return qkv.view(len(x), -1, self.model.config.head_dim)

    def _norms(self, attention: Attention) -> tuple[Tensor, Tensor, float] | None:
        if not self.model.config.qk_norm:
            return None
        return attention.q_norm.weight, attention.k_norm.weight, self.model.config.norm_eps
