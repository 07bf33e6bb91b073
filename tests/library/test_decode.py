"""The Triton kernels of a decode step against float64; and what the compiler makes of them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_reference import (
    BF16,
    DEVICES,
    FORMATS,
    FP16,
    FP32,
    HAS_GPU,
    TOLERANCE,
    compiled,
    counts,
    error,
    held,
    poison,
    reference,
    same_rows,
    settle,
    slot_of,
    tokens,
    turned,
)
from torch import Tensor

from model import Rope
from selective_kv.formats import Format, quantize
from selective_kv.kernels import pytorch as eager
from selective_kv.kernels import triton_backend as kernels  # after kernel_reference, which chooses the interpreter
from selective_kv.kernels.decode import run
from selective_kv.kernels.decode_config import MOST_PARTIAL, SHARED_SLACK, Plan, fitting, merging, plan, sharing
from selective_kv.regions import Regions


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


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


@pytest.mark.parametrize("formats", FORMATS[1:], ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((64, 2, 2), FP32), ((64, 1, 8), FP16), ((128, 2, 4), BF16), ((256, 1, 16), BF16)]
)
def test_decode_of_four_bits(
    shape: tuple[int, int, int], dtype: torch.dtype, formats: tuple[Format, Format], device: str
) -> None:
    """Outlier channels, sinks, a zero vector; lengths around the first row and blocks of rows."""
    head_dim, n_kv_head, group = shape
    lengths = [20, 37, 38, 36 + 129] if head_dim < 256 else [120]
    k, v = tokens(len(lengths), n_kv_head, max(lengths), head_dim, dtype)
    q = torch.randn(len(lengths), n_kv_head * group, head_dim).to(dtype)
    regions = held(k, v, lengths, 4, 32, max(lengths) - 36, device, formats)
    poison(device)
    out = kernels.decode_attention(q.to(device), regions, torch.tensor(lengths, device=device) - 1)
    for b, n in enumerate(lengths):
        expected = reference(q[b], k[b], v[b], n, 4, 32, True, None, formats)
        assert error(out[b], expected) < TOLERANCE[dtype], f"{n} tokens"


@pytest.mark.parametrize("twin", [kernels, eager], ids=["Triton", "PyTorch"])
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
            slots[0, b, :, slot_of(pos, sink, window)] = k[b, :, i]
            slots[1, b, :, slot_of(pos, sink, window)] = v[b, :, i]
        is_sink = torch.tensor(kept)[:, None] < sink
        keys = k[b, 0, at].double()
        keys = torch.where(is_sink, turned(keys, max(0, n - sink - window), frequencies), keys)
        expected.append((q[b].double() @ keys.T * head_dim**-0.5).softmax(-1) @ v[b, 0, at].double())
    regions = Regions(*slots.to(device), None, None, None, None, sink, window)
    positions = torch.tensor(lengths, device=device) - 1
    turn = Rope(frequencies.to(device), positions[:, None]).back_to(sink + window - 1)
    out = twin.decode_attention(q.to(device), regions, positions, turn)
    for b, n in enumerate(lengths):
        assert error(out[b], expected[b]) < TOLERANCE[FP32], f"{n} tokens"


def test_nothing_left_the_window_is_the_full_cache_bit_for_bit(device: str) -> None:
    lengths = [1, 63, 64, 200, 260]
    k, v = tokens(len(lengths), 2, 300, 32, BF16)
    q = torch.randn(len(lengths), 4, 32).to(BF16).to(device)
    positions = torch.tensor(lengths, device=device) - 1
    full = kernels.decode_attention(q, held(k, v, lengths, 0, 5000, 0, device), positions)
    unseen = torch.full((len(lengths), 32), float("nan"), device=device)
    for sink, window, n_row in ((0, 300, 0), (7, 253, 0), (4, 300, 900), (300, 1, 200)):
        regions = held(k, v, lengths, sink, window, n_row, device)
        turn = None if n_row else (unseen, unseen)
        assert torch.equal(kernels.decode_attention(q, regions, positions, turn), full)


@pytest.mark.parametrize(("splits", "warps"), [(1, 1), (2, 1), (3, 1), (40, 1), (31, 2), (31, 8)])
def test_any_number_of_programs(splits: int, warps: int, device: str) -> None:
    """One has slots and rows, or two share a border, or most have nothing. What is on its way early changes nothing."""
    lengths = [1, 60, 72, 73, 300]
    k, v = tokens(len(lengths), 2, 300, 32, FP32)
    q = torch.randn(len(lengths), 4, 32)
    positions = torch.tensor(lengths, device=device) - 1
    regions = held(k, v, lengths, 4, 68, 300, device)
    for ahead in (0, 16):
        p = plan(10, 2, 32, 4, 8)._replace(warps=warps, float_slice=16, int_slice=32, splits=splits, ahead=ahead)
        poison(device)
        out = run(q.to(device), regions, positions, None, p)
        for b, n in enumerate(lengths):
            assert error(out[b], reference(q[b], k[b], v[b], n, 4, 68, True, None)) < TOLERANCE[FP32], f"{n} tokens"


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("n_row", [8, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_hopper_takes_the_plan_that_was_measured(head_dim: int, n_row: int, four: bool) -> None:
    p = plan(n_row, 4, head_dim, 2, 132, four)
    assert fitting(p, HOPPER_SHARED, head_dim, 2, 8 if four else 16) == p


def test_a_plan_gives_way_where_its_blocks_do_not_fit_and_not_before() -> None:
    """Slots: 2 of 3 stages' blocks, of 2 warps x 32 tokens x 128 dims of K and V, in bfloat16: 64 KiB; rows: half."""
    p = Plan(4, 2, 32, 32, 3, 3, 2)
    enough = (64 << 10) + SHARED_SLACK
    assert fitting(p, enough, 128, 2, 16) == p
    assert fitting(p, enough - 2, 128, 2, 16) == p._replace(float_stages=2)
    assert fitting(p, enough // 2, 128, 2, 16) == p._replace(float_stages=2, float_slice=16, int_stages=2)
    least = fitting(p, SHARED_SLACK, 128, 2, 16)  # nothing fits: the smallest there is, for the compiler to refuse
    assert least == p._replace(float_stages=2, float_slice=16, int_stages=2, int_slice=32)


def test_a_sequence_without_a_token_gets_zeros(device: str) -> None:
    k, v = tokens(2, 1, 50, 16, FP32)
    regions = held(k, v, [0, 50], 4, 8, 60, device)
    poison(device)
    q = torch.randn(2, 2, 16)
    out = kernels.decode_attention(q.to(device), regions, torch.tensor([-1, 49], device=device))
    assert torch.equal(out[0].cpu(), torch.zeros(2, 16))
    assert error(out[1], reference(q[1], k[1], v[1], 50, 4, 8, True, None)) < TOLERANCE[FP32]


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
            settle(device)
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
        settle(device)
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
        new, at = x[None, i : i + 1].to(device), torch.tensor([i], device=device)
        settle(device)
        kernels.append(regions, new, new, at)
    integers, scales = quantize(x[: n - 1])
    assert regions.k_int is not None and regions.k_scale is not None
    assert torch.equal(regions.k_int[0, 0, : n - 1].cpu(), integers)
    assert torch.equal(regions.k_scale[0, 0, : n - 1].cpu(), scales)


@pytest.mark.parametrize("formats", FORMATS[1:], ids=str)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, FP32), (128, BF16)])
def test_append_of_four_bits(head_dim: int, dtype: torch.dtype, formats: tuple[Format, Format], device: str) -> None:
    sink, window, n = 2, 3, 12
    k, v = tokens(2, 2, n, head_dim, dtype)
    regions = held(k, v, [0, 0], sink, window, n - sink - window, device, formats)
    for step in range(n):
        new = torch.stack((k[:, :, step], v[:, :, step])).to(device)
        at = torch.full((2,), step, device=device)
        settle(device)
        kernels.append(regions, new[0], new[1], at)
    expected = held(k, v, [n, n], sink, window, n - sink - window, "cpu", formats)
    for b in range(2):
        same_rows(regions, expected, b, n - sink - window)
    assert torch.equal(regions.k.cpu(), expected.k) and torch.equal(regions.v.cpu(), expected.v)


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


