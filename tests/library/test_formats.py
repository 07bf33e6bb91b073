"""int8, symmetric, per token and head: the definition, and what must not go wrong at its edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selective_kv.formats import Format, dequantize, dequantize4, hadamard, quantize, quantize4, require_finite, rotate


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


@given(st.integers(0, 10_000), st.sampled_from([1, 2]), st.floats(1e-3, 1e3))
def test_four_bits_are_at_most_half_a_step_off(seed: int, n_group: int, size: float) -> None:
    """With an outlier channel, a sink-like vector, an offset far from zero and a constant group."""
    torch.manual_seed(seed)
    x = torch.randn(6, 64) * size
    x[:, 3] *= 20
    x[1] *= 0.01
    x[2] += 5 * size
    x[3, :32] = size
    packed, scales = quantize4(x, n_group)
    assert packed.shape == (6, 32) and packed.dtype == torch.uint8
    assert scales.shape == (6, n_group, 2) and scales.dtype == torch.float16
    step = scales[..., 0].float().repeat_interleave(64 // n_group, 1)
    # what is beyond half a step is the rounding of scale and base to float16
    slack = x.abs().amax(1, keepdim=True) * 2**-10
    assert ((dequantize4(packed, scales) - x).abs() <= 0.5001 * step + slack).all()


def test_two_integers_share_a_byte_as_documented() -> None:
    """Element i in the low half of byte i, element i + head_dim / 2 in the high half."""
    x = torch.arange(16).float().repeat(4)[None]  # 0 .. 15 four times: scale 1, base 0
    packed, scales = quantize4(x, 1)
    assert scales.tolist() == [[[1.0, 0.0]]]
    assert packed[0].tolist() == [i % 16 + 16 * (i % 16) for i in range(32)]
    assert torch.equal(dequantize4(packed, scales), x)


def test_a_constant_vector_comes_back() -> None:
    packed, scales = quantize4(torch.full((2, 64), 3.0), 2)
    assert torch.equal(dequantize4(packed, scales), torch.full((2, 64), 3.0))


def test_a_rotation_keeps_products_and_is_its_own_inverse() -> None:
    q, k = torch.randn(2, 5, 64)
    assert torch.allclose(rotate(rotate(k)), k, atol=1e-5)
    assert torch.allclose(rotate(q) @ rotate(k).T, q @ k.T, atol=1e-4)
    h = hadamard(8, torch.device("cpu"))
    assert torch.equal(h @ h.T, 8 * torch.eye(8)) and torch.equal(h, h.T)


def test_a_rotation_saves_keys_with_an_outlier_channel() -> None:
    """What it is for: a channel thirty times the others takes most of 16 levels. Gaussian data would not show it."""
    torch.manual_seed(0)
    k = torch.randn(200, 128)
    k[:, 7] = 30 + torch.randn(200)
    rest = torch.arange(128) != 7
    errors = [
        (form.dequantize(*form.quantize(k)) - k)[:, rest].norm() / k[:, rest].norm()
        for form in (Format(4), Format(4, 0, True))
    ]
    assert errors[1] < errors[0] / 2


def test_bits_per_element_count_scales_and_bases() -> None:
    assert Format().bits_per_element(128) == 8.25
    assert Format(4).bits_per_element(128) == 4.25 and Format(4, 64).bits_per_element(128) == 4.5
    for form in (Format(), Format(4), Format(4, 64)):
        stored = form.quantize(torch.randn(3, 5, 128))
        room = form.room((3, 5), 128, torch.device("cpu"))
        assert [(t.shape, t.dtype) for t in stored] == [(t.shape, t.dtype) for t in room]
        assert sum(t.nbytes for t in stored) * 8 / (15 * 128) == form.bits_per_element(128)


def test_a_format_refuses_what_it_is_not_for() -> None:
    with pytest.raises(ValueError, match="power of two and at least 64, not 96"):
        Format(4).check(96)
    with pytest.raises(ValueError, match="must be the head_dim, 128, or half of it, 64, not 32"):
        Format(4, 32).check(128)
    Format().check(96)
