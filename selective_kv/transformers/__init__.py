"""The caches of this library in transformers' `generate()`.

    from selective_kv.transformers import SelectiveKVCache        # registers attn_implementation="selective_kv"

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="selective_kv")
    cache = SelectiveKVCache(model.config, sink_size=16, window_size=128, k_bits=4, v_bits=4)
    model.generate(**inputs, past_key_values=cache)

transformers expects a cache to store keys and values and to return all of them, dense, to an attention function. Here
nothing is made dense: `update` returns the new keys alone, with the layer that they belong to, and the attention
function has that layer's `KVCache` store them and attend, in one call, as this project's own model does.

    cache.py        the caches
    sequences.py    the length of each sequence, and the layers' memory
    attention.py    what is registered with transformers, and what is refused
    rope.py         positions
    decoding.py     whole decode steps recorded as CUDA graphs
    captured.py     each layer's attention recorded as a CUDA graph
"""

from __future__ import annotations

from selective_kv.transformers._versions import check_version

check_version()

from selective_kv.transformers.attention import NAME, register  # noqa: E402
from selective_kv.transformers.cache import (  # noqa: E402
    FullKVCache,
    PolicyKVCache,
    SelectiveKVCache,
    SinkWindowKVCache,
)
from selective_kv.transformers.decoding import captured_decoding  # noqa: E402

register()

__all__ = ["NAME", "FullKVCache", "PolicyKVCache", "SelectiveKVCache", "SinkWindowKVCache", "captured_decoding"]
