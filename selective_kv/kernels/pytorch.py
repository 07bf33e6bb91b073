"""The kernels in plain PyTorch: the reference that Triton's are compared with, and the fast path of a CPU.

Every function has the signature of its twin in Triton.

Decoding. The query heads that share a KV head are one matrix, [KV head, group, head_dim], so that each key is read
once; sequences of one length are computed together, their KV heads side by side. Integers are converted to float32 a
block of tiles at a time. Scales are factored out: a channel's multiplies the query, a token's its score or probability.
A step over a few thousand tokens takes as long as its calls of PyTorch do, so the code makes few of them: `bmm` is one,
where `@` is three. Lengths are read on the host, which costs nothing on a CPU and a synchronisation on a GPU, where
this module is only the fallback.

Prompts. The thousands of queries of a chunk meet a block of tiles made dense (`history_attention`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_kv.formats import TILE, rotation
from selective_kv.kernels.attention_lse import attend, merge
from selective_kv.kernels.contract import AttentionKernels
from selective_kv.regions import LayerGroup, Regions, Stored

BLOCK_BYTES = 1 << 22  # of a block of integers in float32: it must stay in a CPU's cache, and calls be few
BLOCK_TILES = 32  # tiles made dense at a time, for the many queries of a chunk
CLOSED_AT_ONCE = 8  # tiles of all heads quantised together: of a whole chunk, a dozen copies would be made


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


def close(group: LayerGroup, positions: Tensor) -> None:
    """Before a step: quantise, in all layers, the tiles whose last tokens are pushed out of the window by tokens at
    `positions`, int64 [batch]."""
    for b, pos in enumerate(positions.tolist()):
        first, end = (group.first.n_left(n) for n in (pos, pos + 1))
        for layer in group.layers if first < end else ():
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
    for lo in range(first, end, CLOSED_AT_ONCE * TILE):
        _close_some_tiles(regions, lo, min(lo + CLOSED_AT_ONCE * TILE, end), k, v, start)


def _close_some_tiles(regions: Regions, first: int, end: int, k: Tensor, v: Tensor, start: int) -> None:
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
    next_weight: Tensor | None = None,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of one new token per sequence over all that its cache holds.

    q: [batch, n_head, head_dim]; positions: int64 [batch]. sink_rope: cos and sin, float32 [batch, head_dim],
    as `model.Rope` has them. When given, sinks are seen at their distance within the cache, as if the dropped tokens
    had never been there (StreamingLLM, arXiv:2309.17453): for them q is turned back by as many positions. next_weight:
    for kernels that prefetch, not used here. new: the token's key and value, [batch, n_kv_head, head_dim] each, to be
    appended first; None: they are in the cache already. Returns [batch, n_head, head_dim] in q's dtype.
    """
    if new is not None:
        append(regions, *new, positions)
    places = positions.tolist()
    if len(places) == 1 or (min(places) == max(places) and _fit_together(regions)):
        return _decode_sequences(q, regions, places[0] + 1, sink_rope)
    out = torch.empty_like(q)
    for b, pos in enumerate(places):
        turn = None if sink_rope is None else (sink_rope[0][b : b + 1], sink_rope[1][b : b + 1])
        out[b] = _decode_sequences(q[b : b + 1], regions.sequences(b, 1), pos + 1, turn)[0]
    return out


