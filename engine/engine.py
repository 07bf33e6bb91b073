"""Prefill and decoding: tokens through a model and its cache, and the clock beside them.

Each prompt is read into a sequence of the cache, short ones together (packing.py: no padding, so every sequence is
exact); the batch then decodes together, a token per sequence and step. On a CUDA device one captured graph serves every
length: sampling is in it, lengths live on the device, and the host only replays it and picks up tokens that are already
there, `LAG` steps behind.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import first_bad_parameter
from common.errors import UserError
from engine.fused import FusedStep, use_kernels
from engine.fused_chunk import FusedChunk
from engine.kernels import PYTORCH, step_kernels
from engine.packing import PACK_TOKENS, PackedCache, PromptPart, copy_sequences, packs, read_once
from engine.parallel import Parallel
from engine.sampling import BAD, Sampling
from engine.settings import PREFILL_CHUNK
from kv_cache import ModelCache
from model import Cache, Transformer
from selective_kv import KVCache
from selective_kv.kernels.launch import capture_stream, capturing

LAG = 2  # steps that the host may be ahead of the tokens it has seen: enough to never let the GPU wait


@dataclass
class Timing:
    """Seconds and counts of one run; decoding apart from prefill, and each synchronised at its ends."""

    n_read: int = 0  # tokens of prompts
    n_written: int = 0  # of all sequences, end tokens included
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0  # from the beginning of prefill
    decode_seconds: float = 0.0
    n_first: int = 0  # of those written, the ones that prefill chose: one a sequence

    def __add__(self, other: Timing) -> Timing:
        """The timing of two runs together; the time to first token is the first one's."""
        both = Timing(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Timing)})
        both.first_token_seconds = self.first_token_seconds or other.first_token_seconds
        return both

    @property
    def decode_tokens_per_second(self) -> float:
        """Over all sequences; the first token of each belongs to prefill."""
        n_decoded = self.n_written - self.n_first
        return n_decoded / self.decode_seconds if self.decode_seconds else 0.0


def chunk_size(policy: KVCache, context: int, most: int, reach: int | None = None) -> int:
    """How many tokens of a prompt are read at once, where `most` are allowed. reach: as for `Shape`."""
    if policy.endless and reach is None:  # positions within the cache must stay inside the trained context
        return min(most, max(1, context - policy.n_exact))
    return most


