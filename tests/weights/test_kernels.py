"""The Triton products of weights in 8 and 4 bits against float64, and the machine code that they become."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_reference import BF16, DEVICES, FP16, FP32, counts, error, poison  # chooses the interpreter first
from torch import Tensor

from engine.kernels import PYTORCH, quantised
from engine.kernels.epilogue import Around
from engine.kernels.gemv_int4 import Plan as Int4Plan
from engine.kernels.gemv_int4 import parts_of, run_int4
from engine.kernels.gemv_integers import Plan, run_integers
from engine.kernels.small_gemm_int4 import run_tokens_int4, tokens_int4_fit
from engine.kernels.small_gemm_integers import Plan as TokensPlan
from engine.kernels.small_gemm_integers import run_tokens_integers
from engine.kernels.triton_backend import TRITON
from weights.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight

KINDS = st.sampled_from(((8, 0), (8, 32), (8, 64), (8, 128), (4, 32), (4, 64), (4, 128)))  # bits, group
LANES = ["#ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [8, 4]"]  # what the assembly traps without
CLOSE = {FP32: 1e-5, FP16: 3e-3, BF16: 2e-2}  # relative to the whole output: a few roundings of its dtype


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


def weight(n: int, k: int, group: int, device: str, bits: int = 0) -> QuantizedWeight:
    """bits: 0: 4 where there are groups."""
    made = QuantizedLinear(n, k, bits or (4 if group else 8), group, False, FP32)
    w = torch.randn(n, k) / k**0.5
    w[0] = 0
    w[-1, : k // 2] = 0.25
    made.fill(w, 0)
    made.to(device)
    return made.weight


def check(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert error(got, want) < CLOSE[dtype]


@pytest.mark.parametrize(
    ("dtype", "bits", "group"),
    [(BF16, 8, 0), (BF16, 8, 64), (BF16, 4, 128), (FP16, 4, 64), (FP16, 4, 32), (FP16, 8, 32), (FP32, 4, 128)],
)
@pytest.mark.parametrize("n_token", [1, 9, 65])  # each has its way, and float32 a library's
def test_linear(n_token: int, dtype: torch.dtype, bits: int, group: int, device: str) -> None:
    """Groups and chunks that do not divide a row; more rows than a program's."""
    for k, n in ((176, 18),) if n_token < 65 else ((100, 6),):
        for swiglu in (False, True):
            w = weight(2 * n if swiglu else n, k, group, device, bits)
            x, norm, residual = torch.randn(n_token, k), 1 + torch.rand(k), torch.randn(n_token, n)
            x[:, 1] *= 30  # an outlier channel
            around: list[dict[str, Tensor]] = [{}, {"norm": norm, "residual": residual}]
            if not swiglu:
                around.append({"norm": norm, "bias": torch.randn(n)})
            for given_ones in around:
                cast = {name: t.to(dtype) for name, t in {"x": x, **given_ones}.items()}
                dense = w.dense(torch.float64).cpu()
                exact = {name: t.double() for name, t in cast.items()}
                want = PYTORCH.linear(weight=dense, **exact, eps=1e-5, swiglu=swiglu)
                poison(device)
                on = {name: t.to(device) for name, t in cast.items()}
                check(TRITON.linear(weight=w, **on, eps=1e-5, swiglu=swiglu), want, dtype)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("n_token", [1, 5])
