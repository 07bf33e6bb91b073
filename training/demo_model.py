"""The bundled model before and after its training: as it starts, what it attends through, the folder it becomes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.files import replaced_whole, write_whole
from model import Config, LayerCache, Rope, Step, Transformer


@dataclass
class Positions:
    positions: Tensor


class TrainingCache:
    """No memory at all: a sequence is one chunk. The same seam as any cache."""

    def __init__(self, n_layer: int, device: torch.device) -> None:
        self.layers: list[LayerCache] = [self] * n_layer
        self.device = device

    def begin(self, n_token: int) -> Positions:
        return Positions(torch.arange(n_token, device=self.device)[None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, rope: Rope) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def advance(self, step: Step) -> None:
        pass


def new_model(config: Config, device: torch.device, seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            spread = 0.02 if "embed" in name else config.dim**-0.5
            if name.endswith(("wo.weight", "w2.weight")):  # each block starts as a small change
                spread /= math.sqrt(2 * config.n_layer)
            torch.nn.init.normal_(parameter, std=spread)
    return model.to(device)


def export(model: Transformer, processor_bytes: bytes, folder: Path) -> None:
    """A Hugging Face folder: config.json, bfloat16 model.safetensors, tokenizer.model. Raises UserError."""
    c = model.config
    processor = sentencepiece.SentencePieceProcessor(model_proto=processor_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
        "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(), "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": model.tok_embeddings.weight, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.layers):
        at = f"model.layers.{i}."
        heads = [c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim]
        q, k, v = block.attention.wqkv.weight.split(heads)  # type: ignore[union-attr, operator]
        gate, up = block.feed_forward.w13.weight.chunk(2)  # type: ignore[union-attr, operator]
        tensors |= {
            at + "input_layernorm.weight": block.attention_norm.weight,  # type: ignore[union-attr, dict-item]
            at + "post_attention_layernorm.weight": block.ffn_norm.weight,  # type: ignore[union-attr, dict-item]
            at + "self_attn.q_proj.weight": q,
            at + "self_attn.k_proj.weight": k,
            at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": block.attention.wo.weight,  # type: ignore[union-attr, dict-item]
            at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up,
            at + "mlp.down_proj.weight": block.feed_forward.w2.weight,  # type: ignore[union-attr, dict-item]
        }
    half = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in tensors.items()}
    try:
        write_whole(folder / "config.json", json.dumps(config, indent=1) + "\n")
        with replaced_whole(folder / "tokenizer.model") as part:
            part.write_bytes(processor_bytes)
        with replaced_whole(folder / "model.safetensors") as part:
            save_file(half, part, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"--export {folder}: {error}") from None
