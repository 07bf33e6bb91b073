"""The kernels in plain PyTorch: the twins that Triton is compared with, and the fast path of a CPU.

Every function has the signature of its twin in Triton. In decoding, the group of query heads that share a
KV head is packed into one tile, [KV head, group, head_dim], so that each key is read once; integers are
read a block at a time, and a scale multiplies a score or a probability, never an element. A chunk's queries
look at a block of integers thousands of times: for them it is made dense (`history_attention`).
`decode_attention` reads lengths on the host: free on a CPU, a synchronisation on an accelerator, where this
module is only the fallback.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_kv.kernels.attention_lse import attend, merge
from selective_kv.kernels.contract import AttentionKernels
from selective_kv.regions import Regions, Stored

BLOCK = 2048  # keys at a time: their float32 form must stay in a CPU's cache, and calls be few
BLOCK_ROWS = 4096  # quantised rows made dense at a time, for the many queries of a chunk


class Scratch:
    """Blocks in float32, in memory used again and again: fresh pages cost more than the reading."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def float(self, block: Tensor) -> Tensor:
        """block as float32; valid until the next call."""
        if block.dtype == torch.float32:
            return block
        if self.memory is None or self.memory.numel() < block.numel() or self.memory.device != block.device:
            with torch.inference_mode(False):  # a later call may come outside it
                self.memory = torch.empty(block.numel(), device=block.device)
        return self.memory[: block.numel()].view(block.shape).copy_(block)


SCRATCH = Scratch()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., head_dim] turned by RoPE; cos, sin: float32, as `model.Rope` has them."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def append(regions: Regions, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """Write one token per sequence; the one that it pushes out of the window is quantised, or dropped.

    k, v: [batch, n_kv_head, head_dim]; positions: int64 [batch], where the new tokens stand.
    """
    for b, pos in enumerate(positions.tolist()):
        slot, n_left = regions.slot(pos), regions.n_left(pos + 1)
        if n_left > 0:
            _quantize_one(regions, b, slot, n_left - 1)
        regions.k[b, :, slot] = k[b]
        regions.v[b, :, slot] = v[b]


def _quantize_one(regions: Regions, b: int, slot: int, row: int) -> None:
    """The token of sequence b in `slot`, to a row. Keys and values in one go where they are alike: calls cost."""
    stored = list(regions.quantised())
    if not stored:
        return
    tokens = [part.values[b, :, slot] for part in stored]
    if stored[0].format == stored[1].format:
        made = list(zip(*stored[0].format.quantize(torch.stack(tokens)), strict=True))
    else:
        made = [part.format.quantize(token) for part, token in zip(stored, tokens, strict=True)]
    for part, (ints, scales) in zip(stored, made, strict=True):
        part.ints[b, :, row] = ints
        part.scales[b, :, row] = scales


def decode_attention(
    q: Tensor,
    regions: Regions,
    positions: Tensor,
    sink_turn: tuple[Tensor, Tensor] | None = None,
    then: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per sequence, already appended, over all that its cache holds.

    q: [batch, n_head, head_dim]; positions: int64 [batch]. sink_turn: cos and sin, float32 [batch, head_dim],
    as `model.Rope` has them: when given, sinks are seen at their distance within the cache, as if what was dropped had
    never been (StreamingLLM, arXiv:2309.17453): q is turned back by that many positions for them. then: a weight that
    is read next, which has nothing to do with the result. Returns [batch, n_head, head_dim] in q's dtype.
    """
    n_kv_head = regions.k.shape[1]
    out = torch.empty_like(q)
    for b, pos in enumerate(positions.tolist()):
        held = regions.batch_rows(b, 1) if len(q) > 1 else regions
        tile = q[b].unflatten(0, (n_kv_head, -1))[None]  # [1, n_kv_head, group, head_dim]
        n_left = regions.n_left(pos + 1)
        n_slot = pos + 1 - n_left
        if n_left > 0 and held.k_int is not None:
            y = _decode_quantised(tile[0], held, n_slot, n_left)[None]
        elif n_left > 0 and sink_turn is not None:
            cos, sin = sink_turn
            y = _decode_turned(tile[0], held, cos[b], sin[b])[None]
        else:
            y = F.scaled_dot_product_attention(tile, held.k[:, :, :n_slot], held.v[:, :, :n_slot])
        out[b] = y[0].flatten(0, 1)
    return out


def _decode_turned(tile: Tensor, held: Regions, cos: Tensor, sin: Tensor) -> Tensor:
    """Sinks seen by the query turned back, the window by the query as it is. tile: [n_kv_head, group, head_dim]."""
    sink = held.sink_size
    k, v = held.k[0], held.v[0]
    back = turned(tile, cos, sin)
    score = torch.cat((back @ k[:, :sink].transpose(-1, -2), tile @ k[:, sink:].transpose(-1, -2)), -1)
    return (score.float() * tile.shape[-1] ** -0.5).softmax(-1) @ v.float()


