"""A chunk of a prompt by fused kernels: each against plain operators, and all of them against the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from kernel_reference import BF16, DEVICES, FP16, FP32, TOLERANCE, poison
from kernel_reference import error as cpu_error
from torch import Tensor

from engine import FusedChunk
from engine.kernels import prefill  # after kernel_reference, which chooses the interpreter
from kv_cache import ModelCache
from model import Config, Rope, Transformer
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache
from selective_kv.kernels import triton_backend


def error(got: Tensor, want: Tensor) -> float:
    return cpu_error(got, want.double().cpu())


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("n", [96, 2048, 3000])
def test_swiglu(n: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, 2 * n).to(dtype).to(device)
    gate, up = x.double().chunk(2, -1)
    poison(device)
    assert error(prefill.swiglu(x), F.silu(gate) * up) < TOLERANCE[dtype]


def test_more_tokens_than_a_grid_is_wide(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(prefill, "MOST", 4)
    x = torch.randn(10, 64).to(device)
    gate, up = x.chunk(2, -1)
    assert torch.allclose(prefill.swiglu(x), F.silu(gate) * up, atol=1e-6)


@pytest.mark.parametrize("dtype", [FP32, FP16])  # the interpreter does not round to bfloat16 as a GPU does
@pytest.mark.parametrize("n", [96, 1024])
def test_add_norm(n: int, dtype: torch.dtype, device: str) -> None:
    x, y = (torch.randn(7, n).to(dtype).to(device) for _ in "xy")
    norm = torch.rand(n).to(dtype).to(device) + 0.5
    total = (x.float() + y.float()).to(dtype)
    want = F.rms_norm(total.double(), (n,), norm.double(), 1e-5)
    poison(device)
    got = prefill.add_norm(x, y, norm, 1e-5)
    assert torch.equal(x, total)
    assert error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("n_head", "n_kv_head", "head_dim"), [(4, 2, 16), (14, 2, 64), (8, 8, 96)])
def test_rotate_qk(n_head: int, n_kv_head: int, head_dim: int, norms: bool, device: str) -> None:
    n_qk, n_token = n_head + n_kv_head, 6
    qkv = torch.randn(n_token, n_qk + n_kv_head, head_dim).to(device)
    before = qkv.clone()
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    rope = Rope(frequencies.to(device), torch.arange(1000, 1000 + n_token, device=device)[None], magnitude=1.2)
    weights = [torch.rand(head_dim).to(device) + 0.5 for _ in "qk"]
    heads = before.clone()
    if norms:
        heads[:, :n_head] = F.rms_norm(heads[:, :n_head], (head_dim,), weights[0], 1e-5)
        heads[:, n_head:n_qk] = F.rms_norm(heads[:, n_head:n_qk], (head_dim,), weights[1], 1e-5)
    want = rope.rotate(heads[None].transpose(1, 2)).transpose(1, 2)[0]
    cos, sin = (t.reshape(n_token, head_dim) for t in (rope.cos, rope.sin))
    prefill.rotate_qk(qkv, n_head, n_qk, cos, sin, (weights[0], weights[1], 1e-5) if norms else None)
    assert torch.allclose(qkv[:, :n_qk], want[:, :n_qk], atol=1e-5)
    assert torch.equal(qkv[:, n_qk:], before[:, n_qk:])  # values do not turn


@pytest.mark.parametrize(
    ("policy", "qk_norm"),
    [
        (FullCache(), True),
        (SelectiveCache(sink_size=2, window_size=9), False),
        (SinkWindowCache(sink_size=2, window_size=9), False),
    ],
)
def test_a_chunk_is_the_model(policy: KVCache, qk_norm: bool, device: str) -> None:
    """Logits after two chunks and a token, and what the cache holds then."""
    config = Config(101, 48, 2, 4, 2, 80, 256, head_dim=16, qk_norm=qk_norm, qkv_bias=not qk_norm)
    model = Transformer(config).to(device).eval()
    for p in model.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.2)
    shape = Shape(1, 2, 16, 200, FP32, torch.device(device))
    caches = [ModelCache(policy, config.n_layer, shape) for _ in range(2)]
    for layer in caches[0].layers:
        layer.wrap_kernels(lambda _: triton_backend.TRITON)
    chunk = FusedChunk(model)
    slack = 1e-2 if isinstance(policy, SelectiveCache) else 1e-4  # a last bit tips an integer
    with torch.inference_mode():
        for n in (20, 17, 1):
            ids = torch.randint(101, (1, n)).to(device)
            got, want = chunk(ids, caches[0].sequence(0)), model(ids, caches[1].sequence(0), last_only=True)
            assert error(got, want.double()) < slack
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [38]


def test_a_batch_in_one_chunk(device: str) -> None:
    config = Config(101, 48, 2, 6, 2, 80, 256, head_dim=16)
    model = Transformer(config).to(device).eval()
    shape = Shape(3, 2, 16, 64, FP32, torch.device(device))
    with torch.inference_mode():
        ids = torch.randint(101, (3, 20)).to(device)
        got = FusedChunk(model)(ids, ModelCache(FullCache(), 2, shape))
        want = model(ids, ModelCache(FullCache(), 2, dataclasses.replace(shape)), last_only=True)
    assert error(got, want.double()) < 1e-4
