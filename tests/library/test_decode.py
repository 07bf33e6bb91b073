"""The kernels of a decode step against float64. How they are launched and compiled: test_decode_plans.py."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from kernel_reference import (
    BF16,
    DEVICES,
    FEW_BITS,
    FORMATS,
    FP16,
    FP32,
    HAS_GPU,
    RARE,
    TOLERANCE,
    Formats,
    apply_rope,
    error,
    few,
    formats,
    held,
    poison,
    reference,
    tokens,
)
from torch import Tensor

from model import Rope
from selective_kv.kernels import pytorch
from selective_kv.kernels import triton_backend as kernels  # after kernel_reference, which chooses the interpreter
from selective_kv.kernels.decode import run
from selective_kv.kernels.decode_config import plan, rounds_later
from selective_kv.regions import Regions


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


SMALL = (16, 2 if HAS_GPU else 1, 2)  # head_dim, n_kv_head, group
BOUNDARIES = few([1, 5, 163, 164, 3, 4, 36, 165], 0, 1, 2, 3)  # around S = 4, S + W = 36 and the first tile
TILES = few([36 + n for n in (255, 256, 257, 3 * 128)], 0, 1)


@pytest.mark.parametrize(
    ("shape", "sink", "window", "dtype", "lengths"),
    few(
        [
            (SMALL, 4, 32, FP32, BOUNDARIES),
            (SMALL, 4, 32, BF16, TILES),
            (SMALL, 0, 1, FP32, [1, 2, 128, 129, 130, 260]),
            (SMALL, 0, 300, BF16, [63, 64, 65, 300, 427, 428]),  # slots around a block of 64
            ((8, 1, 1), 3, 5, FP32, [2, 9, 140]),
            ((32, 1, 3), 1, 70, FP16, [60, 72, 210]),
            ((64, 2, 7), 4, 60, BF16, [64, 200]),
            ((96, 1, 4), 2, 30, BF16, [31, 170]),
            ((128, 1, 4), 4, 124, BF16, [1, 128, 256, 700]),
            ((128, 1, 16), 4, 28, BF16, [30, 300]),
            ((256, 1, 8), 0, 40, BF16, [40, 200]),
            ((256, 1, 16), 5, 40, FP16, [45, 175]),
        ],
        0,
        1,
        3,
        7,
        9,
    ),
)
def test_decode(
    shape: tuple[int, int, int], sink: int, window: int, dtype: torch.dtype, lengths: list[int], device: str
) -> None:
    head_dim, n_kv_head, group = shape
    k, v = tokens(len(lengths), n_kv_head, max(lengths), head_dim, dtype)
    q = torch.randn(len(lengths), n_kv_head * group, head_dim).to(dtype)
    positions = torch.tensor(lengths, device=device) - 1
    for n_tile in (4, 0) if HAS_GPU or head_dim == 16 else (4,):
        regions = held(k, v, lengths, sink, window, n_tile, device)
        poison(device)
        out = kernels.decode_attention(q.to(device), regions, positions)
        for b, n in enumerate(lengths):
            expected = reference(q[b], k[b], v[b], n, sink, window, n_tile > 0, None)
            assert error(out[b], expected) < TOLERANCE[dtype], f"{n} tokens, {n_tile} tiles"


@pytest.mark.parametrize("form", [*FORMATS, *RARE, *FEW_BITS], ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    few(
        [
            ((64, 1, 2), FP32),
            ((80, 1, 4), BF16),
            ((64, 2, 7), FP16),
            ((128, 1, 4), BF16),
            ((256, 1, 16), BF16),
            ((32, 1, 1), FP32),
        ],
        0,
    ),
)
def test_every_format(shape: tuple[int, int, int], dtype: torch.dtype, form: Formats, device: str) -> None:
    """Outlier channels, sinks, a zero vector; lengths around the first tiles."""
    head_dim, n_kv_head, group = shape
    lengths = [163, 164, 165, 36 + 300] if HAS_GPU else [330]
    k, v = tokens(len(lengths), n_kv_head, max(lengths), head_dim, dtype)
    q = torch.randn(len(lengths), n_kv_head * group, head_dim).to(dtype)
    regions = held(k, v, lengths, 4, 32, 3, device, form)
    poison(device)
    out = kernels.decode_attention(q.to(device), regions, torch.tensor(lengths, device=device) - 1)
    for b, n in enumerate(lengths):
        expected = reference(q[b], k[b], v[b], n, 4, 32, True, None, form)
        assert error(out[b], expected) < max(TOLERANCE[dtype], 2e-3), f"{n} tokens"  # weights are float16


@pytest.mark.parametrize("twin", [kernels, pytorch], ids=["Triton", "PyTorch"])
@pytest.mark.parametrize(("shape", "window"), few([((32, 2, 3), 32), ((256, 1, 16), 20), ((64, 1, 4), 400)], 0, 1))
def test_a_token_that_is_not_in_its_slot_yet(
    shape: tuple[int, int, int], window: int, twin: ModuleType, device: str
) -> None:
    """It gets there, and is seen as if it had been, bit for bit: first tokens, sinks, a ring begun anew, tiles."""
    head_dim, n_kv_head, group = shape
    lengths = few([1, 4, 5, 163, 164, 165, 290, 36, 37], 1, 4, 6)
    k, v = tokens(len(lengths), n_kv_head, max(lengths), head_dim, BF16)
    packed = torch.randn(len(lengths), n_kv_head * (group + 2), head_dim).to(BF16).to(device)
    q, *new = packed.split([n_kv_head * group, n_kv_head, n_kv_head], 1)
    at = torch.tensor(lengths, device=device) - 1
    for b, n in enumerate(lengths):
        k[b, :, n - 1], v[b, :, n - 1] = new[0][b].cpu(), new[1][b].cpu()
    for n_tile in (3, 0):
        there, not_yet = (held(k, v, lengths, 4, window, n_tile, device) for _ in range(2))
        for b, n in enumerate(lengths):
            not_yet.k[b, :, not_yet.slot(n - 1)] = not_yet.v[b, :, not_yet.slot(n - 1)] = float("nan")
        want = twin.decode_attention(q, there, at)
        assert torch.equal(twin.decode_attention(q, not_yet, at, None, None, tuple(new)), want)
        assert all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in ((there.k, not_yet.k), (there.v, not_yet.v))
        )


@pytest.mark.parametrize("twin", [kernels, pytorch], ids=["Triton", "PyTorch"])
@pytest.mark.parametrize("head_dim", [32, 24])
def test_sinks_at_their_distance_within_the_cache(head_dim: int, twin: ModuleType, device: str) -> None:
    """A ragged batch, from the model's own angles: nothing dropped, one token, and a million."""
    sink, window = 6, 34
    lengths = [3, 40, 41, 1_000_040]
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    k, v = tokens(len(lengths), 1, 200, head_dim, FP32)  # the tokens that are gone need not exist
    q = torch.randn(len(lengths), 2, head_dim)
    slots = torch.full((2, len(lengths), 1, sink + window, head_dim), float("nan"))
    expected = []
    for b, n in enumerate(lengths):
        kept = [*range(min(sink, n)), *range(max(sink, n - window), n)]
        at = [pos if pos < sink else pos - max(0, n - 200) for pos in kept]
        for pos, i in zip(kept, at, strict=True):
            slots[0, b, :, pos if pos < sink else sink + (pos - sink) % window] = k[b, :, i]
            slots[1, b, :, pos if pos < sink else sink + (pos - sink) % window] = v[b, :, i]
        is_sink = torch.tensor(kept)[:, None] < sink
        keys = k[b, 0, at].double()
        keys = torch.where(is_sink, apply_rope(keys, max(0, n - sink - window), frequencies), keys)
        expected.append((q[b].double() @ keys.T * head_dim**-0.5).softmax(-1) @ v[b, 0, at].double())
    regions = Regions(*slots.to(device), sink, window)
    positions = torch.tensor(lengths, device=device) - 1
    turn = Rope(frequencies.to(device), positions[:, None]).back_to(sink + window - 1)
    out = twin.decode_attention(q.to(device), regions, positions, turn)
    for b, n in enumerate(lengths):
        assert error(out[b], expected[b]) < TOLERANCE[FP32], f"{n} tokens"


def test_nothing_left_the_window_is_the_full_cache_bit_for_bit(device: str) -> None:
    lengths = few([1, 260, 63, 64, 200], 0, 1)
    n_kv_head = 2 if HAS_GPU else 1
    k, v = tokens(len(lengths), n_kv_head, 300, 32, BF16)
    q = torch.randn(len(lengths), 2 * n_kv_head, 32).to(BF16).to(device)
    positions = torch.tensor(lengths, device=device) - 1
    full = kernels.decode_attention(q, held(k, v, lengths, 0, 5000, 0, device), positions)
    unseen = torch.full((len(lengths), 32), float("nan"), device=device)
    for sink, window, n_tile in few([(7, 253, 0), (4, 129, 2), (0, 300, 0), (4, 300, 7), (300, 1, 2)], 0, 1):
        regions = held(k, v, lengths, sink, window, n_tile, device)
        turn = None if n_tile else (unseen, unseen)
        assert torch.equal(kernels.decode_attention(q, regions, positions, turn), full)


@pytest.mark.parametrize(("splits", "warps"), few([(67, 1), (3, 1), (1, 1), (2, 1), (40, 1), (34, 2), (31, 4)], 0, 1))
def test_any_number_of_programs(splits: int, warps: int, device: str) -> None:
    """One has slots and tiles, or two share a border, or most have nothing; prefetching changes nothing."""
    lengths = few([200, 480, 1, 60, 201], 0, 1)
    n_kv_head = 2 if HAS_GPU else 1
    k, v = tokens(len(lengths), n_kv_head, 480, 32, FP32)
    q = torch.randn(len(lengths), 2 * n_kv_head, 32)
    positions = torch.tensor(lengths, device=device) - 1
    regions = held(k, v, lengths, 4, 68, 3, device)
    for ahead in (0, 16):
        p = plan(10, 2, 32, 4, 8)._replace(warps=warps, float_slice=16, int_slice=32, splits=splits, ahead=ahead)
        poison(device)
        out = run(q.to(device), regions, positions, None, p)
        for b, n in enumerate(lengths):
            assert error(out[b], reference(q[b], k[b], v[b], n, 4, 68, True, None)) < TOLERANCE[FP32], f"{n} tokens"