def _decode_quantised(tile: Tensor, held: Regions, n_slot: int, n_left: int) -> Tensor:
    """All scores, one softmax, all values: for one query token the scores are few, and calls are what costs.

    tile: [n_kv_head, group, head_dim]. Returns it in float32.
    """
    keys, values = held.quantised()
    query = tile.float() * tile.shape[-1] ** -0.5
    score = query.new_empty(*query.shape[:-1], n_slot + n_left)
    score[..., :n_slot] = query @ held.k[0, :, :n_slot].float().transpose(-1, -2)
    _score_stored(keys.format.turn(query), keys, n_left, score[..., n_slot:])
    prob = score.softmax(-1)
    y = prob[..., :n_slot] @ held.v[0, :, :n_slot].float()
    return _add_stored(prob[..., n_slot:], values, n_left, y)


def _score_stored(query: Tensor, keys: Stored, n_left: int, out: Tensor) -> None:
    """Scores of the first n_left stored keys of a sequence. query, out: float32 [n_kv_head, group, head_dim or key]."""
    ints, scales = keys.ints[0, :, :n_left], keys.scales[0, :, :n_left]
    if keys.format.bits == 8:
        torch.mul(_products(query, ints), scales[:, None], out=out)
        return
    # value = base + scale * u, a scale and base per group of elements: q·k = scale * (q·u) + base * sum(q)
    scale, base = scales.float().permute(3, 0, 2, 1)  # [n_kv_head, group of elements, key]
    parts = [_products(q, u) for q, u in zip(query.chunk(2, -1), _halves(ints), strict=True)]
    if scale.shape[1] == 1:
        torch.mul(parts[0].add_(parts[1]), scale, out=out)
    else:
        torch.mul(parts[0], scale[:, :1], out=out).addcmul_(parts[1], scale[:, 1:])
    out += query.unflatten(-1, (scale.shape[1], -1)).sum(-1) @ base


def _add_stored(prob: Tensor, values: Stored, n_left: int, y: Tensor) -> Tensor:
    """y [n_kv_head, group, head_dim] plus the first n_left stored values, weighed by prob [n_kv_head, group, key]."""
    ints, scales = values.ints[0, :, :n_left], values.scales[0, :, :n_left]
    n_key = BLOCK if ints[:, 0].numel() > 512 else 2 * BLOCK  # bytes of a key: few make room for more keys
    blocks = [slice(lo, lo + n_key) for lo in range(0, n_left, n_key)]
    if values.format.bits == 8:
        prob = prob * scales[:, None]
        for block in blocks:
            y.baddbmm_(prob[..., block], SCRATCH.float(ints[:, block]))
        return y
    scale, base = scales.float().permute(3, 0, 2, 1)
    parts = [torch.zeros_like(half, memory_format=torch.contiguous_format) for half in y.chunk(2, -1)]
    weighed = [prob * s[:, None] for s in scale.unbind(1)]  # one for all elements, or one for each half
    for block in blocks:
        for part, p, u in zip(parts, (weighed[0], weighed[-1]), _halves(ints[:, block]), strict=True):
            part.baddbmm_(p[..., block], SCRATCH.float(u))
    y += torch.cat(parts, -1)
    y.unflatten(-1, (base.shape[1], -1)).add_((prob @ base.transpose(1, 2))[..., None])
    return y