@dataclass
class Engine:
    """A model, its cache, and one decode step of the whole batch, captured where that is possible."""

    model: Transformer
    cache: ModelCache
    sampling: Sampling
    end_ids: frozenset[int] = frozenset()
    prefill_chunk: int = PREFILL_CHUNK
    capture: bool = True  # record the step as a CUDA graph where the cache's kernels allow it
    fuse: bool = True  # small operations into the matrix products, where there are kernels for that
    lag: int = -1  # steps ahead of the tokens seen; -1: the device's best; 0: the cache is used after an end token too
    timing: Timing = field(default_factory=Timing)
    ranks: Parallel | None = None  # those that hold the model together, where several do
    hook: Callable[[str], None] | None = None  # called with "prefill", "read", "decode", "step", "end"

    def __post_init__(self) -> None:
        device = self.cache.shape.device
        self.loaded = False  # whether the cache holds what this engine has not read
        self.logits: Tensor | None = None  # after the last token that was read, [batch, vocab_size]
        self.forward: Callable[[Tensor], Tensor] = lambda tokens: self.model(tokens, self.cache)[:, -1]
        self.device = device
        self.generator = torch.Generator(device).manual_seed(self.sampling.seed)
        self.tokens = torch.zeros(self.cache.shape.batch, 1, dtype=torch.int64, device=device)  # fed next
        self.picked = torch.zeros(self.cache.shape.batch, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.read_chunk: Callable[[Tensor, Any, Tensor | None], Tensor] = self._read_chunk
        self.step_path = "eager step"
        self.cache.expect_biases(self.model.key_biases(), self.model.frequencies)
        kernels = step_kernels(device)
        use_kernels(self.model, kernels)
        if self.fuse and kernels is not PYTORCH:
            fused = FusedStep(self.model, kernels)
            self.forward = lambda tokens: fused(tokens, self.cache)
            self.read_chunk = FusedChunk(self.model)
            self.step_path = "fused step"
        if self.ranks is not None:
            self.step_path += f", {self.ranks.path}"
        if self.lag < 0:
            self.lag = LAG if device.type == "cuda" else 0
        self.to_capture = self.capture and self.cache.layers[0].capturable
        if self.to_capture:
            self.step_path = self.step_path.replace("eager", "captured") + " (CUDA graph)"
        if self.to_capture and self.cache.layers[0].sees() is None:  # a cache of somebody's own may count its steps
            self._capture()
            self.reset()

    @torch.inference_mode()
    def _capture(self) -> None:
        """Record the step as a CUDA graph. This happens at the second token, so that the first need not wait for it."""
        side, current = capture_stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._warm_up()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        # NCCL's own thread may look at its events meanwhile, which only a capture of this thread alone allows.
        mode = "global" if self.ranks is None else "thread_local"
        torch.cuda.synchronize(self.device)
        with capturing(graph, self.device, capture_error_mode=mode):
            self._step()
        self.graph, self.to_capture = graph, False

    @property
    def captures(self) -> bool:
        """Whether the step is a CUDA graph, or will be one after the first."""
        return self.to_capture or self.graph is not None

    def _warm_up(self) -> None:
        """Take the next step twice, as a capture needs, and undo it each time: lengths, tokens and random numbers are
        restored, and what it wrote to the cache the real step will write again."""
        lengths, tokens, random = self.cache.lengths.clone(), self.tokens.clone(), self.generator.get_state()
        for _ in range(2):
            self._step()
            self.cache.lengths.copy_(lengths)
            self.tokens.copy_(tokens)
        self.generator.set_state(random)

    def reset(self) -> None:
        """Forget every sequence and start the random numbers anew: the same prompt gives the same tokens."""
        self.cache.reset()
        self.loaded, self.logits = False, None  # those were of a text that is forgotten
        self.generator.manual_seed(self.sampling.seed)

    def _step(self) -> None:
        self._choose(self.forward(self.tokens))

    def _choose(self, logits: Tensor) -> None:
        """logits: [batch, vocab_size], or a rank's part of it: every rank then chooses the same token."""
        config, ranks = self.model.config, self.ranks
        if ranks is None:
            picked = self.sampling.pick(logits, self.generator)
        elif self.sampling.temperature == 0:
            picked = ranks.greedy(logits, config.vocab_start)
        else:
            picked = self.sampling.pick(ranks.gather(logits, config.vocab_size), self.generator)
        self.picked.copy_(picked)
        torch.clamp(self.picked, min=0, out=self.tokens[:, 0])  # BAD must not index the embedding

    def step(self) -> None:
        """Feed `tokens` and choose the next ones. Only the first step, which is captured, waits for the device."""
        if self.to_capture:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()

    def _read_chunk(self, tokens: Tensor, cache: Cache, last: Tensor | None = None) -> Tensor:
        """`FusedChunk.__call__` by the model's own modules."""
        x = self.model.read(tokens, cache)
        return self.model.head(x[:, -1:] if last is None else x[:, last])

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prefill: append each prompt to its sequence and choose every sequence's next token. An empty prompt goes on
        from its sequence's last `logits`. Short prompts are read together, and equal ones once.
        """
        self._notify("prefill")
        assert self.logits is not None or all(prompts), "nothing has been read yet"
        chunk = chunk_size(self.cache.policy, self.model.config.context, self.prefill_chunk, self.cache.shape.reach)
        starts = self.cache.lengths.tolist()
        sources = read_once(prompts, starts, self.cache)
        ends = [
            start + len(prompt) * (source == row)
            for row, (start, prompt, source) in enumerate(zip(starts, prompts, sources, strict=True))
        ]
        planned = packs(starts, ends, chunk, min(PACK_TOKENS, self.prefill_chunk))
        parts = [part for pack in planned for part in pack]
        ids = [t for row, start, n in parts for t in prompts[row][start - starts[row] : start - starts[row] + n]]
        tokens = torch.tensor(ids, dtype=torch.int64).to(self.device)
        last = {} if self.logits is None else {b: self.logits[b : b + 1] for b in range(len(prompts))}
        sizes = [sum(part.n_token for part in pack) for pack in planned]
        for pack, pack_tokens in zip(planned, tokens.split(sizes), strict=True):
            logits = self._read_pack(pack_tokens[None], pack)
            self.timing.n_read += len(pack_tokens)
            for i, part in enumerate(pack):
                last[part.row] = logits[:, i]
        copy_sequences(self.cache, sources)
        self.logits = torch.cat([last[source] for source in sources])
        self._choose(self.logits)

    def _read_pack(self, tokens: Tensor, pack: Sequence[PromptPart]) -> Tensor:
        """tokens: int64 [1, token]. Returns the logits after each part, [1, part, vocab_size]."""
        if len(pack) == 1:
            return self.read_chunk(tokens, self.cache.sequence(pack[0].row, pack[0].start), None)
        packed = PackedCache(self.cache, pack)
        return self.read_chunk(tokens, packed, packed.last)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[int | None]]:
        """Yield, per step, each sequence's new token; None once it has ended. End tokens are yielded.

        prompts: one list of ids per sequence of the cache; they follow what the cache holds, and are empty only where
        that has just been loaded.
        Stops when every sequence has ended, or after max_new_tokens. Raises UserError when the model's
        numbers are no longer finite, naming where that began; ValueError where so many tokens have no room.
        """
        self.require_room(prompts, max_new_tokens)
        timing = self.timing = Timing()
        self.synchronize()
        began = time.perf_counter()
        self.read(prompts)
        self.synchronize()
        timing.prefill_seconds = time.perf_counter() - began
        self._notify("read")
        began = time.perf_counter() - timing.prefill_seconds  # without the time that a hook took
        ended = [False] * len(prompts)
        waiting: deque[_Pending] = deque([_Pending(self.picked)])
        written = array("q")  # eight bytes a token: a text without end must not fill the memory
        timing.n_first, n_queued = len(prompts), 1
        first = self.to_capture  # yield the first token before the step is captured
        decode_began = time.perf_counter()
        self._notify("decode")
        try:
            while True:
                while not first and n_queued < max_new_tokens and len(waiting) <= self.lag and not all(ended):
                    if self.to_capture:  # its time is not decoding's
                        decode_began += self._captured_in()
                    with torch.inference_mode():
                        self.step()
                    waiting.append(_Pending(self.picked))
                    n_queued += 1
                    self._notify("step")
                first = False
                if not waiting or all(ended):  # steps under way when the last sequence ended do not count
                    return
                row = waiting.popleft().tokens()
                if timing.n_written == 0:
                    timing.first_token_seconds = time.perf_counter() - began
                if BAD in row:
                    raise UserError(self._diagnose(prompts, written))
                written.extend(row)
                timing.n_written += len(row) - sum(ended)
                timing.decode_seconds = time.perf_counter() - decode_began
                yield [None if e else t for t, e in zip(row, ended, strict=True)]
                ended = [e or t in self.end_ids for t, e in zip(row, ended, strict=True)]
        finally:
            self._notify("end")

    def require_room(self, prompts: Sequence[Sequence[int]], n_new: int) -> None:
        """Raises ValueError where the cache has no room for what is to be read and, but for the last token, written.

        Every sequence goes on until the last has ended. A step does not look: past its room a sequence would write into
        the memory of the next. Waits for the device.
        """
        lengths = self.cache.lengths.tolist()
        self.cache.check_room(max(n + len(ids) for n, ids in zip(lengths, prompts, strict=True)) + n_new - 1)

    def _captured_in(self) -> float:
        """Capture the step; seconds that it took."""
        began = time.perf_counter()
        self._capture()
        return time.perf_counter() - began

    def _notify(self, event: str) -> None:
        if self.hook is not None:
            self.hook(event)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def _diagnose(self, prompts: Sequence[Sequence[int]], written: Sequence[int]) -> str:
        """Read the prompts and feed the tokens again, looking at every tensor, for the first that is not finite.

        written: a token per sequence, step after step.
        """
        bad = self._first_of_all(first_bad_parameter(self.model))
        if bad is not None:
            return f"the logits are not finite: the weight {bad} holds a NaN or an infinity"
        if self.loaded:
            return "the logits are not finite after a loaded cache: read the prompt anew to find out where that begins"
        found: list[str] = []

        def look(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
            def hook(module: nn.Module, args: tuple[object, ...], out: object) -> None:
                if not found and isinstance(out, Tensor) and not out.isfinite().all():
                    found.append(name)

            return hook

        self.read_chunk = self._read_chunk  # which calls every module
        handles = [m.register_forward_hook(look(name)) for name, m in self.model.named_modules() if name]
        self.cache.reset()
        with torch.inference_mode():
            self.read(prompts)
            for row in torch.tensor(written, dtype=torch.int64).view(-1, len(prompts), 1):
                if self._first_of_all(next(iter(found), None)):
                    break
                self.model(row.to(self.device), self.cache)
        for handle in handles:
            handle.remove()
        first = self._first_of_all(next(iter(found), None))
        where = f"the output of {first} is the first" if first else "they were when all was read again"
        return f"the logits are not finite: {where} ({str(self.cache.shape.dtype).split('.')[-1]} is the dtype)"

    def _first_of_all(self, name: str | None) -> str | None:
        """The first rank's name that is not None, on every rank: all must decide alike."""
        names = [name] if self.ranks is None else self.ranks.from_all(name)
        return next((n for n in names if n is not None), None)


class _Pending:
    """A step's tokens on their way to the host."""

    def __init__(self, picked: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if picked.is_cuda:
            self.host = torch.empty(picked.shape, dtype=picked.dtype, pin_memory=True)
            self.host.copy_(picked, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = picked.clone()

    def tokens(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()
