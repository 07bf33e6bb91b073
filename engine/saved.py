"""A cache in a file: what a run has read, so that another one need not read it again.

The file holds what `KVCache.held` names, for every sequence and layer, as long as it is filled; the tokens that it came
of; the logits after the last of them, so that the same prompt is gone on with to the bit; and a record of what it
belongs to: the model's shape and a fingerprint of its weights, the cache's policy, the dtype.

Where several ranks hold the model together, each writes the rows of its own KV heads into the one file that rank 0
makes; so a file looks the same however many wrote it, and any number of ranks can start from it.

How much of it a new prompt can use is a question of tokens. Where nothing has been quantised or dropped yet (the full
cache: always), the longest beginning that the two share. Otherwise all of the saved text or nothing: what has left a
window cannot come back to it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import Share
from checkpoint.model_fingerprint import model_fingerprint
from common.errors import UserError
from common.files import replaced_whole
from common.program import describe
from common.tensor_file import Digests, Rows, TensorFile, layout, make_room, write_header, write_rows, write_tensors
from engine.engine import Engine
from engine.parallel import Parallel
from kv_cache import make_policy
from model import Config
from selective_kv import KVCache, Shape

KIND = "selective_kv_cache"
WHAT = "a saved cache"
# 2: tiles of keys do not hold their bias; 3: sums of rows, a fingerprint that ranks add up to; 4: keys of 8 bits are
# rotated, 3 bits are in other planes.
VERSION = 4


@dataclass(frozen=True)
class Talk:
    """Where a conversation stands. pending: of the last reply, what the cache has not read yet (its last token).

    Of a chat also its turns, the last reply, and what has been read as text, as cli.conversation has them.
    """

    pending: tuple[int, ...] = ()
    turns: tuple[dict[str, str], ...] = ()
    read: str = ""
    reply: str = ""


def _record(config: Config, policy: KVCache, shape: Shape) -> dict[str, Any]:
    """What a cache belongs to, as JSON has it."""
    record = {
        "version": VERSION,
        "model": dataclasses.asdict(config),
        "cache": {"name": policy.name, **dataclasses.asdict(policy)},
        "dtype": str(shape.dtype).removeprefix("torch."),
    }
    return json.loads(json.dumps(record))


def require_saveable(policy: KVCache) -> None:
    """Raises UserError for a cache that does not say what it holds."""
    layer = dataclasses.replace(policy)
    layer.allocate(Shape(1, 1, 64, policy.n_exact + 1, torch.float32, torch.device("meta")))
    if layer.held(0, 1) is None:
        raise UserError(f"--save_cache: {policy.name} does not say what it holds (KVCache.held), and cannot be saved")


def fingerprint_of(engine: Engine, share: Share | None) -> str:
    """The fingerprint of the whole model's weights, however many ranks hold them."""
    return model_fingerprint(engine.model, share, None if engine.ranks is None else engine.ranks.from_all)


def save_cache(
    path: Path, engine: Engine, tokens: Sequence[Sequence[int]], talk: Talk | None = None, share: Share | None = None
) -> int:
    """Write what the engine's cache holds after `tokens`, a list a sequence. A file of that name is replaced when the
    new one is whole. Returns its bytes. Raises UserError.

    share: of the model, where the engine has one rank's; every rank then calls this.
    """
    ranks, config = engine.ranks, engine.model.config if share is None else share.whole
    tensors: dict[str, Tensor | Rows] = {}
    for b, ids in enumerate(tokens):
        name = f"sequences.{b}"
        tensors[f"{name}.tokens"] = torch.tensor(list(ids), dtype=torch.int32)
        if talk is None and engine.logits is not None:
            row = engine.logits[b : b + 1]
            tensors[f"{name}.logits"] = (row if ranks is None else ranks.gather(row, config.vocab_size))[0]
        held = engine.cache.held(b, len(ids)).items()
        first = 0 if ranks is None else ranks.rank * engine.cache.shape.n_kv_head
        tensors |= {f"{name}.{part}": Rows(view, first, config.n_kv_head) for part, view in held}
    record = _record(config, engine.cache.policy, engine.cache.shape)
    record |= {"weights": fingerprint_of(engine, share), "sequences": len(tokens)}
    record["talk"] = None if talk is None else dataclasses.asdict(talk)
    try:
        if ranks is not None:
            return _save_together(path, ranks, record, tensors)
        with replaced_whole(path) as part:
            write_tensors(part, KIND, record, tensors)
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"--save_cache {path}: {error.strerror}") from None


def _save_together(path: Path, ranks: Parallel, record: dict[str, Any], tensors: dict[str, Tensor | Rows]) -> int:
    """Rank 0 makes the file and, at the end, puts it in its place; what is no rank's own (tokens) it writes too.

    Every rank raises UserError where one of them cannot write its rows.
    """
    with ExitStack() as stack:
        here: list[Path] = []

        def begin() -> tuple[str, int]:
            where = layout(KIND, record, tensors)  # only here is the record whole: a chat is rank 0's alone
            try:
                here.append(stack.enter_context(replaced_whole(path)))
                make_room(here[0], where.size)
            except OSError as error:
                raise UserError(f"--save_cache {path}: {error.strerror}") from None
            return str(here[0].absolute()), where.header

        part, header = ranks.from_first(begin)
        mine = {name: given for name, given in tensors.items() if isinstance(given, Rows) or ranks.rank == 0}
        digests, problem = Digests(), ""
        try:
            digests = write_rows(Path(part), layout(KIND, {}, tensors, header), mine)
        except OSError as error:
            problem = f"--save_cache {path}: rank {ranks.rank}: {describe(error)}"
        every = ranks.from_all((digests, problem))
        for _, said in every:
            if said:
                raise UserError(said)
        if here:
            write_header(here[0], KIND, record, tensors, joined([found for found, _ in every]))
    return ranks.from_first(lambda: path.stat().st_size)


