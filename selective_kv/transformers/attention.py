"""What transformers calls: an attention function, the mask that goes with it, and the operator of a compiled step.

The function is registered as attn_implementation="selective_kv". It never receives a cache: it gets what the cache's
`update` returned, and that is a `Taken`: the new keys, and which layer of which cache they belong to.

Compiled (`generate` does so by itself on a GPU where the cache says `is_compileable`), a layer's attention is one
opaque operator, so that any `KVCache` goes through it, a user's own too. The memory it writes to is not among its
arguments: it finds it by a number. `counts`, which it really changes, keeps the operators in order. `cut` makes several
CUDA graphs of one compiled step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from selective_kv.transformers.sequences import CUT_BEFORE, by_handle

if TYPE_CHECKING:
    from selective_kv.transformers.cache import Layer

NAME = "selective_kv"

# Arguments by which models ask for an attention that these caches do not compute, and what they ask for.
UNSUPPORTED = {
    "softcap": "soft-capped scores",
    "sliding_window": "a sliding window of the model's own (load it with sliding_window=None if it is never reached)",
    "s_aux": "attention sinks of the model's own",
    "sinks": "attention sinks of the model's own",
    "indices": "attention to chosen tokens",
    "block_indices": "attention to chosen blocks",
    "position_bias": "a position bias",
    "attn_bias": "a bias of scores",
    "cu_seq_lens_q": "packed sequences",
    "output_attentions": "attention weights, which are never made",
}


class Taken:
    """New keys and the layer that will take them in: what `update` returns in the keys' place.

    An attention function of transformers that expects a tensor is told what is wrong.
    """

    def __init__(self, layer: Layer, keys: Tensor) -> None:
        self.layer, self.keys = layer, keys

    def __getattr__(self, name: str) -> Any:
        raise ValueError(
            f'this cache works with attn_implementation="{NAME}" alone, and the model has another one, or looks at the '
            f'keys by itself (`{name}`): load it with from_pretrained(..., attn_implementation="{NAME}")'
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Taken | Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: [batch, n_head, token, head_dim], rotated; value like the keys,
    [batch, n_kv_head, token, head_dim]. Returns [batch, token, n_head, head_dim], and no weights.

    Raises ValueError for what these caches cannot do.
    """
    if not isinstance(key, Taken):
        raise ValueError(
            f'attn_implementation="{NAME}" needs a cache of selective_kv.transformers, and the model was given another '
            "one or none: pass past_key_values=FullKVCache(model.config), or load the model with another implementation"
        )
    layer = key.layer
    refuse(module, query, key.keys, value, attention_mask, dropout, kwargs)
    if getattr(module, "layer_idx", layer.index) != layer.index:
        raise ValueError(f"layer {module.layer_idx} uses layer {layer.index}'s keys: shared keys are not supported")
    n_layer, n_held = getattr(getattr(module, "config", None), "num_hidden_layers", None), len(layer.sequences.layers)
    if n_layer not in (None, n_held):
        raise ValueError(f"the model has {n_layer} layers, and the cache was made for another one, of {n_held}")
    head_dim = query.shape[3]
    if scaling is not None and not math.isclose(scaling, head_dim**-0.5):
        query = query * (scaling * head_dim**0.5)  # the kernels scale by head_dim ** -0.5
    sequences = layer.sequences
    if not torch.compiler.is_compiling():
        out = sequences.attend(
            layer.index, query, key.keys, value, sequences.counts, attention_mask, eager=True, module=module
        )  # fmt: skip
    elif query.shape[2] == 1 and attention_mask is None:
        if layer.index in CUT_BEFORE:
            cut(sequences.counts)
        out = decode(query, key.keys, value, sequences.counts, sequences.number.shape[0], layer.index)
    else:
        out = chunk(query, key.keys, value, sequences.counts, attention_mask, sequences.number.shape[0], layer.index)
    return out.transpose(1, 2), None


def refuse(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    """Raises ValueError, saying why, for attention that is not causal softmax(q k / sqrt(head_dim)) v."""
    wanted = [line for name, line in UNSUPPORTED.items() if kwargs.get(name) not in (None, False)]
    if mask is not None and mask.dim() != 2:
        wanted.append("a mask of its own (the caches take a 2D attention_mask)")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        wanted.append("attention that is not causal")
    if dropout:
        wanted.append("dropout (call model.eval())")
    if torch.is_grad_enabled() and q.requires_grad:
        wanted.append("gradients (use torch.no_grad())")
    if v.shape[3] != k.shape[3]:
        wanted.append(f"keys of {k.shape[3]} and values of {v.shape[3]} dimensions")
    if wanted:
        name = type(module).__name__
        raise ValueError(f"{name} asks for {wanted[0]}, which the caches of selective_kv do not support")


def padding_mask(
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    mask_function: Any = causal_mask_function,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask interface. attention_mask: bool [batch, column so far and in this pass], or None; kv_length:
    the most columns that it may have (`Layer.get_mask_sizes`).

    `generate` calls this before each compiled step: it is where the host sees that a cache is full. Returns the mask as
    it is where the pass may hold padding: the cache stores and reads each sequence's tokens by it. None for a step
    whose tokens are all real; what came before is known to the cache.
    """
    if mask_function is not causal_mask_function:
        raise ValueError("this model's mask is more than causal, which the caches of selective_kv do not support")
    if attention_mask is None or attention_mask.dim() != 2:
        return attention_mask
    n_column = attention_mask.shape[1]
    if n_column > kv_length > q_length:
        raise ValueError(f"{n_column} tokens do not fit a cache made with max_cache_len={kv_length}")
    if q_length > 1:
        return attention_mask
    if torch.compiler.is_compiling():  # the host must not look: `generate` has, before it called the compiled model
        torch._assert_async(attention_mask[:, -1].bool().all(), "a compiled step cannot read padding")
        return None
    return None if all(attention_mask[:, -1].tolist()) else attention_mask


@torch.library.custom_op("selective_kv::decode", mutates_args=("counts",))
def decode(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, handle: int, layer: int) -> Tensor:
    """`Sequences.attend` of one token a sequence. With kernels that may be captured, so may this. Contiguous, as a
    compiler is told: it reads the memory by that."""
    return by_handle[handle].attend(layer, q, k, v, counts, None).contiguous()


@torch.library.custom_op("selective_kv::chunk", mutates_args=("counts",), tags=(torch.Tag.cudagraph_unsafe,))
def chunk(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, mask: Tensor | None, handle: int, layer: int) -> Tensor:
    """`Sequences.attend` of several tokens a sequence, or with padding: the host reads the lengths."""
    return by_handle[handle].attend(layer, q, k, v, counts, mask).contiguous()  # as above


@torch.library.custom_op("selective_kv::cut", mutates_args=("counts",), tags=(torch.Tag.cudagraph_unsafe,))
def cut(counts: Tensor) -> None:
    """Does nothing, outside of CUDA graphs: so one ends before it, and the next one is launched while that runs."""


@cut.register_fake
def _(counts: Tensor) -> None:
    return None


@decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, handle: int, layer: int) -> Tensor:
    return q.new_empty(q.shape)


@chunk.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, mask: Tensor | None, handle: int, layer: int) -> Tensor:
    return q.new_empty(q.shape)


def register() -> None:
    """Without a mask function of the same name transformers would make no mask, and padding would be seen."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
