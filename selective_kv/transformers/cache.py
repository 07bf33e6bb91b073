"""Caches for transformers' `generate()`, made of this library's."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from selective_kv.cache import KVCache, Shape
from selective_kv.full import FullCache
from selective_kv.selective import SelectiveCache
from selective_kv.settings import MOST
from selective_kv.sink_window import SinkWindowCache
from selective_kv.transformers.attention import Taken
from selective_kv.transformers.sequences import Sequences

_compiling_nothing = 0  # how many blocks are open


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """A context in which no cache says that it is compileable."""
    global _compiling_nothing
    _compiling_nothing += 1
    try:
        yield
    finally:
        _compiling_nothing -= 1


class Layer(CacheLayerMixin):
    """One layer as transformers sees it. Keys and values are not here: `sequences` has all layers' memory."""

    is_sliding = False
    supports_early_init = True

    def __init__(self, sequences: Sequences, index: int, compileable: bool) -> None:
        super().__init__()
        self.sequences, self.index = sequences, index
        self._compileable = compileable
        seen = sequences.policy.sees()
        self.is_croppable = seen is not None and seen.window_size is None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self._compileable and (torch.compiler.is_compiling() or not _compiling_nothing)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.sequences.shape is None:
            self.sequences.allocate(key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """New keys and values [batch, n_kv_head, token, head_dim]; the attention function stores them."""
        self.sequences.expect(key_states)
        self.is_initialized = True
        return Taken(self, key_states), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns fit, as StaticCache has it: `padding_mask` compares, before a compiled step and not in it,
        which would be compiled for one limit only. Without a limit, query_length.
        """
        if torch.compiler.is_compiling() or self.sequences.endless:
            return query_length, 0
        return self.sequences.max_length or query_length, 0

    def get_seq_length(self) -> Any:
        """Columns read, padding included: a number, or a tensor where memory is fixed (as StaticCache's)."""
        return self.sequences.counts[-1] if self.sequences.fixed else self.sequences.n_column

    def get_max_length(self) -> int:
        return self.sequences.max_length or -1

    def offload(self) -> None:
        raise ValueError("the caches of selective_kv cannot be offloaded")

    prefetch = offload

    # `PolicyKVCache` does these once for all layers.
    def reset(self) -> None:
        raise ValueError("call reset, crop, reorder_cache and the like on the cache, not on one of its layers")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.reset()


class PolicyKVCache(Cache):
    """A `KVCache` of this library, or one of your own, as a cache of transformers.

    config: the model's (`model.config`). policy: e.g. `SelectiveCache(sink_size=16, window_size=128)`. max_cache_len:
    the most tokens, padding included, as for StaticCache: memory is allocated once, and on a GPU `generate` compiles
    and captures its decode step. Without it memory grows as it is needed, and nothing is compiled (a cache of constant
    size, `endless`, needs none).

    The model must be loaded with attn_implementation="selective_kv". Raises ValueError for a model whose attention
    these caches do not compute.
    """

    def __init__(self, config: Any, policy: KVCache, max_cache_len: int | None = None) -> None:
        config = config.get_text_config(decoder=True)
        refuse_config(config)
        if max_cache_len is not None:
            if not hasattr(max_cache_len, "__index__") or not 1 <= max_cache_len <= MOST:
                raise ValueError(f"max_cache_len must be at least 1 and at most {MOST:,}, not {max_cache_len!r}")
            max_cache_len = operator.index(max_cache_len)
        if max_cache_len is None and not policy.endless and not can_grow(policy):
            max_cache_len = config.max_position_embeddings
        self.sequences = Sequences(policy, config, max_cache_len)
        compileable = self.sequences.fixed and can_capture(policy)
        layers: list[Any] = [Layer(self.sequences, i, compileable) for i in range(config.num_hidden_layers)]
        super().__init__(layers=layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.sequences.policy})"

    @property
    def policy(self) -> KVCache:
        return self.sequences.policy

    def nbytes(self) -> dict[str, int]:
        """Bytes really allocated, by region, over all layers."""
        total: dict[str, int] = {}
        for layer in self.sequences.layers if self.sequences.shape else ():
            for region, n in layer.nbytes().items():
                total[region] = total.get(region, 0) + n
        return total

    def score_errors(self, k_bits: int | None = None) -> list[float] | None:
        """How far the scores of the last keys are off in each layer by being stored in fewer bits, in nats, measured
        by the last query of the prompt: call it when one has been read. More than `selective_kv.score_error.BOUND`
        in a layer: a bad choice of bits for this model. k_bits: as if keys were stored in so many. Waits for the
        device.

        None: the cache stores no keys in fewer bits, or there is nothing to measure.
        """
        return self.sequences.score_errors(k_bits)

    def reset(self) -> None:
        """Forget everything. Memory stays, for the next text."""
        self.sequences.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number. Raises ValueError where a past that was quantised or
        dropped would have to come back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, how many tokens to remove, not {tokens_to_remove}")
        self.sequences.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i becomes what sequence beam_idx[i] was."""
        self.sequences.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        shape = self.sequences.shape
        if shape is not None:
            self.sequences.select(torch.arange(shape.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences: indices int64, or bool [batch]."""
        self.sequences.select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)


class FullKVCache(PolicyKVCache):
    """Every token in full precision."""

    def __init__(self, config: Any, *, max_cache_len: int | None = None) -> None:
        super().__init__(config, FullCache(), max_cache_len)


class SinkWindowKVCache(PolicyKVCache):
    """The first and the most recent tokens; the middle is dropped. settings: `SinkWindowCache`'s.

    By default sinks are seen at their distance within the cache (StreamingLLM), which needs the RoPE frequencies of the
    model's config; positions="original" keeps the model's own positions.
    """

    def __init__(self, config: Any, *, max_cache_len: int | None = None, **settings: Any) -> None:
        super().__init__(config, SinkWindowCache(**settings), max_cache_len)


class SelectiveKVCache(PolicyKVCache):
    """Sink and window in full precision, everything between them quantised. settings: `SelectiveCache`'s."""

    def __init__(self, config: Any, *, max_cache_len: int | None = None, **settings: Any) -> None:
        super().__init__(config, SelectiveCache(**settings), max_cache_len)


def refuse_config(config: Any) -> None:
    """Raises ValueError for a model that is known, from its config, to need another attention."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    reasons = {
        "it is an encoder-decoder, with cross-attention": getattr(config, "is_encoder_decoder", False),
        f"it has layers of {', '.join(sorted(kinds))}": kinds,
        "its layers slide (load it with sliding_window=None if the text stays within it)": slides,
        "its attention is chunked": getattr(config, "attention_chunk_size", None),
        "its scores are soft-capped": getattr(config, "attn_logit_softcapping", None),
        "its layers share keys and values": getattr(config, "num_kv_shared_layers", None),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"the caches of selective_kv do not support {config.model_type} as configured: {reason}")


def probe(policy: KVCache, device: str) -> KVCache:
    """A layer of the policy, with room for next to nothing."""
    layer = dataclasses.replace(policy)
    layer.allocate(Shape(1, 1, 64, 1, torch.float16, torch.device(device)))
    return layer


def can_grow(policy: KVCache) -> bool:
    """Whether its sequences can be copied into more memory."""
    return probe(policy, "cpu").storage() is not None


def can_capture(policy: KVCache) -> bool:
    """Whether its decode step may be in a CUDA graph; compiled without one, where there is no GPU, any may."""
    return probe(policy, "cuda").capturable if torch.cuda.is_available() else True
