"""Attention of a chunk in a model that itself looks back a window only (Mistral 7B 0.1), at flash attention's speed.

Elsewhere a chunk of tokens sees itself whole. Here a query sees the last W tokens, itself among them, wherever they
lie: in the chunk or in what the cache held before it; and sinks, apart. No mask is made and no kernel of its own is
needed. Queries are taken W at a time: a block's own tokens are all in its window (causal attention), and of the W - 1
tokens before it, query i sees those from the i-th on. Read backwards, queries and keys both, that is causal attention
as well: with W = 4, a block of queries 4 to 7 and the keys 1 to 3 before it,

    keys       1  2  3              keys       3  2  1
    query 4    x  x  x              query 6    x
    query 5       x  x      ->      query 5    x  x
    query 6          x              query 4    x  x  x
    query 7

The parts are merged by their log-sum-exps (kernels/attention_lse.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selective_kv.cache import Chunk, RopeLike, Shape, wide
from selective_kv.kernels import attention_lse
from selective_kv.region_cache import RegionCache
from selective_kv.regions import Regions

NARROW = 128  # a window below this is masked, for it makes too many blocks
MASKED = 512  # queries at a time, then


class _Parts:
    """The output of queries, [batch, n_head, token, head_dim] in float32, to which keys are added part by part."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Each query sees the keys up to its own: q, k and v are the same tokens."""
        self.q = q
        out, self.lse = attention_lse.attend(q, k, v, causal=True)
        self.out = out.float()

    def add(self, q: Tensor, rows: slice, k: Tensor, v: Tensor, triangle: str = "") -> None:
        """Let the queries `rows`, as `q` has them, see k and v [batch, n_kv_head, key, head_dim].

        triangle "first": the i-th of as many queries as keys sees the first i + 1 keys; "last": the i-th and those
        after it.
        """
        part = q[:, :, rows]
        if part.shape[2] == 0 or k.shape[2] == 0:
            return
        if triangle == "last":
            more, more_lse = attention_lse.attend(part.flip(2), k.flip(2), v.flip(2), causal=True)
            more, more_lse = more.flip(2), more_lse.flip(2)
        else:
            more, more_lse = attention_lse.attend(part, k, v, causal=triangle == "first")
        merged = attention_lse.merge(self.out[:, :, rows], self.lse[:, :, rows], more, more_lse)
        self.out[:, :, rows], self.lse[:, :, rows] = merged


def window_attention(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, window: int) -> _Parts:
    """Queries of a block of at most `window` tokens over themselves and over the tokens before them.

    q: [batch, n_head, token, head_dim]; k, v: [batch, n_kv_head, token, head_dim]; past_k, past_v: the last of the
    tokens before, at most window - 1, oldest first.
    """
    parts = _Parts(q, k, v)
    n_query, n_past = q.shape[2], past_k.shape[2]
    whole = min(window - 1 - n_past, n_query)  # the first queries see all that is there
    parts.add(q, slice(0, whole), past_k, past_v)
    n_edge = min(n_query - whole, n_past)
    parts.add(q, slice(whole, whole + n_edge), past_k[:, :, :n_edge], past_v[:, :, :n_edge], "last")
    parts.add(q, slice(whole, n_query), past_k[:, :, n_edge:], past_v[:, :, n_edge:])
    return parts


