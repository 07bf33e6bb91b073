"""The length of each sequence of a cache, and the memory of its layers.

transformers counts columns: the tokens of the longest prompt, padding included. A cache here counts tokens: sequence b
has `lengths[b]`, without padding. In a batch with left padding each prompt is read by itself, at its own positions 0,
1, ..., so that each sequence gets what it would get alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from selective_kv.cache import Chunk, KVCache, Shape
from selective_kv.closing import Closing
from selective_kv.score_error import layer_errors
from selective_kv.transformers.captured import CapturedSteps
from selective_kv.transformers.rope import ChunkRope, rope_frequencies, scaled_bias

ROOM = 512  # spare tokens when a cache grows by itself: it is copied once in so many steps

# A compiled graph can hold tensors and numbers only. A step's operator finds its cache by a number, the handle, which
# is new whenever the cache's memory moves.
by_handle: WeakValueDictionary[int, Sequences] = WeakValueDictionary()
_handles = itertools.count(2)  # a compiler takes 0 and 1 for constants

# A step that is replayed is cut into several graphs before these layers: launching one takes a microsecond a kernel, in
# which the device waits if it has nothing before it. So the first are short, and each is long enough for the next.
CUT_BEFORE = frozenset((2, 8, 32))


@dataclass
class PassPart:
    """Tokens of a forward pass that are read together: sequences `chunk.row` and on, and which columns of the pass."""

    chunk: Chunk
    rope: ChunkRope
    columns: slice | Tensor  # int64, where padding stands between the tokens


class Sequences:
    """Lengths, and the `KVCache` of every layer. max_length: the most columns, or None: memory grows as it is needed.

    counts: int64 [batch + 1] on the device, the lengths and the number of columns, one tensor because a step adds one
    to all of them. In decoding the host does not read it where memory is `fixed`.
    """

    def __init__(self, policy: KVCache, config: Any, max_length: int | None) -> None:
        self.config, self.max_length = config, max_length
        self.endless = policy.endless_in(max_length or policy.n_exact, None)
        self.fixed = max_length is not None or policy.endless  # memory stays where it is, so a step may be captured
        self.layers = [dataclasses.replace(policy) for _ in range(config.num_hidden_layers)]
        self.policy = policy
        self.shape: Shape | None = None
        self.counts = torch.zeros(1, dtype=torch.int64)
        self.n_column = 0  # as `counts` has it, or fewer after compiled steps, which run no Python when replayed
        self.last_padding = 0  # columns up to the last one that is padding in some sequence
        self.empty = True
        self.under_way = False  # between a forward pass's first layer and its last
        self.rope: ChunkRope | None = None  # in decoding
        self.closing, self.closed = Closing(), False  # whether this step's tiles have been
        self.parts: list[PassPart] = []  # of a chunk; `whole`: there is one, and it is all of the pass
        self.whole = False
        self.handle = -1  # what a compiled graph knows the memory by
        self.number = torch.empty(0)  # [handle, 0]: a compiler takes numbers for constants, but lets a size vary
        self.captured: CapturedSteps | None = None  # of an eager model; for the memory as it is
        self.replays = False  # whether this pass, if it is a step, replays `captured`
        self.cut: Callable[[], None] | None = None  # while a whole step is recorded: ends a graph, begins the next
        self._frequencies: Tensor | None = None
        # Each layer's bias of keys and RoPE's frequencies, as its cache was told; None before the first pass. What that
        # pass does not tell is never told: steps may have been captured without it.
        self.biases: list[tuple[Tensor, Tensor] | None] | None = None
        self.first_pass = False
        seen = policy.sees()
        if seen is not None and seen.within:
            self.frequencies()  # raises now where they are not known, and not in the middle of a text

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"captured": None, "handle": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has memory of its own, for which no graph was captured, and which no compiled graph can find."""
        self.__dict__.update(state)
        if self.shape is not None:
            self._settle()

    @property
    def lengths(self) -> Tensor:
        return self.counts[:-1]

    def frequencies(self) -> Tensor:
        device = self.counts.device
        if self._frequencies is None or self._frequencies.device != device:
            self._frequencies = rope_frequencies(self.config).to(device)
        return self._frequencies

    # Memory

    @torch.compiler.disable
    def allocate(self, k: Tensor) -> None:
        """Allocate all layers for keys like k [batch, n_kv_head, token, head_dim].

        Never in a compiled graph: memory made there is one of its outputs, and its next replay overwrites it.
        """
        batch, n_kv_head, n_token, head_dim = k.shape
        capacity, self.closing = self._capacity(n_token), Closing()  # which would hold on to the old memory
        self.shape = Shape(batch, n_kv_head, head_dim, capacity, k.dtype, k.device)
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside of it
            for layer in self.layers:
                layer.allocate(self.shape)
            self.counts = torch.zeros(batch + 1, dtype=torch.int64, device=k.device)
        self.biases = None
        self._settle()

    def expect(self, k: Tensor) -> None:
        """Keys k [batch, n_kv_head, token, head_dim] are about to come: make memory for them where there is none.

        Raises ValueError where they do not fit what is there.
        """
        held = self.shape
        if held is None or (self.empty and k.shape[0] != held.batch):
            self.allocate(k)
        elif (held.batch, held.dtype, held.device) != (k.shape[0], k.dtype, k.device):
            raise ValueError(
                f"this cache holds {held.batch} sequences in {held.dtype} on {held.device}, and {k.shape[0]} in "
                f"{k.dtype} on {k.device} came: reset() it, or make another one (all layers must be on one device)"
            )

    def _settle(self) -> None:
        """Memory is at a new place: nothing that was captured for the old one may be used again."""
        by_handle.pop(self.handle, None)
        self.handle = next(_handles)
        by_handle[self.handle] = self
        self.captured = None
        self.number = torch.empty(self.handle, 0, device=self.counts.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.counts)
            torch._dynamo.mark_dynamic(self.number, 0)

    def _capacity(self, n_column: int) -> int:
        """How many tokens to make room for, when a sequence will have n_column of them."""
        if self.max_length is not None:
            return self.max_length
        if self.policy.endless:
            return self.policy.n_exact + 1
        return n_column + ROOM

    def make_room(self, n: int) -> None:
        """Make room for n more columns. Raises ValueError if there is none and none can be made."""
        assert self.shape is not None
        n_column = self.n_column + n
        if n_column <= self.shape.capacity or self.endless:
            return
        if self.max_length is not None:
            raise ValueError(f"{n_column} tokens do not fit a cache made with max_cache_len={self.max_length}")
        self._move(dataclasses.replace(self.shape, capacity=self._capacity(n_column)), None)

    def _move(self, shape: Shape, rows: Tensor | None) -> None:
        """Into memory of another shape, a layer at a time. rows: which sequence each one is a copy of; None: itself."""
        self.closing = Closing()  # which would hold on to the old memory
        with torch.inference_mode(False):
            for i, layer in enumerate(self.layers):
                old = layer.storage()
                if old is None:
                    raise ValueError(
                        f"{type(layer).__name__} has no `storage()`, so its sequences cannot be copied: give it "
                        "max_cache_len, or define that method"
                    )
                new = dataclasses.replace(layer)
                new.allocate(shape)
                bias = self.biases[i] if self.biases is not None else None
                if bias is not None:
                    new.expect_bias(*bias)
                into = new.storage()
                assert into is not None
                for source, target in zip(old, into, strict=False):  # more memory may have tensors that less has not
                    source = source if rows is None else source.index_select(0, rows)
                    target[tuple(slice(0, n) for n in source.shape)].copy_(source)
                self.layers[i] = new
        self.shape = shape
        self.closing.look(self.layers)
        self._settle()

    def select(self, rows: Tensor) -> None:
        """Sequence i becomes what sequence rows[i] was. rows: int64 [new batch]."""
        if self.shape is None or self.empty:
            return
        rows = rows.to(self.counts.device)
        if len(rows) == self.shape.batch:  # in place: captured steps go on
            for layer in self.layers:
                storage = layer.storage()
                if storage is None:
                    raise ValueError(
                        f"{type(layer).__name__} has no `storage()`, so its sequences cannot be reordered (beam search)"
                    )
                for tensor in storage:
                    tensor.copy_(tensor.index_select(0, rows))
            self.lengths.copy_(self.lengths.index_select(0, rows))
            return
        with torch.inference_mode(False):
            self.counts = torch.cat((self.counts.index_select(0, rows), self.counts[-1:]))
        self._move(dataclasses.replace(self.shape, batch=len(rows)), rows)

    def _places(self) -> list[int | None]:
        """Where the layers' memory is; None for one that does not say."""
        held = [layer.storage() for layer in self.layers]
        return [t.data_ptr() for tensors in held if tensors for t in tensors] if all(held) else [None]

    def reset(self) -> None:
        self.counts.zero_()
        if self.shape is not None:
            before = self._places()
            for layer in self.layers:
                layer.reset()
            if before == [None] or self._places() != before:
                self._settle()
        self.n_column = self.last_padding = 0
        self.rope, self.parts, self.under_way, self.empty = None, [], False, True

    def crop(self, n: int) -> None:
        """Forget the last n columns. Raises ValueError where what came before them is no longer held as it was."""
        if n == 0 or self.empty:
            return
        counts = self.counts.tolist()
        if self.layers[0].forgets(max(counts[:-1])):
            raise ValueError(
                f"this {type(self.policy).__name__} cannot be cropped: it no longer holds all of its "
                f"{max(counts[:-1])} tokens as they came, and some would have to come back"
            )
        if counts[-1] - n < self.last_padding:
            raise ValueError(f"cannot remove the last {n} columns: some of them hold padding in some sequence")
        self.counts -= n
        self.n_column = counts[-1] - n

    def score_errors(self, k_bits: int | None) -> list[float] | None:
        """See `PolicyKVCache.score_errors`."""
        return None if self.empty else layer_errors(self.layers, self.lengths.tolist(), 0, k_bits)

    # A forward pass

    @contextmanager
    def recorded(self, cut: Callable[[], None]) -> Iterator[None]:
        """A context in which a step is recorded. cut: ends a graph and begins the next one. There must be room for
        it."""
        self.cut = cut
        try:
            yield
        finally:
            self.cut = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, mask: Tensor | None, eager: bool = False,
        module: Any = None,
    ) -> Tensor:  # fmt: skip
        """Attention of q [batch, n_head, column, head_dim] in a layer that takes in k and v [batch, n_kv_head, ...].

        counts: `self.counts`, or the copy of it that a compiled graph works on; the last layer adds to it. mask: None,
        or bool [batch, column so far and in this pass], False where padding is: nothing is stored for it, and its
        output is zero. eager: not from a compiled graph; the output is then valid until the next layer's. module:
        the model's, of this layer, if it is known. Raises ValueError where the cache cannot take the tokens.
        """
        if layer == 0:
            self._begin(q, counts, mask)
            self.replays = eager and self.layers[0].capturable and not torch.cuda.is_current_stream_capturing()
        elif not self.under_way:
            raise ValueError("a forward pass must begin with the model's first layer")
        if self.cut is not None and layer in CUT_BEFORE:
            self.cut()
        cache = self.layers[layer]
        if self.first_pass and self.biases is not None and self.biases[layer] is None:
            told = self.biases[layer] = scaled_bias(module, self.config)
            if told is not None:
                cache.expect_bias(*told)
        if self.rope is not None:
            out = self._step(layer, q, k, v, counts)
        elif self.whole:
            out = cache.attend(q, k, v, self.parts[0].chunk, self.parts[0].rope)
        else:
            out = torch.zeros_like(q)
            for part in self.parts:
                at = slice(part.chunk.row, part.chunk.row + 1), slice(None), part.columns
                out[at] = cache.attend(q[at], k[at], v[at], part.chunk, part.rope)
        if layer == len(self.layers) - 1:
            self._end(q.shape[2], counts)
        return out

    def _step(self, layer: int, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        """Decoding. Positions are what `counts` holds when the step runs; of its parts nothing but q, k, v moves."""
        cache, rope = self.layers[layer], self.rope
        assert rope is not None
        if not self.replays:
            out = cache.attend(q, k, v, Chunk(counts[:-1][:, None], closed=self.closed), rope)
            if layer + 1 in CUT_BEFORE:  # what it has made belongs to a graph that ends here
                self.rope = ChunkRope(self.frequencies, counts[:-1][:, None])
            return out

        def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            positions = counts[:-1][:, None]
            return cache.attend(q, k, v, Chunk(positions, closed=self.closed), ChunkRope(self.frequencies, positions))

        if self.captured is None:
            with torch.inference_mode(False):
                self.captured = CapturedSteps(q, k, v)
        return self.captured.replay(layer, q, k, v, step)

    def _begin(self, q: Tensor, counts: Tensor, mask: Tensor | None) -> None:
        """What the layers of this pass share. One token a sequence is decoding: nothing is read from the device."""
        if self.under_way:
            raise ValueError("the forward pass before this one ended before its last layer: reset() the cache")
        self.first_pass = self.biases is None
        if self.first_pass:
            self.biases = [None] * len(self.layers)
        if q.shape[2] == 1 and mask is None:
            self._room_for_a_step(counts)
            self.rope = ChunkRope(self.frequencies, counts[:-1][:, None])
            self.closed = self.closing(self.layers, Chunk(counts[:-1][:, None])).closed
        else:
            self._begin_chunk(q.shape[2], counts, mask)
        self.under_way, self.empty = True, False

    def _room_for_a_step(self, counts: Tensor) -> None:
        assert self.shape is not None
        if self.cut is None and not self.fixed and counts.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError("a captured step needs memory that stays in its place: give the cache max_cache_len")
        self.make_room(1)
        # Of compiled steps that are replayed the host knows nothing: `padding_mask` counts for `generate`, and this is
        # for whoever calls a compiled model without a mask.
        if counts.is_cuda and self.fixed and not self.endless:
            torch._assert_async((counts[-1] < self.shape.capacity), "the KV cache is full (max_cache_len)")

    def _begin_chunk(self, n: int, counts: Tensor, mask: Tensor | None) -> None:
        """n columns, whose tokens follow what each sequence has."""
        assert self.shape is not None
        *lengths, n_column = counts.tolist()
        self.n_column = n_column
        self.make_room(n)
        if mask is None:
            if any(length != n_column for length in lengths):
                raise ValueError(
                    "this cache read padding: give every later call the attention_mask of all that it read"
                )
            self.whole, self.parts = True, [self._part(0, len(lengths), n_column, slice(0, n))]
            self.added = torch.full_like(counts, n)
            return
        there = _tokens(mask, lengths, n_column, n)
        self.whole, self.parts = False, []
        for row, (columns, length) in enumerate(zip(there, lengths, strict=True)):
            if columns:
                together = columns[-1] - columns[0] + 1 == len(columns)
                at = slice(columns[0], columns[-1] + 1) if together else torch.tensor(columns, device=counts.device)
                self.parts.append(self._part(row, 1, length, at))
        self.added = torch.tensor([*map(len, there), n], device=counts.device)
        padding = [max(set(range(n)).difference(columns), default=-1) for columns in there]
        if max(padding) >= 0:
            self.last_padding = n_column + max(padding) + 1

    def _part(self, row: int, batch: int, start: int, columns: slice | Tensor) -> PassPart:
        n = columns.stop - columns.start if isinstance(columns, slice) else len(columns)
        own = torch.arange(start, start + n, device=self.counts.device).expand(batch, n)
        return PassPart(Chunk(own, row, start), ChunkRope(self.frequencies, own), columns)

    def _end(self, n: int, counts: Tensor) -> None:
        """The last layer has attended to a pass of n columns."""
        if self.rope is None or self.first_pass:  # now: a compiled step may be captured, in memory that is used again
            self.closing.look(self.layers)
        counts += 1 if self.rope is not None else self.added
        self.n_column += n
        self.rope, self.parts, self.under_way = None, [], False


def _tokens(mask: Tensor, lengths: list[int], n_column: int, n: int) -> list[list[int]]:
    """The columns of a pass of n that hold tokens, for each sequence. lengths, n_column: those before the pass."""
    if mask.shape != (len(lengths), n_column + n):
        raise ValueError(
            f"attention_mask is {list(mask.shape)}, and with what the cache holds it must be "
            f"{[len(lengths), n_column + n]}"
        )
    rows = mask.bool().tolist()
    for row, length in zip(rows, lengths, strict=True):
        if sum(row[:n_column]) != length:
            raise ValueError(
                f"attention_mask shows {sum(row[:n_column])} of a sequence's past tokens, and the cache holds "
                f"{length}: what is stored cannot be hidden"
            )
    return [[i for i, token in enumerate(row[n_column:]) if token] for row in rows]
