"""Who takes what in decoding: every block once, in order, evenly, and the merge knows what was written."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_reference import DEVICES, tl, triton

from selective_kv.formats import TILE
from selective_kv.kernels.decode_config import plan, sharing
from selective_kv.kernels.split_kv import (
    count_left,
    first_blocks,
    partition,
    past_gap,
    slots_in_use,
    tile_blocks,
    written,
)

N = 512  # entries looked at: more than there are programs
SLOTS, TOKENS = 32, 64  # per block


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@triton.jit(do_not_specialize=["n_token", "sink_size", "window_size", "n_slot", "n_split"])
def share_kernel(
    out, n_token, sink_size, window_size, n_slot, n_split, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
    HAS_INT: tl.constexpr, HALVES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: out int32 [5, N], the two results of `first_blocks`, that of `written`, the slots at which the first
    N blocks of slots begin, the end of the slots, their number without the gap and the tokens of a block of tiles."""
    n = n_token.to(tl.int64)
    n_left = count_left(n, sink_size, window_size)
    end, _, gap, n_gap = slots_in_use(n, n_left, sink_size, n_slot, SLOTS, HAS_INT)
    block, int_blocks = tile_blocks(n_left, n_split, TOKENS, HAS_INT, HALVES)
    each, float_blocks = partition(end - n_gap, int_blocks, n_split, SLOTS)
    split = tl.arange(0, N)
    tl.store(out + 3 * N + split, past_gap(split * SLOTS, gap, n_gap))
    tl.store(out + 4 * N + split, tl.where(split == 0, end, tl.where(split == 1, end - n_gap, block)))
    first, tile_first = first_blocks(split, each, float_blocks, int_blocks)
    wrote = written(split, each, float_blocks, int_blocks)
    tl.store(out + split, first)
    tl.store(out + N + split, tile_first)
    tl.store(out + 2 * N + split, wrote.to(tl.int32))


def shares(
    n_token: int, sink: int, window: int, n_split: int, has_int: bool, device: str, halves: bool = False
) -> tuple[list[range], list[range], list[bool], list[range]]:
    """Blocks of slots and tokens in tiles of every program, whether there is something at every entry, and the slots of
    the first blocks."""
    out = torch.empty(5, N, dtype=torch.int32, device=device)
    n_slot = sink + window + (TILE if has_int else 0)
    share_kernel[(1,)](out, n_token, sink, window, n_slot, n_split, SLOTS, TOKENS, has_int, halves, N, num_warps=1)
    slots, tiles, wrote, starts, (end, n_used, block, *_) = out.tolist()
    programs = range(n_split)
    return (
        [range(slots[s], slots[s + 1]) for s in programs],
        [range(block * tiles[s], block * tiles[s + 1], block) for s in programs],
        [bool(w) for w in wrote[: n_split + 2]],
        [range(at, min(at + SLOTS, end)) for at in starts[: -(-n_used // SLOTS)]],
    )


@given(
    sink=st.integers(0, 200),
    window=st.integers(1, 5000) | st.integers(1, 1 << 26),
    n_more=st.integers(0, 5000) | st.integers(0, 1 << 26),
    n_split=st.integers(1, 8) | st.integers(1, 255),
    halves=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def check(device: str, sink: int, window: int, n_more: int, n_split: int, halves: bool) -> None:
    slots, tiles, wrote, _ = shares(sink + window + n_more, sink, window, n_split, True, device, halves)
    n_left, block = n_more // TILE * TILE, tiles[0].step
    assert block == TOKENS // 2 if halves and n_left <= 384 * n_split else block == TOKENS
    n_blocks = slots[-1].stop, n_left // block
    for parts, n in zip((slots, tiles), (slots[-1].stop, n_left), strict=True):  # every block once, in order
        assert parts[0].start == 0 and parts[-1].stop == n
        assert all(a.stop == b.start and a.start <= a.stop for a, b in pairwise(parts))
    last_with_slots = max(s for s in range(n_split) if slots[s])
    assert not any(tiles[s] for s in range(last_with_slots))  # slots come first
    work = [len(a) + len(b) for a, b in zip(slots, tiles, strict=True)]
    assert max(work) == -(-sum(n_blocks) // n_split)
    expected = [False] * (n_split + 2)
    for s in range(n_split):
        assert not (slots[s] and expected[s]), "two results at one entry"
        expected[s] |= bool(slots[s])
        expected[s + 1] |= bool(tiles[s])
    assert wrote == expected


def test_every_block_once_in_order_and_evenly(device: str) -> None:
    check(device)


@given(sink=st.integers(0, 200), window=st.integers(1, 300), n_more=st.integers(-300, 3000), n_split=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def check_slots(device: str, sink: int, window: int, n_more: int, n_split: int) -> None:
    n_token = max(1, sink + window + n_more)
    found = shares(n_token, sink, window, n_split, True, device)
    visited = [slot for block in found[3] for slot in block]
    assert len(set(visited)) == len(visited) and found[0][-1].stop == len(found[3])
    n_left = max(0, n_token - sink - window) // TILE * TILE
    ring = range(sink + n_left, n_token)  # positions: see `Regions`
    live = {*range(min(sink, n_token)), *(sink + (at - sink) % (window + TILE) for at in ring)}
    assert live <= set(visited)
    for block in found[3]:  # none without a live slot, but the first, which has the sinks
        assert block.start == 0 or live & set(block)


def test_every_live_slot_once_and_no_block_without_one(device: str) -> None:
    check_slots(device)


def test_without_tiles_the_shares_are_the_full_caches(device: str) -> None:
    for n_split in (1, 2, 7, 255):
        for n_token in (0, 33, 4000, (1 << 20) * SLOTS - 1):
            full = shares(n_token, 0, 1 << 30, n_split, False, device)
            for sink, window in ((0, max(n_token - TILE + 1, 1)), (9, 1 << 29)):
                assert shares(n_token, sink, window, n_split, True, device) == full


def test_many_heads_of_four_bits_have_programs_for_every_processor() -> None:
    """12 sequences of 8 KV heads: the plans before had 192 programs of two warps for 132 SMs."""
    for head_dim, group in ((64, 1), (64, 8), (128, 1), (128, 8)):
        p = plan(96, group, head_dim, 2, 132, 4, 4)
        assert 96 * sharing(p, 96, 132) >= 3.5 * 132


def test_whole_tiles_of_four_bits_are_for_one_warp_a_scheduler() -> None:
    """132 SMs have 528 schedulers. With fewer warps some would have none, with more some would have two."""
    whole = [n for n in range(1, 400) if plan(n, 4, 128, 2, 132, 4, 4).int_slice == TILE]
    assert {64, 128, 256} <= set(whole) and 96 not in whole
    for n in whole:
        p = plan(n, 4, 128, 2, 132, 4, 4)
        assert p.warps == 1 and 15 / 16 * 528 <= n * sharing(p, n, 132) <= 528