def masked_attention(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, window: int) -> _Parts:
    """`window_attention` of any number of tokens, slow and obvious: all scores of a block, and a mask."""
    parts = object.__new__(_Parts)
    parts.q, group = q, q.shape[1] // k.shape[1]
    keys, values = (wide(torch.cat(t, 2)).repeat_interleave(group, 1) for t in ((past_k, k), (past_v, v)))
    n_past = past_k.shape[2]
    score = (wide(q) * q.shape[3] ** -0.5) @ keys.transpose(-1, -2)
    at, own = torch.arange(keys.shape[2], device=q.device), torch.arange(q.shape[2], device=q.device)[:, None] + n_past
    score = score.masked_fill((at > own) | (at <= own - window), float("-inf"))
    parts.out, parts.lse = score.softmax(-1) @ values, score.logsumexp(-1)
    return parts


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, regions: Regions, start: int, sink_q: Tensor | None = None
) -> Tensor:
    """Attention of a chunk over itself and what the cache held when it began, by the window; and over the sinks.

    q: [batch, n_head, token, head_dim]; k, v: [batch, n_kv_head, token, head_dim]; regions: of the same sequences;
    start: the chunk's first position; sink_q: q as the sinks that have left the window are to see it, if not as it is.
    Writes nothing. Returns like q.
    """
    sink, window, n = regions.sink_size, regions.window_size, q.shape[2]
    past = torch.arange(max(0, start - window + 1), start, device=q.device)
    slots = torch.where(past < sink, past, sink + (past - sink) % window)
    held_k, held_v = regions.k[:, :, slots].to(q.dtype), regions.v[:, :, slots].to(q.dtype)
    sinks = [
        torch.cat((held[:, :, : min(start, sink)].to(q.dtype), own[:, :, : max(0, sink - start)]), 2)
        for held, own in ((regions.k, k), (regions.v, v))
    ]
    out = torch.empty_like(q)
    attend, step = (window_attention, window) if window >= NARROW else (masked_attention, MASKED)
    for lo in range(0, n, step):
        block = slice(lo, min(lo + step, n))
        before = slice(max(0, lo - window + 1), lo)
        past_k, past_v = torch.cat((held_k, k[:, :, before]), 2), torch.cat((held_v, v[:, :, before]), 2)
        n_past = min(window - 1, past_k.shape[2])
        past_k, past_v = (t[:, :, t.shape[2] - n_past :] for t in (past_k, past_v))
        parts = attend(q[:, :, block], k[:, :, block], v[:, :, block], past_k, past_v, window)
        _add_sinks(parts, (q if sink_q is None else sink_q)[:, :, block], sinks[0], sinks[1], start + lo, window)
        out[:, :, block] = parts.out.to(q.dtype)
    return out


def _add_sinks(parts: _Parts, q: Tensor, k: Tensor, v: Tensor, start: int, window: int) -> None:
    """Let the queries at start, start + 1, ... see the sinks k and v, those of them that have left the window."""
    n_query, n_sink = q.shape[2], k.shape[2]
    first = max(0, window - start)  # the first query that a sink is too far from
    if first >= n_query or n_sink == 0:
        return
    n_left = min(start + first - window, n_sink)  # before that one's own: all queries from `first` on see these
    n_edge = min(n_sink - n_left, n_query - first)
    edge = slice(n_left, n_left + n_edge)
    parts.add(q, slice(first, n_query), k[:, :, :n_left], v[:, :, :n_left])
    parts.add(q, slice(first, first + n_edge), k[:, :, edge], v[:, :, edge], "first")
    parts.add(q, slice(first + n_edge, n_query), k[:, :, n_left:], v[:, :, n_left:])


@dataclass
class SlidingCache(RegionCache):
    """A cache that can keep to a model's own window (`Shape.reach`): then it holds no more, and no query sees more."""

    slides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reach: int | None = None

    @property
    def attends_to_last(self) -> bool:
        return self.reach is None and super().attends_to_last

    def allocate(self, shape: Shape) -> None:
        self.reach = shape.reach
        super().allocate(shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, rope: RopeLike) -> Tensor:
        if self.reach is None or k.shape[2] == 1:
            return super().attend(q, k, v, chunk, rope)
        if self._reference:  # a token at a time sees just what decoding would show it
            outs = []
            for i in range(q.shape[2]):
                at = slice(i, i + 1)
                token = Chunk(chunk.positions[:, at], chunk.row)
                outs.append(super().attend(q[:, :, at], k[:, :, at], v[:, :, at], token, rope))
            return torch.cat(outs, 2)
        assert chunk.start is not None, "a chunk of several tokens starts at one known position"
        regions = self.regions.sequences(chunk.row, q.shape[0])
        y = sliding_attention(q, k, v, regions, chunk.start, self.sink_queries(q, chunk, rope))
        self.kernels.store_chunk(regions, k, v, chunk.start)
        return y

    def sink_queries(self, q: Tensor, chunk: Chunk, rope: RopeLike) -> Tensor | None:
        """q as sinks that have left the window are to see it; None: as it is."""
        return None
