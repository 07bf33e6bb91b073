"""A chunk's attention over what was held before it, and tiles made dense: against float64 and by both twins."""

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
    INT8,
    RARE,
    TOLERANCE,
    Formats,
    apply_rope,
    error,
    few,
    held,
    n_left,
    poison,
    tokens,
    visible,
)

from model import Rope
from selective_kv.kernels import pytorch
from selective_kv.kernels import triton_backend as kernels  # after kernel_reference, which chooses the interpreter
from selective_kv.kernels.dense import dense_history


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("form", [*FORMATS, *FEW_BITS, *RARE], ids=str)
@pytest.mark.parametrize(("head_dim", "dtype"), few([(24, FP16), (64, FP32), (128, BF16)], 0))
def test_held_tokens_made_dense(head_dim: int, dtype: torch.dtype, form: Formats, device: str) -> None:
    """Tiles, then sinks, then the ring from its oldest token on: all in one block, and cut into several."""
    start, sink, window = 500, 3, 5
    k, v = tokens(2, 1, start, head_dim, dtype)
    regions = held(k, v, [start, start], sink, window, 4, device, form)
    kernels.evict(regions, start)
    n_left = regions.n_left(start + 1)
    exact = [*range(sink), *range(sink + n_left, start)]
    want = []
    for given, part in zip((k, v), regions.stored(), strict=True):
        stored = part.format.stored(part.tiles.part(slice(0, n_left // 128))).flatten(2, 3)
        want.append(torch.cat((stored, part.format.rotate(given[:, :, exact]).to(device)), 2))
    for first, end in ((0, start), (128, 256), (256, start), (n_left + 2, start - 1)):
        poison(device)
        for got, all_of_it in zip(dense_history(regions, start, first, end), want, strict=True):
            slack = {FP32: 1e-4, FP16: 1e-3, BF16: 1e-2}[dtype]
            assert torch.allclose(got.float(), all_of_it[:, :, first:end].float(), rtol=slack, atol=8 * slack)


@pytest.mark.parametrize("twin", [kernels, pytorch], ids=["Triton", "PyTorch"])
@pytest.mark.parametrize("form", [*FORMATS, *FEW_BITS, *RARE], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "group", "dtype", "sink", "window", "start", "n_token"),
    few(
        [
            (16, 2, FP32, 4, 30, 1, 5),
            (16, 2, FP32, 4, 30, 160, 7),  # the last token that closes no tile
            (16, 2, FP32, 4, 30, 161, 7),
            (16, 2, FP32, 0, 1, 128, 3),
            (32, 1, FP16, 3, 70, 74 + 128, 20),
            (64, 4, BF16, 4, 60, 400, 130),
            (96, 1, BF16, 2, 50, 180, 9),
            (256, 2, BF16, 4, 28, 300, 65),
        ],
        0,
        1,
        2,
        3,
        6,
    ),
)
def test_history(
    head_dim: int, group: int, dtype: torch.dtype, sink: int, window: int, start: int, n_token: int,
    form: Formats, twin: ModuleType, device: str,
) -> None:  # fmt: skip
    if form != INT8 and head_dim not in (64, 96):
        pytest.skip("two shapes are enough for other formats")
    k, v = tokens(2, 2, start, head_dim, dtype)
    q = torch.randn(2, n_token, 2 * group, head_dim).to(dtype).transpose(1, 2)
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    for n_tile, turn in ((4, None), (0, None), (0, frequencies)):
        if n_tile == 0 and form != INT8:
            continue
        regions = held(k, v, [start, start], sink, window, n_tile, device, form)
        twin.evict(regions, start)
        turn_on = None
        if turn is not None:  # of a chunk's positions only the first counts
            own = torch.arange(start, start + n_token, device=device).expand(2, -1)
            turn_on = Rope(turn.to(device), own).back_to(sink + window - 1)
        # the chunk over itself: the first sequence has seen something, the other nothing yet
        own_k, own_v = tokens(1, 2 * group, 5, head_dim, dtype)
        own_score = torch.einsum("htd,hkd->htk", q[0].double(), own_k[0].double()) * head_dim**-0.5
        padded = torch.full((*q.shape[:2], n_token + 3), float("-inf"))  # as PyTorch's kernel for float32 returns it
        own = torch.zeros_like(q), padded[:, :, :n_token]
        own[0][0], own[1][0] = own_score.softmax(-1) @ own_v[0].double(), own_score.logsumexp(-1)
        poison(device)
        out = twin.history_attention(q.to(device), regions, start, (own[0].to(device), own[1].to(device)), turn_on)
        for b in range(2):
            # what a token at `start` sees, itself apart: of start + 1 tokens, the first `start`
            last = [torch.cat((x[b], torch.zeros_like(x[b, :, :1])), 1) for x in (k, v)]
            keys, values, pos = visible(last[0], last[1], start + 1, sink, window, n_tile > 0, form)
            keys, values, pos = keys[:, pos < start], values[:, pos < start], pos[pos < start]
            if turn is not None:
                dropped = n_left(start + 1, sink, window, has_tiles=False)
                keys = torch.where((pos < sink)[:, None], apply_rope(keys, dropped, turn), keys)
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            if b == 0:
                keys, values = torch.cat((keys, own_k[0].double()), 1), torch.cat((values, own_v[0].double()), 1)
            if keys.shape[1] == 0:  # nothing was seen
                assert (out[b] == 0).all()
                continue
            score = torch.einsum("htd,hkd->htk", q[b].double(), keys) * head_dim**-0.5
            expected = torch.einsum("htk,hkd->htd", score.softmax(-1), values)
            slack = 1.5 if dtype == BF16 and form[0].rotated else 1  # rotated queries and slots are rounded once more
            assert error(out[b], expected) < slack * TOLERANCE[dtype]