HOPPER_SHARED, SMALL_SHARED = 232_448, 101_376  # bytes that a program may have: an H200's, an RTX 4090's


@pytest.mark.machine_code
@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 128, "group": 4},
        {"head_dim": 128, "group": 4, "n_row": 64},
        {"head_dim": 128, "group": 4, "n_row": 256},
        {"head_dim": 128, "group": 16, "n_row": 64},
        {"head_dim": 64, "group": 8, "n_row": 64},
        {"head_dim": 96, "group": 4},
        {"head_dim": 256, "group": 16},
        {"head_dim": 128, "group": 4, "k_bits": 0},
        {"head_dim": 128, "group": 4, "k_bits": 4, "v_bits": 4},
        {"head_dim": 128, "group": 4, "k_bits": 4, "v_bits": 4, "n_row": 64},
        {"head_dim": 128, "group": 4, "k_bits": 4, "v_bits": 4, "n_row": 256, "n_group": 2},
        {"head_dim": 128, "group": 4, "v_bits": 4, "n_row": 64},
        {"head_dim": 64, "group": 8, "k_bits": 4, "v_bits": 4, "n_row": 64},
        {"head_dim": 128, "group": 4, "dtype": "fp32", "shared": SMALL_SHARED},
        {"head_dim": 256, "group": 4, "n_row": 256, "shared": SMALL_SHARED},
        {"head_dim": 128, "group": 4, "k_bits": 0, "n_row": 64},
        {"head_dim": 128, "group": 4, "k_bits": 0, "v_bits": 0, "turn": True},
        {"head_dim": 64, "group": 8, "k_bits": 0, "v_bits": 0, "turn": True, "n_row": 256},
    ],
)
def test_compiled_for_hopper(shape: dict[str, Any]) -> None:
    """No spills, no byte-wide loads, and the matrix units that were meant: Triton compiles without a GPU.

    Angles of sinks are made once a step: a float64, or the stack that a sine keeps pi on, would be in every program.
    """
    (found,) = counts("compile_split_kernel", [shape])
    assert found["spills"] == 0 and found["stack"] == 0
    assert found["byte_loads"] == 0 and found["float64"] == 0
    assert (found["HMMA"] > 0) == (shape.get("dtype") != "fp32" or shape.get("k_bits", 8) > 0) and (
        found["IMMA"] > 0
    ) == (shape.get("k_bits", 8) > 0)
    assert found["shared"] <= shape.get("shared", HOPPER_SHARED)
    assert found["fetches"] >= (5 if found["ahead"] else 1)  # of what is read next; and of its first tokens
    assert found["copies"] > 0, "keys and values are to be copied to shared memory asynchronously"


