"""A decode step whose small operations are fused into its matrix products."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from engine.kernels import StepKernels
from kv_cache import ModelCache
from model import Attention, Block, Transformer
from weights.modules import QuantizedLinear, QuantizedWeight, Weight, quantized


def use_kernels(model: Transformer, kernels: StepKernels) -> None:
    """Let `model.py`'s own products, which read prompts, be a device's kernels where weights have 8 or 4 bits."""
    for module in quantized(model):
        if isinstance(module, QuantizedLinear):
            module.multiply = kernels.linear


class FusedStep:
    """A decode step of the whole model in six or seven launches a layer: `model.py`'s maths, its small operations fused
    into the matrix products by `StepKernels.qkv` and `StepKernels.linear`.

        qkv(x, norm before it, RoPE after it)      attend: (append,) split, combine
        x = linear(y) + x      h = linear(x, norm before it, SwiGLU after it)      x = linear(h) + x

    The cache sees what it always sees. `model.py` stays the definition, and reads the prompts.
    """

    def __init__(self, model: Transformer, kernels: StepKernels) -> None:
        self.model, self.kernels = model, kernels

    def __call__(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """tokens: int64 [batch, 1]. Returns logits [batch, vocab_size], of a rank's share [batch, vocab_rows]."""
        model, linear = self.model, self.kernels.linear
        step = cache.begin(1)
        rope = model.rope(step.positions)
        cos, sin = rope.cos[:, 0, 0], rope.sin[:, 0, 0]
        n_head, n_kv_head = model.config.n_head, model.config.n_kv_head
        x = self.kernels.embed(tokens[:, 0], model.tok_embeddings.weight, model.norm.weight.dtype)
        for block, layer_cache in zip(model.layers, cache.layers, strict=True):
            assert isinstance(block, Block)
            attention, feed_forward = block.attention, block.feed_forward
            wqkv, norm = attention.wqkv, block.attention_norm
            qkv = self.kernels.qkv(
                x,
                wqkv.weight,
                wqkv.bias,
                norm.weight,
                model.config.norm_eps,
                cos,
                sin,
                n_head,
                attention.n_qk,
                self._norms(attention),
            )
            q, k, v = qkv[:, :, None].split([n_head, n_kv_head, n_kv_head], 1)
            wo = attention.wo.weight
            chunk = replace(step, next_weight=wo.ints if isinstance(wo, QuantizedWeight) else wo)
            y = layer_cache.attend(q, k, v, chunk, rope).reshape(len(x), -1)
            x = self._add(x, y, wo, attention.wo.bias)
            norm = block.ffn_norm
            if model.config.ffn_bias:  # few models have one: the module's own forward, unfused
                x = block.add(x, feed_forward(norm(x)))
                continue
            h = linear(x, feed_forward.w13.weight, norm=norm.weight, eps=model.config.norm_eps, swiglu=True)
            x = self._add(x, h, feed_forward.w2.weight)
        cache.advance(step)
        return linear(x, model.output_weight, norm=model.norm.weight, eps=model.config.norm_eps)

    def _add(self, x: Tensor, y: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x plus weight @ y plus bias, which is the sum of every rank's where several hold the model together."""
        if self.model.ranks is None:  # few models have a bias here: a launch of its own
            return self.kernels.linear(y, weight, residual=x if bias is None else x + bias)
        return self.model.ranks.sum(self.kernels.linear(y, weight, bias), x)

    def _norms(self, attention: Attention) -> tuple[Tensor, Tensor, float] | None:
        if not self.model.config.qk_norm:
            return None
        return attention.q_norm.weight, attention.k_norm.weight, self.model.config.norm_eps
