"""The kernels in plain PyTorch: the twins that Triton's are compared with, and the fast path of a CPU.

Every function has the signature of its twin in Triton. In decoding, the group of query heads that share a KV head is
one matrix, [KV head, group, head_dim], so that each key is read once. Integers are converted to float32 a block of
tiles at a time, in a scratch buffer of the call; scales are factored out: a channel's multiplies the query, a token's
its score or probability. For the thousands of queries of a chunk a block of tiles is dequantised instead
(`history_attention`). `decode_attention` reads lengths on the host: free on a CPU, a synchronisation on an accelerator,
where this module is only the fallback.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_kv.formats import TILE, Format, Tiles
from selective_kv.kernels.attention_lse import attend, merge
from selective_kv.kernels.contract import AttentionKernels
from selective_kv.regions import Regions, Together

BLOCK_BYTES = 1 << 20  # of a block of integers in float32: it must stay in a CPU's cache, and calls be few
BLOCK_TILES = 32  # tiles made dense at a time, for the many queries of a chunk


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., head_dim] turned by RoPE; cos, sin: float32, as `model.Rope` has them."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def append(regions: Regions, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """Write one token per sequence.

    k, v: [batch, n_kv_head, head_dim]; positions: int64 [batch], where the new tokens stand.
    """
    for b, pos in enumerate(positions.tolist()):
        slot = regions.slot(pos)
        regions.k[b, :, slot] = k[b]
        regions.v[b, :, slot] = v[b]


def close(together: Together, positions: Tensor) -> None:
    """Before a step: quantise, in all layers, the tiles whose last tokens are pushed out of the window by tokens at
    `positions`, int64 [batch]."""
    for b, pos in enumerate(positions.tolist()):
        first, end = (together.first.n_left(n) for n in (pos, pos + 1))
        for layer in together.layers if first < end else ():
            own = layer.sequences(b, 1)
            _close_tiles(own, first, end, own.k, own.v, pos)


def evict(regions: Regions, start: int) -> None:
    """Before a chunk: quantise the tile that position `start` pushes out of the window, if it does."""
    _close_tiles(regions, regions.n_left(start), regions.n_left(start + 1), regions.k, regions.v, start)


def store_chunk(regions: Regions, k: Tensor, v: Tensor, start: int) -> None:
    """After attention over a chunk: quantise the tiles that have left the window, keep the tokens that have not.

    k, v: [batch, n_kv_head, token, head_dim], the tokens at positions start, start + 1, ...
    `evict(regions, start)` came first.
    """
    sink, end = regions.sink_size, start + k.shape[2]
    n_left = regions.n_left(end)
    _close_tiles(regions, regions.n_left(start + 1), n_left, k, v, start)
    for first, last in ((start, min(sink, end)), (max(start, sink + n_left), end)):
        while first < last:  # as far as slots go on without a break
            slot = regions.slot(first)
            n = min(last - first, (sink if first < sink else regions.k.shape[2]) - slot)
            for slots, chunk in ((regions.k, k), (regions.v, v)):
                slots[:, :, slot : slot + n] = chunk[:, :, first - start : first - start + n].to(slots.dtype)
            first += n


def _close_tiles(regions: Regions, first: int, end: int, k: Tensor, v: Tensor, start: int) -> None:
    """Quantise the tokens at positions sink_size + first to sink_size + end - 1, whole tiles. Those from `start` on are
    in k, v [batch, n_kv_head, token, head_dim], older ones in their slots."""
    if first >= end:
        return
    positions = range(regions.sink_size + first, regions.sink_size + end)
    slots = [regions.slot(pos) for pos in positions if pos < start]
    fresh = slice(max(positions.start, start) - start, max(positions.stop, start) - start)
    for chunk, part in zip((k, v), regions.stored(), strict=False):
        tokens = torch.cat((part.slots[:, :, slots], chunk[:, :, fresh].to(part.slots.dtype)), 2)
        made = part.quantize(tokens.unflatten(2, (-1, TILE)), first // TILE)
        for held, new in zip(part.tiles, made, strict=True):
            if held is not None and new is not None:
                held[:, :, first // TILE : end // TILE] = new


def decode_attention(
    q: Tensor,
    regions: Regions,
    positions: Tensor,
    sink_rope: tuple[Tensor, Tensor] | None = None,
    then: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per sequence, already appended, over all that its cache holds.

    q: [batch, n_head, head_dim]; positions: int64 [batch]. sink_rope: cos and sin, float32 [batch, head_dim],
    as `model.Rope` has them: when given, sinks are seen at their distance within the cache, as if what was dropped had
    never been (StreamingLLM, arXiv:2309.17453): q is turned back by that many positions for them. then: a weight that
    is read next, which has nothing to do with the result. Returns [batch, n_head, head_dim] in q's dtype.
    """
    out = torch.empty_like(q)
    for b, pos in enumerate(positions.tolist()):
        held = regions.sequences(b, 1) if len(q) > 1 else regions
        group = q[b].unflatten(0, (regions.k.shape[1], -1))  # [n_kv_head, group, head_dim]
        if regions.n_left(pos + 1) == 0:
            k, v = (x[:, :, : pos + 1] for x in (held.k, held.v))
            y = F.scaled_dot_product_attention(group[None], k, v)[0]
        else:
            turn = None if sink_rope is None else (sink_rope[0][b], sink_rope[1][b])
            y = _decode(group, held, pos + 1, turn)
        out[b] = y.flatten(0, 1)
    return out


