"""The three caches against the definition, computed from outside, and against their own references."""

from __future__ import annotations

import dataclasses
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kv_cache import ModelCache, plan
from model import Config, Rope, Transformer
from selective_kv import Chunk, FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache
from selective_kv.formats import BITS, TILE, Format
from selective_kv.kernels import pytorch as eager

CPU = torch.device("cpu")


def frequencies(head_dim: int) -> Tensor:
    return 100.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


@dataclasses.dataclass
class Case:
    """Sequences of random keys with an outlier channel and sink-like tokens, read in chunks, then decoded."""

    n_kv_head: int
    group: int
    head_dim: int
    sink: int
    window: int
    chunks: list[list[int]]  # of each sequence; the last n_decode tokens come one by one, all together
    n_decode: int
    seed: int

    def build(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        torch.manual_seed(self.seed)
        qs, ks, vs = [], [], []
        for chunks in self.chunks:
            n = sum(chunks) + self.n_decode
            qs.append(torch.randn(self.n_kv_head * self.group, n, self.head_dim))
            k, v = torch.randn(2, self.n_kv_head, n, self.head_dim)
            k[:, :, 0] *= 20  # an outlier channel
            k[:, :2] *= 5  # sink-like tokens
            v[:, :2] *= 0.05
            ks.append(k)
            vs.append(v)
        return qs, ks, vs

    @property
    def capacity(self) -> int:
        return max(sum(c) for c in self.chunks) + self.n_decode


cases = st.builds(
    Case,
    n_kv_head=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8, 16]),
    sink=st.integers(0, 6),
    window=st.integers(1, 9) | st.sampled_from([TILE - 1, TILE, TILE + 1]),
    chunks=st.lists(
        st.lists(
            st.integers(1, 14) | st.integers(TILE - 14, TILE + 4) | st.integers(1, 3 * TILE), min_size=0, max_size=4
        ),
        min_size=1,
        max_size=3,
    ),
    n_decode=st.integers(0, 6),
    seed=st.integers(0, 1000),
)


def run(policy: KVCache, case: Case, reference: bool = False, slack: int = 0) -> list[Tensor]:
    """Feed the case through a one-layer cache; the attention output of every token, per sequence."""
    qs, ks, vs = case.build()
    shape = Shape(len(qs), case.n_kv_head, case.head_dim, max(1, case.capacity + slack), torch.float32, CPU)
    cache = ModelCache(policy, 1, shape)
    layer = cache.layers[0]
    if reference:
        layer.use_reference()
    outs: list[list[Tensor]] = [[] for _ in qs]

    def feed(view: ModelCache, n: int, rows: range) -> None:
        chunk = view.begin(n)
        rope = Rope(frequencies(case.head_dim), chunk.positions)
        at = [int(p) for p in chunk.positions[:, 0]]
        q, k, v = (torch.stack([t[b][:, a : a + n] for b, a in zip(rows, at, strict=True)]) for t in (qs, ks, vs))
        y = layer.attend(q, k, v, chunk, rope)
        for b, out in zip(rows, y, strict=True):
            outs[b].append(out)
        view.advance(chunk)

    for b, chunks in enumerate(case.chunks):
        for n in chunks:
            feed(cache.sequence(b), n, range(b, b + 1))
    for _ in range(case.n_decode):
        feed(cache, 1, range(len(qs)))
    return [torch.cat(o, 1) if o else torch.zeros(qs[0].shape[0], 0, case.head_dim) for o in outs]


def expected(case: Case, middle: str, turn: bool = False, formats: tuple[Format, Format] | None = None) -> list[Tensor]:
    outs = []
    for q, k, v, chunks in zip(*case.build(), case.chunks, strict=True):
        start, parts = 0, [torch.zeros(q.shape[0], 0, case.head_dim, dtype=torch.float64)]
        sink, window = (case.sink, case.window) if middle != "exact" else (0, 10**6)
        for n in [*chunks, *[1] * case.n_decode]:
            end = start + n
            freq = frequencies(case.head_dim) if turn else None
            parts.append(
                oracle.attention(q[:, start:end], k[:, :end], v[:, :end], start, sink, window, middle, freq, formats)
            )
            start = end
        outs.append(torch.cat(parts, 1))
    return outs


def policies(case: Case) -> list[tuple[KVCache, str, bool]]:
    return [
        (FullCache(), "exact", False),
        (SelectiveCache(case.sink, case.window, rotate=False), "quantised", False),
        (SinkWindowCache(case.sink, case.window, "original"), "gone", False),
        (SinkWindowCache(case.sink, case.window, "cache"), "gone", True),
    ]


