"""The rotation in registers, and what an append leaves for after its wait."""

from __future__ import annotations

import pytest
import torch
from kernel_reference import BF16, DEVICES, FORMATS, FP32, HAS_GPU, counts, held, same_rows, settle, tl, tokens, triton
from torch import Tensor

from selective_kv.formats import Format, hadamard
from selective_kv.kernels import triton_backend as kernels
from selective_kv.kernels.hadamard import butterfly, butterfly_halves


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


@triton.jit
def rotation_kernel(x, whole, halves, SIZE: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """x: [N, SIZE], its columns turned as one vector and as two halves of one."""
    HALF: tl.constexpr = SIZE // 2
    n = tl.arange(0, N)[None, :] * SIZE
    d, half = tl.arange(0, SIZE)[:, None] + n, tl.arange(0, HALF)[:, None] + n
    tl.store(whole + d, butterfly(tl.load(x + d).to(tl.float32), SIZE, N))
    low, high = tl.load(x + half).to(tl.float32), tl.load(x + half + HALF).to(tl.float32)
    low, high = butterfly_halves(low, high, HALF, N)
    tl.store(halves + half, low)
    tl.store(halves + half + HALF, high)


@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_butterfly_is_the_matrix(head_dim: int, n: int, device: str) -> None:
    x = torch.randn(n, head_dim)
    x[:, 1] *= 100  # an outlier
    want = x.double() @ hadamard(head_dim, torch.device("cpu")).double()
    out = [torch.empty(n, head_dim, device=device) for _ in range(2)]
    for n_warp in (1, 2, 4) if HAS_GPU else (1,):
        rotation_kernel[(1,)](x.to(device), *out, SIZE=head_dim, N=n, num_warps=n_warp)
        for got in out:
            assert (got.double().cpu() - want).abs().max() < 1e-6 * want.abs().max()


def test_one_number_in_a_vector_shows_a_column_of_the_matrix(device: str) -> None:
    """Exactly: a matrix of 1 and -1 needs no rounding."""
    eye = torch.eye(64).to(device)
    out = [torch.empty(64, 64, device=device) for _ in range(2)]
    rotation_kernel[(1,)](eye, *out, SIZE=64, N=64)
    for got in out:
        assert torch.equal(got.cpu(), hadamard(64, torch.device("cpu")))


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("window", [1, 2, 5])
def test_steps_of_append_and_attention(window: int, formats: tuple[Format, Format], device: str) -> None:
    """As in decoding, back to back: on a GPU an append reads its slot while the launch before is at work."""
    head_dim, sink, n = 64, 2, 40 if HAS_GPU else 12
    k, v = tokens(2, 2, n, head_dim, BF16 if HAS_GPU else FP32)
    regions = held(k, v, [0, 0], sink, window, n - sink - window, device, formats)
    q, new = torch.randn(2, 4, head_dim).to(device, k.dtype), torch.stack((k, v)).to(device)
    lengths = torch.zeros(2, dtype=torch.int64, device=device)
    outs: list[Tensor] = []
    for step in range(n):
        kernels.append(regions, new[0, :, :, step], new[1, :, :, step], lengths)
        if HAS_GPU:  # the interpreter takes its time
            outs.append(kernels.decode_attention(q, regions, lengths))
        lengths += 1
        settle(device)
    expected = held(k, v, [n, n], sink, window, n - sink - window, "cpu", formats)
    for b in range(2):
        same_rows(regions, expected, b, n - sink - window)
    assert torch.equal(regions.k.cpu(), expected.k) and torch.equal(regions.v.cpu(), expected.v)
    assert all(out.isfinite().all() for out in outs)


MOST = {  # instructions, as (head_dim, bits, scales per vector, early)
    (128, 0, 1, False): 150, (128, 8, 1, False): 450, (128, 4, 1, False): 850, (128, 4, 2, False): 900,
    (64, 4, 1, False): 650, (256, 4, 1, False): 1200, (128, 8, 1, True): 450,
}  # fmt: skip


@pytest.mark.machine_code
def test_what_an_append_leaves_for_after_its_wait() -> None:
    """A load and a store; no local memory, no shared memory. Compiled for Hopper, which needs no GPU."""
    for shape, found in zip(MOST, counts("compile_append_kernel", list(MOST)), strict=True):
        assert found["after_wait"] <= 10, shape
        assert (found["trigger"] > 0) != shape[3], shape
        assert found["local"] == found["stack"] == found["shared"] == 0, shape
        assert found["instructions"] < MOST[shape], (shape, found)