def joined(every: Sequence[Digests]) -> Digests:
    """The digests of all rows from each rank's, in order."""
    names = {name: None for found in every for name in found}
    return {name: [digest for found in every for digest in found.get(name, ())] for name in names}


class SavedCache:
    """A file of `save_cache`, its record and its tokens read, all else not yet. Raises UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = TensorFile(path, KIND, WHAT)
        self.record = self.file.record
        if self.record.get("version") != VERSION:
            raise UserError(f"{path}: {WHAT} of version {self.record.get('version')}, and this program reads {VERSION}")
        names = [f"sequences.{b}.tokens" for b in range(self.record["sequences"])]
        self.tokens: list[list[int]] = [ids.tolist() for _, ids in self.file.read(names)]
        talk = self.record["talk"]
        self.talk = None if talk is None else Talk(**talk | {name: tuple(talk[name]) for name in ("pending", "turns")})

    def policy(self) -> KVCache:
        """The cache's setting. Raises UserError where there is no such cache here."""
        knobs = dict(self.record["cache"])
        return make_policy(knobs.pop("name"), knobs)

    def require(self, config: Config, policy: KVCache, shape: Shape) -> None:
        """Raises UserError, naming what differs, unless the cache is of such a model, policy, dtype and batch.

        config: the whole model's.
        """
        want = _record(config, policy, shape)
        for part, what in (("model", "another model"), ("cache", "another cache"), ("dtype", "another dtype")):
            here, there = want[part], self.record[part]
            if here != there:
                raise UserError(f"{self.path}: {WHAT} of {what}: {_difference(there, here)}")
        if len(self.tokens) != shape.batch:
            raise UserError(f"{self.path}: it holds {_sequences(len(self.tokens))}, and the run has {shape.batch}")

    def kept(self, prompts: Sequence[Sequence[int]], policy: KVCache, shape: Shape) -> list[int]:
        """Of each prompt, how many of its first tokens the saved cache stands for. The rest is to be read: nothing,
        where the prompt is the saved text itself.
        """
        longest = max(map(len, self.tokens))
        layer = dataclasses.replace(policy)
        room = max(longest, shape.capacity) + policy.n_exact
        layer.allocate(dataclasses.replace(shape, batch=1, capacity=room, device=torch.device("meta")))
        found = []
        for b, (saved, prompt) in enumerate(zip(self.tokens, prompts, strict=True)):
            common = _common(saved, prompt)
            whole = common == len(saved) and (common < len(prompt) or f"sequences.{b}.logits" in self.file.sums)
            if whole:
                found.append(common)
            else:
                found.append(0 if layer.forgets(len(saved)) else min(common, len(prompt) - 1))
        return found

    @torch.inference_mode()
    def load(self, engine: Engine, kept: Sequence[int], share: Share | None = None) -> None:
        """Fill an empty cache with the first `kept` tokens of each sequence. Raises UserError where the weights are
        other ones, or the file is damaged.

        share: of the model, where the engine has one rank's; every rank then calls this.
        """
        ranks, config = engine.ranks, engine.model.config if share is None else share.whole
        if self.record["weights"] != fingerprint_of(engine, share):
            few_bits = not all(parameter.is_floating_point() for parameter in engine.model.parameters())
            differ = "with the number of ranks, the device, its kind of processor and this program's version"
            more = f" (in 8 or 4 bits they differ {differ})" if few_bits else ""
            raise UserError(f"{self.path}: {WHAT} of other weights, for a model of the same shape{more}")
        views: dict[str, Tensor] = {}
        for b, n in enumerate(kept):
            views |= {f"sequences.{b}.{part}": view for part, view in engine.cache.held(b, n).items()} if n else {}
        for name, view in views.items():
            shape, want = self.file.shape(name), (config.n_kv_head, *view.shape[1:])
            if shape is None or shape[:1] + shape[2:] != want[:1] + want[2:] or shape[1] < want[1]:
                raise UserError(f"{self.path}: {WHAT} of another version: {name} is {shape}, not {want}")
        digests = self.file.load(views, 0 if ranks is None else ranks.rank * engine.cache.shape.n_kv_head)
        self.file.require(digests if ranks is None else joined(ranks.from_all(digests)))
        engine.loaded = True
        engine.cache.lengths.copy_(torch.tensor(list(kept)))
        names = [f"sequences.{b}.logits" for b, n in enumerate(kept) if n == len(self.tokens[b])]
        names = [name for name in names if name in self.file.sums]
        if names:
            own = engine.model.config
            first, n_row = own.vocab_start, own.vocab_rows or own.vocab_size
            logits = {name: row[first : first + n_row] for name, row in self.file.read(names)}
            like = next(iter(logits.values()))
            engine.logits = torch.zeros(len(kept), n_row, dtype=like.dtype, device=engine.device)
            for name, row in logits.items():
                engine.logits[int(name.split(".")[1])] = row


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _sequences(n: int) -> str:
    return "1 sequence" if n == 1 else f"{n} sequences"


def _difference(there: Any, here: Any) -> str:
    """The first thing that two records do not share."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return f"{there} there, {here} here"
    name = next(name for name in {**here, **there} if here.get(name) != there.get(name))
    return f"{name} is {there.get(name)} there, {here.get(name)} here"
