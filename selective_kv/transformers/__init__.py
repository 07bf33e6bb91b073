"""The caches of this library in transformers' `generate()`.

    from selective_kv.transformers import SelectiveKVCache        # registers attn_implementation="selective_kv"

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="selective_kv")
    cache = SelectiveKVCache(model.config, sink_size=16, window_size=128, k_bits=4, v_bits=4)
    model.generate(**inputs, past_key_values=cache)

transformers lets a cache store keys and values and return them to an attention function, dense. Here nothing is
dense: `update` hands the new keys on together with the layer they belong to, and the attention function lets that
layer's `KVCache` take them in and attend, in one call, as this project's own model does. `cache.py` has the caches,
`sequences.py` where each sequence stands, `attention.py` what is registered and what is refused, `rope.py` positions,
`decoding.py` and `captured.py` steps recorded as CUDA graphs: all of a step, or attention a layer at a time.
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
