"""A long chunk's sums over ranks, by rows and in two parts: processes that write into each other's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from kernel_reference import FP32  # chooses the interpreter first
from ranks import finish, start
from torch import Tensor

from engine import FusedChunk
from engine.chunk_sums import ChunkSums, Memory, n_byte
from kv_cache import ModelCache
from model import Config, Transformer
from selective_kv import FullCache, Shape

CONFIG = Config(101, 48, 2, 4, 2, 80, 256, head_dim=16)
CHUNKS = (21, 14, 40)  # tokens: parts that differ, and that ranks do not share evenly; the last begins after 35
SHARES = {2: (0.3, 0.7), 3: (0.5, -0.25, 0.75)}  # what each rank's products give of the whole


class Shared:
    """What a chunk asks of ranks, where memory is shared by processes."""

    def __init__(self, rank: int, memories: list[Tensor]) -> None:
        most, size = max(CHUNKS), len(memories)
        self.sums = ChunkSums(rank, [Memory.in_bytes(m, size, most, CONFIG.dim, FP32) for m in memories])

    def chunk(self, x: Tensor) -> ChunkSums:
        return self.sums.begin(len(x))

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x + residual


def model_of(share: float) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    for p in model.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.2)
    for block in model.layers:
        block.attention.wo.weight.data *= share
        block.feed_forward.w2.weight.data *= share
    return model


@torch.inference_mode()
def logits(model: Transformer) -> Tensor:
    """After each chunk."""
    cache = ModelCache(FullCache(), CONFIG.n_layer, Shape(1, 2, 16, sum(CHUNKS), FP32, torch.device("cpu")))
    chunk, found = FusedChunk(model), []
    for n in CHUNKS:
        ids = torch.arange(n)[None] * 7 % 101
        found.append(chunk(ids, cache.sequence(0))[:, -1])
    return torch.cat(found)


@pytest.mark.parametrize(("size", "to_last"), [(2, True), (2, False), (3, True)])
def test_ranks_read_as_one(size: int, to_last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FullCache, "attends_to_last", to_last)  # a cache of somebody's own attends to all
    n = n_byte(size, max(CHUNKS), CONFIG.dim, FP32)
    memories = [torch.zeros(n, dtype=torch.uint8).share_memory_() for _ in range(size)]
    found = torch.zeros(size, len(CHUNKS), CONFIG.vocab_size).share_memory_()

    def body(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        model = model_of(SHARES[size][rank])
        model.ranks = Shared(rank, memories)
        found[rank] = logits(model)
        dist.destroy_process_group()

    ranks = start(size, body, tmp_path)
    assert finish(ranks) == [0] * size, [rank.err.read_text() for rank in ranks]
    want = logits(model_of(1.0))
    for rank in range(size):
        assert (found[rank] - want).abs().max() < 1e-4 * want.abs().max()
        assert torch.equal(found[rank], found[0])


def test_rows_are_one_ranks_and_all_are_somebodys() -> None:
    """Whichever are asked for, in any order."""
    n_token, size = 23, 3
    memory = torch.zeros(n_byte(size, n_token, CONFIG.dim, FP32), dtype=torch.uint8)
    memories = [Memory.in_bytes(memory, size, n_token, CONFIG.dim, FP32)] * size
    x, index = torch.randn(n_token, CONFIG.dim), torch.randperm(n_token)
    rows = [ChunkSums(rank, memories).begin(n_token).own_rows(x, index) for rank in range(size)]
    assert torch.equal(torch.stack(rows).sum(0), x[index])
    assert [int((own != 0).any(1).sum()) for own in rows] == [7, 8, 8]
