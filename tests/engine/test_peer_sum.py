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


def messages(data: torch.Tensor, count: int) -> torch.Tensor:
    """int64: 4 bytes of data each, below the number of the sum."""
    words = data.contiguous().view(-1).view(torch.int32).to(torch.int64)
    return (words & 0xFFFFFFFF) | (count << 32)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("n", [48, kernel.WORDS, 2 * kernel.WORDS + 40])
def test_two_ranks_sum(dtype: torch.dtype, n: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over five sums, so that both halves are used again. What the other rank would have sent when this one waits is
    written beforehand; what this one sent to the other is what the other's sum then reads.
    """
    monkeypatch.setattr(kernel, "MOST_WORDS", 4 * kernel.WORDS)  # little memory
    memory = [torch.zeros(kernel.places(2)[1], dtype=torch.uint8, device=device) for _ in "ab"]
    counts = [torch.zeros(4, dtype=torch.int32, device=device) for _ in "ab"]
    peers = [m.data_ptr() for m in memory]
    parts = [m[: kernel.places(2)[0]].view(torch.int64).view(2, 2, -1) for m in memory]  # half, rank, word
    n_word = n * dtype.itemsize // 4

    for count in range(1, 6):
        residual = torch.randn(1, n).to(dtype).to(device)
        x = [torch.randn(1, n).to(dtype).to(device) for _ in "ab"]
        sent = messages(x[1], count)
        parts[0][:, 1, :n_word] = messages(x[1] + 1, count)  # who looks into the wrong half is wrong, and ends
        parts[0][count & 1, 1, :n_word] = sent
        first = kernel.peer_sum(x[0], residual, peers, counts[0], 0)
        want = (residual.double() + x[0].double() + x[1].double()).cpu()
        most = torch.finfo(dtype).eps * (want.abs().amax() + 1)
        assert (first.double().cpu() - want).abs().max() <= most
        assert torch.equal(parts[1][count & 1, 0, :n_word], messages(x[0], count))
        assert not parts[1][count & 1, 0, n_word:].any()
        parts[0][count & 1, 1, :n_word] = 0  # rank 1 sends it itself
        second = kernel.peer_sum(x[1], residual, peers, counts[1], 1)
        assert torch.equal(parts[0][count & 1, 1, :n_word], sent)
        assert torch.equal(first, second)
        used = -(-n_word // kernel.WORDS)
        assert [c.tolist() for c in counts] == [[count] * used + [0] * (4 - used)] * 2


@pytest.mark.parametrize("n_rank", [4, kernel.MOST_RANKS])
def test_more_ranks_sum_and_choose(n_rank: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in turn, when the others' messages are there; twice, in both halves. All have the same bits, and each has
    written to each other one."""
    monkeypatch.setattr(kernel, "MOST_WORDS", 2 * kernel.WORDS)
    sums, size = kernel.places(n_rank)
    n = kernel.WORDS + 40
    memory = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(n_rank)]
    counts = [torch.zeros(kernel.MOST_ROWS, dtype=torch.int32, device=device) for _ in range(2 * n_rank)]
    peers = [m.data_ptr() for m in memory]
    parts = [m[:sums].view(torch.int64).view(2, n_rank, -1) for m in memory]  # half, rank, word
    keys = [m[sums:].view(torch.int64).view(2, n_rank, -1) for m in memory]
    for count in (1, 2):
        residual, half = torch.randn(1, n).to(device), count & 1
        x = [torch.randn(1, n).to(device) for _ in range(n_rank)]
        logits = [torch.randn(1, 101).to(device) for _ in range(n_rank)]
        sent = torch.stack([messages(t, count) for t in x])
        chosen = torch.stack([messages(kernel.parts(t, 101 * k).amax(1), count) for k, t in enumerate(logits)])
        want = (residual.double() + torch.stack(x).double().sum(0)).cpu()
        found, tokens = [], []
        for rank in range(n_rank):
            others = torch.arange(n_rank) != rank
            parts[rank][half, others, :n], keys[rank][half, others, :2] = sent[others], chosen[others]
            found.append(kernel.peer_sum(x[rank], residual, peers, counts[rank], rank))
            tokens.append(kernel.peer_choice(logits[rank], 101 * rank, peers, counts[n_rank + rank], rank))
            for other in others.nonzero()[:, 0].tolist():
                assert torch.equal(parts[other][half, rank, :n], sent[rank])
                assert torch.equal(keys[other][half, rank, :2], chosen[rank])
                parts[other][half, rank, :n] = 0
        assert (found[0].double().cpu() - want).abs().max() < 1e-5
        assert all(torch.equal(other, found[0]) for other in found)
        assert {int(t) for t in tokens} == {int(torch.cat(logits, 1).argmax())}


def test_what_is_no_whole_word_or_too_large_is_not_taken() -> None:
    assert kernel.summable(torch.empty(1, 48, dtype=BF16)) and not kernel.summable(torch.empty(1, 47, dtype=BF16))
    most = kernel.MOST_BYTES // 4
    assert kernel.summable(torch.empty(most)) and not kernel.summable(torch.empty(most + 1))


def test_two_ranks_choose(device: str) -> None:
    """The first largest of all logits, and what is not finite on either rank; three times, through both halves."""
    n_row = 4
    memory = [torch.zeros(kernel.places(2)[1], dtype=torch.uint8, device=device) for _ in "ab"]
    counts = [torch.zeros(kernel.MOST_ROWS, dtype=torch.int32, device=device) for _ in "ab"]
    peers = [m.data_ptr() for m in memory]
    keys = memory[0][kernel.places(2)[0] :].view(torch.int64).view(2, 2, -1)  # half, rank, word
    for count in range(1, 4):
        logits = torch.randn(n_row, 101)
        logits[0, [7, 60]] = 9.0
        logits[1, 60 if count == 1 else 7] = float("nan")
        halves = logits.to(device).split([51, 50], 1)
        sent = messages(kernel.parts(halves[1], 51).amax(1), count)  # what rank 1 would have sent by now
        keys[:, 1, : 2 * n_row] = messages(kernel.parts(halves[1], 0).amax(1), count)  # of the other half: wrong
        keys[count & 1, 1, : 2 * n_row] = sent
        first = kernel.peer_choice(halves[0], 0, peers, counts[0], 0)
        assert first.tolist() == [7, -1, *logits[2:].argmax(1).tolist()]
        keys[count & 1, 1, : 2 * n_row] = 0  # it sends it itself
        second = kernel.peer_choice(halves[1], 51, peers, counts[1], 1)
        assert torch.equal(first, second)
        assert torch.equal(keys[count & 1, 1, : 2 * n_row], sent)