def test_a_sequence_without_a_token_gets_zeros(device: str) -> None:
    k, v = tokens(2, 1, 50, 16, FP32)
    regions = held(k, v, [0, 50], 4, 8, 2, device)
    poison(device)
    q = torch.randn(2, 2, 16)
    out = kernels.decode_attention(q.to(device), regions, torch.tensor([-1, 49], device=device))
    assert torch.equal(out[0].cpu(), torch.zeros(2, 16))
    assert error(out[1], reference(q[1], k[1], v[1], 50, 4, 8, True, None)) < TOLERANCE[FP32]


def test_strided_queries_and_a_slice_of_the_batch(device: str) -> None:
    lengths = [50, 190, 330]
    k, v = tokens(3, 2, 330, 16, FP32)
    packed = torch.randn(3, 9, 1, 16)
    q = packed[:, 2:6, 0]
    regions = held(k, v, lengths, 4, 40, 2, device).sequences(1, 2)
    positions = torch.tensor(lengths[1:], device=device) - 1
    out = kernels.decode_attention(packed.to(device)[1:, 2:6, 0], regions, positions)
    for b, n in enumerate(lengths[1:]):
        assert error(out[b], reference(q[1 + b], k[1 + b], v[1 + b], n, 4, 40, True, None)) < TOLERANCE[FP32]


def test_tiny_and_huge_values_and_scales(device: str) -> None:
    """Probability times V's scale is a float16: it must neither overflow nor vanish."""
    k, v = tokens(1, 1, 400, 32, FP32)
    q = torch.randn(1, 1, 32)
    for size in (1e-6, 1.0, 1e6):
        spread = v * size
        spread[..., 100:, :] *= 1e3
        out = kernels.decode_attention(
            q.to(device), held(k, spread, [400], 4, 20, 2, device), torch.tensor([399], device=device)
        )
        expected = reference(q[0], k[0], spread[0], 400, 4, 20, True, None)
        assert error(out[0], expected) < 1e-3


@pytest.mark.parametrize("size", few([7e4, 1e-12, 1e12], 0, 1))
@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[1]], ids=str)
@pytest.mark.parametrize("twin", [kernels, pytorch], ids=["Triton", "PyTorch"])
def test_keys_and_values_beyond_float16(twin: ModuleType, form: Formats, size: float, device: str) -> None:
    """Scales and bases past 65,504 were infinities once; keys of 7e4 were 31% wrong in silence."""
    k, v = tokens(1, 1, 300, 64, FP32)
    q = torch.randn(1, 2, 64) / size
    regions = held(k * size, v * size, [300], 4, 20, 2, device, form)
    out = twin.decode_attention(q.to(device), regions, torch.tensor([299], device=device))
    expected = reference(q[0], (k * size)[0], (v * size)[0], 300, 4, 20, True, None, form)
    assert error(out[0], expected) < TOLERANCE[FP32]


