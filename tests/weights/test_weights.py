"""Weights in 8 and 4 bits: the numbers, the modules, a CPU's products."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantize
from cli.plan import make_plan
from common.errors import UserError
from kv_cache import parse_policy
from model import CONFIGS
from quantize import WeightSetting, parse_weights
from selective_kv import Shape
from weights.cpu import MOST_TOKENS, Packed8, for_cpu, has_kernels
from weights.modules import QuantizedEmbedding, QuantizedLinear, product
from weights.setting import DEFAULT_GROUPS

shapes = st.tuples(st.integers(1, 70), st.integers(1, 300))
groups = st.sampled_from(quantize.GROUP_SIZES)


def matrix(shape: tuple[int, int], seed: int, outliers: bool = False) -> Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    if outliers:
        w[0, ::7] *= 100
    return w


def round_trip4(w: Tensor, group: int) -> Tensor:
    u, pairs, unit = quantize.quantize4(w, group)
    assert u.max() <= 15
    return quantize.dequantize4(quantize.unpack4(quantize.pack4(u, group), group), pairs, unit, w.shape[1])


def grouped(w: Tensor, group: int) -> Tensor:
    """[n, n_group, group], the last group filled up by its row's last element."""
    missing = -w.shape[1] % group
    return torch.cat((w, w[:, -1:].expand(-1, missing)), 1).view(len(w), -1, group)


@given(shapes, st.integers(0, 9), st.booleans())
@settings(deadline=None, max_examples=40)
def test_8_bits_are_within_half_a_step(shape: tuple[int, int], seed: int, outliers: bool) -> None:
    w = matrix(shape, seed, outliers)
    ints, scale = quantize.quantize8(w)
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((quantize.dequantize8(ints, scale) - w).abs() <= 0.5001 * step).all()


@given(shapes, groups, st.integers(0, 9), st.booleans())
@settings(deadline=None, max_examples=40)
def test_8_bits_in_groups_are_within_half_a_groups_step(
    shape: tuple[int, int], group: int, seed: int, outliers: bool
) -> None:
    """A step is at most a 255th of the row's longest longer than the group's largest element asks for."""
    w = matrix(shape, seed, outliers)
    ints, steps, scale = quantize.quantize8_groups(w, group)
    assert ints.shape == w.shape and steps.shape == (len(w), quantize.n_groups(w.shape[1], group)) and steps.min() >= 1
    most = grouped(w, group).abs().amax(-1)
    step = most / 127 + most.amax(1, keepdim=True) / (127 * 255)
    error = (quantize.dequantize8_groups(ints, steps, scale, group) - w).abs()
    assert (error <= 0.5001 * step.repeat_interleave(group, 1)[:, : w.shape[1]]).all()


def test_8_bits_in_groups_lose_less() -> None:
    w = matrix((64, 1024), 0)
    rows = quantize.dequantize8(*quantize.quantize8(w)) - w
    ints, steps, scale = quantize.quantize8_groups(w, 64)
    assert (quantize.dequantize8_groups(ints, steps, scale, 64) - w).norm() < 0.8 * rows.norm()


@given(shapes, groups, st.integers(0, 9), st.booleans())
@settings(deadline=None, max_examples=40)
def test_4_bits_lose_no_more_than_a_groups_whole_range_would(
    shape: tuple[int, int], group: int, seed: int, outliers: bool
) -> None:
    """Per group, the squared error is at most that of 15 even steps from the least to the largest element."""
    w = matrix(shape, seed, outliers)
    error = grouped(round_trip4(w, group), group) - (of_w := grouped(w, group))
    low, high = of_w.amin(-1, keepdim=True), of_w.amax(-1, keepdim=True)
    scale = (high - low) / 15
    plain = low + ((of_w - low) / scale.clamp_min(1e-30)).round() * scale - of_w
    rounding = w.abs().max() * 2.0**-11  # of scale and base, to float16
    assert (error.square().sum(-1).sqrt() <= plain.square().sum(-1).sqrt() + rounding * group**0.5).all()


def test_4_bits_search_beats_the_whole_range() -> None:
    w = matrix((64, 1024), 0)
    of_w = grouped(w, 128)
    low = of_w.amin(-1, keepdim=True)
    scale = (of_w.amax(-1, keepdim=True) - low) / 15
    plain = low + ((of_w - low) / scale).round() * scale
    assert (round_trip4(w, 128) - w).norm() < 0.94 * (plain - of_w).norm()


