"""The three caches against the definition, computed from outside, and against their own references."""

from __future__ import annotations

import dataclasses
from collections import Counter
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
from selective_kv.formats import INT8, Format
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
    window=st.integers(1, 9),
    chunks=st.lists(st.lists(st.integers(1, 14), min_size=0, max_size=4), min_size=1, max_size=3),
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
            feed(cache.slot(b), n, range(b, b + 1))
    for _ in range(case.n_decode):
        feed(cache, 1, range(len(qs)))
    return [torch.cat(o, 1) if o else torch.zeros(qs[0].shape[0], 0, case.head_dim) for o in outs]


def expected(
    case: Case, middle: str, turn: bool = False, formats: tuple[Format, Format] = (INT8, INT8)
) -> list[Tensor]:
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
        (SelectiveCache(case.sink, case.window), "quantised", False),
        (SinkWindowCache(case.sink, case.window, "original"), "gone", False),
        (SinkWindowCache(case.sink, case.window, "cache"), "gone", True),
    ]


@settings(max_examples=60, deadline=None)
@given(cases)
def test_every_cache_is_its_definition_and_its_reference(case: Case) -> None:
    """Random shapes, chunks and lengths around every boundary, ragged batches included."""
    for policy, middle, turn in policies(case):
        want = expected(case, middle, turn)
        for reference in (False, True):
            got = run(policy, case, reference)
            for g, w in zip(got, want, strict=True):
                assert torch.allclose(g.double(), w, rtol=1e-4, atol=1e-4), (policy, reference)


four_bit_caches = st.builds(
    SelectiveCache,
    sink_size=st.integers(0, 6),
    window_size=st.integers(1, 9),
    k_bits=st.sampled_from([8, 4]),
    v_bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([0, 32, 64]),
    rotate=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(cases, four_bit_caches)
def test_four_bits_are_their_definition_and_their_reference(case: Case, policy: SelectiveCache) -> None:
    """The policy stays: only what the middle is rounded to differs."""
    case = dataclasses.replace(case, head_dim=64, sink=policy.sink_size, window=policy.window_size)
    want = expected(case, "quantised", formats=policy.formats())
    for reference in (False, True):
        for g, w in zip(run(policy, case, reference), want, strict=True):
            # a rotation's last bit may tip a rounding: then one element of one key is a step away
            most = 2e-2 if policy.k_bits == 4 and policy.rotate else 1e-4
            assert (g.double() - w).norm() <= most * (1 + w.norm()), reference


@settings(max_examples=30, deadline=None)
@given(cases, st.integers(0, 5))
def test_a_window_of_the_whole_sequence_is_the_full_cache_bit_for_bit(case: Case, extra: int) -> None:
    window = max(1, case.capacity + extra)
    full = run(FullCache(), case)
    for policy in (SelectiveCache(case.sink, window), SinkWindowCache(case.sink, window)):
        for a, b in zip(run(policy, case, slack=extra + case.sink), full, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("exact", [True, False], ids=["int8 products", "float32 products"])
@pytest.mark.parametrize(
    "formats", [{}, {"k_bits": 4}, {"v_bits": 4}, {"k_bits": 4, "v_bits": 4, "group_size": 32}], ids=str
)
def test_a_long_middle_is_read_as_precisely_as_a_short_one(
    exact: bool, formats: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past a block of rows a CPU with int8 products uses them on K: the same scores to float32's rounding."""
    if exact and not eager.int8_products_are_exact():
        pytest.skip("this processor has no int8 products")
    monkeypatch.setattr(eager, "int8_products_are_exact", lambda: exact)
    torch.manual_seed(0)
    n, heads, group, dim = 2 * eager.BLOCK + 77, 2, 3, 64
    layer = SelectiveCache(4, 8, **formats)
    layer.allocate(Shape(1, heads, dim, n, torch.float32, CPU))
    k, v = torch.randn(2, 1, heads, n, dim)
    k[..., 5] *= 10
    eager.store_chunk(layer.regions, k, v, 0)
    q = torch.randn(1, heads * group, dim)
    q[..., 9] *= 10
    got = eager.decode_attention(q, layer.regions, torch.tensor([n - 1]))
    want = oracle.attention(q[0, :, None], k[0], v[0], n - 1, 4, 8, "quantised", formats=layer.formats())[:, 0]
    # 4 bits: a group's base and its integers, which an outlier channel makes large, cancel in the sum.
    assert (got[0].double() - want).norm() / want.norm() < (1e-4 if formats else 2e-6)


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
    assert plan(SelectiveCache(16, 32), 1, shape) == {
        "sink": 16 * token * 2,
        "window": 32 * token * 2,
        "quantised": 952 * token,
        "scales": 952 * token // 128 * 4,
    }
    four = plan(SelectiveCache(16, 32, k_bits=4, v_bits=4), 1, shape)
    assert four["quantised"] == 952 * token // 2 and four["scales"] == 952 * token // 128 * 4
    long = dataclasses.replace(shape, capacity=8192)
    share = sum(plan(SelectiveCache(16, 128, 4, 4), 1, long).values()) / sum(plan(FullCache(), 1, long).values())
    assert share <= 0.28
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
    with pytest.raises(ValueError, match="--sink_size must be at least 0, not -1"):
        SinkWindowCache(-1, 4)
    with pytest.raises(ValueError, match="--positions must be one of cache, original, not nearest"):
        SinkWindowCache(4, 4, "nearest")


def test_the_reference_refuses_to_quantise_what_is_not_finite() -> None:
    layer = SelectiveCache(0, 1)
    layer.allocate(Shape(1, 1, 8, 4, torch.float32, CPU))
    layer.use_reference()
    bad = torch.full((1, 1, 2, 8), float("nan"))
    chunk = Chunk(torch.arange(2)[None], 0, 0)
    with pytest.raises(ValueError, match="position 0 holds a value that is not finite"):
        layer.attend(torch.zeros(1, 1, 2, 8), bad, bad, chunk, Rope(frequencies(8), chunk.positions))
