"""A chunk of a prompt, its small operations fused into single passes over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import RMSNorm

from model import Attention, Block, Transformer

if TYPE_CHECKING:
    from engine.kernels.contract import HeadNorms


class FusedChunk:
    """`Transformer.forward` with `last_only`, by `kernels/prefill.py` between the matrix products.

        normed = norm(x)                   qkv = wqkv(normed), then norms of heads and RoPE in place
        x += wo(attention), normed         h = swiglu(w13(normed))        x += w2(h), normed

    Of the last layer all keys and values are needed, and of queries and what follows only the last token's: one layer
    of 32 is hardly there.

    The products are the model's own modules, whatever they are, and the cache sees what it always sees. `model.py`
    stays the definition.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def __call__(self, tokens: Tensor, cache: Any, last: Tensor | None = None) -> Tensor:
        """tokens: int64 [batch, token]; cache: a `ModelCache` or a `PackedCache`. Returns the logits after the last
        token, [batch, 1, vocab_size]; with `last`, int64 [part], after those of the one row, [1, part, vocab_size]."""
        from engine.kernels.prefill import rotate_qk, swiglu

        model, config = self.model, self.model.config
        batch, n_token = tokens.shape
        step = cache.begin(n_token)
        rope = model.rope(step.positions)
        cos, sin = (t.reshape(-1, config.head_dim) for t in (rope.cos, rope.sin))
        x = model.tok_embeddings(tokens.reshape(-1))  # [batch * token, dim]
        blocks = [block for block in model.layers if isinstance(block, Block)]
        norms = [norm for block in blocks for norm in (block.attention_norm, block.ffn_norm)][1:]
        after = iter([*norms, model.norm])  # the norm that follows each addition
        normed = blocks[0].attention_norm(x)
        for block, layer_cache in zip(blocks, cache.layers, strict=True):
            attention, feed_forward = block.attention, block.feed_forward
            qkv = attention.wqkv(normed).view(batch * n_token, -1, config.head_dim)
            rotate_qk(qkv, config.n_head, attention.n_qk, cos, sin, _norms(attention, config.norm_eps))
            heads = qkv.view(batch, n_token, -1, config.head_dim).transpose(1, 2)
            q, k, v = heads.split([config.n_head, config.n_kv_head, config.n_kv_head], 1)
            if block is blocks[-1] and layer_cache.attends_to_last:  # nobody asks what the other tokens become
                q = q[:, :, -1:] if last is None else q[:, :, last]
                x = x.view(batch, n_token, -1)[:, -1].contiguous() if last is None else x[last]
            y = layer_cache.attend(q, k, v, step, rope).transpose(1, 2).reshape(len(x), -1)
            del qkv, heads, q, k, v
            x, normed = self._add(x, attention.wo(y), next(after))
            h = swiglu(feed_forward.w13(normed))
            x, normed = self._add(x, feed_forward.w2(h), next(after))
        cache.advance(step)
        if last is not None:
            return model.head((x if len(x) == len(last) else x[last])[None])
        return model.head(x.view(batch, -1, x.shape[1])[:, -1:])

    def _add(self, x: Tensor, y: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """x and y, or every rank's y, which may take x's place; and the norm of that."""
        from engine.kernels.prefill import add_norm

        if self.model.ranks is not None:
            x = self.model.ranks.sum(y, x)
            return x, norm(x)
        return x, add_norm(x, y, norm.weight, self.model.config.norm_eps)


def _norms(attention: Attention, eps: float) -> HeadNorms | None:
    if not attention.config.qk_norm:
        return None
    return attention.q_norm.weight, attention.k_norm.weight, eps
