"""Scores of a text as a cache would have given them while decoding it token by token.

`read_sequential` decodes token by token. `read_parallel` computes the same in one pass over the text, by
`ParallelCache`: each query sees each key as it would have seen it in decoding, in full precision, quantised, or not at
all (`selective_kv.cache` has the definition). The queries between two closing tiles all see the same. `ParallelCache`
is a cache object like any other, so the model does not know. Memory: one block of one layer's scores.

It is exact: in float64 every logit equals the sequential one to 1e-6, at 8 bits and at 4. In float32 a product of many
tokens and a product of one differ in the last bit; now and then that rounds an element of a key to the other integer,
and later layers amplify it. The effect is smaller than quantisation's own: with the bundled model (600 tokens; AVX-512,
AVX2 and SSE) logits differ by 0.1 to 0.3 of what quantising changes in them (root mean square), mean NLLs by less than
5e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from kv_cache import ModelCache
from model import Cache, Transformer
from selective_kv import KVCache, Shape
from selective_kv.cache import Visible, wide
from selective_kv.formats import TILE
from selective_kv.key_bias import key_bias
from selective_kv.sink_window import rotate

QUERIES = 512  # a block's queries: its scores are [n_head, QUERIES, keys] in float32
POSITIONS = (0, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)  # borders of a record's `by_position`
HEAD_TOKENS = 1024  # tokens whose logits are held at once


@dataclass
class _Step:
    positions: Tensor


class ParallelCache:
    """A cache for texts of one length, each read as one chunk: every token sees what decoding token by token would show
    it. biases: as `Transformer.key_biases` returns them.
    """

    def __init__(self, policy: KVCache, biases: Sequence[Tensor | None], device: torch.device) -> None:
        seen = policy.sees()
        if seen is None:
            raise ValueError(f"{policy.name}: what a query sees is not known in advance: score it sequentially")
        self.layers = [ParallelLayer(seen, bias) for bias in biases]
        self.device = device

    @staticmethod
    def can(policy: KVCache) -> bool:
        """Whether a cache says what its queries see. A user's own, or a subclass, does not, and is scored
        sequentially."""
        return policy.sees() is not None

    def begin(self, n_token: int) -> _Step:
        return _Step(torch.arange(n_token, device=self.device)[None])

    def advance(self, step: Any) -> None:
        pass


class ParallelLayer:
    """One layer of it. bias: of its keys, [n_kv_head, head_dim] before RoPE."""

    def __init__(self, seen: Visible, bias: Tensor | None) -> None:
        self.sink = seen.sink_size
        self.window = 1 << 62 if seen.window_size is None else seen.window_size
        self.formats = seen.formats
        self.within = seen.within
        self.bias = bias

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Any, rope: Any) -> Tensor:
        """q: [batch, n_head, token, head_dim]; k, v: [batch, n_kv_head, token, head_dim]. Returns like q."""
        group, n_token = q.shape[1] // k.shape[1], q.shape[2]
        tile = 1 if self.formats is None else TILE
        if n_token < self.sink + self.window + tile:  # nothing ever leaves
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        k, v = wide(k).flatten(0, 1), wide(v).flatten(0, 1)  # to attention another sequence's head is another head
        shape, q = q.shape, q.flatten(0, 1)
        out = torch.empty_like(q)
        if self.formats is None:
            for lo in range(0, n_token, QUERIES):
                hi = min(lo + QUERIES, n_token)
                out[:, lo:hi] = self._window_block(q[:, lo:hi], k[:, :hi], v[:, :hi], lo, rope.frequencies)
            return out.view(shape)
        n_left = self._n_left(n_token)
        stored = slice(self.sink, self.sink + n_left)
        rounded = self._rounded(k[:, stored], v[:, stored], q.dtype, rope.frequencies)
        lo = 0
        while lo < n_token:
            n_left = self._n_left(lo + 1)
            hi = min(lo + QUERIES, self.sink + self.window + n_left + TILE - 1, n_token)  # then a tile closes
            met = [
                torch.cat((x[:, : min(self.sink, hi)], r[:, :n_left], x[:, self.sink + n_left : hi]), 1)
                for x, r in zip((k, v), rounded, strict=True)
            ]
            out[:, lo:hi] = _causal(q[:, lo:hi], *met)
            lo = hi
        return out.view(shape)

    def _rounded(self, k: Tensor, v: Tensor, dtype: torch.dtype, frequencies: Tensor) -> list[Tensor]:
        """Keys and values [batch * n_kv_head, token, head_dim] of whole tiles, quantised and dequantised. dtype: that
        of the keys before they were made wide."""
        assert self.formats is not None
        tiles = [x.unflatten(1, (-1, TILE)) for x in (k, v)]
        every, kept_out = slice(0, tiles[0].shape[1]), None
        if self.bias is not None:
            kept_out = key_bias(self.bias, frequencies, self.sink, every.stop)
        if kept_out is not None:
            n_kv_head = len(kept_out.pairs)
            tiles[0] = kept_out.taken_out(tiles[0].to(dtype).unflatten(0, (-1, n_kv_head)), every).flatten(0, 1)
        rounded = [f.dequantize(f.quantize(x)) for f, x in zip(self.formats, tiles, strict=True)]
        if kept_out is not None:  # in float32, as a cache gives it back
            dense = kept_out.dense(every, k.shape[-1])
            rounded[0] = (rounded[0].unflatten(0, (-1, n_kv_head)) + dense).flatten(0, 1)
        return [x.flatten(1, 2).to(k.dtype) for x in rounded]

    def _n_left(self, n_token: int) -> int:
        """How many of n_token tokens are in whole tiles that have left the window."""
        return max(0, n_token - self.sink - self.window) // TILE * TILE

    def _window_block(self, q: Tensor, k: Tensor, v: Tensor, lo: int, frequencies: Tensor) -> Tensor:
        """Queries at positions lo, lo + 1, ... over sinks and a window, the rest gone: [n_head, query, head_dim] in
        the keys' dtype. k, v: up to the last query's."""
        n_kv_head, n_query, dim = k.shape[0], q.shape[1], q.shape[2]
        hi = lo + n_query
        pos = torch.arange(lo, hi, device=q.device)
        sink = min(self.sink, hi)
        first = min(max(sink, lo - self.window + 1), hi)  # what is before it is gone for every query here
        rows = wide(q).reshape(n_kv_head, -1, dim) * dim**-0.5  # [n_kv_head, group * query, dim]
        turned = rows
        if self.within:
            dropped = (pos + 1 - self.sink - self.window).clamp_min(0)  # before each query
            turned = rotate(wide(q), -dropped[:, None], frequencies).reshape(rows.shape) * dim**-0.5
        s = torch.cat((turned @ k[:, :sink].transpose(-1, -2), rows @ k[:, first:].transpose(-1, -2)), -1)
        key = torch.cat((torch.arange(sink, device=q.device), torch.arange(first, hi, device=q.device)))
        gone = (key >= sink) & (key <= pos[:, None] - self.window)
        s.view(n_kv_head, -1, n_query, s.shape[-1]).masked_fill_((key > pos[:, None]) | gone, float("-inf"))
        return (s.softmax(-1) @ torch.cat((v[:, :sink], v[:, first:]), 1)).view(q.shape)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last tokens of k, v [n_kv_head, key, head_dim] over those up to themselves: q and what is
    returned [n_head, query, head_dim], the latter in k's dtype."""
    n_query, n_key = q.shape[1], k.shape[1]
    s = wide(q).reshape(k.shape[0], -1, q.shape[2]) * q.shape[2] ** -0.5 @ k.transpose(-1, -2)
    key = torch.arange(n_key, device=q.device)
    s.view(k.shape[0], -1, n_query, n_key).masked_fill_(key > key[n_key - n_query :, None], float("-inf"))
    return (s.softmax(-1) @ v).view(q.shape)


