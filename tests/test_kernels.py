"""The Triton kernels against float64, token by token; and what the compiler makes of them.

Without a GPU the kernels run in Triton's interpreter, on the CPU; with one, on it (`-m gpu`). The reference
here shares nothing with the kernels, nor with their PyTorch twins, but the reference quantisation.
Memory that holds no token is full of NaN, so that a kernel that looks at it cannot pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton", reason="the kernels need Triton")

from kernels import triton_kernels as kernels  # noqa: E402
from kernels.regions import Regions  # noqa: E402
from quantize import dequantize, quantize  # noqa: E402

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="the GPU runs the same tests")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")]),
]
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


def tokens(batch: int, n_kv_head: int, n_token: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random keys and values with an outlier channel in K and sinks that draw much attention."""
    k, v = (torch.randn(batch, n_kv_head, n_token, head_dim) for _ in "kv")
    k[..., 1] *= 8
    k[:, :, :2] *= 2
    v[:, :, :2] *= 0.1
    v[:, :, n_token // 2] = 0  # a zero vector has scale 1
    return k.to(dtype), v.to(dtype)


def slot_of(pos: int, sink: int, window: int) -> int:
    return pos if pos < sink else sink + (pos - sink) % window


def held(k: Tensor, v: Tensor, lengths: list[int], sink: int, window: int, n_row: int, device: str) -> Regions:
    """The memory of a cache that has seen the first lengths[b] tokens of k, v [batch, n_kv_head, token, D]."""
    batch, n_kv_head, _, head_dim = k.shape
    slots = [torch.full((batch, n_kv_head, sink + window, head_dim), float("nan"), dtype=k.dtype) for _ in "kv"]
    ints = [torch.randint(-128, 128, (batch, n_kv_head, n_row, head_dim), dtype=torch.int8) for _ in "kv"]
    scales = [torch.full((batch, n_kv_head, n_row), float("nan")) for _ in "kv"]
    for b, n in enumerate(lengths):
        for pos in range(n):
            for x, slot, integer, scale in zip((k, v), slots, ints, scales, strict=True):
                if pos < sink or pos > n - 1 - window:
                    slot[b, :, slot_of(pos, sink, window)] = x[b, :, pos]
                elif n_row:
                    integer[b, :, pos - sink], scale[b, :, pos - sink] = quantize(x[b, :, pos])
    slots, ints, scales = ([t.to(device) for t in group] for group in (slots, ints, scales))
    if not n_row:
        return Regions(slots[0], slots[1], None, None, None, None, sink, window)
    return Regions(*slots, *ints, *scales, sink, window)


def turned(x: Tensor, offset: int, frequencies: Tensor) -> Tensor:
    """x float64 [..., D] rotated by `offset` positions of RoPE."""
    a, b = x.chunk(2, -1)
    cos, sin = (frequencies.double() * offset).cos(), (frequencies.double() * offset).sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def visible(k: Tensor, v: Tensor, n: int, sink: int, window: int, quantised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """float64 keys and values that token n - 1 sees, and their positions. k, v: [n_kv_head, token, D]."""
    pos = torch.arange(n)
    middle = (pos >= sink) & (pos <= n - 1 - window)
    keys, values = (x[:, :n].double() for x in (k, v))
    if quantised:
        keys, values = (
            torch.where(middle[:, None], dequantize(*quantize(x[:, :n])).double(), exact)
            for x, exact in ((k, keys), (v, values))
        )
        return keys, values, pos
    return keys[:, ~middle], values[:, ~middle], pos[~middle]


def reference(
    q: Tensor, k: Tensor, v: Tensor, n: int, sink: int, window: int, quantised: bool, frequencies: Tensor | None
) -> Tensor:
    """float64 attention of the query of token n - 1. q: [n_head, D]; k, v: [n_kv_head, token, D]."""
    keys, values, pos = visible(k, v, n, sink, window, quantised)
    group = q.shape[0] // k.shape[0]
    if frequencies is not None:
        dropped = max(0, n - sink - window)
        keys = torch.where((pos < sink)[:, None], turned(keys, dropped, frequencies), keys)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    score = torch.einsum("hd,hkd->hk", q.double(), keys) * q.shape[-1] ** -0.5
    return torch.einsum("hk,hkd->hd", score.softmax(-1), values)


def error(out: Tensor, expected: Tensor) -> float:
    return ((out.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-6)).item()


def poison(device: str) -> None:
    """Fill memory about to be reused with NaN: what a kernel does not write, or reads too early, shows."""
    for n in (1 << 12, 1 << 16, 1 << 20):
        torch.full((n,), float("nan"), device=device)


SMALL = (16, 2, 2)  # head_dim, n_kv_head, group
BOUNDARIES = [1, 3, 4, 5, 35, 36, 37, 38]  # around S = 4 and S + W = 36
BLOCKS = [36 + n for n in (1, 127, 128, 129, 255, 256, 257, 300)]  # int8 rows around a block of 128


@pytest.mark.parametrize(
    ("shape", "sink", "window", "dtype", "lengths"),
    [
        (SMALL, 4, 32, FP32, BOUNDARIES),
        (SMALL, 4, 32, BF16, BLOCKS),
        (SMALL, 0, 1, FP32, [1, 2, 3, 200]),
        (SMALL, 0, 300, BF16, [63, 64, 65, 127, 128, 129, 300]),  # slots around a block of 64
        ((8, 1, 1), 3, 5, FP32, [2, 9, 40]),
        ((32, 1, 3), 1, 70, FP16, [60, 72, 150]),
        ((64, 2, 7), 4, 60, BF16, [64, 200]),
        ((96, 1, 4), 2, 30, BF16, [31, 170]),
        ((128, 1, 4), 4, 124, BF16, [1, 128, 129, 700]),
        ((128, 1, 16), 4, 28, BF16, [30, 300]),
        ((256, 1, 8), 0, 40, BF16, [40, 200]),
        ((256, 1, 16), 5, 40, FP16, [45, 46]),
    ],
)
def test_decode(
    shape: tuple[int, int, int], sink: int, window: int, dtype: torch.dtype, lengths: list[int], device: str
) -> None:
    head_dim, n_kv_head, group = shape
    k, v = tokens(len(lengths), n_kv_head, max(lengths), head_dim, dtype)
    q = torch.randn(len(lengths), n_kv_head * group, head_dim).to(dtype)
    positions = torch.tensor(lengths, device=device) - 1
    for n_row in (max(1, max(lengths) - sink - window), 0):
        regions = held(k, v, lengths, sink, window, n_row, device)
        poison(device)
        out = kernels.decode_attention(q.to(device), regions, positions)
        for b, n in enumerate(lengths):
            expected = reference(q[b], k[b], v[b], n, sink, window, n_row > 0, None)
            assert error(out[b], expected) < TOLERANCE[dtype], f"{n} tokens, {n_row} rows"


@pytest.mark.parametrize("n", [3, 40, 41, 1_000_040])
def test_sinks_at_their_distance_within_the_cache(n: int, device: str) -> None:
    sink, window, head_dim = 6, 34, 32
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    last = min(n, 200)  # the tokens that are gone need not exist
    k, v = tokens(1, 1, last, head_dim, FP32)
    q = torch.randn(1, 2, head_dim)
    dropped = max(0, n - sink - window)
    slots = torch.full((2, 1, 1, sink + window, head_dim), float("nan"))
    kept = [*range(min(sink, n)), *range(max(sink, n - window), n)]
    at = [min(pos, pos - (n - last)) if pos >= sink else pos for pos in kept]
    for pos, i in zip(kept, at, strict=True):
        slots[0, 0, :, slot_of(pos, sink, window)] = k[0, :, i]
        slots[1, 0, :, slot_of(pos, sink, window)] = v[0, :, i]
    regions = Regions(*slots.to(device), None, None, None, None, sink, window)
    out = kernels.decode_attention(q.to(device), regions, torch.tensor([n - 1], device=device), frequencies.to(device))
    keys, values = k[0, :, at].double(), v[0, :, at].double()
    is_sink = torch.tensor(kept)[:, None] < sink
    keys = torch.where(is_sink, turned(keys, dropped, frequencies), keys)
    score = q[0].double() @ keys[0].T * head_dim**-0.5
    assert error(out[0], score.softmax(-1) @ values[0]) < TOLERANCE[FP32]


def test_nothing_left_the_window_is_the_full_cache_bit_for_bit(device: str) -> None:
    lengths = [1, 63, 64, 200, 260]
    k, v = tokens(len(lengths), 2, 300, 32, BF16)
    q = torch.randn(len(lengths), 4, 32).to(BF16).to(device)
    positions = torch.tensor(lengths, device=device) - 1
    full = kernels.decode_attention(q, held(k, v, lengths, 0, 5000, 0, device), positions)
    frequencies = torch.rand(16, dtype=torch.float64, device=device)
    for sink, window, n_row in ((0, 300, 0), (7, 253, 0), (4, 300, 900), (300, 1, 200)):
        regions = held(k, v, lengths, sink, window, n_row, device)
        turn = None if n_row else frequencies
        assert torch.equal(kernels.decode_attention(q, regions, positions, turn), full)


def test_strided_queries_and_a_slice_of_the_batch(device: str) -> None:
    lengths = [50, 90, 130]
    k, v = tokens(3, 2, 130, 16, FP32)
    packed = torch.randn(3, 9, 1, 16)
    q = packed[:, 2:6, 0]
    regions = held(k, v, lengths, 4, 40, 100, device).batch_rows(1, 2)
    positions = torch.tensor(lengths[1:], device=device) - 1
    out = kernels.decode_attention(packed.to(device)[1:, 2:6, 0], regions, positions)
    for b, n in enumerate(lengths[1:]):
        assert error(out[b], reference(q[1 + b], k[1 + b], v[1 + b], n, 4, 40, True, None)) < 2e-4


def test_tiny_and_huge_values_and_scales(device: str) -> None:
    """Probability times V's scale is a float16: it must neither overflow nor vanish."""
    k, v = tokens(1, 1, 400, 32, FP32)
    q = torch.randn(1, 1, 32)
    for size in (1e-6, 1.0, 1e6):
        spread = v * size
        spread[..., 100:, :] *= 1e3
        out = kernels.decode_attention(
            q.to(device), held(k, spread, [400], 4, 20, 400, device), torch.tensor([399], device=device)
        )
        expected = reference(q[0], k[0], spread[0], 400, 4, 20, True, None)
        assert error(out[0], expected) < 1e-3


def test_a_spoiled_token_spoils_no_neighbour(device: str) -> None:
    """A NaN in one head's cache must show in that head alone: int8 has no NaN, so its scale says it."""
    k, v = tokens(2, 2, 100, 16, FP32)
    regions = held(k, v, [60, 60], 2, 8, 90, device)
    clean = Regions(*(t.clone() if isinstance(t, Tensor) else t for t in regions))
    for bad in (float("nan"), float("inf")):
        spoiled = Regions(*(t.clone() if isinstance(t, Tensor) else t for t in clean))
        spoiled.v[0, 1, slot_of(52, 2, 8), 3] = bad
        new = torch.randn(2, 2, 16, device=device)
        for target in (spoiled, clean):
            kernels.append(target, new, new, torch.tensor([60, 60], device=device))
        assert spoiled.v_scale is not None and clean.v_scale is not None
        assert not spoiled.v_scale[0, 1, 50].isfinite()
        keep = torch.ones(2, 2, 90, dtype=torch.bool, device=device)
        keep[0, 1, 50] = False
        for mine, theirs in zip(spoiled[2:6], clean[2:6], strict=True):
            assert isinstance(mine, Tensor) and isinstance(theirs, Tensor)
            assert torch.equal(mine[keep].nan_to_num(-1), theirs[keep].nan_to_num(-1))
        q = torch.randn(2, 4, 16, device=device)
        out = kernels.decode_attention(q, spoiled, torch.tensor([60, 60], device=device))
        assert out[0, 2:].isnan().any() and out[0, :2].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize(("sink", "window", "quantised"), [(0, 1, True), (3, 5, True), (2, 7, False), (0, 40, False)])
@pytest.mark.parametrize(("head_dim", "dtype"), [(16, FP32), (96, BF16)])
def test_append(sink: int, window: int, quantised: bool, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Token by token, ragged, from strided views: the memory must be what the definition says."""
    n = sink + window + 12
    k, v = tokens(2, 2, n, head_dim, dtype)
    n_row = n - sink - window if quantised else 0
    regions = held(k, v, [0, 0], sink, window, n_row, device)
    ints_before = regions.k_int.clone() if regions.k_int is not None else None
    lag = 5  # the second sequence starts later
    for step in range(n):
        at = torch.tensor([step, max(0, step - lag)], device=device)
        qkv = torch.randn(2, 7, head_dim, dtype=dtype)
        for b in range(2):
            qkv[b, 2:4], qkv[b, 5:7] = k[b, :, int(at[b])], v[b, :, int(at[b])]
        new = qkv.to(device)
        kernels.append(regions, new[:, 2:4], new[:, 5:7], at)
    expected = held(k, v, [n, n - lag], sink, window, n_row, "cpu")
    for b, length in enumerate((n, n - lag)):
        n_left = max(0, length - sink - window) if quantised else 0
        for mine, theirs in zip(regions[:2], expected[:2], strict=True):
            assert torch.equal(mine[b].cpu().nan_to_num(7), theirs[b].nan_to_num(7))
        for mine, theirs in zip(regions[2:6], expected[2:6], strict=True):
            if isinstance(mine, Tensor):
                assert torch.equal(mine[b, :, :n_left].cpu(), theirs[b, :, :n_left])
        if ints_before is not None and regions.k_int is not None:  # and nothing beyond was touched
            assert torch.equal(regions.k_int[b, :, n_left:], ints_before[b, :, n_left:])


def test_append_rounds_as_the_reference_does(device: str) -> None:
    """Halves and near-halves: x / scale must be a true division, rounded half to even."""
    head_dim, n = 128, 64
    base = torch.arange(-127, 128).double()[torch.randint(0, 255, (n, head_dim))]
    ulps = torch.randint(-2, 3, (n, head_dim)).double() * 2.0**-22
    scale = torch.rand(n, 1).double() + 0.01
    x = ((base + 0.5) * (1 + ulps) * scale).float().clamp(-127 * scale, 127 * scale).float()
    x[:, 0] = (127 * scale[:, 0]).float()
    regions = held(x[None, None], x[None, None], [1], 0, 1, n, device)
    regions.k[0, 0, 0] = regions.v[0, 0, 0] = x[0].to(device)
    for i in range(1, n):
        kernels.append(
            regions, x[None, i : i + 1].to(device), x[None, i : i + 1].to(device), torch.tensor([i], device=device)
        )
    integers, scales = quantize(x[: n - 1])
    assert regions.k_int is not None and regions.k_scale is not None
    assert torch.equal(regions.k_int[0, 0, : n - 1].cpu(), integers)
    assert torch.equal(regions.k_scale[0, 0, : n - 1].cpu(), scales)


CHUNKS = [  # (tokens before the chunk, tokens in it) around S = 3 and W = 20
    (0, 1), (0, 3), (0, 23), (0, 24), (0, 70), (1, 5), (3, 20), (22, 1), (22, 2), (23, 1), (23, 9), (30, 40), (99, 3),
]  # fmt: skip


@pytest.mark.parametrize("n_row", [200, 0])
@pytest.mark.parametrize(("head_dim", "dtype"), [(16, FP32), (96, BF16)])
def test_store_chunk(head_dim: int, dtype: torch.dtype, n_row: int, device: str) -> None:
    """After `evict` and `store_chunk` the memory is what the definition says of the chunk's last token."""
    sink, window = 3, 20
    for start, n_token in CHUNKS:
        end = start + n_token
        k, v = tokens(2, 2, end, head_dim, dtype)
        regions = held(k, v, [start, start], sink, window, n_row, device)
        chunk = torch.cat((k, v), 1)[:, :, start:].transpose(1, 2).contiguous().to(device).transpose(1, 2)
        kernels.evict(regions, start)
        kernels.store_chunk(regions, chunk[:, :2], chunk[:, 2:], start)
        expected = held(k, v, [end, end], sink, window, n_row, "cpu")
        n_slot, n_left = min(end, sink + window), max(0, end - sink - window)
        for mine, theirs in zip(regions[:2], expected[:2], strict=True):
            assert torch.equal(mine[:, :, :n_slot].cpu(), theirs[:, :, :n_slot]), (start, n_token)
            assert mine[:, :, n_slot:].isnan().all()
        for mine, theirs in zip(regions[2:6], expected[2:6], strict=True):
            if isinstance(mine, Tensor):
                assert torch.equal(mine[:, :, :n_left].cpu(), theirs[:, :, :n_left]), (start, n_token)


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype", "sink", "window", "start", "n_token"),
    [
        (16, 2, FP32, 4, 30, 1, 5),
        (16, 2, FP32, 4, 30, 33, 7),  # the first token that nothing leaves for
        (16, 2, FP32, 4, 30, 34, 7),
        (16, 2, FP32, 0, 1, 9, 3),
        (32, 1, FP16, 3, 70, 74 + 64, 20),
        (64, 4, BF16, 4, 60, 400, 130),
        (96, 1, BF16, 2, 50, 180, 9),
        (256, 2, BF16, 4, 28, 200, 65),
    ],
)
def test_history(
    head_dim: int, group: int, dtype: torch.dtype, sink: int, window: int, start: int, n_token: int, device: str
) -> None:
    k, v = tokens(2, 2, start, head_dim, dtype)
    q = torch.randn(2, n_token, 2 * group, head_dim).to(dtype).transpose(1, 2)
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    for n_row, turn in ((start, None), (0, None), (0, frequencies)):
        regions = held(k, v, [start, start], sink, window, n_row, device)
        kernels.evict(regions, start)
        turn_on = turn.to(device) if turn is not None else None
        poison(device)
        out, lse = kernels.history_attention(q.to(device), regions, start, turn_on)
        for b in range(2):
            # what a token at `start` sees, itself apart: of start + 1 tokens, the first `start`
            last = [torch.cat((x[b], torch.zeros_like(x[b, :, :1])), 1) for x in (k, v)]
            keys, values, pos = visible(last[0], last[1], start + 1, sink, window, n_row > 0)
            keys, values, pos = keys[:, pos < start], values[:, pos < start], pos[pos < start]
            if turn is not None:
                dropped = max(0, start + 1 - sink - window)
                keys = torch.where((pos < sink)[:, None], turned(keys, dropped, turn), keys)
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            if keys.shape[1] == 0:  # nothing is left to see
                assert (out[b] == 0).all() and (lse[b] == float("-inf")).all()
                continue
            score = torch.einsum("htd,hkd->htk", q[b].double(), keys) * head_dim**-0.5
            expected = torch.einsum("htk,hkd->htd", score.softmax(-1), values)
            assert error(out[b], expected) < TOLERANCE[dtype]
            assert torch.allclose(lse[b].double().cpu(), score.logsumexp(-1), atol=2e-2 if dtype == BF16 else 2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_one_graph_serves_every_length() -> None:
    torch.manual_seed(0)
    k, v = tokens(2, 2, 900, 128, BF16)
    q = torch.randn(2, 8, 128, device="cuda").to(BF16)
    positions = torch.zeros(2, dtype=torch.int64, device="cuda")
    regions = held(k, v, [0, 0], 4, 60, 900, "cuda")
    kernels.decode_attention(q, regions, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.decode_attention(q, regions, positions)
    for lengths in ([1, 5], [64, 65], [900, 1], [300, 777]):
        for mine, new in zip(regions[:6], held(k, v, lengths, 4, 60, 900, "cuda")[:6], strict=True):
            assert isinstance(mine, Tensor) and isinstance(new, Tensor)
            mine.copy_(new)
        positions.copy_(torch.tensor(lengths) - 1)
        out.fill_(float("nan"))
        graph.replay()
        for b, n in enumerate(lengths):
            assert error(out[b], reference(q[b].cpu(), k[b], v[b], n, 4, 60, True, None)) < 1e-2


COMPILE = """
import json, sys
sys.path.insert(0, "tests")
from aot import compile_split_kernel
print(json.dumps(compile_split_kernel(**json.loads(sys.argv[1]))))
"""


@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 128, "group": 4},
        {"head_dim": 128, "group": 4, "n_row": 64},
        {"head_dim": 128, "group": 16, "n_row": 64},
        {"head_dim": 64, "group": 8, "n_row": 64},
        {"head_dim": 96, "group": 4},
        {"head_dim": 256, "group": 16},
        {"head_dim": 128, "group": 4, "has_int": False},
    ],
)
def test_compiled_for_hopper(shape: dict[str, int]) -> None:
    """No spills, no byte-wide loads, and the matrix units that were meant: Triton compiles without a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(shape)],
        cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    if found is None:
        pytest.skip("this Triton has no cuobjdump beside it")
    assert found["spills"] == 0 and found["stack"] == 0
    assert found["byte_loads"] == 0
    assert found["HMMA"] > 0 and (found["IMMA"] > 0) == shape.get("has_int", True)
    assert found["copies"] > 0, "keys and values are to be copied to shared memory asynchronously"