def _halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit integers as int8: elements 0 to head_dim / 2 - 1, and the rest."""
    return (packed & 15).view(torch.int8), (packed >> 4).view(torch.int8)


@functools.cache
def int8_products_are_exact() -> bool:
    """Whether this processor has int8 products worth using: fast, and not saturating in 16 bits on the way."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    worst = torch.full((16, 128), 127, dtype=torch.int8)
    return bool((torch._int_mm(worst, -worst.t().contiguous()) == -128 * 127 * 127).all())


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """query @ keys^T. query: float32 [n_kv_head, group, d]; keys: int8 [n_kv_head, key, d]. float32.

    Where int8 products are exact, no key is converted: a query is three int8 terms, each 1/254 of the one before. Off
    by 1e-7 of the largest element of a query times the keys, as float32 itself is.
    """
    n_head, group, _ = query.shape
    n_key = keys.shape[1]
    if n_key < BLOCK or query.device.type != "cpu" or not int8_products_are_exact():
        parts = [query @ SCRATCH.float(part).transpose(-1, -2) for part in keys.split(BLOCK, 1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    unit = torch.linalg.vector_norm(query, torch.inf, -1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    rest = query / unit
    terms = [rest.round()]
    for _ in range(2):
        rest = (rest - terms[-1]) * 254
        terms.append(rest.round())
    tile = torch.cat(terms, 1).to(torch.int8)  # [n_kv_head, 3 * group, d]
    sums = query.new_empty(n_head, 3 * group, n_key)
    for out, t, k in zip(sums, tile, keys, strict=True):
        out.copy_(torch._int_mm(t, k.t()))
    return (unit * _together(group)) @ sums


@functools.cache
def _together(group: int) -> Tensor:
    """float32 [group, 3 * group]: what adds the three terms of each query up."""
    with torch.inference_mode(False):
        return torch.cat([torch.eye(group) / 254**n for n in range(3)], 1)


def history_attention(
    q: Tensor, regions: Regions, start: int, sink_turn: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk that begins at position `start` over what the cache held before it.

    q: [batch, n_head, token, head_dim]. The token at start - window_size has left (`evict` came
    first): its slot, which `start` will take, is not looked at. sink_turn: as for `decode_attention`, of the
    token at `start`. Returns the output, float32 and shaped like q, and the log-sum-exp of its scores, float32
    [batch, n_head, token].
    """
    out = torch.zeros(q.shape, device=q.device)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    for queries, k, v in _held(q, regions, start, sink_turn):
        if k.shape[2]:
            out, lse = merge(out, lse, *attend(queries, k, v))
    return out, lse


def _held(
    q: Tensor, regions: Regions, start: int, sink_turn: tuple[Tensor, Tensor] | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What the cache holds, in parts that are dense: queries as these keys want them, keys, values."""
    sink, n_left = regions.sink_size, regions.n_left(start + 1)
    gap, end = (regions.slot(start), regions.k.shape[2]) if n_left > 0 else (start, start)
    first = 0
    if sink_turn is not None and n_left > 0:
        cos, sin = sink_turn
        yield turned(q, cos[:, None, None], sin[:, None, None]), regions.k[:, :, :sink], regions.v[:, :, :sink]
        first = sink
    for part in (slice(first, gap), slice(gap + 1, end)):
        yield q, regions.k[:, :, part], regions.v[:, :, part]
    queries = regions.k_format.turn(q).to(q.dtype)
    for lo in range(0, n_left, BLOCK_ROWS):
        rows = slice(lo, min(lo + BLOCK_ROWS, n_left))
        dense = [
            form.stored(ints[:, :, rows], scales[:, :, rows]).to(q.dtype)
            for _, ints, scales, form in regions.quantised()
        ]
        if dense:
            yield queries, dense[0], dense[1]


def evict(regions: Regions, start: int) -> None:
    """Before a chunk: quantise the token that position `start` pushes out of the window."""
    _quantize_slots(regions, start - regions.window_size, start - regions.window_size + 1)


def store_chunk(regions: Regions, k: Tensor, v: Tensor, start: int) -> None:
    """After attention over a chunk: keep its last tokens, quantise (or drop) what leaves the window.

    k, v: [batch, n_kv_head, token, head_dim], the tokens at positions start, start + 1, ...
    `evict(regions, start)` came first.
    """
    sink, window = regions.sink_size, regions.window_size
    end = start + k.shape[2]
    _quantize_slots(regions, start - window + 1, min(start, end - window))
    first = max(start, sink)  # chunk tokens that pass through the window without staying in it
    if first < end - window:
        rows, passing = slice(first - sink, end - window - sink), slice(first - start, end - window - start)
        for chunk, (_, ints, scales, form) in zip((k, v), regions.quantised(), strict=False):
            ints[:, :, rows], scales[:, :, rows] = form.quantize(chunk[:, :, passing])
    kept = [*range(start, min(sink, end)), *range(max(start, sink, end - window), end)]
    slots = torch.tensor([regions.slot(pos) for pos in kept], device=k.device)
    index = torch.tensor([pos - start for pos in kept], device=k.device)
    regions.k[:, :, slots] = k[:, :, index].to(regions.k.dtype)
    regions.v[:, :, slots] = v[:, :, index].to(regions.v.dtype)


def _quantize_slots(regions: Regions, first: int, end: int) -> None:
    """Quantise the tokens at positions first to end - 1, which still stand in their slots."""
    first = max(first, regions.sink_size)
    if first >= end:
        return
    slots = torch.tensor([regions.slot(pos) for pos in range(first, end)], device=regions.k.device)
    rows = slice(first - regions.sink_size, end - regions.sink_size)
    for values, ints, scales, form in regions.quantised():
        ints[:, :, rows], scales[:, :, rows] = form.quantize(values[:, :, slots])


PYTORCH = AttentionKernels(
    name="PyTorch kernels",
    captures=False,
    append=append,
    decode_attention=decode_attention,
    history_attention=history_attention,
    evict=evict,
    store_chunk=store_chunk,
    merge=merge,
)