@dataclass(frozen=True)
class Scored:
    """What a text cost: nll in nats, float64 [token], of every token but the first; and against a reference,
    kl in nats and whether the likeliest token is the same."""

    nll: Tensor
    kl: Tensor | None = None
    same_top: Tensor | None = None


@torch.inference_mode()
def read_parallel(model: Transformer, policy: KVCache, tokens: Tensor) -> Tensor:
    """The states that `model.head` turns into logits, [..., token, dim], as decoding token by token would give them.

    tokens: int64 [token], or [batch, token] of texts of one length.
    """
    cache: Cache = ParallelCache(policy, model.key_biases(), tokens.device)
    return model.read(tokens.view(-1, tokens.shape[-1]), cache).view(*tokens.shape, -1)


@torch.inference_mode()
def read_sequential(model: Transformer, policy: KVCache, tokens: Tensor, reference: bool = False) -> Tensor:
    """The same, decoded token by token through the real cache, or through its slow reference, which computes float64 in
    float64."""
    c = model.config
    dtype = model.norm.weight.dtype
    texts = tokens.view(-1, tokens.shape[-1])
    shape = Shape(len(texts), c.n_kv_head, c.head_dim, texts.shape[1], dtype, tokens.device)
    cache: Any = ModelCache(policy, c.n_layer, shape)
    cache.expect_biases(model.key_biases(), model.frequencies)
    if reference:
        for layer in cache.layers:
            layer.use_reference()
    return torch.cat([model.read(column, cache) for column in texts.split(1, dim=1)], 1).view(*tokens.shape, -1)


def reader(policy: KVCache, sequential: bool) -> Callable[[Transformer, KVCache, Tensor], Tensor]:
    return read_sequential if sequential or not ParallelCache.can(policy) else read_parallel


@torch.inference_mode()
def score(
    model: Transformer,
    tokens: Tensor,
    states: Tensor,
    reference: Tensor | None = None,
    reference_model: Transformer | None = None,
) -> Scored:
    """Score each token but the first from the state before it, HEAD_TOKENS at a time since logits are wide.

    tokens: int64 [token]; states, reference: [token, dim], from a reader; reference_model: the model that made
    `reference`, if it is another. Raises UserError if a logit is not finite.
    """
    parts: list[tuple[Tensor, ...]] = []
    for lo in range(0, len(tokens) - 1, HEAD_TOKENS):
        hi = min(lo + HEAD_TOKENS, len(tokens) - 1)
        logp = model.head(states[lo:hi]).float().log_softmax(-1)
        nll = -logp.gather(1, tokens[lo + 1 : hi + 1, None])[:, 0].double()
        if reference is None:
            parts.append((nll,))
            continue
        want = (reference_model or model).head(reference[lo:hi]).float().log_softmax(-1)
        kl = (want.exp() * (want - logp)).double().sum(-1)
        parts.append((nll, kl, (want.argmax(-1) == logp.argmax(-1)).double()))
    scored = Scored(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
    if not scored.nll.isfinite().all():
        dtype = str(states.dtype).split(".")[-1]
        raise UserError(f"the logits are not finite: a token's probability is no number ({dtype} is the dtype)")
    return scored


def windows(tokens: Tensor, length: int, n: int) -> Iterator[Tensor]:
    """n windows of `length` tokens, evenly spread over a text; as many as there are, if those are fewer."""
    n = min(n, len(tokens) // length)
    for i in range(n):
        start = (len(tokens) - length) * i // max(1, n - 1) if n > 1 else 0
        yield tokens[start : start + length]