@settings(max_examples=60, deadline=None)
@given(cases)
def test_every_cache_is_its_definition_and_its_reference(case: Case) -> None:
    """Random shapes, chunks and lengths around every boundary, ragged batches included."""
    for policy, middle, turn in policies(case):
        want = expected(case, middle, turn, policy.formats() if isinstance(policy, SelectiveCache) else None)
        for reference in (False, True):
            got = run(policy, case, reference)
            for g, w in zip(got, want, strict=True):
                assert torch.allclose(g.double(), w, rtol=1e-4, atol=1e-4), (policy, reference)


selective_caches = st.builds(
    SelectiveCache,
    sink_size=st.integers(0, 6),
    window_size=st.integers(1, 9) | st.integers(TILE - 2, TILE + 2),
    k_bits=st.sampled_from(BITS),
    v_bits=st.sampled_from(BITS),
    rotate=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(cases, selective_caches, st.sampled_from([2, 24, 64]))
def test_every_format_is_its_definition_and_its_reference(case: Case, policy: SelectiveCache, head_dim: int) -> None:
    """The policy stays: only what a tile is rounded to differs."""
    case = dataclasses.replace(case, head_dim=head_dim, sink=policy.sink_size, window=policy.window_size)
    want = expected(case, "quantised", formats=policy.formats())
    for reference in (False, True):
        for g, w in zip(run(policy, case, reference), want, strict=True):
            assert (g.double() - w).norm() <= 1e-4 * (1 + w.norm()), reference


@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
@pytest.mark.parametrize("n_decode", [0, 2 * TILE + 5])
def test_a_tile_is_quantised_once_and_when_its_last_token_has_left(n_decode: int, reference: bool) -> None:
    """Between window_size and window_size + 127 recent tokens are exact; what is stored never changes again."""
    sink, window, prompt = 3, 20, 200
    case = Case(2, 1, 8, sink, window, [[prompt]], max(1, n_decode), 0)
    layer = SelectiveCache(sink, window)
    shape = Shape(1, 2, 8, case.capacity, torch.float32, CPU)
    cache = ModelCache(layer, 1, shape)
    layer = cache.layers[0]  # type: ignore[assignment]
    if reference:
        layer.use_reference()
    (q,), (k,), (v,) = case.build()
    seen: list[Tensor] = []
    for lo, hi in [(0, prompt), *((i, i + 1) for i in range(prompt, prompt + n_decode))]:
        chunk = cache.begin(hi - lo)
        layer.attend(
            q[None, :, lo:hi], k[None, :, lo:hi], v[None, :, lo:hi], chunk, Rope(frequencies(8), chunk.positions)
        )
        cache.advance(chunk)
        n_tile = max(0, hi - sink - window) // TILE
        assert layer.regions.n_left(hi) == n_tile * TILE and window <= hi - sink - n_tile * TILE < window + TILE
        assert layer.regions.k_tiles is not None
        codes = layer.regions.k_tiles.codes[0]
        assert not codes[:, n_tile:].any() and codes[:, :n_tile].any(-1).all()
        if n_tile > len(seen):
            seen.append(codes[:, n_tile - 1].clone())
        assert all(torch.equal(codes[:, t], tile) for t, tile in enumerate(seen))
    assert len(seen) == 1 + n_decode // TILE


@settings(max_examples=30, deadline=None)
@given(cases, st.integers(0, 5))
def test_a_window_of_the_whole_sequence_is_the_full_cache_bit_for_bit(case: Case, extra: int) -> None:
    window = max(1, case.capacity + extra)
    full = run(FullCache(), case)
    for policy in (SelectiveCache(case.sink, window), SinkWindowCache(case.sink, window)):
        for a, b in zip(run(policy, case, slack=extra + case.sink), full, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 2), (8, 4)])
