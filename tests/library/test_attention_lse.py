"""A chunk's attention in parts: the library's kernel, the plain one, and the merging of two sets of keys."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise

import kernel_reference  # noqa: F401  (chooses the interpreter)
import pytest
import torch
from torch import Tensor

from selective_kv.formats import rotate, rotation_matrix
from selective_kv.kernels import attention_lse
from selective_kv.kernels.merge import merge as triton_merge
from selective_kv.warning import warn_once


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    score = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    if causal:
        score = score.masked_fill(torch.ones(score.shape[-2:], device=q.device).triu(1).bool(), float("-inf"))
    return score.softmax(-1) @ v, score.logsumexp(-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_head", "n_kv_head", "head_dim"), [(4, 4, 16), (6, 2, 24), (4, 1, 96)])
def test_both_ways_are_attention(
    n_head: int, n_kv_head: int, head_dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention_lse, "SCORES", 1000)  # a few queries at a time
    n_key = 37 if causal else 53
    q = torch.randn(2, 37, n_head, head_dim).transpose(1, 2)  # as a projection leaves it
    k, v = torch.randn(2, 2, n_kv_head, n_key, head_dim)
    want = reference(q, k, v, causal)
    group = n_head // n_kv_head
    repeated = [x.repeat_interleave(group, 1) for x in (k, v)]
    for got in (attention_lse.attend(q, k, v, causal), attention_lse.plain(q, *repeated, causal)):
        for mine, theirs in zip(got, want, strict=True):
            assert torch.allclose(mine.double(), theirs, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient", "plain", "attend"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_of_a_gpu(kernel: str, dtype: torch.dtype) -> None:
    """Each against float64: a chunk's causality, ragged lengths, groups, batches, and keys that are part of a cache."""
    device = torch.device("cuda")
    run = getattr(attention_lse, kernel)
    if kernel in ("cudnn", "flash") and dtype == torch.float32:
        pytest.skip("for 16 bits alone")
    for n_head, n_kv_head, head_dim in ((8, 2, 128), (7, 1, 64), (4, 4, 96), (4, 1, 256), (4, 2, 24)):
        if kernel == "cudnn" and (head_dim > 128 or not attention_lse.has_cudnn(device)):
            continue
        for n_token, n_key, causal, batch in (
            (777, 777, True, 1),
            (513, 1333, False, 1),
            (130, 130, True, 3),
            (9, 1, False, 2),
        ):
            torch.manual_seed(n_token)
            q = torch.randn(batch, n_token, n_head + n_kv_head, head_dim, device=device, dtype=dtype)
            q = q.transpose(1, 2)[:, :n_head]  # as a projection leaves it
            k, v = torch.randn(2, batch, n_kv_head, n_key + 37, head_dim, device=device, dtype=dtype)[:, :, :, :n_key]
            want, want_lse = reference(q, k, v, causal)
            got, lse = run(q, k, v, causal)
            close = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
            assert (got.double() - want).norm() / want.norm() < close, (n_head, n_kv_head, head_dim, n_token, n_key)
            assert lse.shape == want_lse.shape and torch.allclose(lse.double(), want_lse, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_long_keys_go_to_cudnn_in_blocks_and_are_one() -> None:
    from selective_kv.kernels.history import over_dense

    device = torch.device("cuda")
    q = torch.randn(1, 2048, 32, 128, device=device, dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.randn(2, 1, 8, 45001, 128, device=device, dtype=torch.bfloat16)[:, :, :, :45000]
    blocks = list(attention_lse.key_blocks(q, k))
    assert blocks[0].start == 0 and blocks[-1].stop == 45000
    assert all(a.stop == b.start for a, b in pairwise(blocks))
    got, lse = triton_merge(over_dense(q, k, v), q.dtype)
    some = slice(1000, 1064)
    want, want_lse = reference(q[:, :, some], k, v, False)
    assert (got[:, :, some].double() - want).norm() / want.norm() < 6e-3
    assert torch.allclose(lse[:, :, some].double(), want_lse, atol=1e-3)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is warned of, each time that it is logged; nothing has been said before."""
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("selective_kv"), "warning", lines.append)
    for cached in (warn_once, attention_lse.has_cudnn):
        cached.cache_clear()
    yield lines
    for cached in (warn_once, attention_lse.has_cudnn):
        cached.cache_clear()


@pytest.mark.parametrize("version", [None, 8907, 91900])
def test_an_old_or_missing_cudnn_is_said_once(
    version: int | None, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    q = torch.empty(1, 32, 8192, 128, dtype=torch.bfloat16, device="meta")
    taken = [attention_lse.takes_cudnn(q, q[:, :8], causal) for causal in (True, False)]
    assert taken == [version == 91900] * 2
    assert len(said) == (version != 91900) and all("long prompts" in line for line in said)


@pytest.mark.parametrize(
    ("n_head", "n_token", "n_key", "taken"),
    [
        (32, 8192, 8192, (True, True)),
        (16, 8192, 8192, (True, True)),  # of two ranks each; by flash a 32k prompt took 70 ms more
        (8, 8192, 8192, (True, True)),
        (2, 8192, 8192, (False, False)),
        (16, 6144, 6144, (False, False)),  # a prompt's last chunk: its length does not come again
        (32, 6144, 6144, (False, True)),
        (8, 1024, 8192, (False, False)),
    ],
)
def test_cudnn_is_asked_where_a_plan_is_worth_its_time(
    n_head: int, n_token: int, n_key: int, taken: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_lse, "has_cudnn", lambda device: True)
    q = torch.empty(1, n_head, n_token, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, n_head, n_key, 128, dtype=torch.bfloat16, device="meta")
    assert tuple(attention_lse.takes_cudnn(q, k, causal) for causal in (True, False)) == taken


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_that_refuse_are_replaced_and_named_once(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("No valid execution plans built.\nand more")

    torch.manual_seed(0)
    q = torch.randn(1, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)
    want, want_lse = reference(q, k, v, True)
    monkeypatch.setattr(attention_lse, "takes_cudnn", lambda q, k, causal: True)
    monkeypatch.setattr(attention_lse, "cudnn", refuse)
    for kernels in (("flash",), ("flash", "efficient")):  # where cuDNN refuses; where the other two do, too
        for _ in range(2):
            out, lse = attention_lse.attend(q, k, v, True)
            assert (out.double() - want).norm() / want.norm() < 6e-3
            assert torch.allclose(lse.double(), want_lse, atol=1e-3)
        monkeypatch.setattr(attention_lse, "takes_flash", lambda device, head_dim: False)
        monkeypatch.setattr(attention_lse, "efficient", refuse)
        assert len(said) == len(kernels)
    assert "cuDNN's attention refuses 4 heads of 64 in bfloat16 over 2" in said[0] and "and more" not in said[0]
    assert "no attention kernel takes" in said[1]


@pytest.mark.parametrize("cut", [0, 1, 20, 53])
def test_two_sets_of_keys_are_one(cut: int) -> None:
    """Also where one of the two is empty: its log-sum-exp is -inf."""
    torch.manual_seed(1)
    q, (k, v) = torch.randn(1, 4, 9, 16), torch.randn(2, 1, 2, 53, 16)
    parts = []
    for keys, values in ((k[:, :, :cut], v[:, :, :cut]), (k[:, :, cut:], v[:, :, cut:])):
        empty = torch.zeros(q.shape), torch.full(q.shape[:3], float("-inf"))
        parts.append(attention_lse.attend(q, keys, values) if keys.shape[2] else empty)
    out, lse = attention_lse.merge(*parts[0], *parts[1])
    for mine, theirs in zip((out, lse), reference(q, k, v, False), strict=True):
        assert torch.allclose(mine.double(), theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_part", "head_dim"), [(1, 16), (2, 96), (7, 24), (8, 16), (13, 16)])
@pytest.mark.parametrize("rotated", [False, True])
def test_merging_in_triton_is_merging(rotated: bool, n_part: int, head_dim: int, dtype: torch.dtype) -> None:
    """Strides as they come, a length off the blocks' border, parts that have seen nothing, more parts than a launch
    takes, and parts that are still rotated."""
    torch.manual_seed(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = []
    for i in range(n_part):
        out = torch.randn(2, 37, 6, head_dim, device=device).to(dtype)
        out = out.transpose(1, 2) if i % 2 else out.transpose(1, 2).contiguous()
        lse = torch.randn(2, 6, 64, device=device)[..., :37] * 3
        lse[:, i % 6], lse[:, 5] = float("-inf"), float("-inf")  # of the last head no part has seen anything
        parts.append((out, lse))
    for out, lse in parts:
        out[lse == float("-inf")] = 0
    lses = torch.stack([lse.double() for _, lse in parts])
    outs = [out.double() if i == 0 or not rotated else rotate(out.double()) for i, (out, _) in enumerate(parts)]
    want = (lses.softmax(0).nan_to_num()[..., None] * torch.stack(outs)).sum(0), lses.logsumexp(0)
    matrix = rotation_matrix(head_dim, torch.device(device)).to(dtype) if rotated else None
    got = triton_merge(parts, dtype, matrix)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert torch.allclose(got[0].double(), want[0], atol=1e-5 if dtype == torch.float32 else 5e-2)
    assert torch.allclose(got[1].double(), want[1].double(), atol=1e-5)
