"""Sums over GPUs' memory: two ranks played by one process, whose memory each other's kernel writes into."""

from __future__ import annotations

import pytest
import torch
from kernel_reference import BF16, DEVICES, FP16, FP32  # chooses the interpreter first

from engine.kernels import peer_sum as kernel


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("n", [48, kernel.BLOCK, 2 * kernel.BLOCK + 40])
def test_two_ranks_sum(dtype: torch.dtype, n: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over five sums, so that both halves are used again. What the other rank would have written when this one waits
    is written beforehand; what this one wrote for the other is what the other's sum then reads.
    """
    monkeypatch.setattr(kernel, "MOST_ELEMENTS", 4 * kernel.BLOCK)  # little memory
    n_program = kernel.MOST_ELEMENTS // kernel.BLOCK
    memory = [torch.zeros(kernel.places(2)[-1], dtype=torch.uint8, device=device) for _ in "ab"]
    counts = [torch.zeros(n_program, dtype=torch.int32, device=device) for _ in "ab"]
    peers = [m.data_ptr() for m in memory]
    part_bytes = kernel.MOST_ELEMENTS * kernel.ITEM_BYTES
    start, stop = kernel.places(2)[:2]
    flags = [m[start:stop].view(torch.int32).view(2, n_program) for m in memory]
    used = -(-n // kernel.BLOCK)

    for count in range(1, 6):
        residual = torch.randn(1, n).to(dtype).to(device)
        x = [torch.randn(1, n).to(dtype).to(device) for _ in "ab"]
        at = ((count & 1) * 2 + 1) * part_bytes  # rank 1's part in rank 0's memory
        memory[0][at : at + x[1].nbytes] = x[1].view(-1).view(torch.uint8)
        flags[0][1] = count
        first = kernel.peer_sum(x[0], residual, peers, counts[0], 0)
        assert flags[1][0].tolist() == [count] * used + [0] * (n_program - used)
        memory[0][at : at + x[1].nbytes] = 0  # rank 1 writes it itself
        second = kernel.peer_sum(x[1], residual, peers, counts[1], 1)
        assert flags[0][1][:used].tolist() == [count] * used
        assert torch.equal(memory[0][at : at + x[1].nbytes], x[1].view(-1).view(torch.uint8))
        want = (residual.double() + x[0].double() + x[1].double()).cpu()
        assert torch.equal(first, second)
        most = torch.finfo(dtype).eps * (want.abs().amax() + 1)
        assert (first.double().cpu() - want).abs().max() <= most
        assert [c.tolist()[:used] for c in counts] == [[count] * used] * 2


def test_two_ranks_choose(device: str) -> None:
    """The first largest of all logits, and what is not finite on either rank; three times, through both halves."""
    n_row = 4
    memory = [torch.zeros(kernel.places(2)[-1], dtype=torch.uint8, device=device) for _ in "ab"]
    counts = [torch.zeros(kernel.MOST_ROWS, dtype=torch.int32, device=device) for _ in "ab"]
    peers = [m.data_ptr() for m in memory]
    _, at, flags_at, stop = kernel.places(2)
    keys = memory[0][at:flags_at].view(torch.int64).view(2, 2, -1)
    flags = memory[0][flags_at:stop].view(torch.int32).view(2, -1)
    for count in range(1, 4):
        logits = torch.randn(n_row, 101)
        logits[0, [7, 60]] = 9.0
        logits[1, 60 if count == 1 else 7] = float("nan")
        halves = logits.to(device).split([51, 50], 1)
        keys[count & 1, 1, :n_row] = kernel.parts(halves[1], 51).amax(1)  # what rank 1 would have written by now
        flags[1, :n_row] = count
        first = kernel.peer_choice(halves[0], 0, peers, counts[0], 0)
        keys[count & 1, 1, :n_row] = 0  # it writes them itself
        second = kernel.peer_choice(halves[1], 51, peers, counts[1], 1)
        assert first.tolist() == second.tolist() == [7, -1, *logits[2:].argmax(1).tolist()]
        assert torch.equal(keys[count & 1, 1, :n_row], kernel.parts(halves[1], 51).amax(1))
        assert flags[1, :n_row].tolist() == [count] * n_row
