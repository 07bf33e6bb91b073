"""Compile the Triton kernels of a run in parallel, while its weights are being read.

Which kernels a run launches is found by running it: a model of two layers on the meta device, where tensors have shapes
and strides but no memory, reads the prompts and takes a step, and each launch only compiles (`kernels.launch`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoint.quantised import skeleton
from common.messages import say
from engine import FusedChunk, FusedStep, Sampling, gpu_start
from engine.chunk_sums import ChunkSums
from engine.fused import use_kernels
from engine.packing import PromptPart
from engine.parallel import Parallel
from engine.sums import PeerSums
from kv_cache import ModelCache
from model import Config, Transformer
from quantize import WeightSetting
from selective_kv import Chunk, KVCache, Shape
from selective_kv.kernels import uses_triton
from selective_kv.kernels.attention_lse import make_plans
from selective_kv.kernels.launch import compiling

META = torch.device("meta")
MOST_WORKERS = 16


class Run(NamedTuple):
    """What decides, beside the model and the sampling, which kernels a run launches. parts: the parts of prompts that
    it reads (`prompt_parts`); without any it only takes steps.
    """

    policy: KVCache
    shape: Shape
    parts: Sequence[PromptPart] = ()
    weights: WeightSetting | None = None


@contextmanager
def compiled_ahead(
    config: Config, runs: Sequence[Run], sampling: Sampling, ranks: Parallel | None = None
) -> Iterator[None]:
    """Compile in the background what all these runs, on one device and in one dtype, launch; at the end wait for it.
    Nothing happens where no Triton kernel will run.

    An error here is printed and ends nothing: the launch that needs the kernel raises it again.
    """
    if not runs or runs[0].shape.device.type != "cuda":
        yield
        return
    device, dtype = runs[0].shape.device, runs[0].shape.dtype
    failed: list[Exception] = []
    longest = max((part.n_token for run in runs for part in run.parts), default=1)

    def walk_all() -> None:
        for run in runs:
            walk(config, run.policy, run.shape, sampling, run.parts, run.weights, ranks)

    def work() -> None:
        try:
            if uses_triton(device):
                gpu_start.wait()
                compile_all(walk_all, device)
                make_plans(device, dtype, config.n_head, config.n_kv_head, config.head_dim, longest)
        except Exception as error:
            failed.append(error)

    def multiply() -> None:
        try:
            first_product(device, dtype, config.dim, longest)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=do, name=do.__name__, daemon=True) for do in (work, multiply)]
    for thread in threads:
        thread.start()
    try:
        yield
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        # a compiler cannot be stopped, and the interpreter's own exit would wait for it
        if any(thread.is_alive() for thread in threads):
            os._exit(130)
        raise
    if failed:
        say(f"kernels could not be compiled ahead, and are at their first use: {failed[0]!r}")


def first_product(device: torch.device, dtype: torch.dtype, dim: int, n_token: int) -> None:
    """Have the library of products load itself: 0.1 s, that a prompt's first layer would wait for."""
    torch.cuda.set_device(device)
    x, weight = (torch.zeros(n, dim, dtype=dtype, device=device) for n in (n_token, dim))
    torch.nn.functional.linear(x, weight)


def prompt_parts(lengths: Sequence[int], chunk: int, kept: Sequence[int] = ()) -> list[PromptPart]:
    """The parts that `Engine.read` reads of prompts of these lengths, but one of each kind.

    A kernel's binary depends on how pointers are aligned, and so on the sequence modulo 4 (a scale has 4 bytes), on
    whether anything came before, and on whether there is one token or more. Of more, the longest part needs the most.
    """
    longest: dict[tuple[int, int, bool], PromptPart] = {}
    for b, length in enumerate(lengths):
        for start in range(kept[b] if b < len(kept) else 0, length, chunk):
            part = PromptPart(b, start, min(chunk, length - start))
            kind = b % 4, start, part.n_token == 1
            longest[kind] = max(longest.get(kind, part), part, key=lambda p: p.n_token)
    return list(longest.values())


class _Past(ModelCache):
    """A cache on the meta device, whose lengths cannot be asked for: `start` says where a chunk begins."""

    start = 0

    def begin(self, n_token: int) -> Chunk:
        positions = torch.empty(len(self.lengths), n_token, dtype=torch.int64, device=META)
        return super().begin(1) if n_token == 1 else Chunk(positions, self.row, self.start)


