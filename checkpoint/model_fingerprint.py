"""Which weights a model has, in 64 letters: what has been computed with them belongs to no other ones."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

SAMPLES = 1024  # elements of a tensor that are looked at one by one
BLOCK = 1 << 24  # words added up at a time: a sum widens them to 8 bytes


def model_fingerprint(model: nn.Module) -> str:
    """A SHA-256 over every parameter and buffer: its name, dtype and shape, the sum of all its bits taken as whole
    numbers, and evenly spaced elements, which tell an order from another. Computed where the weights are: 16 GB take
    a GPU some milliseconds.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        words = _words(tensor.detach())
        if words.numel():
            total = sum(block.sum(dtype=torch.int64) for block in words.split(BLOCK))
            some = words[torch.linspace(0, words.numel() - 1, SAMPLES, dtype=torch.float64).long().to(words.device)]
            digest.update(torch.cat((torch.as_tensor(total).reshape(1), some.long())).cpu().numpy().tobytes())
    return digest.hexdigest()


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as a line of integers, as wide as its length and its place in memory allow."""
    line = tensor.contiguous().reshape(-1)
    place = line.storage_offset() * line.element_size()
    for dtype in (torch.int32, torch.int16):
        if line.nbytes % dtype.itemsize == 0 and place % dtype.itemsize == 0:
            return line.view(dtype)
    return line.view(torch.uint8)
