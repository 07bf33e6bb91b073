"""What a GGUF file says of its model: the shape, which tensor is which, where RoPE's pairs lie.

Architectures are llama (Mistral says so too), qwen2 and qwen3. What the model could not compute faithfully is
refused by name. llama.cpp's converter writes q and k of llama with neighbouring pairs, as Meta does, and those of
qwen2 and qwen3 in halves, as Hugging Face does: the file does not say it, the architecture does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from checkpoint.configs import Fields, make_config
from checkpoint.gguf import GGUF
from checkpoint.layout import Fill, match_tensors
from checkpoint.stored import Stored
from common.errors import UserError
from model import Config, RopeScaling

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_FREQS = "rope_freqs.weight"


def gguf_config(gguf: GGUF) -> Config:
    """The model's shape. Raises UserError that names what is missing, odd or not computed here."""
    path, kind = gguf.path, gguf.get("general.architecture", str)
    purpose = gguf.get("general.type", str, "model")
    if purpose != "model":
        raise UserError(f"{path}: general.type is {purpose!r}, not a model")
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {kind!r} is not supported ({', '.join(ARCHITECTURES)} are)")
    f = Fields({key.removeprefix(f"{kind}."): value for key, value in gguf.metadata.items()}, path)
    for name in ("expert_count", "attention.clamp_kqv", "attention.max_alibi_bias"):
        if f.get(name):
            f.refuse(name, f.get(name))
    n_head = _same_in_layers(f, "attention.head_count")
    head_dim = f.whole("attention.key_length", f.whole("embedding_length") // max(n_head, 1))
    if f.whole("attention.value_length", head_dim) != head_dim:
        raise f.error(f"attention.value_length {f.get('attention.value_length')} is not key_length, {head_dim}")
    if f.whole("rope.dimension_count", head_dim) != head_dim:
        raise f.error(
            f"rope.dimension_count {f.get('rope.dimension_count')} of {head_dim}: RoPE turns all or it is refused"
        )
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path}: missing token_embd.weight")
    return make_config(
        path,
        vocab_size=embedding.shape[0],
        dim=f.whole("embedding_length"),
        n_layer=f.whole("block_count"),
        n_head=n_head,
        n_kv_head=_same_in_layers(f, "attention.head_count_kv", n_head),
        ffn_dim=_same_in_layers(f, "feed_forward_length"),
        **_context(f),
        head_dim=head_dim,
        norm_eps=f.number("attention.layer_norm_rms_epsilon", least=0),
        rope_theta=f.number("rope.freq_base", 10000.0, least=1e-30),
        rope_scaling=_scaling(f, gguf.tensors.get(_ROPE_FREQS), head_dim),
        tied_embeddings="output.weight" not in gguf.tensors,
        qkv_bias="blk.0.attn_q.bias" in gguf.tensors,
        qk_norm=kind == "qwen3",
    )


def _same_in_layers(f: Fields, name: str, default: int | None = None) -> int:
    """A number that newer files may give as one a layer: here it must be the same in all."""
    value = f.get(name)
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        f = Fields({name: value[0]}, f.path)
    elif isinstance(value, list):
        raise f.error(f"{name} differs between layers, which is not supported")
    return f.whole(name, default)


def _context(f: Fields) -> dict[str, int]:
    """The context, which ends at the window of attention, if there is one: up to there every cache is right."""
    context = f.whole("context_length")
    window = f.whole("attention.sliding_window", 0, least=0)
    return (
        {"context": window, "reach": window, "far_context": context} if 0 < window < context else {"context": context}
    )


def _scaling(f: Fields, freqs: Stored | None, head_dim: int) -> RopeScaling | None:
    """rope.scaling.*, rope.scale_linear of older files, or a factor for each pair in a tensor (Llama 3.1 and on)."""
    kind = f.get("rope.scaling.type", "linear" if f.get("rope.scale_linear") else "none")
    if kind not in ("none", "linear", "yarn"):
        raise f.error(f"rope scaling {kind!r} is not supported (none, linear, yarn and factors in {_ROPE_FREQS} are)")
    factor = f.number("rope.scaling.factor", f.number("rope.scale_linear", 1.0)) if kind != "none" else 1.0
    if factor == 0:  # what llama.cpp takes for none
        factor = 1.0
    if factor < 1:
        raise f.error(f"rope scaling factor {factor} is below 1")
    scaling = RopeScaling("linear", factor) if factor != 1 else None
    if kind == "yarn" and scaling is not None:
        original = f.whole("rope.scaling.original_context_length", least=1)
        slow, fast = f.number("rope.scaling.yarn_beta_slow", 1.0), f.number("rope.scaling.yarn_beta_fast", 32.0)
        if not 0 < slow < fast:
            raise f.error(f"yarn_beta_fast {fast} is not above yarn_beta_slow {slow}, or that not above 0")
        magnitude = f.number("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(factor))
        scaling = RopeScaling("yarn", factor, slow, fast, original, magnitude=magnitude)
    if freqs is None:
        return scaling
    if freqs.shape != (head_dim // 2,):
        raise f.error(f"{_ROPE_FREQS} has shape {[*freqs.shape]}, and {head_dim // 2} pairs turn")
    factors = tuple(freqs.read().double().tolist())
    if not all(0 < value < float("inf") for value in factors):
        raise f.error(f"{_ROPE_FREQS} holds factors that are no positive numbers")
    if scaling is not None:
        raise f.error(f"rope scaling {kind!r} beside {_ROPE_FREQS} is not supported")
    return RopeScaling("factors", 1.0, factors=factors) if any(value != 1 for value in factors) else None


def gguf_fills(gguf: GGUF, config: Config) -> tuple[Fill, ...]:
    """Which tensor fills what, every slot once. Raises UserError by llama.cpp's names."""
    quantised = any(stored.read_rows is not None for stored in gguf.tensors.values())
    version = gguf.metadata.get("general.quantization_version", 2)
    if quantised and version != 2:
        raise UserError(f"{gguf.path}: general.quantization_version is {version}: only 2 is read")
    tensors = {name: stored for name, stored in gguf.tensors.items() if name != _ROPE_FREQS}
    fills, _ = match_tensors(config, tensors, gguf.path)
    if gguf.metadata["general.architecture"] != "llama":
        fills = tuple(replace(fill, interleaved=False) for fill in fills)
    return fills


def gguf_name(gguf: GGUF) -> str:
    """The model's name, for reports."""
    name: Any = gguf.metadata.get("general.name")
    return name if isinstance(name, str) and name.strip() else gguf.path.stem
