"""Which tensor of a checkpoint goes where in the model: names, rows, and the order of RoPE's pairs.

A checkpoint's tensor fills one `Slot` (rows of a parameter) or, where the checkpoint fuses q, k and v,
three. Slots have gpt-fast's names: `layers.0.attention.wq.weight` is the first rows of our
`layers.0.attention.wqkv.weight`. Meta and gpt-fast rotate neighbours, dimensions (2i, 2i + 1); Hugging
Face and our model rotate halves, (i, i + head_dim/2). So rows of q and k move, within each head:

    interleaved, head_dim 6:  a0 b0 a1 b1 a2 b2   ->   halves:  a0 a1 a2 b0 b1 b2
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from checkpoint.stored import Stored
from common.errors import UserError
from model import Config


@dataclass(frozen=True)
class Slot:
    """Rows of a parameter, from `start` on. rotated: they are dimensions that RoPE pairs."""

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    rotated: bool = False


@dataclass(frozen=True)
class Fill:
    """A stored tensor's rows fill these slots, one after the other."""

    stored: Stored
    slots: tuple[Slot, ...]
    interleaved: bool


HUGGING_FACE_NAMES = {  # theirs to gpt-fast's, inside a layer and outside
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}
GGUF_NAMES = {  # llama.cpp's to gpt-fast's; `output` is `output`
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
}
_UNUSED = re.compile(r"rotary_emb\.inv_freq$|^rope\.freqs$")  # derived from the config


def slots_of(config: Config) -> dict[str, Slot]:
    """Every slot of a model by its name in gpt-fast's convention; together they are every parameter."""
    dim, head_dim = config.dim, config.head_dim
    n_q, n_kv = config.n_head * head_dim, config.n_kv_head * head_dim
    slots = {"tok_embeddings.weight": Slot("tok_embeddings.weight", (config.vocab_size, dim))}
    for n in range(config.n_layer):
        attention, feed_forward = f"layers.{n}.attention", f"layers.{n}.feed_forward"
        for kind, columns in [("weight", (dim,)), *([("bias", ())] if config.qkv_bias else [])]:
            wqkv = f"{attention}.wqkv.{kind}"
            slots[f"{attention}.wq.{kind}"] = Slot(wqkv, (n_q, *columns), 0, rotated=True)
            slots[f"{attention}.wk.{kind}"] = Slot(wqkv, (n_kv, *columns), n_q, rotated=True)
            slots[f"{attention}.wv.{kind}"] = Slot(wqkv, (n_kv, *columns), n_q + n_kv)
        for kind, columns in [("weight", (dim,)), *([("bias", ())] if config.ffn_bias else [])]:
            w13 = f"{feed_forward}.w13.{kind}"
            slots[f"{feed_forward}.w1.{kind}"] = Slot(w13, (config.ffn_dim, *columns))
            slots[f"{feed_forward}.w3.{kind}"] = Slot(w13, (config.ffn_dim, *columns), config.ffn_dim)
        biases = [
            name for name, there in (("attention.wo", config.wo_bias), ("feed_forward.w2", config.ffn_bias)) if there
        ]
        slots |= {f"layers.{n}.{name}.bias": Slot(f"layers.{n}.{name}.bias", (dim,)) for name in biases}
        whole: dict[str, tuple[int, ...]] = {
            f"{attention}.wo": (dim, n_q),
            f"{feed_forward}.w2": (dim, config.ffn_dim),
            f"layers.{n}.attention_norm": (dim,),
            f"layers.{n}.ffn_norm": (dim,),
        }
        slots |= {f"{name}.weight": Slot(f"{name}.weight", shape) for name, shape in whole.items()}
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            name = f"{attention}.{norm}.weight"
            slots[name] = Slot(name, (head_dim,), rotated=True)
    slots["norm.weight"] = Slot("norm.weight", (dim,))
    if not config.tied_embeddings:
        slots["output.weight"] = Slot("output.weight", (config.vocab_size, dim))
    return slots


