"""Small GGUF files, written with the gguf package's writer as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel

ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
}
# Where a block's scales lie, as float16: random bytes there could be infinite
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor to llama.cpp's."""
    inner, kind = name.removeprefix("model.").rsplit(".", 1)
    if inner.startswith("layers."):
        _, layer, inner = inner.split(".", 2)
        return f"blk.{layer}.{NAMES[inner]}.{kind}"
    return f"{NAMES[inner]}.{kind}"


def interleaved(rows: Tensor, n_head: int) -> Tensor:
    """Halves to neighbours within each head, as the converter permutes q and k of llama."""
    return rows.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)


def packed(values: np.ndarray, kind: str) -> np.ndarray:
    """values: float32 [row, column]. In a type, or random blocks of it where the package cannot quantise."""
    if kind not in SCALES:
        return gguf.quantize(values, Kind[kind])
    block, n_byte = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(values.shape[0])
    blocks = rng.integers(0, 256, (values.shape[0], values.shape[1] // block, n_byte), dtype=np.uint8)
    for at in SCALES[kind]:
        scale = rng.uniform(0.5, 1, blocks.shape[:2]).astype(np.float16) * np.float16(2e-4 if "_K" in kind else 1e-3)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def write(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F32",
    add: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    drop: tuple[str, ...] = (),
    **changes: Any,
) -> Path:
    """The model as a GGUF. kind: of matrices. add: more metadata or tensors. changes: of metadata; None leaves out."""
    config, architecture = model.config, ARCHITECTURE[model.config.model_type]
    writer = gguf.GGUFWriter(path, changes.pop("architecture", architecture), **changes.pop("writer", {}))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }
    if head_dim != config.hidden_size // config.num_attention_heads:
        fields |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if config.rope_parameters["rope_type"] == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_parameters["factor"])}
    if config.rope_parameters["rope_type"] == "yarn":
        fields |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(config.rope_parameters["factor"])}
        fields["rope.scaling.original_context_length"] = config.rope_parameters["original_max_position_embeddings"]
    for key, value in (fields | {k.replace("__", "."): v for k, v in changes.items()}).items():
        put(writer, f"{architecture}.{key}", value)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, tensor in state.items():
        ours = gguf_name(name)
        if ours in drop:
            continue
        if architecture == "llama" and ".attn_q." in ours:
            tensor = interleaved(tensor, config.num_attention_heads)
        if architecture == "llama" and ".attn_k." in ours:
            tensor = interleaved(tensor, config.num_key_value_heads)
        values = tensor.float().numpy()
        if tensor.dim() == 1:
            writer.add_tensor(ours, values)
        else:
            writer.add_tensor(ours, packed(values, kind), raw_dtype=Kind[kind])
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Metadata of whatever type; None leaves it out."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def llama3_factors(parameters: dict[str, Any], head_dim: int) -> Tensor:
    """rope_freqs as the converter writes them for Llama 3.1: what each frequency is divided by, float32."""
    frequencies = parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / parameters["factor"] + smooth)).float()


def sentencepiece_metadata(data: bytes, /, **changes: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of a SentencePiece model."""
    model = sentencepiece.SentencePieceProcessor(model_proto=data)

    def kind(n: int) -> int:
        flags = model.is_unknown(n), model.is_control(n), False, model.is_unused(n), model.is_byte(n)
        return flags.index(True) + 2 if any(flags) else 1

    size = range(model.vocab_size())
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(n) for n in size],
        "scores": [model.get_score(n) for n in size],
        "token_type": [kind(n) for n in size],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items() if value is not None}
