"""The sum of every rank's partial result and the residual, in one launch, by GPUs that write into each other's memory;
and the choice of a token among all ranks' logits, in the same way.

A step has two sums a layer, of 8 KiB a token: what counts is how long the first byte takes. So what is sent are
messages of 8 bytes that arrive whole: 4 bytes of data, and beside them the number of the sum they belong to, as in
NCCL's protocol LL. Data and flag need no order between them, and no write has to be confirmed before the next; a
receiver asks its own memory until every message has the number it waits for. (Data first and a flag released after it,
this file's earlier way, took 4.0 us, NCCL's all-reduce and the residual's launch 9.3: LOG.md, 2026-11-26.) A program
has WORDS words of 4 bytes and nothing to do with other programs. It

    1. writes its part of x into the other ranks' memory;
    2. waits for the others' parts, which come into its own memory meanwhile: no value is asked for from afar, so what
       is waited for is one way of the link and not two;
    3. adds up all parts in the order of ranks, in float32, and the residual, and rounds once: every rank has the same
       bits.

There are two halves of that memory, used in turns, and no wait at the end: whoever writes sum e + 2 has the others'
messages of sum e + 1, which they sent after sum e was read. A program counts its own sums in device memory, so that a
captured graph can be replayed. Programs spin, so all must be resident (`MOST_BYTES`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.argmax import LAST, SPOILED, parts
from selective_kv.kernels.decode_config import processor
from selective_kv.kernels.launch import launch

WORDS, WARPS = 64, 1  # of a program: what measured best for 1 and 8 tokens (LOG.md)
MOST_BYTES = 512 * 1024  # of x: 64 tokens of 4,096 in 16 bits: 2,048 programs of a warp, of 4,224 that a card holds
MOST_WORDS = MOST_BYTES // 4
MOST_ROWS = 1024  # sequences that a token is chosen for
MOST_RANKS = 8
MESSAGE_BYTES = 8


def places(n_rank: int) -> tuple[int, int]:
    """A rank's memory begins with the messages of sums, and those of choices follow: returns where the latter begin and
    end, in bytes. Both have two halves with a place for each rank.
    """
    choices = 2 * n_rank * MOST_WORDS * MESSAGE_BYTES
    return choices, choices + 2 * n_rank * MOST_ROWS * 2 * MESSAGE_BYTES


@triton.jit
def send(memory, place, words, count, inside):
    """Write int32 words into another rank's memory, each as a message of number `count`. place: in messages."""
    message = (count.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    tl.store(tl.multiple_of(memory.to(tl.pointer_type(tl.int64)), 16) + place, message, inside)


@triton.jit
def receive(memory, place, count, inside):
    """The int32 words that another rank sent as number `count`, when all have come."""
    at = tl.multiple_of(memory.to(tl.pointer_type(tl.int64)), 16) + place
    come = count.to(tl.int64) << 32
    message = tl.load(at, inside, come, volatile=True)
    while tl.max(((message >> 32).to(tl.int32) != count).to(tl.int32), 0) != 0:
        message = tl.load(at, inside, come, volatile=True)
    return message.to(tl.int32)


@triton.jit
def first_of(words, KIND: tl.constexpr):
    """The first (lower) number of each int32 word, in float32. KIND: the numbers' dtype."""
    if KIND.primitive_bitwidth == 32:
        first = words.to(tl.float32, bitcast=True)
    else:
        first = words.to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
    return first


@triton.jit
def second_of(words, KIND: tl.constexpr):
    return (words >> 16).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)


