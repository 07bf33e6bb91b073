"""Tiny random models of every family, made by transformers and saved as it saves them.

`make("qwen3", folder)` writes a Hugging Face folder and returns the model, the reference to compare
with. Sizes are small and odd enough that a swapped dimension shows: no two of them are equal by chance.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

N_VOCAB = 97
_SHAPE = dict(
    vocab_size=N_VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
_THETA = dict(rope_type="default", rope_theta=1e6)

FAMILIES = {  # name: (config class, model class, what differs from _SHAPE)
    "llama2": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=6)),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        dict(rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True, eos_token_id=[2, 5, 7]),
    ),
    "llama-linear": (
        LlamaConfig,
        LlamaForCausalLM,
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0), head_dim=12),
    ),
    "qwen2-yarn": (Qwen2Config, Qwen2ForCausalLM, dict(rope_parameters=_YARN)),
    "qwen3-yarn": (
        Qwen3Config,
        Qwen3ForCausalLM,
        dict(head_dim=16, rope_parameters=_YARN | dict(beta_fast=8.0, beta_slow=2.0, truncate=False)),
    ),
    "llama-yarn": (LlamaConfig, LlamaForCausalLM, dict(rope_parameters=_YARN | dict(mscale=1.0, mscale_all_dim=0.5))),
    "llama-bias": (LlamaConfig, LlamaForCausalLM, dict(attention_bias=True, mlp_bias=True, rope_parameters=_THETA)),
    "qwen3-bias": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=16, attention_bias=True, rope_parameters=_THETA)),
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=None, rope_parameters=_THETA)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(rope_parameters=_THETA, tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=16, rope_parameters=_THETA)),
}

SLIDING = {  # past the window only caches that keep to it are right: not among the others
    "mistral-sliding": (MistralConfig, MistralForCausalLM, dict(sliding_window=32, rope_parameters=_THETA)),
    "qwen2-sliding": (
        Qwen2Config,
        Qwen2ForCausalLM,
        dict(use_sliding_window=True, sliding_window=32, max_window_layers=0, rope_parameters=_THETA),
    ),
}


def make(family: str, folder: Path, seed: int = 0, max_shard_size: str = "5GB") -> PreTrainedModel:
    """Save a tiny model of `family` in `folder`, and return it: float32, on the CPU, in eval mode.

    Every parameter is random, norms and biases too, and large enough that attention is not uniform: a
    tensor that is swapped, permuted wrongly or forgotten changes the logits.
    """
    config_class, model_class, changes = (FAMILIES | SLIDING)[family]
    model = model_class(config_class(**_SHAPE | changes)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + spread if "norm" in name else spread)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """tokens: int64 [batch, token]. Returns the reference's logits, float32 [batch, token, N_VOCAB]."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits
