"""Small checkpoints in others' formats, gpt-fast's own arithmetic on them, and the model with no cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import families
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import Checkpoint, load_model, open_checkpoint
from checkpoint.layout import slots_of
from model import Config, Rope, Transformer

CPU = torch.device("cpu")
TOKENS = torch.randint(families.N_VOCAB, (2, 80), generator=torch.Generator().manual_seed(1))


class PlainCache:
    """No cache: causal attention within the one chunk that is read."""

    def __init__(self, config: Config, batch: int) -> None:
        self.layers, self.batch = [self] * config.n_layer, batch

    def begin(self, n_token: int) -> PlainCache:
        self.positions = torch.arange(n_token).expand(self.batch, n_token)
        return self

    def advance(self, step: PlainCache) -> None:
        pass

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: PlainCache, rope: Rope) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def forward(model: Transformer, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens, PlainCache(model.config, tokens.shape[0]))


def load(path: Path | None, model: str | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(open_checkpoint(path, model), CPU, dtype)


def gpt_fast_logits(state: dict[str, Tensor], config: Config, tokens: Tensor = TOKENS) -> Tensor:
    """gpt-fast's arithmetic on gpt-fast's tensors (its model.py): neighbours rotate, as complex numbers."""
    batch, n_token = tokens.shape
    n_q, n_kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    angle = torch.outer(torch.arange(n_token), config.rope_frequencies)
    magnitude = config.rope_scaling.magnitude if config.rope_scaling else 1.0
    turn = torch.polar(torch.full_like(angle, magnitude), angle)[:, None]  # [token, 1, head_dim / 2]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight

    def heads(x: Tensor, rotated: bool) -> Tensor:
        x = x.view(batch, n_token, -1, config.head_dim)
        if rotated:
            pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn
            x = torch.view_as_real(pairs).flatten(-2).float()
        return x.transpose(1, 2)

    x = state["tok_embeddings.weight"][tokens]
    for n in range(config.n_layer):
        w = {name.removeprefix(f"layers.{n}."): v for name, v in state.items() if f"layers.{n}." in name}
        qkv = F.linear(norm(x, w["attention_norm.weight"]), w["attention.wqkv.weight"], w.get("attention.wqkv.bias"))
        q, k, v = qkv.split([n_q, n_kv, n_kv], -1)
        if config.qk_norm:  # not in gpt-fast: its naming, continued
            q = norm(q.unflatten(-1, (-1, config.head_dim)), w["attention.q_norm.weight"])
            k = norm(k.unflatten(-1, (-1, config.head_dim)), w["attention.k_norm.weight"])
        y = F.scaled_dot_product_attention(
            heads(q, True), heads(k, True), heads(v, False), is_causal=True, enable_gqa=True
        )
        x = x + F.linear(y.transpose(1, 2).flatten(2), w["attention.wo.weight"], w.get("attention.wo.bias"))
        h = norm(x, w["ffn_norm.weight"])
        gate, up, down = ((w[f"feed_forward.{n}.weight"], w.get(f"feed_forward.{n}.bias")) for n in ("w1", "w3", "w2"))
        x = x + F.linear(F.silu(F.linear(h, *gate)) * F.linear(h, *up), *down)
    return F.linear(norm(x, state["norm.weight"]), state["output.weight"])


def random_gpt_fast(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """A state dict as gpt-fast names it, q, k and v apart."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: 0.3 * torch.randn(slot.shape, generator=generator) + ("norm" in name)
        for name, slot in slots_of(config).items()
    }
    if config.tied_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def fused(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    state = dict(state)
    for n in range(config.n_layer):
        parts = [state.pop(f"layers.{n}.attention.{part}.weight") for part in ("wq", "wk", "wv")]
        state[f"layers.{n}.attention.wqkv.weight"] = torch.cat(parts)
    return state


SMALL = Config(families.N_VOCAB, 48, 3, 6, 2, 256, 4096)  # ffn_dim: what params.json computes


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def write_hugging_face_config(folder: Path, **changes: object) -> Path:
    """A config.json for SMALL, in the form of transformers 4."""
    fields = dict(
        model_type="llama",
        vocab_size=families.N_VOCAB,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
    )
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (fields | changes).items() if v != "absent"}))
    return path


def edited(tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], family: str = "llama2") -> Path:
    families.make(family, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def assert_shares(load: Callable[[Checkpoint], Transformer], checkpoint: Checkpoint, n_rank: int) -> None:
    """The ranks' parameters are the whole model's, each element somewhere, and in the places that heads say."""
    whole = dict(load(checkpoint).named_parameters())
    for rank in range(n_rank):
        part = checkpoint.share_of(rank, n_rank)
        c, model = checkpoint.config, load(part)
        n_q, n_kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        q, kv, ffn = n_q // n_rank, n_kv // n_rank, c.ffn_dim // n_rank
        for name, got in model.named_parameters():
            want = whole[name]
            if "wqkv" in name:
                heads = zip(want.split([n_q, n_kv, n_kv]), (q, kv, kv), strict=True)
                want = torch.cat([part[rank * n :][:n] for part, n in heads])
            elif "w13" in name:
                want = torch.cat([half[rank * ffn :][:ffn] for half in want.chunk(2)])
            elif "wo." in name:
                want = want[:, rank * q :][:, :q]
            elif "w2." in name:
                want = want[:, rank * ffn :][:, :ffn]
            elif name == "output.weight":
                want = want[part.config.vocab_start :][: part.config.vocab_rows]
            assert torch.equal(got, want), (name, rank)
        rows = whole.get("output.weight", whole["tok_embeddings.weight"])
        start = part.config.vocab_start
        assert torch.equal(model.output_weight, rows[start : start + part.config.vocab_rows])
