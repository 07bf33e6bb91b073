"""The Triton kernels of a prefill chunk: what they store, and attention over what was held before it."""

from __future__ import annotations

import pytest
import torch
from kernel_reference import (
    BF16,
    DEVICES,
    FORMATS,
    FP16,
    FP32,
    TOLERANCE,
    error,
    held,
    poison,
    same_rows,
    tokens,
    turned,
    visible,
)  # fmt: skip
from torch import Tensor

from model import Rope
from selective_kv.formats import INT8, Format
from selective_kv.kernels import triton_backend as kernels  # after kernel_reference, which chooses the interpreter
from selective_kv.kernels.history import dequantize_rows


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


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


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, FP32), (64, FP16), (128, BF16)])
def test_store_and_dequantise(head_dim: int, dtype: torch.dtype, formats: tuple[Format, Format], device: str) -> None:
    """What a chunk leaves, from slots and from the chunk itself, and a block of it made dense again."""
    sink, window, end = 3, 5, 60
    k, v = tokens(2, 2, end, head_dim, dtype)
    n_left = end - sink - window
    for start in (0, 20):
        regions = held(k, v, [start, start], sink, window, n_left, device, formats)
        kernels.evict(regions, start)
        kernels.store_chunk(regions, k[:, :, start:].to(device), v[:, :, start:].to(device), start)
        expected = held(k, v, [end, end], sink, window, n_left, "cpu", formats)
        for b in range(2):
            same_rows(regions, expected, b, n_left)
    poison(device)
    dense = dequantize_rows(regions, 7, 45)
    for got, held_part in zip(dense, regions.quantised(), strict=True):
        want = held_part.format.stored(held_part.ints, held_part.scales)[:, :, 7:45]
        assert torch.allclose(got.float(), want, rtol=1e-2 if dtype == BF16 else 1e-3, atol=1e-4)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
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
    head_dim: int, group: int, dtype: torch.dtype, sink: int, window: int, start: int, n_token: int,
    formats: tuple[Format, Format], device: str,
) -> None:  # fmt: skip
    if formats != (INT8, INT8) and head_dim not in (64, 256):
        pytest.skip("4 bits: two shapes are enough, and some head_dims are not for them")
    k, v = tokens(2, 2, start, head_dim, dtype)
    q = torch.randn(2, n_token, 2 * group, head_dim).to(dtype).transpose(1, 2)
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    for n_row, turn in ((start, None), (0, None), (0, frequencies)):
        if turn is None and n_row == 0 and formats != (INT8, INT8):
            continue
        regions = held(k, v, [start, start], sink, window, n_row, device, formats)
        kernels.evict(regions, start)
        turn_on = None
        if turn is not None:  # of a chunk's positions only the first counts
            own = torch.arange(start, start + n_token, device=device).expand(2, -1)
            turn_on = Rope(turn.to(device), own).back_to(sink + window - 1)
        poison(device)
        out, lse = kernels.history_attention(q.to(device), regions, start, turn_on)
        for b in range(2):
            # what a token at `start` sees, itself apart: of start + 1 tokens, the first `start`
            last = [torch.cat((x[b], torch.zeros_like(x[b, :, :1])), 1) for x in (k, v)]
            keys, values, pos = visible(last[0], last[1], start + 1, sink, window, n_row > 0, formats)
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
            slack = {FP32: 2e-3, FP16: 2e-2, BF16: 6e-2}[dtype]  # turned queries are rounded to their dtype
            assert torch.allclose(lse[b].double().cpu(), score.logsumexp(-1), atol=slack)