def test_a_long_middle_is_read_as_precisely_as_a_short_one(bits: tuple[int, int]) -> None:
    """Several blocks of tiles, with an outlier channel: the definition's scores to float32's rounding."""
    torch.manual_seed(0)
    n, heads, group, dim = 40 * TILE + 77, 2, 3, 64
    layer = SelectiveCache(4, 8, *bits)
    layer.allocate(Shape(1, heads, dim, n, torch.float32, CPU))
    k, v = torch.randn(2, 1, heads, n, dim)
    k[..., 5] *= 10
    eager.store_chunk(layer.regions, k, v, 0)
    q = torch.randn(1, heads * group, dim)
    q[..., 9] *= 10
    got = eager.decode_attention(q, layer.regions, torch.tensor([n - 1]))
    want = oracle.attention(q[0, :, None], k[0], v[0], n - 1, 4, 8, "quantised", formats=layer.formats())[:, 0]
    # below 8 bits a base and its integers cancel in the sum
    assert (got[0].double() - want).norm() / want.norm() < (1e-4 if min(bits) < 8 else 2e-5)


@pytest.mark.parametrize("block", [1, 1 << 17, 1 << 22])  # bytes: a tile at a time, some, all sequences together
@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (4, 3)])
def test_sequences_of_one_length_are_read_together_as_each_alone(
    bits: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tiles are made float32 at once; the ring in one part and in two; a group that is filled up to 4."""
    monkeypatch.setattr(eager, "BLOCK_BYTES", block)
    torch.manual_seed(0)
    batch, heads, group, dim = 3, 2, 3, 32
    for n in (4 * TILE + 60, 5 * TILE + 60):
        layer = SelectiveCache(4, 40, *bits)
        layer.allocate(Shape(batch, heads, dim, n, torch.float32, CPU))
        k, v = torch.randn(2, batch, heads, n, dim)
        eager.store_chunk(layer.regions, k, v, 0)
        q, at = torch.randn(batch, heads * group, dim), torch.full((batch,), n - 1)
        together = eager.decode_attention(q, layer.regions, at)
        for b in range(batch):
            alone = eager.decode_attention(q[b : b + 1], layer.regions.sequences(b, 1), at[:1])[0]
            assert torch.allclose(together[b], alone, atol=1e-5)
            formats = layer.formats()
            want = oracle.attention(q[b, :, None], k[b], v[b], n - 1, 4, 40, "quantised", formats=formats)[:, 0]
            assert (alone.double() - want).norm() < 1e-4 * want.norm()


def test_two_threads_with_a_cache_each_get_what_each_alone_would() -> None:
    """Scratch memory was shared by the whole process once: 202 of 480 steps were wrong."""
    torch.manual_seed(0)
    layers, tokens, n = [], [], 30 * TILE
    for _ in range(2):
        layer = SelectiveCache(4, 8, 4, 4)
        layer.allocate(Shape(1, 2, 64, n, torch.float32, CPU))
        k, v = torch.randn(2, 1, 2, n, 64)
        eager.store_chunk(layer.regions, k, v, 0)
        layers.append(layer)
        tokens.append(torch.randn(1, 4, 64))
    at = torch.tensor([n - 1])
    want = [eager.decode_attention(q, layer.regions, at) for q, layer in zip(tokens, layers, strict=True)]

    def work(i: int) -> bool:
        return all(torch.equal(eager.decode_attention(tokens[i], layers[i].regions, at), want[i]) for _ in range(20))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


def test_no_value_of_an_earlier_text_is_left_to_be_masked() -> None:
    """A decode step multiplies values whose token is in a tile by zero: a NaN of the text before a reset would show."""
    cache = SelectiveCache(4, 16)
    with torch.inference_mode():
        cache.allocate(Shape(1, 2, 8, 400, torch.float32, CPU))
    with torch.inference_mode():
        cache.regions.v.fill_(float("nan"))
    cache.reset()
    assert cache.regions.v.isfinite().all()


@pytest.mark.parametrize("policy", [FullCache(), SelectiveCache(4, 8), SinkWindowCache(4, 8)])
def test_reset_forgets(policy: KVCache) -> None:
    """torchao's mask flag survived into the next prompt; here the same tokens twice give the same output."""
    shape = Shape(1, 2, 8, 40, torch.float32, CPU)
    cache = ModelCache(policy, 1, shape)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    runs = []
    for _ in range(2):
        cache.reset()
        out = []
        for lo, hi in [(0, 20), *((i, i + 1) for i in range(20, 30))]:
            chunk = cache.begin(hi - lo)
            rope = Rope(frequencies(8), chunk.positions)
            out.append(cache.layers[0].attend(q[:, :, lo:hi], k[:, :, lo:hi], v[:, :, lo:hi], chunk, rope))
            cache.advance(chunk)
        runs.append(torch.cat(out, 2))
    assert torch.equal(*runs)


class Launches(TorchDispatchMode):
    """What would be launched on a GPU, by name: every operation that is no view and no allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith("empty"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_layer", [1, 3])
def test_the_sinks_turn_is_made_once_a_step_and_where_it_is_wanted(n_layer: int) -> None:
    """For all layers together; until something is dropped, the step is otherwise that of original positions."""
    config = Config(20, 16, n_layer, 2, 1, 8, 64)
    model = Transformer(config)
    made = []
    for policy in (SinkWindowCache(2, 9, "cache"), SinkWindowCache(2, 9, "original"), SinkWindowCache(0, 11)):
        cache = ModelCache(policy, n_layer, Shape(2, 1, 8, 64, torch.float32, CPU))
        tokens = torch.ones(2, 3, dtype=torch.int64)
        with torch.no_grad():  # in inference mode a conversion would look like a view
            model(tokens, cache)
            with Launches() as launches:
                model(tokens[:, :1], cache)
        made.append(launches.names)
    assert made[0] - made[1] == {name: 1 for name in ("rsub", "clamp_max", "mul", "cos", "sin")}
    assert made[2] == made[1]


def test_bytes_are_what_was_planned_and_what_the_arithmetic_says() -> None:
    shape = Shape(3, 8, 128, 1000, torch.bfloat16, CPU)
    for policy in (FullCache(), SelectiveCache(16, 32), SinkWindowCache(16, 32)):
        assert ModelCache(policy, 2, shape).nbytes() == plan(policy, 2, shape)
    token = 2 * 3 * 8 * 128  # elements of K and V of one position, in one layer
    assert plan(FullCache(), 1, shape) == {"window": 1000 * token * 2}
    # of 1,000 - 16 - 32 tokens 7 tiles can leave the window; their tokens wait for each other in 128 slots more
    assert plan(SelectiveCache(16, 32), 1, shape) == {
        "sink": 16 * token * 2,
        "window": (32 + TILE) * token * 2,
        "quantised": 7 * TILE * token,
        "scales": 7 * TILE * token // 128 * 4,
    }
    four = plan(SelectiveCache(16, 32, k_bits=4, v_bits=4), 1, shape)
    assert four["quantised"] == 7 * TILE * token // 2 and four["scales"] == 7 * TILE * token // 128 * 5
    assert plan(SelectiveCache(16, 900), 1, shape) == {"sink": 16 * token * 2, "window": 984 * token * 2}
    long = dataclasses.replace(shape, capacity=8192)
    share = sum(plan(SelectiveCache(16, 128, 4, 4), 1, long).values()) / sum(plan(FullCache(), 1, long).values())
    assert share <= 0.30
    assert sum(plan(SinkWindowCache(16, 32), 1, dataclasses.replace(shape, capacity=10**6)).values()) == (
        48 * token * 2
    )


def test_a_chunk_past_the_capacity_is_refused() -> None:
    cache = ModelCache(FullCache(), 1, Shape(1, 1, 8, 10, torch.float32, CPU))
    cache.advance(cache.begin(8))
    with pytest.raises(ValueError, match="11 tokens do not fit a cache made for 10"):
        cache.begin(3)


def test_knobs_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="--window_size must be at least 1, not 0"):
        SelectiveCache(4, 0)
    for knobs in (dict(sink_size="x"), dict(window_size=1e3), dict(sink_size=True), dict(rotate="no"), dict(rotate=1)):
        with pytest.raises(ValueError, match="takes a value of type"):  # "no" rotated, and half a token was no error
            SelectiveCache(**knobs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--window_size must be at most 2,147,483,647"):
        SelectiveCache(window_size=10**20)
    assert SelectiveCache(torch.tensor(3), 8) == SelectiveCache(3, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--sink_size must be at least 0, not -1"):
        SinkWindowCache(-1, 4)
    with pytest.raises(ValueError, match="--positions must be one of cache, original, not nearest"):
        SinkWindowCache(4, 4, "nearest")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_reference_refuses_to_quantise_what_is_not_finite(bad: float) -> None:
    layer, n = SelectiveCache(0, 1), TILE + 1
    layer.allocate(Shape(1, 1, 8, n, torch.float32, CPU))
    layer.use_reference()
    k = torch.randn(1, 1, n, 8)
    k[0, 0, 77, 3] = bad
    chunk = Chunk(torch.arange(n)[None], 0, 0)
    with pytest.raises(ValueError, match="positions 0 to 127 holds a value that is not finite"):
        layer.attend(torch.zeros(1, 1, n, 8), k, k, chunk, Rope(frequencies(8), chunk.positions))
