"""The fused step of a decode: its matrix products against float64, and the whole of it against the model."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from families import FAMILIES, make
from kernel_reference import BF16, DEVICES, FP16, FP32, counts, error, poison  # chooses the interpreter first
from torch import Tensor

from checkpoint import load_model, open_checkpoint
from engine import FusedStep
from engine.kernels import gemv as triton_linear
from engine.kernels import pytorch as eager
from engine.kernels import triton_backend as triton_kernels
from engine.kernels.epilogue import Around, Turn
from engine.kernels.small_gemm import Plan, padded, plan_tokens, run_tokens
from kv_cache import ModelCache
from model import CONFIGS
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache

HOPPER_SHARED = 232_448  # bytes that a program may have
CLOSE = {FP32: 1e-5, FP16: 1.5e-3, BF16: 1.2e-2}  # relative to the whole output: a few roundings of its dtype


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("n_token", [1, 2, 9, 17])  # each has its way: one, padded to 8 or 16, a library's product
@pytest.mark.parametrize(("k", "n"), [(64, 12), (672, 33)])  # K a power of two, or not
def test_linear(dtype: torch.dtype, n_token: int, k: int, n: int, device: str) -> None:
    for swiglu in (False, True):
        rows = 2 * n if swiglu else n
        x, norm, residual = torch.randn(n_token, k), 1 + torch.rand(k), torch.randn(n_token, n)
        x[:, 1] *= 30  # an outlier channel
        weight, bias = torch.randn(rows, k) / k**0.5, torch.randn(rows)
        around: list[dict[str, Tensor]] = [{}, {"norm": norm}, {"residual": residual}]
        around += [{"norm": norm, "bias": bias}, {"residual": residual, "bias": bias}]
        for given in around if not swiglu else around[:3]:
            cast = {name: t.to(dtype) for name, t in {"x": x, "weight": weight, **given}.items()}
            want = eager.linear(**{name: t.double() for name, t in cast.items()}, eps=1e-5, swiglu=swiglu)
            poison(device)
            got = triton_kernels.linear(**{name: t.to(device) for name, t in cast.items()}, eps=1e-5, swiglu=swiglu)
            assert got.dtype == dtype
            assert error(got, want) < CLOSE[dtype], (swiglu, list(given))


@pytest.mark.parametrize("n_token", [1, 3, 17])
def test_a_norm_before_float16_runs_out(n_token: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """g * x alone is beyond its 65,504: the norm may not be left for after the product. The interpreter computes in
    float32, so there it is looked at who makes the norm."""
    x, norm, weight = torch.randn(n_token, 64), torch.full((64,), 8.0), torch.randn(24, 64) / 8
    x[:, 5] = 3e4
    seen: list[Around] = []
    run_tokens = triton_linear.run_tokens

    def spy(x: Tensor, weight: Tensor, around: Around, plan: Any) -> Tensor:
        seen.append(around)
        return run_tokens(x, weight, around, plan)

    monkeypatch.setattr(triton_linear, "run_tokens", spy)
    x, norm, weight = (t.to(FP16) for t in (x, norm, weight))
    want = eager.linear(x.double(), weight.double(), norm=norm.double(), eps=1e-5)
    cos, sin = torch.ones(n_token, 8), torch.zeros(n_token, 8)
    there = [t.to(device) for t in (x, weight, norm, cos, sin)]
    got = triton_kernels.linear(there[0], there[1], norm=there[2], eps=1e-5)
    qkv = triton_kernels.qkv(there[0], there[1], None, there[2], 1e-5, there[3], there[4], 1, 2, None)
    for y in (got, qkv.flatten(1)):
        assert error(y, want) < CLOSE[FP16]
    assert len(seen) == (2 if n_token == 3 else 0) and all(around.norm is None for around in seen)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("head_dim", "normed"), [(64, False), (96, False), (128, True)])
def test_rotate_qk(dtype: torch.dtype, head_dim: int, normed: bool, device: str) -> None:
    qkv, (cos, sin) = torch.randn(3, 7, head_dim).to(dtype), torch.randn(2, 3, head_dim)
    norms = (torch.rand(head_dim).to(dtype), torch.rand(head_dim).to(dtype), 1e-6) if normed else None
    wide = None if norms is None else (norms[0].double(), norms[1].double(), 1e-6)
    want, got = qkv.double(), qkv.to(device)
    eager.rotate_qk(want, 4, 6, cos.double(), sin.double(), wide)
    there = None if norms is None else (norms[0].to(device), norms[1].to(device), 1e-6)
    triton_kernels.rotate_qk(got, 4, 6, cos.to(device), sin.to(device), there)
    assert (got.double().cpu() - want).norm() / want.norm() < CLOSE[dtype]
    assert torch.equal(got[:, 6].cpu(), qkv[:, 6])  # v is left alone


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("n_token", [1, 2, 3, 8, 16, 17])
@pytest.mark.parametrize(("head_dim", "kind"), [(64, "bias"), (24, "plain"), (32, "norms")])
def test_qkv(dtype: torch.dtype, n_token: int, head_dim: int, kind: str, device: str) -> None:
    """Four heads of q, two of k and one of v, which does not turn; a head is not always a power of 2."""
    x, norm = torch.randn(n_token, 96), 1 + torch.rand(96)
    x[:, 1] *= 30
    weight, (cos, sin) = torch.randn(7 * head_dim, 96) / 10, torch.randn(2, n_token, head_dim)
    bias = torch.randn(7 * head_dim) if kind == "bias" else None
    q_norm, k_norm = torch.rand(2, head_dim).to(dtype)
    given = [t if t is None else t.to(dtype) for t in (x, weight, bias, norm)]

    def made(kernels: ModuleType, *, at: torch.dtype | None, where: str) -> Tensor:
        """By the twin in float64, or by the kernels as they are used."""
        own = [t if t is None else t.to(where, at or t.dtype) for t in given]
        turn = [t.to(where, at or t.dtype) for t in (cos, sin)]
        norms = tuple(t.to(where, at or t.dtype) for t in (q_norm, k_norm))
        return kernels.qkv(*own, 1e-5, *turn, 4, 6, (*norms, 1e-6) if kind == "norms" else None)

    want = made(eager, at=torch.float64, where="cpu")
    poison(device)
    got = made(triton_kernels, at=None, where=device)
    assert got.dtype == dtype and got.shape == (n_token, 7, head_dim)
    for heads in (slice(0, 4), slice(4, 6), slice(6, 7)):
        assert error(got[:, heads], want[:, heads]) < 1.5 * CLOSE[dtype]


PLANS = [Plan(16, 2, 16, 2), Plan(32, 4, 32, 3), Plan(64, 2, 64, 4), Plan(32, 1, 64, 3), Plan(16, 8, 32, 2)]


@pytest.mark.parametrize("p", PLANS, ids=str)
@pytest.mark.parametrize("n_token", [2, 8, 11, 16])
@pytest.mark.parametrize(("k", "n_head"), [(128, 3), (200, 5)])  # whole blocks of every plan, or not
def test_every_plan_of_a_product_for_a_few_tokens(p: Plan, n_token: int, k: int, n_head: int, device: str) -> None:
    head_dim = 24
    n = n_head * head_dim
    x, norm, residual = torch.randn(n_token, k), 1 + torch.rand(k), torch.randn(n_token, n)
    x[:, 1] *= 30
    turn = Turn(torch.randn(n_token, head_dim), torch.randn(n_token, head_dim), n_head - 1)
    narrow, bias = torch.randn(n, k) / k**0.5, torch.randn(n)
    cases = [
        (narrow, Around(bias, norm, 1e-5, turn=turn)),
        (torch.randn(2 * n, k) / k**0.5, Around(None, norm, 1e-5, True, residual)),
        (narrow, Around(bias, residual=residual)),
    ]
    for weight, around in cases:
        given = [None if t is None else t.to(BF16) for t in (x, weight, around.bias, around.norm, around.residual)]
        wide = [None if t is None else t.double() for t in given]
        want = eager.linear(*wide[:4], 1e-5, around.swiglu, wide[4])
        if around.turn is not None:
            eager.rotate_qk(want.view(n_token, -1, head_dim), 1, n_head - 1, turn.cos.double(), turn.sin.double(), None)
        there = [None if t is None else t.to(device) for t in given]
        moved = Turn(turn.cos.to(device), turn.sin.to(device), turn.n_head) if around.turn is not None else None
        poison(device)
        got = run_tokens(there[0], there[1], Around(*there[2:4], 1e-5, around.swiglu, there[4], moved), p)
        assert error(got, want) < CLOSE[BF16], around._fields


def test_plans_fit_what_a_program_may_have() -> None:
    """Of shared memory, on small and large GPUs, for every product of the models here."""
    for config in CONFIGS.values():
        heads = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        for n_row, n_token, kib in product(
            (heads, config.dim, 2 * config.ffn_dim, config.vocab_size), (2, 8, 9, 16), (99, 163, 227)
        ):
            p = plan_tokens(n_row, n_token, 132, kib << 10)
            assert p.shared(padded(n_token)) <= kib << 10
            assert p.stages >= 3 and p.rows >= 16 and p.slice >= 16


SHAPES: list[dict[str, int | bool | str]] = [  # Llama 3.1 8B's, and one with a bias
    {"n_row": 6144, "k": 4096, "head_dim": 128, "norm": True},
    {"n_row": 4096, "k": 4096, "add": True},
    {"n_row": 28672, "k": 4096, "norm": True, "swiglu": True},
    {"n_row": 4096, "k": 14336, "add": True},
    {"n_row": 128256, "k": 4096, "norm": True, "dtype": "fp16"},
    {"n_row": 4608, "k": 3584, "head_dim": 128, "norm": True, "bias": True},
]


@pytest.mark.machine_code
@pytest.mark.parametrize("n_token", [8, 16])
def test_products_for_a_few_tokens_compile_without_spills(n_token: int) -> None:
    """Their weights must be copied asynchronously, and their first ones asked for before the wait."""
    shapes = [shape | {"n_token": n_token} for shape in SHAPES]
    for shape, found in zip(SHAPES, counts("compile_tokens_kernel", shapes), strict=True):
        assert found["spills"] == 0 and found["stack"] == 0, shape
        assert found["copies"] > 0 and found["HMMA"] > 0 and found["CCTL"] > 0, shape
        assert found["shared"] <= HOPPER_SHARED, shape


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [FullCache(), SelectiveCache(2, 2), SinkWindowCache(2, 2)], ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_the_fused_step_is_the_model(n: int, family: str, policy: KVCache, tmp_path: Path, device: str) -> None:
    """A ragged batch, decoded: by the twins and by the kernels, at float32."""
    make(family, tmp_path)
    checkpoint = open_checkpoint(tmp_path, None)
    config = checkpoint.config
    model = load_model(checkpoint, torch.device(device), torch.float32)
    shape = Shape(n, config.n_kv_head, config.head_dim, 20, torch.float32, torch.device(device))
    tokens = torch.randint(97, (10, n, 1), device=device)
    outs = []
    with torch.inference_mode():
        for kernels in (None, eager.PYTORCH, triton_kernels.TRITON):
            if kernels is triton_kernels.TRITON and device == "cpu" and family not in ("qwen2", "qwen3"):
                continue  # a bias, a norm of q and k; the interpreter takes its time
            cache = ModelCache(policy, config.n_layer, shape)
            for b, length in enumerate((3, 7)[:n]):
                model(tokens[:length, b].T, cache.sequence(b))
            step = (lambda t, c: model(t, c)[:, -1]) if kernels is None else FusedStep(model, kernels)
            outs.append(torch.stack([step(t, cache) for t in tokens[:4]]))
    assert (outs[1] - outs[0]).abs().max() < 1e-4
    # a rounding that differs in the last bit may turn an integer of the middle into its neighbour
    most = 5e-2 if device == "cuda" and isinstance(policy, SelectiveCache) else 1e-4
    assert (outs[-1] - outs[0]).abs().max() < most


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("n", [1, 97, 512, 20_001])
def test_greedy(dtype: torch.dtype, n: int, device: str) -> None:
    """The largest of each row and of equals the first; -1 where a row is not finite, wherever that stands."""
    logits = torch.randn(8, n + 3).to(dtype)[:, :n]  # rows further apart than they are long
    logits[1, n // 3 :] = 9.0
    logits[2] = -100.0  # all alike, and below what is beyond the end
    for row, bad in ((3, "nan"), (4, "inf"), (5, "-inf")):
        logits[row, n - 1] = float(bad)
    logits[6, 0] = float("nan")
    logits[7] = -1.0
    logits[7, n // 2], logits[7, -1] = -0.0, 0.0  # equals
    poison(device)
    got = triton_kernels.greedy(logits.to(device)).cpu()
    want = torch.where(logits.isfinite().all(-1), (logits == logits.amax(-1, keepdim=True)).int().argmax(-1), -1)
    assert got.tolist() == want.tolist() and want[1] == n // 3 and want[7] == n // 2
    assert eager.greedy(logits).tolist() == want.tolist()
    for kernels in (triton_kernels, eager):  # the vocabulary in two parts
        x = logits.to(device if kernels is triton_kernels else "cpu")
        parts = [(x[:, : n // 3], 0), (x[:, n // 3 :], n // 3)][n < 3 :]
        keys = torch.stack([kernels.best(part, start) for part, start in parts]).amax(0)
        assert kernels.chosen(keys).tolist() == want.tolist()