class _BlankRope:
    """Rotations as `model.Rope` has them, without values."""

    def __init__(self, positions: Tensor, head_dim: int) -> None:
        self.cos, self.sin = (torch.empty(len(positions), 1, positions.shape[1], head_dim, device=META) for _ in "cs")
        self.frequencies = torch.empty(head_dim // 2, dtype=torch.float64, device=META)

    def back_to(self, last: int) -> tuple[Tensor, Tensor]:
        return self.cos[:, 0, 0], self.sin[:, 0, 0]


def blank(model: Transformer) -> None:
    """Have a model on the meta device compute shapes alone. PyTorch's operators there are Python, mostly, and import
    sympy and a compiler: 3 s of a start, in which the thread that reads weights hardly gets to run.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.RMSNorm) and isinstance(module.weight, nn.Parameter):
            module.forward = partial(_outputs, module)  # type: ignore[method-assign]
    head_dim = model.config.head_dim

    def rope(positions: Tensor) -> Any:
        return _BlankRope(positions, head_dim)

    model.rope = rope  # type: ignore[method-assign]


def _outputs(module: nn.Linear | nn.Embedding | nn.RMSNorm, x: Tensor) -> Tensor:
    shape = x.shape
    if isinstance(module, nn.Embedding):
        shape = torch.Size([*shape, module.embedding_dim])
    elif isinstance(module, nn.Linear):
        shape = torch.Size([*shape[:-1], module.out_features])
    return torch.empty(shape, dtype=module.weight.dtype, device=META)


class _Sums:
    """What sums over ranks on the meta device: the kernel where it is ours, else nothing."""

    def __init__(self, ranks: Parallel) -> None:
        self.ranks = ranks

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        sums = self.ranks.sums[0]
        return sums.sum(x, residual) if isinstance(sums, PeerSums) and sums.fits(x) else x

    def chunk(self, x: Tensor) -> ChunkSums | None:
        return self.ranks.chunk(x)


@torch.inference_mode()
def walk(
    config: Config, policy: KVCache, shape: Shape, sampling: Sampling, parts: Sequence[PromptPart],
    weights: WeightSetting | None = None, ranks: Parallel | None = None,
) -> None:  # fmt: skip
    """Call every kernel that a run does, on the meta device: only in `compiling`."""
    from engine.kernels.triton_backend import TRITON as STEP
    from selective_kv.kernels.triton_backend import TRITON

    sums = None if ranks is None else _Sums(ranks)
    model = skeleton(replace(config, n_layer=2), weights, shape.dtype, sums)  # the last layer is another kind
    blank(model)
    use_kernels(model, STEP)
    # Whether a key bias is kept out of tiles depends on weights that nobody has read yet, and differs between layers.
    biased = config.qkv_bias and not config.qk_norm
    for bias in (None, torch.empty(config.n_kv_head, config.head_dim, device=META)) if biased else (None,):
        cache = _Past(policy, 2, replace(shape, device=META))
        cache.expect_biases([bias] * 2, model.frequencies)
        if not all([layer.wrap_kernels(lambda _: TRITON) for layer in cache.layers]):  # a plugin's own attention
            return
        tokens = torch.zeros(shape.batch, 1, dtype=torch.int64, device=META)
        logits = FusedStep(model, STEP)(tokens, cache)
        for row, start, n_token in parts:
            view: Any = cache.sequence(row)
            view.start = start
            FusedChunk(model)(torch.zeros(1, n_token, dtype=torch.int64, device=META), view)
    if sampling.temperature == 0 and ranks is None:
        STEP.greedy(logits)
    elif sampling.temperature == 0 and ranks is not None and isinstance(ranks.sums[0], PeerSums):
        ranks.sums[0].choose(logits, config.vocab_start)
    elif sampling.temperature == 0:
        STEP.chosen(STEP.best(logits, config.vocab_start))


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels and load them, and what came of each."""

    def __init__(self, device: torch.device) -> None:
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        super().__init__(workers, "compile ahead", torch.cuda.set_device, (device,))  # current is a thread's own
        self.results: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def compile_and_load() -> Any:
            kernel = fn(*args, **kwargs)
            load(kernel)
            return kernel

        self.results.append(super().submit(compile_and_load))
        return self.results[-1]


def load(kernel: Any) -> None:
    """Make a compiled kernel's launcher, which may take a C compiler, and put it on the GPU: `run` does both."""
    _ = kernel.run


def compile_all(walk: Callable[[], None], device: torch.device) -> None:
    """Compile what `walk` launches, side by side where Triton can. Raises the first error when all have been tried."""
    torch.cuda.set_device(device)
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:  # an older Triton: one after the other
        with compiling(load):
            walk()
        return
    with _Compilers(device) as compilers:
        with AsyncCompileMode(compilers, ignore_errors=True), compiling():
            walk()
        for result in compilers.results:
            result.result()
