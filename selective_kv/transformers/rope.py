"""RoPE, for the two caches that ask: `compress_kv` sees its sinks at their distance within the cache, and `quantize_kv`
keeps the bias of keys out of what it stores.

transformers rotates keys and queries before a cache meets them, by original positions. That is what every cache here
expects; sink + window turns its queries back for the sinks, by frequencies that come from the model's config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Models whose RoPE turns dimension i with i + head_dim / 2, all of them, as `rotate_half` does.
ROTATES_HALVES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "mixtral", "qwen2_moe", "qwen3_moe"})
FIXED = ("linear", "llama3", "yarn")  # scalings whose frequencies do not depend on how long the text is


def rope_frequencies(config: Any) -> Tensor:
    """float64 [head_dim / 2]: radians that each pair turns per position, from a model's config.

    Raises ValueError for a model that rotates in another way.
    """
    instead = "use positions='original', which keeps the model's own"
    if config.model_type not in ROTATES_HALVES:
        raise ValueError(f"positions='cache' is not supported for {config.model_type}: {instead}")
    settings = config.rope_parameters
    kind = settings["rope_type"]
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"positions='cache' is not supported where RoPE turns only part of a head: {instead}")
    if kind in FIXED:
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0].double()
    if kind != "default":
        raise ValueError(f"positions='cache' is not supported with RoPE scaling {kind!r}: {instead}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64)
    return settings["rope_theta"] ** (-pair / head_dim)


def scaled_bias(module: Any, config: Any) -> tuple[Tensor, Tensor] | None:
    """The bias of an attention module's keys, float32 [n_kv_head, head_dim] and as long as RoPE makes it, and RoPE's
    frequencies; None where it has none, or RoPE is not known. Were it another one, keys would be stored less well, and
    attention would be as right.
    """
    bias = getattr(getattr(module, "k_proj", None), "bias", None)
    # after a norm no two keys have the same in them
    if not isinstance(bias, Tensor) or bias.is_meta or hasattr(module, "k_norm"):
        return None
    try:
        frequencies = rope_frequencies(config)
    except ValueError:
        return None
    kind, magnitude = config.rope_parameters["rope_type"], 1.0
    if kind in FIXED:
        magnitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[1]
    return bias.detach().float().view(-1, 2 * len(frequencies)) * magnitude, frequencies


class ChunkRope:
    """What a cache asks of RoPE (`RopeLike`) about one chunk of tokens.

    known: gives the frequencies, or raises ValueError; most caches never ask. positions: int64 [batch, token].
    """

    def __init__(self, known: Callable[[], Tensor], positions: Tensor) -> None:
        self._known, self.positions = known, positions
        self._back: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def frequencies(self) -> Tensor:
        return self._known()

    def back_to(self, last: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [batch, head_dim], of the rotation that takes each sequence's first position back to
        `last`; of none where it is not beyond. Made once: the layers of a step share them.
        """
        if last not in self._back:
            frequencies = self.frequencies
            signed = torch.cat((-frequencies, frequencies))  # so that `roll` by half a head completes the rotation
            angle = (last - self.positions[:, :1]).clamp_max(0) * signed
            self._back[last] = angle.cos().float(), angle.sin().float()
        return self._back[last]
