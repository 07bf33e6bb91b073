"""Llama in one file: config, RMSNorm, RoPE, attention, feed-forward, transformer.

One model covers Llama 2, 3, 3.1 and 3.2, Mistral 7B, Qwen 2.5 and Qwen 3 (dense); what tells them apart is data
(`Config`), not code. Attention computes q, k and v and hands them to a cache object; it gets the attention output back
and never learns what the cache keeps, how, or for how long.

Layout rules: activations are [batch, token, ...] outside attention and [batch, head, token, head_dim] inside it, as
`scaled_dot_product_attention` wants. RoPE pairs dimension i with i + head_dim/2 (the layout of Hugging Face
checkpoints; `checkpoint` permutes others on loading).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are lowered so that a model can read past the context that it was pre-trained with.

    "linear": every frequency is divided by `factor`.
    "llama3" (`apply_scaling` in meta-llama/llama-models): frequencies of wavelengths above original_context /
    low_freq_factor are divided, those below original_context / high_freq_factor are not, with a smooth step between.
    "yarn" (Peng et al. 2023, arXiv:2309.00071): frequencies that turn less than `low_freq_factor` times over the
    original context (the paper's beta_slow) are divided, those that turn more than `high_freq_factor` times (beta_fast)
    are not; the step between is linear in the pair's index, rounded to whole indices if `whole_pairs`. Queries and keys
    are multiplied by `magnitude`, which sharpens attention.
    "factors": each frequency is divided by its own factor (a GGUF file's rope_freqs)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] = ()  # one for each pair of dimensions
    magnitude: float = 1.0
    whole_pairs: bool = True

    def stretched(self, freq: Tensor, theta: float) -> Tensor:
        """freq: float64 [head_dim / 2], radians per position, not scaled. Returns the scaled ones."""
        if self.kind == "linear":
            return freq / self.factor
        if self.kind == "factors":
            return freq / torch.tensor(self.factors, dtype=torch.float64, device=freq.device)
        if self.kind == "llama3":
            turns = self.original_context * freq / (2 * math.pi)  # over the original context
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        elif self.kind == "yarn":
            n_pair = len(freq)

            def pair_of(turns: float) -> float:  # the index, a fraction, at which a pair would turn so often
                return n_pair * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(theta)

            first, last = pair_of(self.high_freq_factor), pair_of(self.low_freq_factor)
            if self.whole_pairs:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, 2 * n_pair - 1)
            step = (torch.arange(n_pair, dtype=torch.float64, device=freq.device) - first) / (last - first or 0.001)
            keep = 1 - step
        else:
            raise ValueError(f"config: rope scaling {self.kind!r} is not supported (linear, llama3 and yarn are)")
        keep = keep.clamp(0, 1)
        return keep * freq + (1 - keep) * freq / self.factor


@dataclass(frozen=True)
class Config:
    """The shape of a model. `context` is the number of tokens that it was trained to handle.

    reach: how many tokens the model's own attention looks back to, the query's token included (Mistral 7B 0.1); 0: to
    all of them. With a reach, `context` is at most that, the length up to which every cache is right, and `far_context`
    is what the model was trained to handle, for caches that keep to the reach too (`KVCache.slides`)."""

    vocab_size: int
    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    ffn_dim: int
    context: int
    head_dim: int = 0  # 0: dim // n_head
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    wo_bias: bool = False
    ffn_bias: bool = False
    reach: int = 0
    far_context: int = 0
    qk_norm: bool = False
    vocab_start: int = 0  # the first token that the head scores
    vocab_rows: int = 0  # how many it scores; 0: the whole vocabulary. Ranks may share the vocabulary

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layer", "n_head", "n_kv_head", "ffn_dim", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"config: {name} must be positive, not {getattr(self, name)}")
        if self.rope_theta <= 0 or self.norm_eps < 0:
            raise ValueError(
                f"config: rope_theta {self.rope_theta} must be positive, norm_eps {self.norm_eps} not below 0"
            )
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.dim // self.n_head)
        if self.n_head % self.n_kv_head:
            raise ValueError(f"config: n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"config: head_dim {self.head_dim} is not even, and RoPE needs pairs")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"config: yarn needs a rope_theta above 1, not {self.rope_theta}")

    @property
    def rope_frequencies(self) -> Tensor:
        """float64 [head_dim / 2] on the CPU: radians that each pair turns per position."""
        pair = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu")
        freq = self.rope_theta ** (-pair / self.head_dim)
        return freq if self.rope_scaling is None else self.rope_scaling.stretched(freq, self.rope_theta)


_LLAMA31 = RopeScaling("llama3", 8.0)
_LLAMA32 = RopeScaling("llama3", 32.0)

CONFIGS: dict[str, Config] = {
    "llama-2-7b": Config(32000, 4096, 32, 32, 32, 11008, 4096),
    "llama-2-13b": Config(32000, 5120, 40, 40, 40, 13824, 4096),
    "llama-2-70b": Config(32000, 8192, 80, 64, 8, 28672, 4096),
    "llama-3-8b": Config(128256, 4096, 32, 32, 8, 14336, 8192, rope_theta=5e5),
    "llama-3-70b": Config(128256, 8192, 80, 64, 8, 28672, 8192, rope_theta=5e5),
    "llama-3.1-8b": Config(128256, 4096, 32, 32, 8, 14336, 131072, rope_theta=5e5, rope_scaling=_LLAMA31),
    "llama-3.1-70b": Config(128256, 8192, 80, 64, 8, 28672, 131072, rope_theta=5e5, rope_scaling=_LLAMA31),
    "llama-3.2-1b": Config(
        128256, 2048, 16, 32, 8, 8192, 131072, rope_theta=5e5, rope_scaling=_LLAMA32, tied_embeddings=True
    ),
    "llama-3.2-3b": Config(
        128256, 3072, 28, 24, 8, 8192, 131072, rope_theta=5e5, rope_scaling=_LLAMA32, tied_embeddings=True
    ),
    "mistral-7b": Config(32000, 4096, 32, 32, 8, 14336, 32768, rope_theta=1e6),  # v0.2; v0.3 has vocab 32768
    "qwen-2.5-0.5b": Config(
        151936, 896, 24, 14, 2, 4864, 32768, norm_eps=1e-6, rope_theta=1e6, tied_embeddings=True, qkv_bias=True
    ),
    "qwen-2.5-7b": Config(152064, 3584, 28, 28, 4, 18944, 32768, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True),
    "qwen-3-0.6b": Config(
        151936, 1024, 28, 16, 8, 3072, 40960, 128, 1e-6, rope_theta=1e6, tied_embeddings=True, qk_norm=True
    ),
    "qwen-3-8b": Config(151936, 4096, 36, 32, 8, 12288, 40960, 128, 1e-6, rope_theta=1e6, qk_norm=True),
}


class Step(Protocol):
    """What a cache says of the chunk of tokens about to be read. positions: int64 [batch, token]."""

    @property
    def positions(self) -> Tensor: ...


class LayerCache(Protocol):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, rope: Rope) -> Tensor:
        """Take in k, v [batch, n_kv_head, token, head_dim]; return attention of q [batch, n_head, ...]."""
        ...


class Cache(Protocol):
    """All that the model asks of a cache: one object per layer, and where each sequence stands."""

    @property
    def layers(self) -> Sequence[LayerCache]: ...

    def begin(self, n_token: int) -> Step: ...

    def advance(self, step: Step) -> None: ...


class Ranks(Protocol):
    """What the model asks of the devices that hold its layers together, where there are several."""

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual plus the sum of every rank's x: [..., dim], which may be in x's memory."""
        ...