def _decode(q: Tensor, held: Regions, n_token: int, sink_rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """All scores, one softmax, all values: for one query token the scores are few, and calls are what costs.

    q: [n_kv_head, group, head_dim], of one sequence. Returns it in float32.
    """
    query = q.float() * q.shape[-1] ** -0.5  # scaled first: 16 bits end at 65,504
    sinks = query if sink_rope is None else apply_rope(query, *sink_rope)
    parts = held.exact_slots(n_token)
    scores = [
        (sinks if i == 0 else query) @ held.k[0, :, part].float().transpose(-1, -2) for i, part in enumerate(parts)
    ]
    n_left, stored = held.n_left(n_token), [*held.stored()]
    if stored:
        keys, values = stored
        tile_scores = _score_tiles(keys.format.rotate(query), keys.tiles, keys.format, n_left // TILE)
        if keys.bias is not None:
            tile_scores += keys.bias.scores(query, n_left // TILE).flatten(-2)
        scores.append(tile_scores)
    prob = torch.cat(scores, -1).softmax(-1).split([s.shape[-1] for s in scores], -1)
    y = sum(p @ held.v[0, :, part].float() for p, part in zip(prob, parts, strict=False))
    if stored:
        y = y + values.format.rotate(_sum_tiles(prob[-1], values.tiles, values.format, n_left // TILE))
    return y


def _blocks(tiles: Tiles, form: Format, n_tile: int) -> Iterator[tuple[slice, Tensor]]:
    """Some tiles of one sequence at a time, their integers (of 8 bits less 128) as float32 [n_kv_head, tile, TILE,
    head_dim]: valid until the next are asked for."""
    codes = tiles.codes[0]
    n_element = codes.shape[0] * codes.shape[2] * 8 // form.bits
    each = max(1, BLOCK_BYTES // (4 * n_element))
    memory = torch.empty(each * n_element, device=codes.device)
    for lo in range(0, n_tile, each):
        part = slice(lo, min(lo + each, n_tile))
        block = codes[:, part]
        out = memory[: n_element * block.shape[1]].view(*block.shape[:2], TILE, -1)
        yield part, form.unpack_into(block, out)


def _score_tiles(query: Tensor, tiles: Tiles, form: Format, n_tile: int) -> Tensor:
    """Scores of the first n_tile tiles of keys. query: float32 [n_kv_head, group, head_dim], rotated if they are.

    Returns float32 [n_kv_head, group, n_tile * TILE].
    """
    scale, base = tiles.scales[0, :, :n_tile].float().unbind(-1)  # [n_kv_head, tile, head_dim]
    if form.bits == 8:
        base = base + 128 * scale
    out = query.new_empty(*query.shape[:2], n_tile, TILE)
    for part, codes in _blocks(tiles, form, n_tile):
        products = (query[:, None] * scale[:, part, None]) @ codes.transpose(-1, -2)  # [n_kv_head, tile, group, TILE]
        out[:, :, part] = products.transpose(1, 2)
    out += (query @ base.transpose(-1, -2))[..., None]
    if tiles.factors is not None:
        out *= tiles.factors[0, :, :n_tile].float().transpose(-1, -2).flatten(-2)[:, None]
    return out.flatten(-2)


def _sum_tiles(prob: Tensor, tiles: Tiles, form: Format, n_tile: int) -> Tensor:
    """The first n_tile tiles of values weighed by prob [n_kv_head, group, n_tile * TILE]: float32 [n_kv_head, group,
    head_dim], still rotated if they are."""
    scale, base = tiles.scales[0, :, :n_tile].float().flatten(1, 2).unbind(-1)  # [n_kv_head, token]
    if form.bits == 8:
        base = base + 128 * scale
    weight = prob * scale[:, None]
    y = (prob @ base[..., None]).repeat(1, 1, tiles.codes.shape[-1] * 8 // (form.bits * TILE))
    for part, codes in _blocks(tiles, form, n_tile):
        y.baddbmm_(weight[..., part.start * TILE : part.stop * TILE], codes.flatten(1, 2))
    return y


def history_attention(
    q: Tensor,
    regions: Regions,
    start: int,
    own: tuple[Tensor, Tensor],
    sink_rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of a chunk that begins at position `start` over itself, which is `own`, and what the cache held before.

    q: [batch, n_head, token, head_dim]. What `start` pushes out of the window has left (`evict` came first). own: the
    output over the chunk, like q, and the log-sum-exp of its scores, float32 [batch, n_head, token]. Returns like q.
    """
    seen = own
    n_left = regions.n_left(start + 1)
    for i, part in enumerate(regions.exact_slots(start, 1)):
        queries = q
        if i == 0 and n_left > 0 and sink_rope is not None:
            cos, sin = sink_rope
            queries = apply_rope(q, cos[:, None, None], sin[:, None, None])
        k, v = regions.k[:, :, part], regions.v[:, :, part]
        if k.shape[2]:
            seen = merge(*seen, *attend(queries, k, v))
    if regions.k_tiles is None or n_left == 0:
        return seen[0].to(q.dtype)
    keys, values = regions.stored()
    rotated = keys.format.rotate(q).to(q.dtype)
    stored = torch.zeros(q.shape, device=q.device), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    for lo in range(0, n_left // TILE, BLOCK_TILES):
        part = slice(lo, min(lo + BLOCK_TILES, n_left // TILE))
        # [batch, n_kv_head, token, head_dim]
        k, v = (x.stored(x.tiles.part(part), part).flatten(2, 3).to(q.dtype) for x in (keys, values))
        stored = merge(*stored, *attend(rotated, k, v))
    return merge(*seen, values.format.rotate(stored[0]), stored[1], q.dtype)[0]


PYTORCH = AttentionKernels(
    name="PyTorch kernels",
    captures=False,
    append=append,
    close=close,
    decode_attention=decode_attention,
    history_attention=history_attention,
    evict=evict,
    store_chunk=store_chunk,
)
