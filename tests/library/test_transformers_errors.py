"""What the plug-in refuses, each at the first call and in one line: a wrong result would be worse."""

from __future__ import annotations

import importlib
import re
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from transformers import (
    Cache,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
)
from transformers_models import LONG, PROMPTS, padded, tiny, write

from selective_kv import SelectiveCache, SinkWindowCache
from selective_kv.transformers import NAME, FullKVCache, PolicyKVCache, SelectiveKVCache, SinkWindowKVCache
from selective_kv.transformers.attention import UNSUPPORTED, attention

_SMALL: dict[str, Any] = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def says(line: str, call: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_our_cache_with_another_attention(implementation: str) -> None:
    model = tiny("llama3", implementation)
    for cache in (FullKVCache(model.config), SelectiveKVCache(model.config, max_cache_len=64)):
        says(f'attn_implementation="{NAME}"', lambda cache=cache: write(model, PROMPTS, cache))


def test_our_attention_with_another_cache() -> None:
    model = tiny("llama3")
    for cache in (None, DynamicCache(config=model.config)):
        says("needs a cache of selective_kv.transformers", lambda cache=cache: write(model, PROMPTS, cache))
    says("needs a cache of selective_kv.transformers", lambda: model(PROMPTS, use_cache=False))


@pytest.mark.parametrize("n", (1, 5))
def test_a_cache_of_another_model(n: int) -> None:
    """Of one with more layers the first pass went through; of one with fewer it ended in an IndexError."""
    model = tiny("llama3")
    cache = FullKVCache(LlamaConfig(**_SMALL | dict(num_hidden_layers=n)))
    says(
        f"the model has 3 layers, and the cache was made for another one, of {n}",
        lambda: write(model, PROMPTS, cache),
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    (
        (MistralConfig(sliding_window=4096), "its layers slide"),
        (Qwen2Config(use_sliding_window=True, sliding_window=32, max_window_layers=2), "sliding_attention"),
        (Gemma2Config(), "do not support gemma2"),
        (GptOssConfig(), "do not support gpt_oss"),
        (T5Config(), "cross-attention"),
    ),
)
def test_models_of_another_attention(config: Any, reason: str) -> None:
    says(reason, lambda: FullKVCache(config))


def of(config_class: Any, model_class: Any, **settings: Any) -> PreTrainedModel:
    model = model_class(config_class(**_SMALL | settings)).eval()
    model.set_attn_implementation(NAME)
    return model


def test_attention_that_the_config_does_not_give_away() -> None:
    """The same models, with a cache made from a config that looks harmless: the attention function refuses them."""
    llama = LlamaConfig(**_SMALL)
    sliding = of(Gemma2Config, Gemma2ForCausalLM, query_pre_attn_scalar=8)
    says("more than causal", lambda: write(sliding, PROMPTS, FullKVCache(llama)))
    layer = FullKVCache(llama).layers[0]
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    for name, reason in UNSUPPORTED.items():
        keys, values = layer.update(k, v)
        says(reason, lambda name=name, k=keys, v=values: attention(Module(), q, k, v, None, **{name: 30.0}))
    keys, values = layer.update(k, v)
    says("not causal", lambda: attention(Module(), q, keys, values, None, is_causal=False))
    says("dropout", lambda: attention(Module(), q, keys, values, None, dropout=0.1))
    says("values of 6 dimensions", lambda: attention(Module(), q, keys, values[..., :6], None))
    model = tiny("llama3")
    says("attention weights", lambda: model(PROMPTS, past_key_values=FullKVCache(model.config), output_attentions=True))
    mask = torch.ones(3, 1, 24, 24, dtype=torch.bool)
    says("a mask of its own", lambda: call(model, PROMPTS, FullKVCache(model.config), mask))
    with torch.enable_grad():
        says("gradients", lambda: model(inputs_embeds=torch.randn(1, 4, 48, requires_grad=True),
                                        past_key_values=FullKVCache(model.config)))  # fmt: skip


def call(model: PreTrainedModel, ids: Tensor, cache: Cache, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits


def test_positions_within_the_cache_need_known_frequencies() -> None:
    dynamic = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    says("'dynamic'", lambda: SinkWindowKVCache(LlamaConfig(**_SMALL | dict(rope_parameters=dynamic))))
    half = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
    says("only part of a head", lambda: SinkWindowKVCache(LlamaConfig(**_SMALL | dict(rope_parameters=half))))
    SinkWindowKVCache(LlamaConfig(**_SMALL | dict(rope_parameters=dynamic)), positions="original")


def test_what_does_not_fit() -> None:
    model = tiny("llama3")
    says("max_cache_len=30", lambda: write(model, PROMPTS, SelectiveKVCache(model.config, max_cache_len=30)))
    says("max_cache_len=20", lambda: write(model, PROMPTS, FullKVCache(model.config, max_cache_len=20)))
    small = partial(SinkWindowKVCache, model.config, sink_size=2, window_size=40, max_cache_len=30)
    says("max_cache_len=30", lambda: write(model, PROMPTS, small()))  # its window was 28 then
    says("at least 1", lambda: FullKVCache(model.config, max_cache_len=0))
    for wrong in (2.5, "20", 10**20):
        says("at least 1 and at most 2,147,483,647", partial(FullKVCache, model.config, max_cache_len=wrong))
    cache = FullKVCache(model.config)
    call(model, PROMPTS, cache)
    says("this cache holds 3 sequences", lambda: call(model, PROMPTS[:2], cache))
    cache.reset()
    call(model, PROMPTS[:2], cache)  # another batch after it has forgotten the first one


def test_what_cannot_be_cropped() -> None:
    model = tiny("llama3")
    for policy in (SelectiveCache(sink_size=2, window_size=6), SinkWindowCache(sink_size=2, window_size=6)):
        cache = PolicyKVCache(model.config, policy)
        call(model, PROMPTS[:, :8], cache)
        cache.crop(-3)
        call(model, LONG, cache)
        says("no longer holds all of its 195 tokens", lambda cache=cache: cache.crop(-1))
        says("negative", lambda cache=cache: cache.crop(3))
    ids, mask = padded([PROMPTS[0, :6], PROMPTS[1, :3]])
    cache = FullKVCache(model.config)
    call(model, ids, cache, mask)
    says("padding", lambda: cache.crop(-4))
    cache.crop(-3)


def test_masks_that_do_not_match_the_past() -> None:
    model = tiny("llama3")
    ids, mask = padded([PROMPTS[0, :6], PROMPTS[1, :3]])
    more, whole = PROMPTS[:2, :4], torch.ones(2, 10, dtype=torch.int64)
    cache = FullKVCache(model.config)
    call(model, ids, cache, mask)
    says("give every later call the attention_mask", lambda: call(model, more, cache))
    says("what is stored cannot be hidden", lambda: call(model, more, cache, whole))
    says("it must be [2, 10]", lambda: call(model, more, cache, whole[:, :7]))
    call(model, more, cache, torch.cat((mask, whole[:, :4]), 1))  # nothing above has spoiled it


def test_a_pass_that_ended_early_is_not_continued() -> None:
    model = tiny("llama3")
    cache = FullKVCache(model.config)
    broken = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(model, PROMPTS, cache)
    broken.remove()
    says("reset() the cache", lambda: call(model, PROMPTS, cache))
    cache.reset()
    assert call(model, PROMPTS, cache).equal(call(model, PROMPTS, FullKVCache(model.config)))


@pytest.mark.parametrize(("version", "supported"), (("5.16.2", False), ("5.17.0", True), ("5.25.0.dev0", False)))
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str, supported: bool) -> None:
    check = importlib.import_module("selective_kv.transformers._versions").check_version
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    if supported:
        check()
    else:
        with pytest.raises(ImportError, match=f"5.17 to 5.24, and this is {version}"):
            check()
