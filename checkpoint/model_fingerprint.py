"""Which weights a model has, in 64 letters: what has been computed with them belongs to no other ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from checkpoint.share import Share

BLOCK = 1 << 24  # elements that are widened to 8 bytes at a time
BLOCK_ON_CPU = 1 << 18  # they stay in its cache, which makes ten times of it (LOG.md, 2026-11-26)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FACTORS = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))  # splitmix64's, as signed numbers
Gather = Callable[[list[int]], Iterable[list[int]]]  # every rank's


def model_fingerprint(model: nn.Module, share: Share | None = None, gather: Gather | None = None) -> str:
    """A SHA-256 over every parameter and buffer: its name, its dtype, and a number made of all its bits.

    Elements are taken as whole numbers; a matrix's rows and its columns are added up, each sum is multiplied with a
    random number of its row or column, and all is added modulo 2^64. So a changed element shows, and so do two that
    have changed places; and several ranks that have a share of the model each (`share`, `gather`) add up to what one
    device finds. Matrices in 8 and 4 bits do not: a share has scales of its own. Computed where the weights are: 16 GB
    take a GPU a tenth of a second.
    """
    named = sorted(model.state_dict().items())
    numbers = [_number(name, tensor.detach(), share) for name, tensor in named]
    totals = torch.stack(numbers).tolist() if numbers else []
    every = [totals] if gather is None else gather(totals)
    digest = hashlib.sha256()
    for (name, tensor), *found in zip(named, *every, strict=True):
        digest.update(f"{name} {tensor.dtype} {sum(found) % (1 << 64)}\n".encode())
    return digest.hexdigest()


def _number(name: str, tensor: Tensor, share: Share | None) -> Tensor:
    """int64 [], on the CPU. Of what every rank has alike only the first one's counts."""
    words = tensor.contiguous().view(WORDS[tensor.element_size()])
    words = words.reshape(len(words), -1) if words.dim() > 1 else words.reshape(-1, 1)
    n_row, n_column = words.shape
    rows, first_column = torch.arange(n_row, device=words.device), 0
    if share is not None:
        spans = columns = None
        if name.endswith((".weight", ".bias")):
            tied = name == "output.weight" and share.whole.tied_embeddings  # the embedding, which is whole everywhere
            spans, columns = None if tied else share.rows(name), share.columns(name)
            if spans is None and columns is None and share.rank:
                return torch.zeros((), dtype=torch.int64)
        else:  # in fewer bits: a share's own numbers
            rows = rows + (share.rank << 40)
        if spans is not None:
            rows = torch.cat([torch.arange(*span, device=words.device) for span in spans])
        first_column = 0 if columns is None else columns[0]
    by_row = _random(rows, 1)
    by_column = _random(torch.arange(first_column, first_column + n_column, device=words.device), 2)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    step = max(1, (BLOCK_ON_CPU if words.device.type == "cpu" else BLOCK) // max(1, n_column))
    for start in range(0, n_row, step):
        block = words[start : start + step].long()
        total += (block.sum(1) * by_row[start : start + step]).sum() + (block.sum(0) * by_column).sum()
    return total.cpu()


def _random(index: Tensor, which: int) -> Tensor:
    """An odd 64-bit number for each index, always the same: splitmix64's steps (Steele et al. 2014), but that a
    shift fills up with the sign.
    """
    mixed = (2 * index + which) * FACTORS[0]
    mixed = (mixed ^ (mixed >> 30)) * FACTORS[1]
    return (mixed ^ (mixed >> 27)) | 1
