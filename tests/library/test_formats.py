"""Tiles of keys and values as integers: the definition, and what must not go wrong at its edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selective_kv.formats import (
    BITS,
    TILE,
    Format,
    Tiles,
    hadamard,
    key_format,
    require_finite,
    rotate,
    rounded_down,
    rounded_up,
    value_format,
)

CPU = torch.device("cpu")
FORMATS = [
    make(bits, rotated) for make in (key_format, value_format) for bits in BITS[1:] for rotated in (False, True)
] + [Format(8, per_channel, rotated) for per_channel in (True, False) for rotated in (False, True)]  # fmt: skip
BARE = [Format(bits, per_channel, rotated=False) for bits in BITS for per_channel in (True, False)]


def keys(seed: int, head_dim: int, size: float = 1.0) -> Tensor:
    """Two heads of two tiles, with an outlier channel, an offset, a small and a large token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, TILE, head_dim, generator=generator)
    x[..., 0] *= 50
    x[..., 1] += 7
    x[..., 5, :] *= 0.01
    x[..., 9, :] *= 20
    return x * size


def steps(form: Format, tiles: Tiles, like: Tensor) -> Tensor:
    """The distance of two levels, for each element."""
    scale = tiles.scales[..., 0].float().unsqueeze(-2 if form.per_channel else -1).expand_as(like)
    if tiles.factors is not None:
        scale = scale * tiles.factors.float().transpose(-1, -2).flatten(-2)[..., None]
    return scale


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from(FORMATS + BARE), st.sampled_from([2, 8, 64, 96]),
    st.sampled_from([1e-20, 1e-6, 1.0, 7e4, 1e30]),
)  # fmt: skip
def test_no_element_is_more_than_half_a_step_off(seed: int, form: Format, head_dim: int, size: float) -> None:
    """At every size that a float32 has: scales are bfloat16, which has float32's range."""
    x = keys(seed, head_dim, size)
    tiles = form.quantize(x)
    turned = form.rotate(x)
    error = (form.stored(tiles) - turned).abs()
    slack = 1e-6 * turned.abs().amax((-1, -2), keepdim=True)
    assert (error <= 0.5001 * steps(form, tiles, error) + slack).all()
    back = (form.dequantize(tiles) - x).double().norm() / x.double().norm()
    assert back < {8: 0.02, 4: 0.3, 3: 0.6, 2: 1.5}[form.bits]


@given(st.integers(0, 10_000), st.sampled_from(BARE), st.sampled_from([1e-20, 1.0, 1e30]))
@settings(max_examples=20, deadline=None)
def test_levels_reach_to_the_elements_and_no_further(seed: int, form: Format, size: float) -> None:
    """But for the inset, at both ends."""
    x = keys(seed, 8, size)
    scale, base = form.quantize(x).scales.float().unbind(-1)
    axis = -2 if form.per_channel else -1
    low, high = x.amin(axis).double(), x.amax(axis).double()
    inset, top = form.inset * scale.double(), base.double() + scale.double() * (2**form.bits - 1)
    assert (base <= low + inset * (1 + 1e-6)).all() and (top + inset >= high * (1 - 1e-6) - 1e-45).all()
    # a bfloat16 has 8 significant bits
    assert (top - base <= (high - low - inset) * 1.01 + low.abs() / 100).all()


@pytest.mark.parametrize("form", BARE, ids=str)
def test_what_is_constant_comes_back_exactly(form: Format) -> None:
    x = torch.tensor([0.0, 3.0, -1.5, 0.0078125, -7e4, 2.0**100, -(2.0**-100), 1e-38]).bfloat16().float()
    tile = x.expand(TILE, 8) if form.per_channel else x.repeat(16)[:, None].expand(TILE, 8)
    assert torch.equal(form.dequantize(form.quantize(tile[None])), tile[None])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zeros_come_back_as_zeros(form: Format) -> None:
    x = torch.zeros(1, TILE, 64)
    assert torch.equal(form.dequantize(form.quantize(x)), x)
    x[0, :64] = torch.randn(64, 64)
    assert form.dequantize(form.quantize(x)).isfinite().all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_and_spoils_no_other_tile(form: Format, bad: float) -> None:
    x = keys(0, 64)
    good = form.quantize(x)
    x[1, 0, 3, 5] = bad
    tiles = form.quantize(x)
    for mine, clean in zip(tiles, good, strict=True):
        if mine is not None and clean is not None:
            assert torch.equal(mine[0], clean[0]) and torch.equal(mine[1, 1], clean[1, 1])
    assert not form.stored(tiles)[1, 0, 3, 5].isfinite()
    if not form.per_channel:  # nor another token
        rest = torch.arange(TILE) != 3
        assert torch.equal(tiles.scales[1, 0, rest], good.scales[1, 0, rest])
    with pytest.raises(ValueError, match="the key holds a value that is not finite"):
        require_finite(x, "the key")