@pytest.mark.parametrize("n_tile", [2, 0])
@pytest.mark.parametrize("twin", [kernels, pytorch], ids=["Triton", "PyTorch"])
def test_scores_beyond_float16(twin: ModuleType, n_tile: int, device: str) -> None:
    """q·k past 65,504 must not be made in 16 bits before it is scaled: NaN, once, in `compress_kv`."""
    k, v = tokens(1, 1, 300, 64, FP16)
    q, k = torch.full((1, 2, 64), 100.0).to(FP16), k.abs() + 20
    turn = None if n_tile else (torch.ones(1, 64, device=device), torch.zeros(1, 64, device=device))
    regions = held(k, v, [300], 4, 20, n_tile, device)
    out = twin.decode_attention(q.to(device), regions, torch.tensor([299], device=device), turn)
    assert error(out[0], reference(q[0], k[0], v[0], 300, 4, 20, n_tile > 0, None)) < 5e-2


def flat(regions: Regions) -> list[Tensor]:
    """All of its memory."""
    tiles = [t for part in regions.stored() for t in part.tiles if t is not None]
    return [regions.k, regions.v, *tiles]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_one_graph_serves_every_length() -> None:
    torch.manual_seed(0)
    k, v = tokens(2, 2, 900, 128, BF16)
    q = torch.randn(2, 8, 128, device="cuda").to(BF16)
    positions = torch.zeros(2, dtype=torch.int64, device="cuda")
    regions = held(k, v, [0, 0], 4, 60, 6, "cuda")
    kernels.decode_attention(q, regions, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.decode_attention(q, regions, positions)
    for lengths in ([1, 5], [64, 65], [900, 1], [300, 777]):
        now = held(k, v, lengths, 4, 60, 6, "cuda")
        for mine, new in zip(flat(regions), flat(now), strict=True):
            mine.copy_(new)
        positions.copy_(torch.tensor(lengths) - 1)
        out.fill_(float("nan"))
        graph.replay()
        for b, n in enumerate(lengths):
            assert error(out[b], reference(q[b].cpu(), k[b], v[b], n, 4, 60, True, None)) < 1e-2


def test_blocks_of_half_a_tile_where_programs_have_few(device: str) -> None:
    """Up to 384 tokens in tiles a program, and beyond; what is made of the border between slots and tiles."""
    lengths = [36 + 384, 36 + 512 + 5]
    form = formats(3, 3)
    k, v = tokens(2, 1, max(lengths), 64, BF16)
    q = torch.randn(2, 4, 64).to(BF16)
    regions = held(k, v, lengths, 4, 32, 4, device, form)
    p = plan(2, 4, 64, 2, 132, 3, 3)._replace(halves=True, splits=1)
    assert p.int_slice == 128
    poison(device)
    out = run(q.to(device), regions, torch.tensor(lengths, device=device) - 1, None, p)
    for b, n in enumerate(lengths):
        assert error(out[b], reference(q[b], k[b], v[b], n, 4, 32, True, None, form)) < TOLERANCE[BF16], f"{n} tokens"


def test_three_bits_by_programs_of_several_warps_rotate_values_back_themselves(device: str) -> None:
    """As batches do (`rounds_later`); the program at the border has slots and tiles."""
    lengths, form = [36 + 256, 36 + 384 + 5, 20], formats(3, 3)
    k, v = tokens(3, 1, max(lengths), 64, BF16)
    q = torch.randn(3, 4, 64).to(BF16)
    regions = held(k, v, lengths, 4, 32, 3, device, form)
    p = plan(2, 4, 64, 2, 132, 3, 3)._replace(warps=2, int_slice=64, splits=2)
    assert rounds_later(p, 3, 3, 64, 64) == 1 < rounds_later(p._replace(warps=1), 3, 3, 64, 64)
    poison(device)
    out = run(q.to(device), regions, torch.tensor(lengths, device=device) - 1, None, p)
    for b, n in enumerate(lengths):
        assert error(out[b], reference(q[b], k[b], v[b], n, 4, 32, True, None, form)) < TOLERANCE[BF16], f"{n} tokens"


def test_three_bits_need_whole_words(device: str) -> None:
    k, v = tokens(1, 1, 200, 6, FP32)
    regions = held(k, v, [200], 4, 32, 1, device, formats(4, 3))
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        kernels.decode_attention(torch.zeros(1, 1, 6, device=device), regions, torch.tensor([199], device=device))
