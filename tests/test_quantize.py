"""int8, symmetric, per token and head: the definition, and what must not go wrong at its edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize import dequantize, quantize, require_finite


@given(st.integers(0, 10_000), st.sampled_from([1e-30, 1e-6, 1.0, 1e4, 1e30]), st.sampled_from([2, 64, 96]))
def test_the_largest_becomes_127_and_no_error_is_past_half_a_step(seed: int, size: float, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, dim, generator=generator) * size
    x[0, :, 0] *= 50  # an outlier channel
    integers, scale = quantize(x)
    absmax = x.abs().amax(-1)
    assert torch.equal(scale, absmax / 127)
    assert torch.equal(integers.abs().amax(-1), torch.full((3, 4), 127, dtype=torch.int8))
    error = (dequantize(integers, scale).double() - x.double()).abs()
    assert (error <= 0.5001 * scale.double()[..., None]).all()


def test_a_zero_vector_has_scale_one_and_comes_back_as_zero() -> None:
    integers, scale = quantize(torch.zeros(2, 8))
    assert torch.equal(scale, torch.ones(2)) and not dequantize(integers, scale).any()


def test_half_precision_is_quantised_in_float32() -> None:
    x = torch.randn(16, 64).bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(quantize(x), quantize(x.float()), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_vector_spoils_nobody_else(bad: float) -> None:
    x = torch.randn(5, 16)
    good = quantize(x)
    x[2, 3] = bad
    ints, scale = quantize(x)
    others = [0, 1, 3, 4]
    assert torch.equal(ints[others], good[0][others]) and torch.equal(scale[others], good[1][others])
    assert not torch.isfinite(scale[2])
    with pytest.raises(ValueError, match="the key holds a value that is not finite"):
        require_finite(x, "the key")