@pytest.mark.parametrize("form", [Format(bits, True) for bits in BITS], ids=str)
def test_packing(form: Format) -> None:
    """Every integer comes back; and the bytes are where the module's opening says."""
    u = torch.randint(0, 2**form.bits, (3, TILE, 12), dtype=torch.uint8)
    codes = form.pack(u)
    assert codes.shape == (3, form.n_byte(12)) and torch.equal(form.unpack(codes), u)
    if form.bits == 3:
        planes = codes.view(3, 3, 32, 6)
        for row, i in ((0, 0), (3, 5), (31, 2)):
            for j in range(3):
                even, odd = (int(n) for n in u[1, row + 32 * j, 2 * i : 2 * i + 2])
                assert int(planes[1, j, row, i]) & 63 == even | odd << 3
            even, odd = (int(n) for n in u[1, row + 96, 2 * i : 2 * i + 2])
            upper = [int(planes[1, j, row, i]) >> 6 for j in range(3)]
            assert upper[0] | upper[1] << 2 | upper[2] << 4 == even | odd << 3
        return
    n_row = TILE * form.bits // 8
    for row, d, i in ((0, 0, 0), (3, 5, 8 // form.bits - 1), (n_row - 1, 2, 0)):
        byte = int(codes[1, row * 12 + d]) ^ (128 if form.bits == 8 else 0)
        assert (byte >> (form.bits * i)) % 2**form.bits == int(u[1, row + i * n_row, d])


def test_half_precision_is_quantised_in_float32() -> None:
    x = keys(0, 64).bfloat16()
    for form in FORMATS:
        for mine, theirs in zip(form.quantize(x), form.quantize(x.float()), strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)  # type: ignore[arg-type]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_to_bfloat16_has_a_direction(number: float) -> None:
    x = torch.tensor([number])
    for rounded, sign in ((rounded_down(x), 1), (rounded_up(x), -1)):
        assert rounded.isinf().any() or torch.equal(rounded.bfloat16().float(), rounded)
        assert (sign * (x.double() - rounded.double()) >= 0).all()
        near = x.bfloat16().float()
        assert (sign * (near.double() - x.double()) > 0).all() or torch.equal(rounded, near)


@pytest.mark.parametrize("head_dim", [2, 64, 96, 80])
def test_a_rotation_keeps_products_and_is_its_own_inverse(head_dim: int) -> None:
    q, k = torch.randn(2, 5, head_dim)
    assert torch.allclose(rotate(rotate(k)), k, atol=1e-5)
    assert torch.allclose(rotate(q) @ rotate(k).T, q @ k.T, atol=1e-4)
    h = hadamard(8, CPU)
    assert torch.equal(h @ h.T, 8 * torch.eye(8)) and torch.equal(h, h.T)


def test_a_channel_that_is_far_from_the_others_costs_the_others_nothing() -> None:
    """Keys with a bias (Qwen 2): a scale per token made int8 44% wrong; a scale per channel does not see it."""
    x = torch.randn(1, TILE, 128)
    far = x.clone()
    far[..., 7] += 300
    rest = torch.arange(128) != 7
    form = Format(8, per_channel=True, rotated=False)
    assert torch.equal(form.dequantize(form.quantize(far))[..., rest], form.dequantize(form.quantize(x))[..., rest])


def test_balancing_saves_127_tokens_from_a_large_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, TILE, 64)
    x[:, 17] *= 30
    rest = torch.arange(TILE) != 17
    errors = [
        (form.dequantize(form.quantize(x)) - x)[:, rest].norm() / x[:, rest].norm()
        for form in (Format(4, True, True, balanced=False), key_format(4))
    ]
    assert errors[1] < errors[0] / 3


def test_bits_per_element_count_everything() -> None:
    assert [key_format(b).bits_per_element(64) for b in BITS] == [8.25, 4.5, 3.5, 2.5]
    assert [key_format(b).bits_per_element(128) for b in BITS] == [8.25, 4.375, 3.375, 2.375]
    assert [value_format(b).bits_per_element(128) for b in BITS] == [8.25, 4.25, 3.25, 2.25]
    for form in FORMATS:
        stored = form.quantize(torch.randn(3, 5, TILE, 128))
        room = form.zeros((3, 5), 128, CPU)
        for mine, made in zip(room, stored, strict=True):
            assert mine is made is None or (mine.shape, mine.dtype) == (made.shape, made.dtype)  # type: ignore[union-attr]
        assert stored.nbytes * 8 / (15 * TILE * 128) == form.bits_per_element(128)


def test_a_format_refuses_bits_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="a format has 8, 4, 3, 2 bits, not 5"):
        Format(5, True)