def test_qkv(n_token: int, group: int, device: str) -> None:
    """RoPE in the product's launch, and after it where heads have norms."""
    head_dim, n_head, n_qk, k = 16, 3, 5, 128
    w = weight(7 * head_dim, k, group, device)
    x, norm = torch.randn(n_token, k).to(BF16), torch.rand(k).to(BF16)
    angle = torch.rand(n_token, head_dim // 2)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat((-angle.sin(), angle.sin()), 1)
    heads = torch.rand(head_dim).to(BF16), torch.rand(head_dim).to(BF16), 1e-5
    for norms in (None, heads):
        wide = None if norms is None else (norms[0].double(), norms[1].double(), norms[2])
        dense = w.dense(torch.float64).cpu()
        want = PYTORCH.qkv(x.double(), dense, None, norm.double(), 1e-5, cos.double(), sin.double(), n_head, n_qk, wide)
        there = None if norms is None else (norms[0].to(device), norms[1].to(device), norms[2])
        on = [t.to(device) for t in (norm, cos, sin)]
        got = TRITON.qkv(x.to(device), w, None, on[0], 1e-5, on[1], on[2], n_head, n_qk, there)
        check(got, want, BF16)


@given(
    st.integers(1, 40), st.integers(1, 20), KINDS, st.sampled_from((1, 2, 4)), st.integers(1, 3),
    st.sampled_from((1, 2)),
)  # fmt: skip
@settings(deadline=None, max_examples=8)
def test_any_plan_of_one_token(n: int, parts: int, kind: tuple[int, int], units: int, steps: int, warps: int) -> None:
    k = 16 * parts
    w, x = weight(n, k, kind[1], "cpu", kind[0]), torch.randn(1, k).to(FP16)
    if torch.cuda.is_available():
        pytest.skip("the interpreter's")
    got = run_integers(x, w, Around(residual=torch.ones(1, n).to(FP16)), Plan(units, steps, warps))
    check(got, x.double() @ w.dense(torch.float64).T + 1, FP16)


@given(st.integers(16, 60), st.integers(1, 70), st.sampled_from((1, 2)), st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=5)
def test_any_plan_on_matrix_units(n: int, sixteenths: int, split: int, steps: int, swiglu: bool) -> None:
    """Rows that no 16 divide, and rows of elements that no group, part or block divides."""
    k = 16 * sixteenths
    if torch.cuda.is_available():
        pytest.skip("the interpreter's")
    w, x, norm = weight(2 * n if swiglu else n, k, 128, "cpu"), 3 * torch.randn(1, k).to(FP16), torch.rand(k).to(FP16)
    p = Int4Plan(1 if swiglu else split, steps, min(4, parts_of(k)))
    got = run_int4(x, w, Around(norm=norm, eps=1e-5, swiglu=swiglu), p)
    dense = w.dense(torch.float64)
    check(got, PYTORCH.linear(x.double(), dense, norm=norm.double(), eps=1e-5, swiglu=swiglu), FP16)


@given(
    st.integers(1, 20), st.integers(1, 40), KINDS.filter(lambda kind: kind != (4, 32)), st.integers(1, 10),
    st.sampled_from((1, 2)),
)  # fmt: skip
@settings(deadline=None, max_examples=8)
def test_any_plan_of_a_few_tokens(n: int, parts: int, kind: tuple[int, int], n_token: int, warps: int) -> None:
    k, (bits, group) = 16 * parts, kind
    w, x = weight(n, k, group, "cpu", bits), torch.randn(n_token, k).to(FP16)
    if torch.cuda.is_available():
        pytest.skip("the interpreter's")
    p = TokensPlan(16, warps, group // 4 if bits == 4 else group or 32, 2)
    check(run_tokens_integers(x, w, Around(), p), x.double() @ w.dense(torch.float64).T, FP16)


@given(
    st.integers(16, 60), st.integers(1, 50), st.integers(2, 8), st.integers(1, 4), st.booleans(), st.booleans()
)  # fmt: skip
@settings(deadline=None, max_examples=5)
def test_any_rows_of_a_few_tokens_on_matrix_units(
    n: int, sixteenths: int, n_token: int, steps: int, swiglu: bool, normed: bool
) -> None:
    """Rows that no 16 divide, of elements that no group or part divides; an odd number of groups is refused."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter's")
    k = 16 * sixteenths
    dtype = BF16 if normed else FP16
    w, x = weight(2 * n if swiglu else n, k, 128, "cpu"), (3 * torch.randn(n_token, k)).to(dtype)
    norm = 1 + torch.rand(k).to(dtype) if normed else None
    around = Around(norm=norm, eps=1e-5, swiglu=swiglu)
    if -(-k // 128) % 2:
        assert not tokens_int4_fit(x, w, around)
        return
    got = run_tokens_int4(x, w, around, steps)
    dense, wide = w.dense(torch.float64), None if norm is None else norm.double()
    check(got, PYTORCH.linear(x.double(), dense, norm=wide, eps=1e-5, swiglu=swiglu), dtype)


@pytest.mark.parametrize("n_token", [2, 8])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_few_tokens_on_matrix_units(n_token: int, dtype: torch.dtype, device: str) -> None:
    """RoPE, SwiGLU, norm and residual in the launch, by the plan, on a card too; several parts of a row."""
    head_dim, n_head, n_qk, k = 16, 2, 3, 768
    x, norm = torch.randn(n_token, k).to(dtype), (1 + torch.rand(k)).to(dtype)
    x[:, 1] *= 30
    angle = torch.rand(n_token, head_dim // 2)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat((-angle.sin(), angle.sin()), 1)
    w = weight(4 * head_dim, k, 128, device)
    dense, exact = w.dense(torch.float64).cpu(), (x.double(), norm.double())
    x, norm = x.to(device), norm.to(device)
    poison(device)
    want = PYTORCH.qkv(exact[0], dense, None, exact[1], 1e-5, cos.double(), sin.double(), n_head, n_qk, None)
    got = TRITON.qkv(x, w, None, norm, 1e-5, cos.to(device), sin.to(device), n_head, n_qk, None)
    check(got, want, dtype)
    want = PYTORCH.linear(exact[0], dense, norm=exact[1], eps=1e-5, swiglu=True)
    check(TRITON.linear(x, w, norm=norm, eps=1e-5, swiglu=True), want, dtype)
    residual = torch.randn(n_token, len(w)).to(dtype)
    want = PYTORCH.linear(exact[0], dense, residual=residual.double())
    check(TRITON.linear(x, w, residual=residual.to(device)), want, dtype)


@pytest.mark.parametrize("bad", ["nan", "-inf"])
@pytest.mark.parametrize(("n", "group"), [(9, 0), (9, 128), (20, 128)])  # the last on matrix units
def test_what_is_no_number_stays_none(n: int, group: int, bad: str, device: str) -> None:
    """The terms of an activation are integers: they alone would hide it."""
    w = weight(n, 256, group, device)
    x = torch.randn(1, 256).to(BF16)
    x[0, 100] = float(bad)
    assert not TRITON.linear(x.to(device), w).isfinite().any()
    zeros = TRITON.linear(torch.zeros(1, 256, dtype=BF16, device=device), w)
    assert (zeros == 0).all()


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 64), (4, 32), (4, 128)])
def test_rows_made_dense(bits: int, group: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(37, 300, group, device, bits)
    out = torch.full((37, 300), float("nan"), device=device)
    quantised.make_dense(w, out)
    assert torch.allclose(out, w.dense(FP32), atol=1e-6)
    x = torch.randn(70, 300, device=device)
    monkeypatch.setattr("weights.modules.DENSE_ELEMENTS", 300 * 10)
    assert error(quantised.product_of_many(x, w, None), x.double() @ w.dense(torch.float64).T) < 1e-5


@pytest.mark.parametrize("group", [0, 64])
def test_rows_of_an_embedding(group: int, device: str) -> None:
    made = QuantizedEmbedding(10, 96, group, FP32)
    made.fill(torch.randn(10, 96), 0)
    made.to(device)
    tokens = torch.tensor([9, 0, 3], device=device)
    assert torch.allclose(TRITON.embed(tokens, made.weight, FP32), made(tokens), atol=1e-6)
    assert torch.allclose(PYTORCH.embed(tokens, made.weight, FP32), made(tokens))


def test_views_of_rows_are_the_rows() -> None:
    for bits in (4, 8):
        w = weight(20, 96, 32, "cpu", bits)
        assert torch.equal(w.rows(5, 12).dense(FP32), w.dense(FP32)[5:12])
    assert replace(w, scale=w.scale * 2).dense(FP32).norm() > w.dense(FP32).norm()


@pytest.mark.machine_code
def test_machine_code_of_one_token() -> None:
    """16 bytes a load, nothing spilled, no conversion of an integer before it is multiplied: dp4a's are all there."""
    found = counts(
        "compile_integers_kernel",
        [
            [4096, 4, 64],
            [4096, 4, 128, True],
            [14336, 4, 128, False, False],
            [4096, 8, 0],
            [14336, 8, 0],
            [4096, 8, 64],
            [14336, 8, 128, True],
        ],
    )
    for one in found:
        assert one["spills"] == one["stack"] == one["byte_loads"] == one["float64"] == 0
        assert one["wide_loads"] >= one["rows"] and one["dp4a"] % 2 == 0 and one["dp4a"] > 0
        assert one["conversions"] <= 4 * one["rows"]


@pytest.mark.machine_code
def test_machine_code_on_matrix_units() -> None:
    """Operands are in the lanes that the instruction wants: the kernel would trap. 16 bytes a load, nothing spilled."""
    shapes = [[14336, 4096, True], [3072, 4096, False, 128], [300, 1200]]
    for one in counts("compile_int4_kernel", shapes):
        assert one["lanes"] == LANES
        assert one["spills"] == one["stack"] == one["byte_loads"] == one["float64"] == 0
        assert one["IMMA"] == 4 * one["blocks"] and one["dp4a"] == 0
        assert one["wide_loads"] >= 4 * one["blocks"]  # two rows, before the loop and in it


@pytest.mark.machine_code
def test_machine_code_of_a_few_tokens_on_matrix_units() -> None:
    """As of one: 16 bytes a load, nothing spilled; a program's 16 warps fill an SM."""
    shapes: list[list[object]] = [
        [4096, True],
        [4096, False, 128],
        [4096, False, 0, False],
        [1200, False, 0, False, "fp16"],
    ]
    for one in counts("compile_tokens_int4_kernel", shapes):
        assert one["lanes"] == LANES
        assert one["spills"] == one["stack"] == one["byte_loads"] == one["float64"] == one["conversions"] == 0
        assert one["HMMA"] == 32  # a group's offset, and its product: 8 each
        assert one["wide_loads"] >= 8 + 4 + 8  # tiles before the wait, in the loop, tokens


@pytest.mark.machine_code
def test_machine_code_of_a_few_tokens() -> None:
    """Integers reach the matrix units from registers: through asynchronous copies and ldmatrix, never byte by byte."""
    kinds = [[4096, 4, 128], [4096, 4, 64], [4096, 8, 0], [4096, 8, 0, 16], [4096, 8, 64], [4096, 8, 32]]
    for one in counts("compile_tokens_integers_kernel", kinds):
        assert one["spills"] == one["stack"] == one["byte_loads"] == 0
        assert one["HMMA"] > 0 and one["copies"] > 0 and one["conversions"] == 0