@triton.jit
def word_of(first, second, KIND: tl.constexpr):
    """The int32 words of numbers, rounded to KIND."""
    if KIND.primitive_bitwidth == 32:
        words = first.to(tl.int32, bitcast=True)
    else:
        low = first.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = low | (second.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return words


@triton.jit(do_not_specialize=["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"])
def sum_kernel(
    x, residual, out, counts, p0, p1, p2, p3, p4, p5, p6, p7, n_word,
    RANK: tl.constexpr, N_RANK: tl.constexpr, WORDS: tl.constexpr, MOST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program: WORDS words of x, which has n_word. p0...: addresses of the ranks' memory; counts: int32 [program], sums
    so far. MOST: words of a part.
    """
    KIND: tl.constexpr = x.dtype.element_ty
    if OVERLAP:
        gdc_launch_dependents()
    program = tl.program_id(0)
    i = program * WORDS + tl.arange(0, WORDS)
    inside = i < n_word
    memories = (p0, p1, p2, p3, p4, p5, p6, p7)  # addresses are arguments, so that none has to be loaded
    if OVERLAP:
        gdc_wait()
    mine = tl.load(x.to(tl.pointer_type(tl.int32)) + i, inside, 0)
    count = tl.load(counts + program) + 1
    half = (count & 1) * N_RANK
    for far in tl.static_range(1, N_RANK):
        send(memories[(RANK + far) % N_RANK], (half + RANK) * MOST + i, mine, count, inside)
    added = tl.load(residual.to(tl.pointer_type(tl.int32)) + i, inside, 0)
    first = tl.zeros((WORDS,), tl.float32)
    second = tl.zeros((WORDS,), tl.float32)
    for r in tl.static_range(N_RANK):
        words = mine
        if r != RANK:
            words = receive(memories[RANK], (half + r) * MOST + i, count, inside)
        first += first_of(words, KIND)
        if KIND.primitive_bitwidth == 16:
            second += second_of(words, KIND)
    first += first_of(added, KIND)
    if KIND.primitive_bitwidth == 16:
        second += second_of(added, KIND)
    tl.store(out.to(tl.pointer_type(tl.int32)) + i, word_of(first, second, KIND), inside)
    tl.store(counts + program, count)


@triton.jit(do_not_specialize=["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7", "n_part"])
def choose_kernel(
    keys, out, counts, p0, p1, p2, p3, p4, p5, p6, p7, n_part,
    RANK: tl.constexpr, N_RANK: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, CHOICES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program: one sequence. keys: int64 [sequence, n_part] of this rank's logits, n_part <= BLOCK; out: int64
    [sequence], the index in the largest of all ranks' keys; counts: int32 [sequence]. MOST: the most sequences.
    """
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    memories = (p0, p1, p2, p3, p4, p5, p6, p7)
    own = memories[RANK] + CHOICES
    if OVERLAP:
        gdc_wait()
    best = tl.max(tl.load(keys + row * n_part + tl.minimum(i, n_part - 1)), 0)
    count = tl.load(counts + row) + 1
    half = (count & 1) * N_RANK
    word = tl.arange(0, 2)  # a key is two messages
    inside = word < 2
    words = tl.where(word == 0, best, best >> 32).to(tl.int32)
    for far in tl.static_range(1, N_RANK):
        memory = memories[(RANK + far) % N_RANK] + CHOICES
        send(memory, ((half + RANK) * MOST + row) * 2 + word, words, count, inside)
    for far in tl.static_range(1, N_RANK):
        r = (RANK + far) % N_RANK
        theirs = receive(own, ((half + r) * MOST + row) * 2 + word, count, inside).to(tl.int64)
        best = tl.maximum(best, tl.sum(tl.where(word == 0, theirs & 0xFFFFFFFF, theirs << 32), 0))
    tl.store(out + row, tl.where(best == SPOILED, -1, (best & LAST) ^ LAST))
    tl.store(counts + row, count)


def peer_sum(x: Tensor, residual: Tensor, peers: Sequence[int], counts: Tensor, rank: int) -> Tensor:
    """residual plus every rank's x, in x's dtype. x, residual: contiguous, of at most MOST_BYTES in whole words.

    peers: addresses of each rank's memory (`places` has its size), zeros at first; counts: int32
    [MOST_WORDS / WORDS], zeros at first. Every rank makes the same calls in the same order.
    """
    assert summable(x) and residual.shape == x.shape and x.is_contiguous() and residual.is_contiguous()
    n_word = x.numel() * x.element_size() // 4
    out = x.new_empty(x.shape)
    overlap = processor(x.device).overlap
    launch(sum_kernel, (triton.cdiv(n_word, WORDS),))(
        x, residual, out, counts, *_all(peers), n_word, RANK=rank, N_RANK=len(peers), WORDS=WORDS, MOST=MOST_WORDS,
        OVERLAP=overlap, launch_pdl=overlap, num_warps=WARPS,
    )  # fmt: skip
    return out


def summable(x: Tensor) -> bool:
    """Whether `peer_sum` takes x: at most MOST_BYTES, in whole words."""
    n_byte = x.numel() * x.element_size()
    return n_byte <= MOST_BYTES and n_byte % 4 == 0


def peer_choice(logits: Tensor, start: int, peers: Sequence[int], counts: Tensor, rank: int) -> Tensor:
    """The index of each sequence's largest logit on any rank; -1 where some rank's are not finite. int64 [sequence].

    logits: [sequence, n], of at most MOST_ROWS sequences, this rank's, of tokens from `start` on; counts: int32
    [MOST_ROWS]. Otherwise as `peer_sum`.
    """
    keys = parts(logits, start)
    n_sequence, n_part = keys.shape
    assert n_sequence <= MOST_ROWS
    out = torch.empty(n_sequence, dtype=torch.int64, device=keys.device)
    overlap = processor(keys.device).overlap
    launch(choose_kernel, (n_sequence,))(
        keys, out, counts, *_all(peers), n_part, RANK=rank, N_RANK=len(peers), BLOCK=triton.next_power_of_2(n_part),
        MOST=MOST_ROWS, CHOICES=places(len(peers))[0], OVERLAP=overlap, launch_pdl=overlap, num_warps=1,
    )  # fmt: skip
    return out


def _all(peers: Sequence[int]) -> list[int]:
    """The ranks' addresses, filled up to MOST_RANKS: a kernel has as many arguments."""
    return [*peers, *[peers[0]] * (MOST_RANKS - len(peers))]
