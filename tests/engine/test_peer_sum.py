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
    memory = [torch.zeros(kernel.memory_bytes(2), dtype=torch.uint8, device=device) for _ in "ab"]
    counts = [torch.zeros(n_program, dtype=torch.int32, device=device) for _ in "ab"]
    peers = torch.tensor([m.data_ptr() for m in memory], device=device)
    part_bytes = kernel.MOST_ELEMENTS * kernel.ITEM_BYTES
    flags = [m[4 * part_bytes :].view(torch.int32).view(2, n_program) for m in memory]
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
