"""Writing to the cache: an append, a chunk, tiles that close; and what an append leaves for after its wait."""

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
    INT8,
    RARE,
    Formats,
    copied,
    counts,
    few,
    formats,
    held,
    n_left,
    same_tiles,
    settle,
    tl,
    tokens,
    triton,
)
from torch import Tensor

from selective_kv.formats import TILE, hadamard
from selective_kv.kernels import pytorch
from selective_kv.kernels import triton_backend as kernels
from selective_kv.kernels.hadamard import butterfly
from selective_kv.key_bias import key_bias
from selective_kv.regions import Regions, layer_groups


def step(twin: ModuleType, regions: Regions, k: Tensor, v: Tensor, at: Tensor) -> None:
    """A token of each sequence."""
    if regions.k_tiles is not None:
        (own,) = layer_groups([regions])
        twin.close(own, at)
    twin.append(regions, k, v, at)


EXACT = formats(8, 8, rotated=False)  # no sum is made: every bit is the reference's
TWINS = pytest.mark.parametrize("twin", [kernels, pytorch], ids=["Triton", "PyTorch"])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


def same_memory(mine: Regions, theirs: Regions, lengths: list[int]) -> None:
    """Slots that are looked at, bit for bit, and tiles."""
    for b, n in enumerate(lengths):
        for part in mine.exact_slots(n):
            for got, want in ((mine.k, theirs.k), (mine.v, theirs.v)):
                assert torch.equal(got[b, :, part].cpu(), want[b, :, part])
        same_tiles(mine, theirs, b, mine.n_left(n) // TILE if mine.k_tiles else 0)


def untouched(mine: Regions, before: Regions, b: int, n_tile: int) -> None:
    """No tile of sequence b from n_tile on has changed."""
    for got, want in zip(mine.stored(), before.stored(), strict=True):
        for a, c in zip(got.tiles, want.tiles, strict=True):
            if a is not None and c is not None:
                assert torch.equal(a[b, :, n_tile:].nan_to_num(-1), c[b, :, n_tile:].nan_to_num(-1))


@TWINS
@pytest.mark.parametrize(("sink", "window", "head_dim", "dtype"), [(0, 1, 16, FP32), (3, 5, 96, BF16)])
def test_append_to_sinks_and_a_ring(
    sink: int, window: int, head_dim: int, dtype: torch.dtype, twin: ModuleType, device: str
) -> None:
    """Token by token, ragged, from strided views, nothing quantised."""
    n = sink + window + 4
    k, v = tokens(2, 2, n, head_dim, dtype)
    regions = held(k, v, [0, 0], sink, window, 0, device)
    lag = 2  # the second sequence starts later
    for i in range(n):
        at = torch.tensor([i, max(0, i - lag)], device=device)
        qkv = torch.randn(2, 7, head_dim, dtype=dtype)
        for b in range(2):
            qkv[b, 2:4], qkv[b, 5:7] = k[b, :, int(at[b])], v[b, :, int(at[b])]
        new = qkv.to(device)
        settle(device)
        step(twin, regions, new[:, 2:4], new[:, 5:7], at)
    same_memory(regions, held(k, v, [n, n - lag], sink, window, 0, "cpu"), [n, n - lag])


@TWINS
@pytest.mark.parametrize("form", [*FORMATS, *FEW_BITS, *RARE], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "dtype", "sink", "window"),
    few([(32, FP32, 2, 9), (64, BF16, 0, 1), (128, BF16, 0, 1), (24, FP16, 3, 130)], 0),
)
def test_append_closes_a_tile_of_each_sequence_in_its_own_step(
    head_dim: int, dtype: torch.dtype, sink: int, window: int, form: Formats, twin: ModuleType, device: str
) -> None:
    """Before, in and after the step whose token pushes the last token of a tile out of the window."""
    full = sink + window + TILE
    lengths = [full - 3, full + TILE - 2]
    k, v = tokens(2, 1, full + TILE + 2, head_dim, dtype)
    regions = held(k, v, lengths, sink, window, 3, device, form)
    before = copied(regions)
    for i in range(4):
        at = torch.tensor(lengths, device=device) + i
        new_k, new_v = (torch.stack([x[b, :, n + i] for b, n in enumerate(lengths)]).to(device) for x in (k, v))
        settle(device)
        step(twin, regions, new_k, new_v, at)
        now = [n + i + 1 for n in lengths]
        for b, n in enumerate(now):
            untouched(regions, before, b, n_left(n, sink, window) // TILE)
    same_memory(regions, held(k, v, now, sink, window, 3, "cpu", form), now)


@TWINS
def test_integers_are_the_references_at_halves(twin: ModuleType, device: str) -> None:
    """(x - base) / scale must be a true division, rounded half to even, of float32 keys and values."""
    head_dim = 32
    u = torch.randint(0, 255, (TILE, head_dim)).double() + 0.5
    x = (u * (1 + torch.randint(-2, 3, u.shape).double() * 2.0**-22) * (torch.rand(head_dim).double() + 0.1)).float()
    x[0], x[1] = 0, x.amax(0) + 1
    k = torch.cat((x, torch.randn(1, head_dim)))[None, None]
    regions = held(k, k, [TILE], 0, 1, 1, device, EXACT)
    last = k[:, :, TILE].to(device)
    settle(device)
    step(twin, regions, last, last, torch.tensor([TILE], device=device))
    same_tiles(regions, held(k, k, [TILE + 1], 0, 1, 1, "cpu", EXACT), 0, 1)


@TWINS
@pytest.mark.parametrize("bad", few([float("nan"), float("inf")], 0))
@pytest.mark.parametrize("form", few([formats(4, 4), EXACT], 0), ids=str)
def test_a_spoiled_token_spoils_one_head(form: Formats, bad: float, twin: ModuleType, device: str) -> None:
    """A NaN in one head's cache must show in that head alone: integers have no NaN, so scales say it."""
    sink, window, n = 2, 8, 10 + TILE - 1
    k, v = tokens(2, 2, n + 1, 64, FP32)
    regions = held(k, v, [n, n], sink, window, 1, device, form)
    for which in "kv":
        spoiled, clean = copied(regions), copied(regions)
        (spoiled.k if which == "k" else spoiled.v)[0, 1, sink + 5, 3] = bad
        at = torch.tensor([n, n], device=device)
        for target in (spoiled, clean):
            settle(device)
            step(twin, target, k[:, :, n].to(device), v[:, :, n].to(device), at)
        q = torch.randn(2, 4, 64, device=device)
        out, want = (twin.decode_attention(q, r, at) for r in (spoiled, clean))
        assert out[0, 2:].isnan().any() and torch.equal(out[0, :2], want[0, :2]) and torch.equal(out[1], want[1])
        for mine, theirs in zip(spoiled.stored(), clean.stored(), strict=True):
            for a, c in zip(mine.tiles, theirs.tiles, strict=True):
                assert a is c is None or (torch.equal(a[0, 0], c[0, 0]) and torch.equal(a[1], c[1]))  # type: ignore[index]


CHUNKS = few([  # (start, tokens): with 3 sinks and a window of 20, a tile closes at 151, 279 and 407 tokens
    (0, 2), (0, 3), (0, 23), (0, 150), (0, 151), (0, 152), (0, 407), (2, 400), (100, 50), (100, 51), (149, 2), (150, 1),
    (150, 3), (151, 127), (151, 128), (160, 250), (278, 2), (300, 9),
], 0, 3, 4, 7, 9, 11, 14)  # fmt: skip


@TWINS
@pytest.mark.parametrize("n_tile", [4, 0])
def test_store_chunk(n_tile: int, twin: ModuleType, device: str) -> None:
    """After `evict` and `store_chunk` the memory is what the definition says of the chunk's last token."""
    sink, window = 3, 20
    for start, n_token in CHUNKS:
        end = start + n_token
        k, v = tokens(1, 2, end, 16, FP32)
        regions = held(k, v, [start], sink, window, n_tile, device, EXACT)
        before = copied(regions)
        chunk = torch.cat((k, v), 1)[:, :, start:].transpose(1, 2).contiguous().to(device).transpose(1, 2)
        twin.evict(regions, start)
        twin.store_chunk(regions, chunk[:, :2], chunk[:, 2:], start)
        same_memory(regions, held(k, v, [end], sink, window, n_tile, "cpu", EXACT), [end])
        if n_tile:
            untouched(regions, before, 0, n_left(end, sink, window) // TILE)


@TWINS
@pytest.mark.parametrize("form", [*FORMATS, *FEW_BITS, *RARE], ids=str)
@pytest.mark.parametrize(("head_dim", "dtype"), few([(32, FP16), (96, BF16), (128, BF16)], 0))
def test_a_chunk_in_every_format(
    head_dim: int, dtype: torch.dtype, form: Formats, twin: ModuleType, device: str
) -> None:
    """Tiles from slots alone, from both, and from the chunk alone."""
    sink, window, start, end = 3, 5, 100, 280
    k, v = tokens(1, 1, end, head_dim, dtype)
    regions = held(k, v, [start], sink, window, 2, device, form)
    twin.evict(regions, start)
    twin.store_chunk(regions, k[:, :, start:].to(device), v[:, :, start:].to(device), start)
    same_memory(regions, held(k, v, [end], sink, window, 2, "cpu", form), [end])


@triton.jit
def rotation_kernel(x, whole, SIZE: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """x: [N, SIZE], its columns turned as one vector."""
    d = tl.arange(0, SIZE)[:, None] + tl.arange(0, N)[None, :] * SIZE
    tl.store(whole + d, butterfly(tl.load(x + d).to(tl.float32), SIZE, N))


@pytest.mark.parametrize(("head_dim", "n"), [(64, 1), (128, 4), (256, 16)])
def test_the_butterfly_is_the_matrix(head_dim: int, n: int, device: str) -> None:
    x = torch.randn(n, head_dim)
    x[:, 1] *= 100  # an outlier
    want = x.double() @ hadamard(head_dim, torch.device("cpu")).double()
    out = torch.empty(n, head_dim, device=device)
    for n_warp in (1, 2, 4) if HAS_GPU else (1,):
        rotation_kernel[(1,)](x.to(device), out, SIZE=head_dim, N=n, num_warps=n_warp)
        assert (out.double().cpu() - want).abs().max() < 1e-6 * want.abs().max()


def test_one_number_in_a_vector_shows_a_column_of_the_matrix(device: str) -> None:
    """Exactly: a matrix of 1 and -1 needs no rounding."""
    eye = torch.eye(64).to(device)
    out: Tensor = torch.empty(64, 64, device=device)
    rotation_kernel[(1,)](eye, out, SIZE=64, N=64)
    assert torch.equal(out.cpu(), hadamard(64, torch.device("cpu")))


@pytest.mark.parametrize("form", few([formats(4, 4), formats(8, 3), INT8], 0), ids=str)
def test_all_layers_close_in_one_launch_what_each_would(form: Formats, device: str) -> None:
    """Of three layers, of the second and third sequence: the first to close none, the second one, one too early."""
    sink, window, n_tile = 2, 9, 3
    full = sink + window + TILE - 1
    layers = []
    for _ in range(3):
        k, v = tokens(4, 2, full + TILE + 1, 32, BF16)
        layers.append(held(k, v, [full, full, full + TILE, full + 1], sink, window, n_tile, device, form))
    (all_,) = layer_groups(layers)
    before = [copied(layer) for layer in layers]
    kernels.close(all_.sequences(1, 3), torch.tensor([full - 1, full + TILE, full + 1], device=device))
    for layer, old in zip(layers, before, strict=True):
        want = copied(old)
        (one,) = layer_groups([want.sequences(2, 1)])
        pytorch.close(one, torch.tensor([full + TILE], device=device))
        for b in (0, 1, 3):
            untouched(layer, old, b, 0)
        untouched(layer, old, 2, 2)
        same_tiles(layer, want, 2, 2)


def test_layers_that_differ_are_not_seen_as_one() -> None:
    """In a format, or in whether a key bias is kept apart; what has no tiles has no place in a launch."""
    k, v = tokens(1, 1, 300, 32, FP32)
    a, b, c = (held(k, v, [200], 2, 9, 2, "cpu", form) for form in (INT8, formats(4, 4), INT8))
    biased = a._replace(key_bias=key_bias(100 * torch.ones(1, 32), torch.logspace(0, -4, 16), 2, 2))
    parts = layer_groups([a, b, biased, c])
    assert [len(part.layers) for part in parts] == [2, 1, 1]
    assert parts[0].layers[1] is c and parts[0].offsets[1].any() and not parts[0].offsets[0].any()


def test_what_an_append_leaves_for_after_its_wait() -> None:
    """A load and a store, and few registers: splits become resident beside it."""
    for found in counts("compile_append_kernel", [[128], [64], [96], [128, True]]):
        assert found["after_wait"] <= 40 and found["instructions"] <= 200 and found["registers"] <= 40, found


def test_quantising_a_chunk_is_a_dozen_instructions_an_element() -> None:
    """64 elements a thread, of keys or of values; the matrix units rotate, and two programs fit an SM."""
    for found in counts("compile_close_kernel", [[128, 4, 4], [128, 8, 8], [128, 3, 3], [64, 4, 4]]):
        assert found["instructions"] <= 5000 and found["products"] >= 4 and found["local"] <= 100, found
        assert found["registers"] <= 128 and found["shared"] <= 100 << 10, found
