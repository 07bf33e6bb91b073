"""The bias of a Qwen 2's keys in transformers' `generate`: the plug-in finds it, the cache keeps it out of tiles."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DynamicCache, PreTrainedModel
from transformers_models import LONG

import selective_kv.transformers.sequences as sequences
from selective_kv.score_error import BOUND
from selective_kv.transformers import NAME, SelectiveKVCache


def biased(implementation: str = NAME) -> PreTrainedModel:
    """A Qwen 2 whose keys have a bias of 100 in three of the fast pairs of each head; queries are small there."""
    config_class, model_class, changes = families.FAMILIES["qwen2"]
    torch.manual_seed(0)
    shape = families._SHAPE | changes | {"head_dim": 32, "num_hidden_layers": 2}
    model = model_class(config_class(**shape)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.view(2, 2, 16)[:, 0, 1:4] = 100
            layer.self_attn.q_proj.weight.view(6, 2, 16, 48)[:, :, 1:4] /= 100
    model.set_attn_implementation(implementation)
    return model


@torch.no_grad()
def last_logits(model: PreTrainedModel, cache: Any) -> Tensor:
    """After a prompt that closes a tile and a token by itself."""
    model(LONG[:, :-1], past_key_values=cache)
    return model(LONG[:, -1:], past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("max_cache_len", [None, 256])
def test_a_key_bias_is_kept_out_of_tiles(max_cache_len: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = biased()
    exact = last_logits(biased("sdpa"), DynamicCache())

    def error() -> float:
        cache = SelectiveKVCache(
            model.config, max_cache_len=max_cache_len, sink_size=2, window_size=6, k_bits=3, v_bits=8
        )
        return (last_logits(model, cache) - exact).norm().item()

    told = error()
    monkeypatch.setattr(sequences, "scaled_bias", lambda module, config: None)
    assert told < error() / 5


def test_memory_that_grows_and_a_second_text_keep_the_bias_out() -> None:
    model = biased()
    cache = SelectiveKVCache(model.config, sink_size=2, window_size=6, k_bits=3, v_bits=8)
    short = SelectiveKVCache(model.config, sink_size=2, window_size=6, k_bits=3, v_bits=8)
    once = last_logits(model, cache)
    with torch.no_grad():
        model(LONG[:, :5], past_key_values=short)  # room for 517: 600 more make it move
        model(LONG[:, :1].repeat(1, 600), past_key_values=short)
    assert all(layer.regions.key_bias is not None for layer in short.sequences.layers)  # type: ignore[attr-defined]
    cache.reset()
    assert torch.equal(last_logits(model, cache), once)


def test_a_cache_tells_how_far_scores_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = biased(), torch.ones(3, 189, dtype=torch.int64)
    batch[1, :30] = 0  # padding

    def errors(k_bits: int | None = None) -> list[float]:
        cache = SelectiveKVCache(model.config, sink_size=2, window_size=6, k_bits=3, v_bits=8)
        assert cache.score_errors() is None
        with torch.no_grad():
            model(LONG[:, :-1], attention_mask=batch, past_key_values=cache)
        found = cache.score_errors(k_bits)
        assert found is not None and len(found) == 2
        return found

    eight, three = errors(8), errors()
    assert max(eight) < BOUND and max(eight) < min(three)
    monkeypatch.setattr(sequences, "scaled_bias", lambda module, config: None)
    assert min(errors()) > 1.5 * max(three)
