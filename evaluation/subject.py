"""What is evaluated: a model, the cache settings to compare, and the texts to score them on."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import kv_cache
from checkpoint import (
    check_tokenizer,
    chosen_weights,
    end_ids,
    find_demo,
    load_model,
    open_checkpoint,
    parse_device,
    parse_dtype,
    require_finite,
)
from cli.device import device_memory
from cli.plan import require_suits, weight_bytes
from common.errors import UserError
from common.files import read_text_file
from common.messages import note, progress, size
from engine import PREFILL_CHUNK, Engine, Sampling
from engine.precompile import Run, compiled_ahead, prompt_parts
from engine.sampling import BAD
from evaluation import scoring
from evaluation.flags import SCORED
from evaluation.full_results import FullResults
from kv_cache import ModelCache, format_policy, parse_policy
from selective_kv import FullCache, KVCache, Shape
from tokenizer import Tokenizer

MOST_SEQUENCES = 1 << 12  # that the model writes side by side
T = TypeVar("T")
Ids = Sequence[int]
Enough = Callable[[int, list[int]], bool]  # of a sequence and what it has written
EngineOf = Callable[[KVCache], Engine]


def never(b: int, ids: list[int]) -> bool:
    return False


@dataclass
class Text:
    """Windows of token ids, and where they come from. sha256: of the text, or of the ids that the model wrote."""

    name: str
    sha256: str
    windows: list[Tensor]
    sampled: bool


class Subject:
    """The model under test, its tokenizer, and the settings to compare, the full cache first."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.full_results = FullResults()  # stores nothing, until a run names a folder
        self.device = parse_device(args.device)
        checkpoint = open_checkpoint(args.checkpoint_path or find_demo(), args.model)
        self.path = checkpoint.path
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise UserError(f"{checkpoint.path}: no tokenizer with the weights")
        self.checkpoint, self.name, self.config = checkpoint, checkpoint.name, checkpoint.config
        self.tokenizer: Tokenizer = tokenizer
        check_tokenizer(self.config, self.tokenizer)
        self.end_ids = end_ids(checkpoint, self.tokenizer)
        self.dtype = parse_dtype(args.dtype, checkpoint, self.device)
        others = [parse_policy(text) for text in args.caches]
        self.policies: list[KVCache] = [FullCache(), *(p for p in others if p.name != FullCache.name)]
        for policy in self.policies:
            require_suits(policy, self.config)
        self.weights = chosen_weights(checkpoint, args.weights)
        need = weight_bytes(self.config, self.dtype, self.weights, self.device)
        free = device_memory(self.device)
        if need > free:
            raise UserError(f"the weights need {size(need)}, and {size(free)} are free")
        self.model = load_model(checkpoint, self.device, self.dtype, weights=self.weights)
        # The model with which weights in fewer bits are compared; the same one, if the checkpoint has no others.
        self.reference = self.model
        if args.reference_path is not None:
            other = open_checkpoint(args.reference_path)
            if other.config.vocab_size != self.config.vocab_size:
                most = f"{other.config.vocab_size} tokens, and {checkpoint.path} has {self.config.vocab_size}"
                raise UserError(f"--reference_path {other.path}: its vocabulary has {most}")
            self.reference = load_model(other, self.device, self.dtype)
            require_finite(self.reference)
        elif self.weights is not None and checkpoint.weights is None and args.kind in SCORED:
            self.reference = load_model(checkpoint, self.device, self.dtype)
        require_finite(self.model)
        self.engines: dict[str, Engine] = {}
        self.compiled: Shape | None = None  # of the engines whose kernels are there

    @property
    def weights_name(self) -> str:
        """The weights' bits; their file's name, if they are compared with another file's."""
        path = None if self.args.reference_path is None else self.path
        return str(self.weights or 16) if path is None else path.name

    def shape(self, capacity: int, batch: int = 1) -> Shape:
        c = self.config
        return Shape(batch, c.n_kv_head, c.head_dim, capacity, self.dtype, self.device)

    def memory(self, policy: KVCache, n_token: int) -> dict[str, float]:
        """Bytes of a sequence's cache, and bits per element of what is quantised, scales included."""
        regions = kv_cache.plan(policy, self.config.n_layer, self.shape(n_token))
        held = {"cache_bytes": float(sum(regions.values()))}
        bits = kv_cache.bits_per_element(policy, self.config.head_dim)
        if regions.get("quantised") and bits is not None:
            held["bits_per_quantised_element"] = sum(bits.values()) / 2
        return held

    def encode(self, text: str) -> list[int]:
        """Without a beginning-of-text token."""
        return self.tokenizer.encode(text, bos=False)

    def texts(self) -> list[Text]:
        """Texts to score, cut into windows."""
        if not self.args.text:
            return [self.own_text(self.args.windows, self.args.context)]
        found = []
        for path in self.args.text:
            note(f"reading {path.name}")
            text = read_text(path)
            ids = torch.tensor(self.encode(text))
            cut = list(scoring.windows(ids, self.args.context, self.args.windows))
            if not cut:
                raise UserError(f"{path}: {len(ids)} tokens, and a window has {self.args.context}")
            found.append(Text(path.name, sha256_of(text), cut, False))
        return found

    def own_text(self, n: int, context: int) -> Text:
        """What the model itself writes with the full cache: a rise over its entropy is all the cache's doing."""
        start = [self.tokenizer.bos_id if self.tokenizer.bos_id is not None else 0]

        def write() -> dict[str, Tensor]:
            shape, sampling = self.shape(context, n), Sampling(temperature=1.0, seed=self.args.seed)
            need = sum(kv_cache.plan(FullCache(), self.config.n_layer, shape).values())
            need += n * self.config.vocab_size * sampling.bytes_per_logit
            if n > MOST_SEQUENCES or need > device_memory(self.device):
                what = f"{n} texts of {context} tokens, which the model would write at once"
                raise UserError(f"{what}: {size(need)}, and {size(device_memory(self.device))} are free")
            engine = Engine(self.model, ModelCache(FullCache(), self.config.n_layer, shape), sampling)
            bar = progress(engine.generate([start] * n, context - 1), context - 1, "writing")
            return {"tokens": torch.tensor([row for row in bar], dtype=torch.int64).T.contiguous()}

        columns = self.full_results.result(f"own-{n}-{context}", start, write)["tokens"]
        windows = [torch.cat((torch.tensor(start), column)) for column in columns]
        return Text("(the model's own)", hashlib.sha256(columns.numpy().tobytes()).hexdigest(), windows, True)

    def text_bytes(self, ids: Tensor) -> int:
        return sum(len(self.tokenizer.token_bytes(i)) for i in ids.tolist())

    def written_after(
        self,
        name: str,
        bodies: Sequence[Ids],
        questions: Sequence[Ids],
        capacity: int,
        n_new: int,
        enough: Enough = never,
    ) -> Iterator[list[list[int]]]:
        """Yields for each setting what it writes greedily in each sequence, ids without the end token. It has read
        `bodies` as prompts, and then `questions`, which see of the bodies only what the cache still holds.

        capacity: tokens that a sequence may have; n_new: the most that it may write; enough(sequence, ids written so
        far): whether that sequence is done. The full cache's answers are stored as the result `name`.

        On a GPU the last tokens of all questions, as many as the shortest question has, go through the captured step
        together; what longer questions have before them is read with the bodies.
        """
        if self.device.type == "cuda":
            n = min(map(len, questions))
            bodies = [[*body, *question[:-n]] for body, question in zip(bodies, questions, strict=True)]
            questions = [question[-n:] for question in questions]
        engines = self.engines_after(bodies, capacity)
        for policy in self.policies:
            answer = functools.partial(self._written, engines, policy, questions, n_new, enough)
            if policy.name == FullCache.name:
                of = [token for ids in (*bodies, *questions) for token in ids]
                yield json.loads(self.full_results.text(name, of, lambda: json.dumps(answer())))  # noqa: B023
            else:
                yield answer()

    def _written(
        self, engines: EngineOf, policy: KVCache, questions: Sequence[Ids], n_new: int, enough: Enough
    ) -> list[list[int]]:
        written: list[list[int]] = [[] for _ in questions]
        going = set(range(len(questions)))
        engine = engines(policy)
        rows = fed(engine, questions, n_new) if engine.captures else engine.generate(questions, n_new)
        for row in rows:
            for b in [*going]:
                token = row[b]
                if token is None or token in self.end_ids:
                    going.discard(b)
                    continue
                written[b].append(token)
                if enough(b, written[b]):
                    going.discard(b)
            if not going:
                break
        return written

    def engines_after(self, bodies: Sequence[Ids], capacity: int) -> EngineOf:
        """A function that gives a setting's engine after it has read `bodies`, a sequence each.

        A prompt that is one chunk sees only itself, so its keys and values are the same whatever the cache: the
        full cache reads it, once somebody needs it, and the others take them from its slots as they would have
        stored them.
        """

        @functools.cache
        def full() -> Engine:
            engine = self.engine(FullCache(), capacity, len(bodies))
            engine.read(bodies)
            return engine

        def engine_of(policy: KVCache) -> Engine:
            if policy.name == FullCache.name:
                return full()
            engine = self.engine(policy, capacity, len(bodies))
            if scoring.ParallelCache.can(policy) and max(map(len, bodies)) <= self.chunk(policy):
                for b, ids in enumerate(bodies):
                    adopt(engine.cache.sequence(b), full().cache.sequence(b), len(ids))
            else:
                engine.read(bodies)
            return engine

        return engine_of

    def engine(self, policy: KVCache, capacity: int, batch: int) -> Engine:
        """An engine that has read nothing. On a GPU, where capturing its step takes time, it is used again for the next
        call with the same setting and shape."""
        name, shape = format_policy(policy), self.shape(capacity, batch)
        engine = self.engines.pop(name, None)
        if engine is not None and engine.cache.shape == shape:
            engine.reset()
        else:
            del engine  # its memory is free before the next one's is taken
            self.compile(shape)
            captured = self.device.type == "cuda"
            cache = ModelCache(policy, self.config.n_layer, shape)
            engine = Engine(self.model, cache, Sampling(temperature=0), self.end_ids, capture=captured, lag=0)
        if self.device.type == "cuda":
            self.engines[name] = engine
        return engine

    def compile(self, shape: Shape) -> None:
        """Compile what engines of this shape launch, all settings side by side; on a CPU nothing, nor a second time."""
        if self.compiled == shape:
            return
        self.compiled = shape
        lengths = [shape.capacity] * shape.batch
        runs = [Run(p, shape, prompt_parts(lengths, self.chunk(p)), self.weights) for p in self.policies]
        with compiled_ahead(self.config, runs, Sampling(temperature=0)):
            pass

    def chunk(self, policy: KVCache) -> int:
        """The most tokens of a prompt that an engine reads at once."""
        return min(PREFILL_CHUNK, self.config.context - policy.n_exact) if policy.endless else PREFILL_CHUNK


