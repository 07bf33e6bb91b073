"""A chunk's attention in parts: the library's kernel, the plain one, and the merging of two sets of keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selective_kv.kernels import flash


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    score = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    if causal:
        score = score.masked_fill(torch.ones(score.shape[-2:]).triu(1).bool(), float("-inf"))
    return score.softmax(-1) @ v, score.logsumexp(-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_head", "n_kv_head", "head_dim"), [(4, 4, 16), (6, 2, 24), (4, 1, 96)])
def test_both_ways_are_attention(
    n_head: int, n_kv_head: int, head_dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(flash, "SCORES", 1000)  # a few queries at a time
    n_key = 37 if causal else 53
    q = torch.randn(2, 37, n_head, head_dim).transpose(1, 2)  # as a projection leaves it
    k, v = torch.randn(2, 2, n_kv_head, n_key, head_dim)
    want = reference(q, k, v, causal)
    group = n_head // n_kv_head
    repeated = [x.repeat_interleave(group, 1) for x in (k, v)]
    for got in (flash.attend(q, k, v, causal), flash.plain(q, *repeated, causal)):
        for mine, theirs in zip(got, want, strict=True):
            assert torch.allclose(mine.double(), theirs, atol=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 20, 53])
def test_two_sets_of_keys_are_one(cut: int) -> None:
    """Also where one of the two is empty: its log-sum-exp is -inf."""
    torch.manual_seed(1)
    q, (k, v) = torch.randn(1, 4, 9, 16), torch.randn(2, 1, 2, 53, 16)
    parts = []
    for keys, values in ((k[:, :, :cut], v[:, :, :cut]), (k[:, :, cut:], v[:, :, cut:])):
        empty = torch.zeros(q.shape), torch.full(q.shape[:3], float("-inf"))
        parts.append(flash.attend(q, keys, values) if keys.shape[2] else empty)
    out, lse = flash.merge(*parts[0], *parts[1])
    for mine, theirs in zip((out, lse), reference(q, k, v, False), strict=True):
        assert torch.allclose(mine.double(), theirs, atol=1e-5)
