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
from selective_kv.kernels.history import dequantize_tiles


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("form", [*FORMATS, *FEW_BITS, *RARE], ids=str)
@pytest.mark.parametrize(("head_dim", "dtype"), few([(24, FP16), (64, FP32), (128, BF16)], 0))
def test_tiles_made_dense(head_dim: int, dtype: torch.dtype, form: Formats, device: str) -> None:
    k, v = tokens(2, 1, 600, head_dim, dtype)
    regions = held(k, v, [600, 500], 3, 5, 4, device, form)
    poison(device)
    dense = dequantize_tiles(regions, 1, 3)
    for got, part in zip(dense, regions.stored(), strict=True):
        want = part.format.stored(part.tiles.part(slice(1, 3))).flatten(2, 3)
        assert torch.allclose(got.float(), want, rtol=1e-2 if dtype == BF16 else 1e-3, atol=1e-4)


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
        poison(device)
        out, lse = twin.history_attention(q.to(device), regions, start, turn_on)
        for b in range(2):
            # what a token at `start` sees, itself apart: of start + 1 tokens, the first `start`
            last = [torch.cat((x[b], torch.zeros_like(x[b, :, :1])), 1) for x in (k, v)]
            keys, values, pos = visible(last[0], last[1], start + 1, sink, window, n_tile > 0, form)
            keys, values, pos = keys[:, pos < start], values[:, pos < start], pos[pos < start]
            if turn is not None:
                dropped = n_left(start + 1, sink, window, has_tiles=False)
                keys = torch.where((pos < sink)[:, None], apply_rope(keys, dropped, turn), keys)
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            if keys.shape[1] == 0:  # nothing is left to see
                assert (out[b] == 0).all() and (lse[b] == float("-inf")).all()
                continue
            score = torch.einsum("htd,hkd->htk", q[b].double(), keys) * head_dim**-0.5
            expected = torch.einsum("htk,hkd->htd", score.softmax(-1), values)
            assert error(out[b], expected) < TOLERANCE[dtype]
            slack = {FP32: 2e-3, FP16: 2e-2, BF16: 6e-2}[dtype]  # turned queries are rounded to their dtype
            assert torch.allclose(lse[b].double().cpu(), score.logsumexp(-1), atol=slack)
