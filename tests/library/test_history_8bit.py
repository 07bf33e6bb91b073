"""A chunk's attention over tiles in 8 bits: near what it is in float64, beside what the tiles themselves lose."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_reference import BF16, DEVICES, FP16, HAS_GPU, Formats, counts, error, formats, held, poison, tokens
from torch import Tensor

from selective_kv.formats import TILE
from selective_kv.kernels import history, history_8bit
from selective_kv.kernels import triton_backend as kernels  # after kernel_reference, which chooses the interpreter
from selective_kv.regions import Regions


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    if HAS_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 products are for Hopper and later here")
    return request.param


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """In float64: the output [batch, n_head, token, D] and the log-sum-exp."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().cpu().repeat_interleave(group, 1) for x in (k, v))
    score = q.double().cpu() @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    return score.softmax(-1) @ v, score.logsumexp(-1)


def made(head_dim: int, dtype: torch.dtype, form: Formats, device: str) -> tuple[Regions, Tensor, Tensor, Tensor]:
    """A cache of 4 tiles, a chunk's queries, and the keys and values that were stored. Values share a direction, as a
    model's do: of ones with mean 0 a softmax over hundreds of tokens leaves noise alone."""
    n = 2 + 4 * TILE + 40
    k, v = tokens(2, 2, n, head_dim, dtype)
    v[:] += torch.randn(head_dim)
    regions = held(k, v, [n, n], 2, 40, 5, device, form)
    kernels.evict(regions, n)
    q = (2 * torch.randn(2, 70, 4, head_dim)).to(dtype).transpose(1, 2)
    return regions, q, k[:, :, 2 : 2 + 4 * TILE], v[:, :, 2 : 2 + 4 * TILE]


@pytest.mark.parametrize("form", [formats(4, 4), formats(3, 3), formats(4, 2)], ids=str)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, FP16), (128, BF16)])
def test_it_adds_less_than_the_tiles_lose(head_dim: int, dtype: torch.dtype, form: Formats, device: str) -> None:
    if not HAS_GPU and (form != formats(3, 3) if head_dim == 64 else form != formats(4, 4)):
        pytest.skip("enough for the interpreter")
    regions, q, k, v = made(head_dim, dtype, form, device)
    keys, values = (part.format.dequantize(part.tiles.part(slice(0, 4))).flatten(2, 3) for part in regions.stored())
    want, want_lse = attention(q, keys, values)
    poison(device)
    assert regions.rotation is not None
    queries = history_8bit.quantize_queries(q.to(device), regions.rotation)
    for first, end in ((0, 4), (1, 3)):
        some = slice(first * TILE, end * TILE)
        out, lse = history_8bit.attend_8bit(queries, regions, first, end)
        want, want_lse = attention(q, keys[:, :, some], values[:, :, some])
        lost = error(want, attention(q, k[:, :, some], v[:, :, some])[0])
        assert error(out, want) < min(0.03, lost / 2), lost
        assert torch.allclose(lse.double().cpu(), want_lse, atol=0.3)  # scores are up to 20


def test_the_whole_history(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks and window as they are, the tiles in blocks, the chunk itself: and it is this path that is taken."""
    monkeypatch.setattr(history_8bit, "LEAST_TOKENS", 64)
    monkeypatch.setattr(history, "LARGEST_BLOCK", 3 * TILE)
    if not HAS_GPU:
        monkeypatch.setattr(history, "takes_8bit", lambda q, regions: True)
    regions, q, _, _ = made(64, BF16, formats(4, 4), device)
    n = 2 + 4 * TILE + 40
    slots = [*range(2), *(2 + (p - 2) % regions.ring_size for p in range(n - 40, n))]
    own_k, own_v = tokens(2, 4, 5, 64, BF16)
    stored = [part.format.dequantize(part.tiles.part(slice(0, 4))).flatten(2, 3).cpu() for part in regions.stored()]
    keys, values = (
        torch.cat((tiles, part.slots[:, :, slots].cpu()), 2)
        for tiles, part in zip(stored, regions.stored(), strict=True)
    )
    keys = torch.cat((keys.repeat_interleave(2, 1), own_k), 2)
    values = torch.cat((values.repeat_interleave(2, 1), own_v), 2)
    own = tuple(x.to(device, kind) for x, kind in zip(attention(q, own_k, own_v), (BF16, torch.float32), strict=True))
    assert history.takes_8bit(q.to(device), regions)
    poison(device)
    out = kernels.history_attention(q.to(device), regions, n, own)  # type: ignore[arg-type]
    assert error(out, attention(q, keys, values)[0]) < 0.03


def test_what_is_no_number_stays_none(device: str) -> None:
    """int8 has no NaN: a key or a query that is none must not become a number."""
    regions, q, _, _ = made(64, FP16, formats(4, 4), device)
    q[0, 1, 3, 5] = math.nan
    assert regions.k_tiles is not None and regions.k_tiles.factors is not None and regions.rotation is not None
    regions.k_tiles.factors[1, 1, 2, 5, 0] = math.nan  # of one key
    out, _ = history_8bit.attend_8bit(history_8bit.quantize_queries(q.to(device), regions.rotation), regions, 0, 4)
    bad = out.isnan().any(-1)
    assert bad[0, 1, 3] and bad[0].sum() == 1
    assert bad[1, 2:].all() and not bad[1, :2].any()


@pytest.mark.parametrize("form", [formats(8, 8), formats(8, 4, False), formats(4, 4, False), formats(8, 4)], ids=str)
def test_other_formats_are_attended_to_in_16_bits(form: Formats, device: str) -> None:
    regions, q, _, _ = made(64, BF16, form, device)
    assert not history_8bit.takes_8bit(q.to(device), regions)


@pytest.mark.machine_code
def test_the_loop_is_8_bit_products_without_spills() -> None:
    for found in counts("compile_attend_kernel", [[128], [64]]):
        assert found["int8"] and found["float8"] and found["HMMA"] == 0
        assert found["stack"] == 0 and found["spills"] == 0 and found["byte_loads"] == 0