def with_signs(frequencies: Tensor) -> Tensor:
    """[head_dim]: the negated frequencies and then the frequencies, so that the sines of a head's first half already
    have the minus sign of a rotation."""
    return torch.cat((-frequencies, frequencies))


class Rope:
    """Rotary position embedding at the given positions (Su et al. 2021, arXiv:2104.09864).

    Angles are made in float64 from the positions themselves, so there is no table to outgrow and no
    rounding to notice at a position of a million. (MPS has no float64; float32 serves there.)
    frequencies: [head_dim / 2]; positions: [batch, token]; signed: `with_signs(frequencies)`, if the caller has it;
    magnitude: what rotated vectors are multiplied by (YaRN)."""

    def __init__(
        self, frequencies: Tensor, positions: Tensor, signed: Tensor | None = None, magnitude: float = 1.0
    ) -> None:
        self.frequencies, self.positions = frequencies, positions
        self.signed = with_signs(frequencies) if signed is None else signed
        self._back: dict[int, tuple[Tensor, Tensor]] = {}
        angle = positions[:, None, :, None] * self.signed
        # `out` has them rounded to float32 in the same launch: casts of their own would be two more in every step.
        self.cos, self.sin = (torch.empty_like(angle, dtype=torch.float32) for _ in range(2))
        torch.cos(angle, out=self.cos)  # [batch, 1, token, head_dim]: cos is even
        torch.sin(angle, out=self.sin)  # odd: signed, so that `roll` by half a head completes the rotation
        if magnitude != 1:
            self.cos *= magnitude
            self.sin *= magnitude

    def rotate(self, x: Tensor) -> Tensor:
        """x: [batch, head, token, head_dim], any float dtype; the products are float32."""
        half = x.shape[-1] // 2
        return torch.addcmul(x * self.cos, x.roll(half, -1), self.sin).to(x.dtype)

    def part(self, tokens: slice) -> Rope:
        """The rotations of some of the tokens alone."""
        part = copy.copy(self)
        part.positions, part.cos, part.sin = self.positions[:, tokens], self.cos[:, :, tokens], self.sin[:, :, tokens]
        part._back = {}
        return part

    def back_to(self, last: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [batch, head_dim], of the rotation that takes a query from each sequence's first
        position here back to position `last`, without `magnitude`; of none where that position is not above `last`.
        Computed by the first call, before `positions` advance, and shared by a step's layers.
        """
        if last not in self._back:
            back = Rope(self.frequencies, (last - self.positions[:, :1]).clamp_max(0), self.signed)
            self._back[last] = back.cos[:, 0, 0], back.sin[:, 0, 0]
        return self._back[last]


class Attention(nn.Module):
    """Projections, norms and RoPE of q and k; attention itself is the cache's."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.n_qk = config.n_head + config.n_kv_head
        n_row = (self.n_qk + config.n_kv_head) * config.head_dim
        self.wqkv = nn.Linear(config.dim, n_row, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_head * config.head_dim, config.dim, bias=config.wo_bias)
        if config.qk_norm:  # Qwen 3: over head_dim, before RoPE
            self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache, step: Step) -> Tensor:
        batch, n_token, _ = x.shape
        n_head, n_kv_head = self.config.n_head, self.config.n_kv_head
        qkv = self.wqkv(x).view(batch, n_token, -1, self.config.head_dim).transpose(1, 2)
        qk, v = qkv.split([self.n_qk, n_kv_head], dim=1)
        if self.config.qk_norm:
            q, k = qk.split([n_head, n_kv_head], dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rope.rotate(qk).split([n_head, n_kv_head], dim=1)  # one rotation for both
        y = cache.attend(q, k, v, step, rope)  # [batch, n_head, token, head_dim]
        return self.wo(y.transpose(1, 2).reshape(batch, n_token, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202); the gate's and the up projection are one matrix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w13 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=config.ffn_bias)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    """ranks: the devices that each hold some of its heads and columns; None: this one holds them all."""

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks = ranks
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache, step: Step) -> Tensor:
        x = self.add(x, self.attention(self.attention_norm(x), rope, cache, step))
        return self.add(x, self.feed_forward(self.ffn_norm(x)))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, or x + the sum of every rank's y."""
        return x + y if self.ranks is None else self.ranks.sum(y, x)


class Transformer(nn.Module):
    """Build it under `torch.device("meta")`, then `materialize` it: the weights are allocated once.

    ranks: the devices that hold the model together; `config` then describes this one's share of it.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks
        self.frequencies = config.rope_frequencies
        self.signed_frequencies = with_signs(self.frequencies)
        # Not `nn.Embedding(...)`: its normal_ on the meta device imports torch's compiler, 2 to 3 s of every start.
        embeddings = torch.empty(config.vocab_size, config.dim)
        self.tok_embeddings: nn.Embedding = nn.Embedding.from_pretrained(
            embeddings if embeddings.is_meta else nn.init.normal_(embeddings), freeze=False
        )
        self.layers = nn.ModuleList(Block(config, ranks) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_rows or config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Give the head the embedding's parameters, whatever they are, where the two are one matrix."""
        if self.config.tied_embeddings:
            for name, parameter in self.tok_embeddings.named_parameters():
                setattr(self.output, name, parameter)

    def materialize(self, device: torch.device) -> Transformer:
        """Allocate the weights (uninitialised) on `device`, and return the model."""
        if self.config.tied_embeddings:  # to_empty would allocate the shared tensor twice
            for name, _ in self.tok_embeddings.named_parameters():
                setattr(self.output, name, None)
        # Not `to_empty`: its empty_like of a meta tensor imports sympy, a second of every start.
        self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        self.tie()
        return self

    def rope(self, positions: Tensor) -> Rope:
        if self.frequencies.device != positions.device:  # moved once, at the first token
            dtype = torch.float32 if positions.device.type == "mps" else torch.float64
            self.frequencies = self.frequencies.to(positions.device, dtype)
            self.signed_frequencies = with_signs(self.frequencies)
        scaling = self.config.rope_scaling
        magnitude = 1.0 if scaling is None else scaling.magnitude
        return Rope(self.frequencies, positions, self.signed_frequencies, magnitude)

    def key_biases(self) -> list[Tensor | None]:
        """Each layer's bias of its keys, which all of them have before RoPE: float32 [n_kv_head, head_dim], or None."""
        c = self.config
        if not c.qkv_bias or c.qk_norm:  # a norm after the bias divides it by another number for each key
            return [None] * c.n_layer
        magnitude = 1.0 if c.rope_scaling is None else c.rope_scaling.magnitude
        rows = slice(c.n_head * c.head_dim, (c.n_head + c.n_kv_head) * c.head_dim)
        biases: list[Tensor] = [block.attention.wqkv.bias for block in self.layers]  # type: ignore[union-attr, misc]
        return [bias.detach()[rows].float().view(c.n_kv_head, -1) * magnitude for bias in biases]

    def read(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Read a chunk of tokens, int64 [batch, token], that follow what `cache` has seen so far.

        Returns what `head` turns into logits, [batch, token, dim].
        """
        step = cache.begin(tokens.shape[1])
        rope = self.rope(step.positions)
        x = self.tok_embeddings(tokens)
        for block, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = block(x, rope, layer_cache, step)
        cache.advance(step)
        return x

    @property
    def output_weight(self) -> Tensor:
        """The head's rows, [vocab_rows or vocab_size, dim]: where it is tied, of the embedding, which is whole."""
        start, n = self.config.vocab_start, self.config.vocab_rows
        weight = self.output.weight
        if not (n and self.config.tied_embeddings):
            return weight
        rows = getattr(weight, "rows", None)  # of a matrix that is no tensor, because it has fewer bits
        return weight[start : start + n] if rows is None else rows(start, start + n)

    def head(self, x: Tensor) -> Tensor:
        """x: [..., dim]. Returns logits [..., vocab_rows or vocab_size] in the weights' dtype."""
        x = self.norm(x)
        if not (self.config.vocab_rows and self.config.tied_embeddings):
            return self.output(x)
        if isinstance(getattr(self.output, "weight", None), Tensor):
            return F.linear(x, self.output_weight)
        return self.output(x)[..., self.config.vocab_start :][..., : self.config.vocab_rows]

    def forward(self, tokens: Tensor, cache: Cache, last_only: bool = False) -> Tensor:
        """Logits after a chunk, [batch, token, vocab_size]; with `last_only` after its last token, [batch, 1, ...]."""
        x = self.read(tokens, cache)
        return self.head(x[:, -1:] if last_only else x)