@torch.inference_mode()
def fed(engine: Engine, questions: Sequence[Ids], n_new: int) -> Iterator[list[int]]:
    """`engine.generate` for questions of one length, token by token: a short chunk of each sequence alone takes longer.
    Yields the tokens written, [step][sequence]."""
    engine.require_room(questions, n_new)
    for column in torch.tensor(questions, device=engine.device).T:
        engine.tokens[:, 0] = column
        engine.step()
    for n in range(n_new):
        row = engine.picked.tolist()
        if BAD in row:
            raise UserError("the logits are not finite")
        yield row
        if n + 1 < n_new:
            engine.step()


@torch.inference_mode()
def adopt(cache: ModelCache, full: ModelCache, n_token: int) -> None:
    """Store the first n_token tokens that a full cache's sequence holds (both are one, or a `sequence` of several) as a
    prompt read at once."""
    for layer, source in zip(cache.layers, full.layers, strict=True):
        held = source.regions.sequences(full.row, 1)  # type: ignore[attr-defined]
        k, v = held.k[:, :, :n_token], held.v[:, :, :n_token]
        layer.kernels.store_chunk(layer.regions.sequences(cache.row, 1), k, v, 0)  # type: ignore[attr-defined]
    cache.lengths.fill_(n_token)


def groups(items: Sequence[T], n: int) -> Iterator[Sequence[T]]:
    """items in groups of n, in order; the last group may be smaller."""
    return (items[start : start + n] for start in range(0, len(items), n))


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_plain(path: Path) -> str:
    """A file's text, decompressed if it is an .xz. Raises UserError, also where there is none in it."""
    text = read_text_file(path)
    if not text.strip():
        raise UserError(f"{path}: an empty text")
    return text


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """JSONL: the objects and the numbers of their lines. Raises UserError, naming the line, where one is no object."""
    found = []
    for n, line in enumerate(read_plain(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise UserError(f"{path}, line {n}: not JSON") from None
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {n}: not a JSON object")
        found.append((n, fields))
    return found


TEXT_FIELDS = ("text", "document", "prompt")


def text_field(path: Path, n: int, fields: dict[str, Any]) -> str:
    """The text of a line. Raises UserError, naming the line, where there is none."""
    name = next((name for name in TEXT_FIELDS if name in fields), None)
    if name is None:
        raise UserError(f"{path}, line {n}: the field {' or '.join(map(repr, TEXT_FIELDS))} is missing")
    if not isinstance(fields[name], str) or not fields[name].strip():
        raise UserError(f"{path}, line {n}: {name!r} is not a text")
    return fields[name]


def read_text(path: Path) -> str:
    """A text to score. JSONL (by its name): the texts of its lines, one after the other."""
    if ".jsonl" not in path.suffixes[-2:]:
        return read_plain(path)
    return "\n\n".join(text_field(path, n, fields) for n, fields in read_lines(path))
