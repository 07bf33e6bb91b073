"""transformers beside us: the same weights, through its dynamic and its quantised caches.

For `benchmark.py --peer transformers`. The model there is built on views of this project's weights, so it takes no
memory of its own and computes the same function; `gate` sees to that. Its caches are used as its users get them:
`DynamicCache`, and `QuantizedCache` with each back end that is installed (hqq at 8 bits, fp8). It has no 8-bit
quanto.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded here

import torch
from torch import Tensor

from benchmark.clock import timed
from benchmark.contestant import WARM_TOKENS, Timed
from checkpoint.layout import hugging_face_name, slots_of
from common.errors import UserError
from kv_cache import ModelCache
from model import Config, Transformer
from selective_kv import FullCache, Shape

GATE_TOKENS = 64


def transformers_version() -> str:
    return importlib.metadata.version("transformers")


def _config(config: Config) -> Any:
    """transformers' config of the family that computes what ours does."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        s = config.rope_scaling
        if s.kind == "factors":
            raise UserError("transformers has no rope scaling by a factor a pair, which this GGUF file has")
        rope |= {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
        elif s.kind == "yarn":
            rope |= {"beta_slow": s.low_freq_factor, "beta_fast": s.high_freq_factor}
            rope |= {"attention_factor": s.magnitude, "truncate": s.whole_pairs}
        if s.kind != "linear":
            rope["original_max_position_embeddings"] = s.original_context
    biases: dict[str, bool] = {}
    family: Any = Qwen3Config if config.qk_norm else LlamaConfig
    if config.qkv_bias and not config.wo_bias and not config.qk_norm:
        family = Qwen2Config  # which has these and no others, without being asked
    elif config.qkv_bias:
        biases["attention_bias"] = True
    if config.ffn_bias:
        biases["mlp_bias"] = True
    return family(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tied_embeddings,
        **biases,
    )


def transformers_model(model: Transformer) -> Any:
    """transformers' model on views of `model`'s weights. Raises UserError where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("--peer transformers: it is not installed (pip install transformers)")
    from transformers import AutoModelForCausalLM

    parameters = dict(model.named_parameters())
    state = {}
    for name, slot in slots_of(model.config).items():
        state[hugging_face_name(name)] = parameters[slot.parameter].detach().narrow(0, slot.start, slot.shape[0])
    if model.config.tied_embeddings:
        state["lm_head.weight"] = state[hugging_face_name("tok_embeddings.weight")]
    weight = model.tok_embeddings.weight
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(_config(model.config), dtype=weight.dtype)
    theirs.load_state_dict(state, assign=True)
    with weight.device:  # what it computes from its config must not stay on the meta device
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    return theirs.eval()


@torch.inference_mode()
def gate(model: Transformer, theirs: Any) -> float:
    """The relative distance of their logits from ours over a short prompt; UserError unless it is rounding.

    Half precision rounds differently in every operation, and layers amplify that: 0.003 to 0.03 was seen with the
    same function, 0.2 to 0.8 with a wrong RoPE.
    """
    weight = model.tok_embeddings.weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, GATE_TOKENS), generator=generator).to(weight.device)
    shape = Shape(1, model.config.n_kv_head, model.config.head_dim, GATE_TOKENS, weight.dtype, weight.device)
    ours = model(tokens, ModelCache(FullCache(), model.config.n_layer, shape).sequence(0)).float()
    error = ((theirs(tokens).logits.float() - ours).norm() / ours.norm()).item()
    if not error < (1e-3 if weight.dtype == torch.float32 else 0.1):
        raise UserError(f"--peer transformers: its logits are {error:.2g} from ours")
    return error


def caches(theirs: Any) -> dict[str, Callable[[], Any]]:
    """Makers of transformers' caches, by name; a back end that is not installed is named and left out."""
    from transformers import DynamicCache, QuantizedCache

    found: dict[str, Callable[[], Any]] = {"transformers dynamic": lambda: DynamicCache(config=theirs.config)}
    for name, knobs in (("hqq", {"nbits": 8}), ("fp8", {})):
        try:
            QuantizedCache(name, theirs.config, **knobs)
        except (ImportError, ValueError) as error:
            print(f"transformers quantized {name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue

        def make(name: str = name, knobs: dict[str, int] = knobs) -> Any:
            return QuantizedCache(name, theirs.config, **knobs)

        found[f"transformers quantized {name} 8 bit"] = make
    return found


class Peer(Timed):
    """transformers' model with one of its caches, filled, ready to step. Its cache grows by what is stepped."""

    def __init__(
        self, name: str, theirs: Any, make: Callable[[], Any], shape: Shape, context: int, prefill: bool = False
    ) -> None:
        super().__init__(name, shape.batch, context, shape.device)
        self.theirs, self.path = theirs, f"transformers {transformers_version()}, eager step"
        before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        with self.peak.watch():
            self.cache = make()
            if prefill:
                generator = torch.Generator().manual_seed(0)
                vocab_size = theirs.config.vocab_size
                ids = torch.randint(vocab_size, (shape.batch, context), generator=generator).to(self.device)
                self.read(ids[:, :WARM_TOKENS])
                self.cache = make()
                self.prefill_seconds = timed(lambda: self.read(ids), self.device)
            else:
                self.fill(shape)
        if self.device.type == "cuda":  # what the system tells; a CPU's does not
            self.cache_bytes = torch.cuda.memory_allocated(self.device) - before

    def fill(self, shape: Shape) -> None:
        kv = (shape.batch, shape.n_kv_head, self.context, shape.head_dim)
        for layer in range(self.theirs.config.num_hidden_layers):
            k, v = (torch.randn(kv, dtype=shape.dtype, device=self.device) for _ in "kv")
            self.cache.update(k, v, layer)
            del k, v
        self.tokens = torch.zeros(shape.batch, 1, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> None:
        logits: Tensor = self.theirs(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.tokens = logits[:, -1].argmax(-1, keepdim=True)

    def advance(self) -> None:
        self.read(self.tokens)
