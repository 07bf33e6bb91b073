"""No dense copy of what is quantised, not even for one layer for one step: measured by what is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import Rope
from selective_kv import Chunk, SelectiveCache, Shape

N_HELD = 40_000


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest storage that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("n_token", [1, 64], ids=["decode", "chunked prefill"])
def test_the_middle_is_never_made_dense(n_token: int) -> None:
    heads, dim = 2, 64
    layer = SelectiveCache(16, 32)
    layer.allocate(Shape(1, heads, dim, N_HELD + n_token, torch.float32, torch.device("cpu")))
    chunk = Chunk(torch.arange(N_HELD, N_HELD + n_token)[None], 0, N_HELD)
    q = torch.randn(1, 2 * heads, n_token, dim)
    k, v = torch.randn(2, 1, heads, n_token, dim)
    rope = Rope(torch.ones(dim // 2, dtype=torch.float64), chunk.positions)
    with LargestTensor() as largest:
        layer.attend(q, k, v, chunk, rope)
    dense = N_HELD * heads * dim * 4  # the float32 form of K's rows of one layer
    assert largest.bytes < dense / 4  # blocks of 4 MiB, however long the past
    layer.use_reference()
    with LargestTensor() as largest:
        layer.attend(q, k, v, chunk, rope)
    assert largest.bytes >= dense  # the reference does just that, so the measurement sees it