def slot_names(name: str) -> tuple[tuple[str, ...], bool]:
    """The slots that a checkpoint's tensor fills, by its name; and whether its pairs are interleaved."""
    name = name.replace("_orig_mod.", "").removeprefix("module.")  # of torch.compile and of DistributedDataParallel
    match = re.fullmatch(r"(layers\.\d+\.|blk\.\d+\.)?(.+)\.(\w+)", name.removeprefix("model."))
    if match is None:
        return (name,), False
    layer, inner, kind = match[1] or "", match[2], match[3]
    if inner in GGUF_NAMES and (layer.startswith("blk.") or not layer):
        return (
            f"{layer.replace('blk.', 'layers.')}{GGUF_NAMES[inner]}.{kind}",
        ), True  # of llama; the others' are halves
    if inner in HUGGING_FACE_NAMES:
        return (f"{layer}{HUGGING_FACE_NAMES[inner]}.{kind}",), False
    if inner == "attention.wqkv":
        return tuple(f"{layer}attention.{part}.{kind}" for part in ("wq", "wk", "wv")), True
    return (f"{layer}{inner}.{kind}",), True


def gguf_name(slot: str) -> str:
    """llama.cpp's name of the tensor that fills a slot."""
    theirs = {ours: name for name, ours in GGUF_NAMES.items()}
    layer, inner, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)(\.\w+)", slot).groups("")  # type: ignore[union-attr]
    return layer.replace("layers.", "blk.") + theirs.get(inner, inner) + kind


def hugging_face_name(slot: str) -> str:
    """Hugging Face's name of the tensor that fills a slot."""
    theirs = {ours: name for name, ours in HUGGING_FACE_NAMES.items()}
    layer, inner, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)(\.\w+)", slot).groups("")  # type: ignore[union-attr]
    return ("" if inner == "output" else "model.") + layer + theirs.get(inner, inner) + kind


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def match_tensors(config: Config, tensors: dict[str, Stored], where: Path) -> tuple[tuple[Fill, ...], Stored | None]:
    """Which tensor fills what, every slot once, and the output of tied embeddings where there is one.

    Raises UserError that names a tensor that is missing, unexpected, doubled, or of another shape.
    """
    if config.n_layer > len(tensors):
        raise UserError(f"{where}: {len(tensors)} tensors, and the config has {config.n_layer} layers")
    slots, tied = slots_of(config), None
    fills, filled, unexpected = [], dict[str, str](), []
    for name, stored in tensors.items():
        names, interleaved = slot_names(name)
        if _UNUSED.search(name):
            continue
        if names == ("output.weight",) and config.tied_embeddings:
            tied, wanted = stored, slots["tok_embeddings.weight"].shape
        elif any(slot not in slots for slot in names):
            unexpected.append(name)
            continue
        else:
            parts = tuple(slots[slot] for slot in names)
            wanted = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            fills.append(Fill(stored, parts, interleaved))
        if stored.shape != wanted:
            raise UserError(f"{where}: {name} has shape {[*stored.shape]}, and the config's is {[*wanted]}")
        for slot in names:
            if slot in filled:
                raise UserError(f"{where}: {name} and {filled[slot]} are the same weights twice")
            filled[slot] = name
    missing = [slot for slot in slots if slot not in filled]
    if any(not fill.interleaved for fill in fills):  # speak as the checkpoint does
        missing = [hugging_face_name(slot) for slot in missing]
    elif any(fill.stored.name == "token_embd.weight" or fill.stored.name.startswith("blk.") for fill in fills):
        missing = [gguf_name(slot) for slot in missing]
    if missing:
        raise UserError(f"{where}: missing {_listed(missing)}, which the config has")
    if unexpected:
        raise UserError(f"{where}: {_listed(unexpected)} have no place in this model or its config")
    return tuple(fills), tied