def _decode_sequences(q: Tensor, regions: Regions, n_token: int, sink_rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """`decode_attention` of sequences that have n_token tokens each. q: [sequence, n_head, head_dim]. Returns like
    q."""
    n_kv_head, head_dim = regions.k.shape[1], q.shape[2]
    group = q.shape[1] // n_kv_head
    if regions.n_left(n_token) == 0:
        k, v = regions.k[:, :, :n_token], regions.v[:, :, :n_token]
        return F.scaled_dot_product_attention(q.view(-1, n_kv_head, group, head_dim), k, v).view(q.shape)
    query = q.reshape(-1, group, head_dim).float() * head_dim**-0.5  # scaled first: 16 bits end at 65,504
    if group % 4 == 3:  # MKL takes less time for four rows than for three
        query = F.pad(query, (0, 0, 0, 1))
    sinks = query
    if sink_rope is not None:
        cos, sin = (t[:, None, None].expand(-1, n_kv_head, 1, -1).flatten(0, 1) for t in sink_rope)
        sinks = apply_rope(query, cos, sin)
    y = _decode(query, sinks, regions, n_token)
    return y[:, :group].reshape(q.shape).to(q.dtype)


def _decode(query: Tensor, sinks: Tensor, held: Regions, n_token: int) -> Tensor:
    """All scores, one softmax, all values: for one query token the scores are few, and calls are what costs.

    query: float32 [head, group, head_dim], of the KV heads of all sequences; sinks: what it is for the sinks. Returns
    float32 like query.
    """
    parts = held.exact_slots(n_token)
    if sinks is query:
        parts = _joined(parts)
    keys, values = ([slots.flatten(0, 1)[:, part] for part in parts] for slots in (held.k, held.v))
    if held.k.dtype != torch.float32:
        keys, values = ([x.float() for x in slots] for slots in (keys, values))
    # [head, group, key]
    scores = [torch.bmm(sinks if i == 0 else query, k.transpose(1, 2)) for i, k in enumerate(keys)]
    if held.k_tiles is None:
        return _weighed(torch.cat(scores, 2).softmax(2), values)
    stored, n_tile = [*held.stored()], held.n_left(n_token) // TILE
    scores.append(_score_tiles(query, stored[0], n_tile))
    return _weighed_with_tiles(torch.cat(scores, 2).softmax(2), values, stored[1], n_tile)


def _joined(parts: list[slice]) -> list[slice]:
    """What `Regions.exact_slots` returns, less what is empty; the ring's beginning follows the sinks."""
    sink, ring, begun = parts
    if begun.stop > begun.start:
        return [slice(0, begun.stop), ring]
    return [part for part in (sink, ring) if part.stop > part.start]


def _weighed(prob: Tensor, values: Sequence[Tensor]) -> Tensor:
    """prob [head, group, token] times values [head, token, head_dim], which are in parts."""
    first, *others = zip(prob.split([v.shape[1] for v in values], 2), values, strict=True)
    y = torch.bmm(*first)
    for part in others:
        y.baddbmm_(*part)
    return y


def _fit_together(held: Regions) -> bool:
    """Whether a tile of every sequence in float32 stays in a processor's cache."""
    return held.k_tiles is None or 4 * TILE * held.k.shape[0] * held.k.shape[1] * held.k.shape[3] <= BLOCK_BYTES


def _tiles_at_once(part: Stored, n_tile: int) -> int:
    """How many tiles of all heads are made float32 together: a block must stay in a processor's cache."""
    codes = part.tiles.codes
    tile_bytes = 4 * codes.shape[0] * codes.shape[1] * codes.shape[3] * 8 // part.format.bits
    return min(n_tile, max(1, BLOCK_BYTES // tile_bytes))


def _blocks(part: Stored, n_tile: int) -> Iterator[tuple[slice, Tensor]]:
    """The first n_tile tiles, some at a time: their indices, and their integers (8 bits less 128) as float32 [head,
    tile, TILE, head_dim]: valid until the next are asked for. head: of all sequences."""
    codes, form = part.tiles.codes.flatten(0, 1), part.format
    n_head, _, n_byte = codes.shape
    head_dim = n_byte * 8 // (form.bits * TILE)
    n_element = n_head * TILE * head_dim  # of a tile
    each = _tiles_at_once(part, n_tile)
    memory = _scratch.floats(each * n_element, codes.device)
    for lo in range(0, n_tile, each):
        n = min(each, n_tile - lo)
        out = memory[: n * n_element].view(n_head, n, TILE, head_dim)
        yield slice(lo, lo + n), form.unpack_into(codes[:, lo : lo + n], out)


class _Scratch(threading.local):
    """Each thread's memory for a block of integers in float32. It is never freed: an allocator would give so large a
    block back to the system at once, and asking for fresh pages takes a CPU longer than computing with the block.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def floats(self, n: int, device: torch.device) -> Tensor:
        """n float32 numbers, uninitialised: valid until the next call."""
        if len(self.memory) < n or self.memory.device != device:
            with torch.inference_mode(False):
                self.memory = torch.empty(n, device=device)
        return self.memory[:n]


_scratch = _Scratch()


def _scales(part: Stored, n_tile: int) -> tuple[Tensor, Tensor]:
    """Scales of the first n_tile tiles, and the value that 0 stands for in the integers of `_blocks`: float32 [head,
    tile, n_vector]."""
    scale, base = part.tiles.scales.flatten(0, 1)[:, :n_tile].float().unbind(3)
    return scale, torch.add(base, scale, alpha=128) if part.format.bits == 8 else base


def _score_tiles(query: Tensor, keys: Stored, n_tile: int) -> Tensor:
    """Scores of the first n_tile tiles of keys: float32 [head, group, n_tile * TILE].

    query: float32 [head, group, head_dim].
    """
    form, (n_head, group, head_dim) = keys.format, query.shape
    rotated = query
    if form.rotated:
        rotated = torch.mm(query.view(-1, head_dim), rotation(head_dim, query.device)).view(query.shape)
    scale, base = _scales(keys, n_tile)  # of channels
    constant = torch.bmm(base, rotated.transpose(1, 2)).unsqueeze(3)  # [head, tile, group, 1]: of all a tile's scores
    scaled = rotated.unsqueeze(1) * scale.unsqueeze(2)  # [head, tile, group, head_dim]
    parts = []
    for which, codes in _blocks(keys, n_tile):
        added, rows = constant, scaled
        if codes.shape[1] < n_tile:
            added, rows = added[:, which], rows[:, which]
        added, rows = added.reshape(-1, group, 1), rows.reshape(-1, group, head_dim)
        products = torch.baddbmm(added, rows, codes.view(-1, TILE, head_dim).transpose(1, 2))
        parts.append(products.view(n_head, -1, group, TILE))
    tiled = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if keys.tiles.factors is not None:  # of the tokens i and i + TILE / 2
        factors = keys.tiles.factors.flatten(0, 1)[:, :n_tile, None].transpose(-1, -2)  # [head, tile, 1, 2, TILE / 2]
        tiled.view(n_head, n_tile, group, 2, -1).mul_(factors)
    scores = tiled.transpose(1, 2).reshape(n_head, group, -1)
    if keys.bias is not None:
        n_kv_head = len(keys.bias.pairs)
        for own, sequence in zip(scores.split(n_kv_head), query.split(n_kv_head), strict=True):
            own += keys.bias.scores(sequence, n_tile).flatten(-2)
    return scores


def _weighed_with_tiles(prob: Tensor, values: Sequence[Tensor], tiles: Stored, n_tile: int) -> Tensor:
    """`_weighed` of values in full precision and of the first n_tile tiles after them."""
    form, n_head, head_dim = tiles.format, len(prob), values[0].shape[2]
    n_exact = prob.shape[2] - n_tile * TILE
    stored = prob.narrow(2, n_exact, n_tile * TILE)
    scale, base = (x.flatten(1) for x in _scales(tiles, n_tile))  # of tokens
    y = torch.bmm(stored, base.unsqueeze(2))  # [head, group, 1]: of all channels
    weight = stored.mul_(scale.unsqueeze(1))
    if form.bits == 8 and not form.rotated and _tiles_at_once(tiles, n_tile) == n_tile:
        # One product for all tokens: copying the slots beside the integers takes less time than a product of their own.
        out = _scratch.floats(n_head * prob.shape[2] * head_dim, prob.device).view(n_head, -1, head_dim)
        codes = tiles.tiles.codes.flatten(0, 1)[:, :n_tile].view(torch.int8).view(n_head, -1, head_dim)
        exact = (x.detach() for x in values)  # where a caller has gradients on, too
        return torch.baddbmm(y, prob, torch.cat((*exact, codes), 1, out=out))
    for which, codes in _blocks(tiles, n_tile):
        part = weight[..., which.start * TILE : which.stop * TILE]
        y = torch.baddbmm(y, part, codes.view(n_head, -1, head_dim))
    if form.rotated:
        y = torch.mm(y.view(-1, head_dim), rotation(head_dim, y.device)).view(y.shape)
    return y.add_(_weighed(prob[..., :n_exact], values))


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
