"""A chunk of a prompt, its small operations fused into single passes over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import RMSNorm

from engine.chunk_sums import ChunkSums
from model import Attention, Block, Ranks, Transformer

if TYPE_CHECKING:
    from engine.kernels.contract import HeadNorms


class ChunkRanks(Ranks, Protocol):
    """What a chunk needs of the ranks in addition to what `model.Ranks` has: `parallel.Parallel` has both."""

    def chunk(self, x: Tensor) -> ChunkSums | None:
        """The sums of a chunk x, [token, dim], by rows; None: by `sum`."""
        ...


class FusedChunk:
    """`Transformer.forward` with `last_only`, by `kernels/prefill.py` between the matrix products.

        normed = norm(x)                   qkv = wqkv(normed), then norms of heads and RoPE in place
        x += wo(attention), normed         h = swiglu(w13(normed))        x += w2(h), normed

    Of the last layer all keys and values are needed, but queries and what follows only of the last token: that layer
    costs little.

    On several GPUs a long chunk's sums go by rows (`chunk_sums.py`): the additions of one part of its tokens and their
    copies run beside the products of the other part.

    The products are the model's own modules, whatever they are, and the cache sees what it always sees. `model.py`
    stays the definition.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def __call__(self, tokens: Tensor, cache: Any, last: Tensor | None = None) -> Tensor:
        """tokens: int64 [batch, token]; cache: a `ModelCache` or a `PackedCache`. Returns the logits after the last
        token, [batch, 1, vocab_size]; with `last`, int64 [part], after those of the one row, [1, part, vocab_size]."""
        from engine.kernels.prefill import swiglu

        model, config = self.model, self.model.config
        batch, n_token = tokens.shape
        step = cache.begin(n_token)
        rope = model.rope(step.positions)
        cos, sin = (t.reshape(-1, config.head_dim) for t in (rope.cos, rope.sin))
        x = model.tok_embeddings(tokens.reshape(-1))  # [batch * token, dim]
        blocks = [block for block in model.layers if isinstance(block, Block)]
        norms = [norm for block in blocks for norm in (block.attention_norm, block.ffn_norm)][1:]
        after = iter([*norms, model.norm])  # the norm that follows each addition
        sums = None if model.ranks is None else cast(ChunkRanks, model.ranks).chunk(x)
        normed: Tensor | None = blocks[0].attention_norm(x)
        norm_after = blocks[0].attention_norm
        for block, layer_cache in zip(blocks, cache.layers, strict=True):
            attention, feed_forward = block.attention, block.feed_forward
            if normed is not None:
                qkv = self._qkv(attention, normed, cos, sin)
            else:
                assert sums is not None
                qkv = self._qkv_in_parts(attention, sums, x, norm_after, cos, sin)
            heads = qkv.view(batch, n_token, -1, config.head_dim).transpose(1, 2)
            q, k, v = heads.split([config.n_head, config.n_kv_head, config.n_kv_head], 1)
            to_last = block is blocks[-1] and layer_cache.attends_to_last
            if to_last:  # nothing needs the last layer's output for other tokens
                q = q[:, :, -1:] if last is None else q[:, :, last]
                x, sums = self._ends(x, batch, last, sums), None
            y = layer_cache.attend(q, k, v, step, rope).transpose(1, 2).reshape(len(x), -1)
            del qkv, heads, q, k, v
            if sums is not None:
                self._in_parts(x, y, block, sums, next(after), norm_after := next(after))
                normed = None
                continue
            x, normed = self._add(x, attention.wo(y), next(after))
            h = swiglu(feed_forward.w13(normed))
            x, normed = self._add(x, feed_forward.w2(h), next(after))
        cache.advance(step)
        if len(x) != (batch if last is None else len(last)):
            if sums is not None:
                sums.add(len(sums.parts) - 1, x, norm_after.weight, config.norm_eps)
            x = self._ends(x, batch, last, sums)
        x = x.view(batch, 1, -1) if last is None else x[None]
        return model.head(x)

    def _ends(self, x: Tensor, batch: int, last: Tensor | None, sums: ChunkSums | None) -> Tensor:
        """The rows of x of each sequence's last token, or of the tokens `last`."""
        if sums is None or x.is_meta:
            rows = x.view(batch, -1, x.shape[1])[:, -1].contiguous() if last is None else x[last]
        else:
            n_token = len(x) // batch
            rows = sums.own_rows(
                x, torch.arange(n_token - 1, len(x), n_token, device=x.device) if last is None else last
            )
        if sums is None or self.model.ranks is None:
            return rows
        return self.model.ranks.sum(rows, rows.new_zeros(rows.shape))

    def _qkv(self, attention: Attention, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries, keys and values, [token, head, head_dim], with RoPE applied. normed: [token, dim]."""
        from engine.kernels.prefill import rotate_qk

        config = self.model.config
        qkv = attention.wqkv(normed).view(len(normed), -1, config.head_dim)
        rotate_qk(qkv, config.n_head, attention.n_qk, cos, sin, _norms(attention, config.norm_eps))
        return qkv

    def _qkv_in_parts(
        self, attention: Attention, sums: ChunkSums, x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """`_qkv` of all tokens, where the sum of the last part before this layer has been sent but not added up yet."""
        eps, qkv = self.model.config.norm_eps, None
        for i, part in enumerate(sums.parts):
            found = self._qkv(attention, sums.normed(i), cos[part], sin[part])
            if qkv is None:
                sums.add(len(sums.parts) - 1, x, norm.weight, eps)
                qkv = found.new_empty(len(x), *found.shape[1:])
            qkv[part] = found
        assert qkv is not None
        return qkv

    def _in_parts(
        self, x: Tensor, y: Tensor, block: Block, sums: ChunkSums, norm: RMSNorm, norm_after: RMSNorm
    ) -> None:
        """The layer after its attention, whose output is y, [token, dim of this rank's heads]; x: the residual, [token,
        dim], changed in place. The last part's sum is left to be added up in the next layer."""
        from engine.kernels.prefill import swiglu

        attention, feed_forward, eps = block.attention, block.feed_forward, self.model.config.norm_eps
        last = len(sums.parts) - 1
        for i, part in enumerate(sums.parts):
            sums.send(i, attention.wo(y[part]))
            if i:
                sums.add(i - 1, x, norm.weight, eps)
        sums.add(last, x, norm.weight, eps)
        for i in range(len(sums.parts)):
            h = swiglu(feed_forward.w13(sums.normed(i)))
            if i:
                sums.add(i - 1, x, norm_after.weight, eps)
            sums.send(i, feed_forward.w2(h))

    def _add(self, x: Tensor, y: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """x plus y (every rank's, if there are ranks), perhaps in x's memory; and the norm of that. [token, dim]."""
        from engine.kernels.prefill import add_norm

        if self.model.ranks is not None:
            x = self.model.ranks.sum(y, x)
            return x, norm(x)
        return x, add_norm(x, y, norm.weight, self.model.config.norm_eps)


def _norms(attention: Attention, eps: float) -> HeadNorms | None:
    if not attention.config.qk_norm:
        return None
    return attention.q_norm.weight, attention.k_norm.weight, eps
