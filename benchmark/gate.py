"""The gate before a benchmark: what is going to be timed must agree with its reference, or nothing is timed."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import ModuleList

from common.errors import UserError
from engine import FusedStep
from engine.kernels import PYTORCH, StepKernels, step_kernels
from engine.packing import PromptPart
from engine.precompile import Run
from kv_cache import ModelCache, format_policy
from model import Transformer
from selective_kv import KVCache, Shape
from selective_kv.cache import wide
from selective_kv.kernels import AttentionKernels
from selective_kv.regions import Regions
from weights.modules import Weight
from weights.setting import WeightSetting

GATE_TOKENS = 200  # beyond sink and window
GATE_AFTER = GATE_TOKENS // 4  # of them, tokens read one by one
GATE_STEPS = 4
GATE_LAYERS = 4  # of a model: its layers differ in values, hardly in kind, and the reference is slow
GATE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, of an output


def copy_values(source: KVCache, target: KVCache) -> None:
    for mine, theirs in zip(target.storage() or [], source.storage() or [], strict=True):
        mine.copy_(theirs)


class Checked:
    """A layer's cache that also asks its reference, with the same q, k and v, and keeps the largest error.

    Layer by layer, because a model's layers amplify what rounding makes of the first one.
    """

    def __init__(self, policy: KVCache, shape: Shape, attention: AttentionKernels | None) -> None:
        self.fast, self.reference = dataclasses.replace(policy), dataclasses.replace(policy)
        for layer in (self.fast, self.reference):
            layer.allocate(shape)
        self.reference.use_reference()
        if attention is not None:
            self.fast.wrap_kernels(lambda _: attention)
        self.error = 0.0

    def tile_storage(self) -> tuple[AttentionKernels, Regions] | None:
        return self.fast.tile_storage()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Any, rope: Any) -> Tensor:
        want = self.reference.attend(q, k, v, step, rope)
        got = self.fast.attend(q, k, v, step, rope)
        self.error = max(self.error, distance(got, want))
        return got


class Compared:
    """A step's products that also ask their PyTorch twins, in float32 at least, and keep the largest relative error:
    a twin that rounds after every operation would be as far from the truth.
    """

    def __init__(self, kernels: StepKernels) -> None:
        self.wrapped = kernels
        self.kernels = dataclasses.replace(kernels, linear=self.linear, qkv=self.qkv)
        self.error = 0.0

    def linear(self, x: Tensor, weight: Weight, *args: Any, **around: Any) -> Tensor:
        given = {name: widened(value) for name, value in around.items()}
        want = PYTORCH.linear(widened(x), widened(weight), *map(widened, args), **given)  # the residual may be reused
        got = self.wrapped.linear(x, weight, *args, **around)
        self.error = max(self.error, distance(got, want))
        return got

    def qkv(self, *args: Any, **named: Any) -> Tensor:
        got = self.wrapped.qkv(*args, **named)
        want = PYTORCH.qkv(*map(widened, args), **{name: widened(value) for name, value in named.items()})
        self.error = max(self.error, distance(got, want))
        return got


def widened(value: Any) -> Any:
    """A tensor in float32 or wider, and a tuple of such; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    return wide(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def distance(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over norm of what is wanted; infinite where it is no number."""
    error = ((got.float() - want.float()).norm() / want.float().norm()).item()
    return error if math.isfinite(error) else math.inf


def gate(
    model: Transformer,
    policy: KVCache,
    shape: Shape,
    kernels: StepKernels | None = None,
    attention: AttentionKernels | None = None,
    batches: Sequence[int] = (),
) -> float:
    """The largest relative error of what is going to be timed, against the slow path; UserError past what the dtype's
    rounding explains.

    Attention of GATE_LAYERS layers: of one sequence over a prompt in two chunks and tokens after it, until some have
    left the window; then of whole batches of ragged lengths, and there the products of the fused step as well.
    batches: of how many sequences, unless shape's alone; its capacity is the gate's own. kernels, attention: the
    device's, unless given.
    """
    if kernels is None:
        kernels = step_kernels(shape.device)
    model, most = shallow(model, GATE_LAYERS), GATE_ERROR[shape.dtype]
    errors = {1: gate_sequence(model, policy, shape, attention)}
    for n in batches or (shape.batch,):
        at = dataclasses.replace(shape, batch=n)
        errors[n] = max(errors.get(n, 0.0), gate_batch(model, policy, at, kernels, attention))
    for n, error in errors.items():
        if not error <= most:
            raise UserError(
                f"{format_policy(policy)}, batch {n}: {error:.2g} from its reference, and {most:g} is allowed"
            )
    return max(errors.values())


def shallow(model: Transformer, n_layer: int) -> Transformer:
    """A model of no more than n_layer of a model's layers, the first and the last among them: all that differ in kind,
    in little time. The layers are the model's own."""
    n = min(n_layer, len(model.layers))
    chosen = [model.layers[round(i * (len(model.layers) - 1) / max(n - 1, 1))] for i in range(n)]
    found = copy.copy(model)
    found._modules = {**model._modules, "layers": ModuleList(chosen)}
    found.config = dataclasses.replace(model.config, n_layer=n)
    return found


def checked_cache(
    model: Transformer, policy: KVCache, shape: Shape, attention: AttentionKernels | None
) -> tuple[ModelCache, list[Checked]]:
    """A model's cache whose layers are `Checked`, and those layers."""
    cache = ModelCache(policy, 0, shape)
    layers = [Checked(policy, shape, attention) for _ in range(model.config.n_layer)]
    cache.layers = layers  # type: ignore[assignment]
    return cache, layers


def gate_chunks(policy: KVCache) -> tuple[int, int]:
    """Tokens of the two chunks of the gate's prompt."""
    n_prompt = policy.n_exact + GATE_TOKENS - GATE_AFTER
    return 2 * n_prompt // 3, n_prompt - 2 * n_prompt // 3


def gate_runs(policy: KVCache, shape: Shape, weights: WeightSetting | None) -> list[Run]:
    """What `gate` runs, for compiling its kernels ahead. shape: its batch counts."""
    at = dataclasses.replace(shape, capacity=policy.n_exact + GATE_TOKENS)
    first, second = gate_chunks(policy)
    parts = [PromptPart(0, 0, first), PromptPart(0, first, second)]
    return [Run(policy, dataclasses.replace(at, batch=1), parts, weights), Run(policy, at, (), weights)]


@torch.inference_mode()
def gate_sequence(
    model: Transformer, policy: KVCache, shape: Shape, attention: AttentionKernels | None = None
) -> float:
    """A prompt past sink and window in two chunks, and GATE_AFTER tokens after it."""
    chunks = gate_chunks(policy)
    at = dataclasses.replace(shape, batch=1, capacity=sum(chunks) + GATE_AFTER)
    cache, layers = checked_cache(model, policy, at, attention)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, at.capacity), generator=generator).to(shape.device)
    for part in tokens.split([*chunks, *[1] * GATE_AFTER], 1):
        model(part, cache.sequence(0), last_only=True)
    return max(layer.error for layer in layers)


@torch.inference_mode()
def gate_batch(
    model: Transformer, policy: KVCache, shape: Shape, kernels: StepKernels, attention: AttentionKernels | None = None
) -> float:
    """GATE_STEPS steps of the whole batch over random values: some sequences within sink and window, most past them."""
    at = dataclasses.replace(shape, capacity=policy.n_exact + GATE_TOKENS)
    cache, layers = checked_cache(model, policy, at, attention)
    if any(not layer.fast.fill_randomly() for layer in layers):  # a cache of one's own: only prompts can be read
        return 0.0
    for layer in layers:
        copy_values(layer.fast, layer.reference)
    last = at.capacity - GATE_STEPS
    cache.lengths.copy_(torch.linspace(last, 1 + policy.n_exact // 2, shape.batch).long())
    compared = Compared(kernels)
    fused = kernels is not PYTORCH
    step = FusedStep(model, compared.kernels) if fused else lambda tokens, cache: model(tokens, cache)[:, -1]
    tokens = torch.arange(shape.batch, device=shape.device)[:, None] % model.config.vocab_size
    for _ in range(GATE_STEPS):
        tokens = step(tokens, cache).argmax(-1, keepdim=True)
    return max(compared.error, *(layer.error for layer in layers))