@pytest.mark.parametrize("group", quantize.GROUP_SIZES)
def test_zero_and_constant_groups_come_back_exactly(group: int) -> None:
    w = torch.zeros(4, 2 * group)
    w[1, :group] = 0.0123
    w[2] = -3.25e-8
    w = w.bfloat16().float()
    assert torch.equal(round_trip4(w, group), w)
    assert torch.equal(quantize.dequantize8(*quantize.quantize8(torch.zeros(3, 5))), torch.zeros(3, 5))
    ints, steps, scale = quantize.quantize8_groups(torch.cat((torch.zeros(1, 2 * group), w[1:2])), group)
    made = quantize.dequantize8_groups(ints, steps, scale, group)
    assert not made[0].any() and not made[1, group:].any() and torch.allclose(made[1, :group], w[1, :group])


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-20, 2.0**100])
def test_4_bits_of_any_size(scale: float) -> None:
    w = matrix((8, 256), 3)
    assert torch.equal(round_trip4(w * scale, 64), round_trip4(w, 64) * scale)


@given(shapes, groups, st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_packing_is_undone_and_has_the_documented_order(shape: tuple[int, int], group: int, seed: int) -> None:
    n, k = shape[0], quantize.n_groups(shape[1], group) * group
    u = torch.randint(16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = quantize.pack4(u, group)
    assert words.shape == (n, k // 4) and words.dtype == torch.int16
    assert torch.equal(quantize.unpack4(words, group), u)
    at = seed % (group // 4)
    nibbles = [(int(words[0, at]) >> shift) & 15 for shift in (0, 4, 8, 12)]
    assert nibbles == u[0, at : group : group // 4].tolist()


def linear(n: int, k: int, bits: int, group: int, bias: bool, dtype: torch.dtype, seed: int = 0) -> QuantizedLinear:
    made = QuantizedLinear(n, k, bits, group, bias, dtype)
    made.fill(matrix((n, k), seed), 0)
    if made.bias is not None:
        made.bias.normal_(generator=torch.Generator().manual_seed(seed))
    return made


def wanted(made: QuantizedLinear, x: Tensor) -> Tensor:
    bias = None if made.bias is None else made.bias.double()
    return torch.nn.functional.linear(x.double(), made.weight.dense(torch.float64), bias)


KINDS = [(8, 0), *((bits, group) for bits in (8, 4) for group in quantize.GROUP_SIZES)]


@given(shapes, st.sampled_from(KINDS), st.booleans(), st.integers(1, 20))
@settings(deadline=None, max_examples=50)
def test_products_agree_with_float64(shape: tuple[int, int], kind: tuple[int, int], bias: bool, n_token: int) -> None:
    made = linear(*shape, *kind, bias, torch.float32)
    x = torch.randn(n_token, shape[1], generator=torch.Generator().manual_seed(1))
    want = wanted(made, x)
    assert torch.allclose(made(x).double(), want, atol=1e-5)
    if has_kernels():  # bfloat16 in and out
        size = x.double().norm(dim=1, keepdim=True) * made.weight.dense(torch.float64).norm(dim=1)
        most = 0.02 * size + 2**-8 * want.abs() + 1e-6
        if kind[0] == 8:  # exact but for these roundings
            most = 2**-7 * size + 2**-8 * want.abs() if n_token <= MOST_TOKENS else 1e-5 * size
        assert ((for_cpu(made)(x).double() - want).abs() <= most + 1e-6).all()


def test_a_weight_of_many_rows_is_made_dense_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = linear(50, 96, 4, 64, True, torch.float32)
    x = torch.randn(3, 96)
    whole = product(x, made.weight, made.bias)
    monkeypatch.setattr("weights.modules.DENSE_ELEMENTS", 96 * 7)
    assert torch.allclose(product(x, made.weight, made.bias), whole, atol=1e-5)


@pytest.mark.skipif(not has_kernels(), reason="this processor's products are the plain ones")
@given(shapes, st.sampled_from((0, *quantize.GROUP_SIZES)))
@settings(deadline=None, max_examples=30)
def test_what_a_cpu_packs_is_found_again(shape: tuple[int, int], group: int) -> None:
    """Dense for a prompt and as an embedding's rows: the kernel's order of places is known here."""
    made = linear(*shape, 8, group, False, torch.float32)
    packed, dense = Packed8(made.weight), made.weight.dense(torch.float32)
    numbers = torch.randperm(shape[0])
    assert torch.equal(packed.rows(numbers), dense[numbers])
    assert torch.allclose(packed.many(torch.eye(shape[1])).T, dense, atol=0, rtol=1e-6)


@pytest.mark.parametrize("group", [0, 64])
def test_a_prompt_in_float16_ends_in_no_infinity(group: int) -> None:
    """Its results are small, though sums of 8 bits' integers, without their scales, are past what float16 holds."""
    made = QuantizedLinear(70, 2048, 8, group, False, torch.float16)
    made.fill(0.01 * matrix((70, 2048), 0).abs(), 0)
    x = torch.full((MOST_TOKENS + 1, 2048), 4.0, dtype=torch.float16)
    for product_of in (made, for_cpu(made) if has_kernels() else made):
        torch.testing.assert_close(product_of(x).double(), wanted(made, x), rtol=3e-3, atol=0)


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 64), (8, 0)])
def test_rows_are_quantised_on_their_own(bits: int, group: int) -> None:
    """A checkpoint's q, k and v come one after the other, and a chunk at a time."""
    w = matrix((96, 200), 5)
    whole, parts = (QuantizedLinear(96, 200, bits, group, False, torch.float32) for _ in range(2))
    whole.fill(w, 0)
    for start in (64, 0, 32):
        parts.fill(w[start : start + 32], start)
    assert torch.equal(whole.weight.dense(torch.float32), parts.weight.dense(torch.float32))


@pytest.mark.parametrize("group", [0, 32])
def test_an_embedding_gives_rows_in_its_dtype(group: int) -> None:
    made = QuantizedEmbedding(10, 48, group, torch.bfloat16)
    made.fill(matrix((10, 48), 0), 0)
    tokens = torch.tensor([[3, 1], [9, 3]])
    assert torch.equal(made(tokens), made.weight.dense(torch.bfloat16)[tokens])


def test_settings_are_read_as_they_are_written() -> None:
    for text in (
        "int8",
        "int8:group_size=32",
        "int4",
        "int4:group_size=64,down_bits=8",
        "int4:head_bits=4,edge_layers=2",
    ):
        assert str(parse_weights(text)) == text
    assert parse_weights("16") is None
    for bits, default in DEFAULT_GROUPS.items():
        assert parse_weights(f"int{bits}:group_size={default}") == parse_weights(f"int{bits}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int3", "int8 or int4"), ("int4:groups=64", "group_size"), ("int4:group_size=48", "32, 64, 128"),
        ("int4:group_size=x", "whole number"), ("16:group_size=64", "nothing to say"),
        ("int8:down_bits=5", "down_bits"), ("int4:group_size=0", "not 0"), ("int8:group_size=16", "0, 32, 64, 128"),
        ("int8:group_size=64,group_size=32", "twice"),
    ],
)  # fmt: skip
def test_a_setting_that_is_none(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_weights(text)


def test_which_matrix_has_how_many_bits() -> None:
    config = CONFIGS["llama-3.1-8b"]
    setting = WeightSetting(4, down_bits=8, edge_layers=1, head_bits=16)
    names = ("tok_embeddings", "output", "layers.0.attention.wo", "layers.5.attention.wo", "layers.5.feed_forward.w2")
    assert [setting.bits_of(name, config) for name in names] == [8, 16, 8, 4, 8]
    assert setting.bits_of("layers.31.attention.wqkv", config) == 8
    assert setting.bits_of("output", CONFIGS["llama-3.2-1b"]) == 8  # tied: the embedding's
    assert (setting.group_of(4), setting.group_of(8)) == (128, 0)
    for group, four in ((0, 128), (32, 32)):
        setting = WeightSetting(8, group_size=group, head_bits=4)
        assert (setting.group_of(8), setting.group_of(4)) == (group, four)


def test_the_readmes_contexts_are_the_plans() -> None:
    """Which weights and which cache reach which context on which card: what is written fits, and 1% more does not."""
    config, device = CONFIGS["llama-3.1-8b"], torch.device("meta")
    policies = [parse_policy(text) for text in ("full", "quantize_kv", "quantize_kv:k_bits=4,v_bits=4")]
    found = re.findall(r"^\| (\d+) GB[^|]*\| (int4|int8|16 bits|any) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert len(found) >= 7
    for card, weights, contexts in found:
        setting = parse_weights({"16 bits": "16", "any": "16"}.get(weights, weights))
        for policy, text in zip(policies, contexts.split("|"), strict=True):
            context = int(text.replace(",", ""))
            room = int(card) * 2**30 * 0.97 - 2**30
            for tokens, fits in ((context, True), (context * 101 // 100, context == config.context)):
                shape = Shape(1, config.n_kv_head, config.head_dim, tokens, torch.bfloat16, device)
                assert (make_plan(config, policy, shape, 2048, setting).total <= room) == fits, (card, weights, tokens)