MOST_AFTER_WAIT = {  # instructions, as (programs per sequence and KV head, head_dim, query heads per KV head, bits)
    (1, 128, 4, 16): 80, (4, 128, 4, 16): 160, (8, 128, 4, 16): 170, (16, 128, 4, 16): 160, (31, 128, 4, 16): 160,
    (33, 128, 4, 0): 180, (33, 96, 3, 16): 180, (63, 128, 4, 8): 170, (127, 256, 16, 16): 210,
}  # fmt: skip


@pytest.mark.machine_code
def test_what_merging_leaves_for_after_its_wait() -> None:
    """Loads at once, from addresses that are there, and one pass over what they bring: every layer waits for it."""
    found_by_shape = zip(MOST_AFTER_WAIT, counts("compile_combine_kernel", list(MOST_AFTER_WAIT)), strict=True)
    for shape, found in found_by_shape:
        assert found["after_wait"] <= MOST_AFTER_WAIT[shape], (shape, found)
        assert found["early_loads"] == 1, shape  # the sequence's position
        assert found["before_loads"] <= 12 and found["trigger"] > 0, (shape, found)
        assert found["local"] == found["stack"] == 0 and found["registers"] <= 64, (shape, found)


@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 96, 128, 256])
def test_what_a_warp_merges(head_dim: int) -> None:
    """All partial results, and dims that tile a head."""
    for n_partial in range(2, 257):
        block = merging(n_partial, head_dim)
        assert block["CHUNK"] >= n_partial and head_dim % block["DIMS"] == 0
        assert block["CHUNK"] * block["DIMS"] <= 1024
        assert all(n & (n - 1) == 0 for n in block.values())


@pytest.mark.parametrize("n_column", [1, 2, 3, 8, 20, 64, 100, 256, 1000])
def test_programs_fill_the_gpu_and_their_results_are_merged_at_once(n_column: int) -> None:
    """An H200 has 132 processors. Programs are at most a sixteenth fewer than would fit it, and never more."""
    for four in (False, True):
        p = plan(n_column, 4, 128, 2, 132, four)
        n = sharing(p, n_column, 132)
        fit = 132 * p.per_processor // n_column
        most = MOST_PARTIAL // p.warps - 1
        assert 1 <= n <= max(2, fit) and n >= min(most, 15 * fit / 16)
        assert merging((n + 1) * p.warps, 128)["CHUNK"] <= MOST_PARTIAL


def test_every_kernel_compiles_for_hopper() -> None:
    """The interpreter is lenient about types; the compiler is not."""
    compiled("compiles", [(8, 8, 1, False), (4, 8, 2, False), (8, 4, 2, False), (4, 4, 1, True)])
    compiled("compile_the_rest", [()])
