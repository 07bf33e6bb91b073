"""A made Qwen 2 whose keys have the biases of Qwen 2.5 7B's first, a median and its last layer, end to end.

Where RoPE turns fast, the queries' rows of those channels are as much smaller as the bias is large: otherwise scores
would swing by 40 with the position, and no such model is the same one without the bias.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from evaluation import scoring
from model import Config, Rope, Transformer
from selective_kv import Chunk, FullCache, SelectiveCache, Shape
from selective_kv.formats import TILE

CONFIG = Config(320, 256, 3, 4, 2, 256, 4096, head_dim=128, rope_theta=1e6, qkv_bias=True)
NORMS = 302, 11, 460  # of a head: of all four 605, 22 and 921 (ggml-org/llama.cpp issue 21385)
N_TOKEN, SINK, WINDOW = 460, 16, 32


@functools.cache
def made(norms: tuple[float, ...], fast: bool, dtype: torch.dtype = torch.float32) -> Transformer:
    """norms: of the key bias of a layer's heads, in six of the ten fastest or slowest pairs."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(CONFIG).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    c = CONFIG
    for norm, block in zip(norms, model.layers, strict=True):
        qkv = block.attention.wqkv  # type: ignore[union-attr]
        queries, keys = qkv.weight.split([c.n_head * c.head_dim, 2 * c.n_kv_head * c.head_dim])[0], qkv.bias
        heads = keys[c.n_head * c.head_dim :][: c.n_kv_head * c.head_dim].view(c.n_kv_head, 2, -1)
        for bias, rows in zip(heads, queries.view(c.n_kv_head, -1, 2, c.head_dim // 2, c.dim), strict=True):
            pair = torch.randperm(10, generator=generator)[:6]
            pair = pair if fast else c.head_dim // 2 - 1 - pair
            value = torch.randn(6, generator=generator)
            bias[torch.randint(0, 2, (6,), generator=generator), pair] = norm * value / value.norm()
            rows[:, :, pair] /= bias[:, pair].norm(dim=0).clamp_min(1)[:, None]
    return model.eval().to(dtype)


def text() -> Tensor:
    return torch.randint(CONFIG.vocab_size, (N_TOKEN,), generator=torch.Generator().manual_seed(1))


@functools.cache
def divergence(norms: tuple[float, ...], fast: bool, bits: int) -> float:
    """Mean KL from the full cache's tokens."""
    model, tokens = made(norms, fast), text()
    full = scoring.read_parallel(model, FullCache(), tokens)
    state = scoring.read_parallel(model, SelectiveCache(SINK, WINDOW, bits, bits), tokens)
    kl = scoring.score(model, tokens, state, full).kl
    assert kl is not None
    return kl.mean().item()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_key_bias_costs_no_quality(bits: int, fast: bool) -> None:
    """With a scale per token the KL went from 5.5e-4 to 0.55 (int8) and from 0.05 to 2.5 (4 bits), without a word."""
    assert 0 < divergence(NORMS, fast, bits) < 2 * divergence((0, 0, 0), fast, bits)


def test_a_bias_is_given_back_as_the_cache_does() -> None:
    """To float64's last bits, where scores show it in full."""
    torch.manual_seed(0)
    n, dim, policy = 3 + TILE + 9, 16, SelectiveCache(3, 5, 4, 4)
    q, k, v = (torch.randn(1, 2, n, dim, dtype=torch.float64) for _ in range(3))
    bias = 30 * torch.randn(2, dim)
    rope = Rope(1e4 ** -torch.linspace(0, 1, dim // 2, dtype=torch.float64), torch.arange(n)[None])
    k = rope.rotate(k + bias[:, None])
    cache = dataclasses.replace(policy)
    cache.allocate(Shape(1, 2, dim, n, torch.float64, torch.device("cpu")))
    cache.expect_bias(bias, rope.frequencies)
    cache.use_reference()
    assert cache.regions.key_bias is not None
    tokens = [slice(i, i + 1) for i in range(n)]
    sequential = torch.cat(
        [cache.attend(q[:, :, i], k[:, :, i], v[:, :, i], Chunk(torch.tensor([[i.start]])), rope) for i in tokens], 2
    )
    seen = policy.sees()
    assert seen is not None
    parallel = scoring.ParallelLayer(seen, bias).attend(q, k, v, None, rope)
    assert torch.allclose(parallel, sequential, rtol=0, atol=1e-9)


def test_the_parallel_form_keeps_the_bias_out_as_the_cache_does() -> None:
    model, tokens, policy = made(NORMS, True, torch.float64), text()[:184], SelectiveCache(SINK, WINDOW, 4, 4)
    parallel = scoring.read_parallel(model, policy, tokens)
    sequential = scoring.read_sequential(model, policy, tokens, reference=True)
    assert (model.head(parallel) - model.head(sequential)).abs().max() < 1e-6
    fast = scoring.read_sequential(model, policy, tokens)
    assert (model.head(parallel) - model.head(fast)).abs().max() < 1e-2
