"""How decode attention is launched, and what the compiler makes of its kernels for Hopper."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_reference import compiled, counts

from selective_kv.kernels.decode_config import MOST_PARTIAL, SHARED_SLACK, Plan, fitting, merging, parts, plan, sharing

HOPPER_SHARED, SMALL_SHARED = 232_448, 101_376  # bytes that a program may have: an H200's, an RTX 4090's
BITS = [(8, 8), (8, 4), (4, 4), (3, 3), (4, 2), (2, 2)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("batch_heads", [8, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_hopper_takes_the_plan_that_was_measured(head_dim: int, batch_heads: int, bits: tuple[int, int]) -> None:
    for group in (1, 4, 8):
        p = plan(batch_heads, group, head_dim, 2, 132, *bits)
        assert fitting(p, HOPPER_SHARED, head_dim, 2, *bits) == p
        assert 128 % (p.warps * p.int_slice) == 0, "a block is a part of a tile"
        assert p.int_slice // parts(*bits) >= 16, "a warp multiplies 16 rows"


def test_a_plan_gives_way_where_its_blocks_do_not_fit_and_not_before() -> None:
    """Slots: 2 of 3 stages' blocks, of 2 warps x 32 tokens x 128 dims of K and V, in bfloat16: 64 KiB; tiles: half."""
    p = Plan(4, 2, 32, 32, 3, 3, 2)
    enough = (64 << 10) + SHARED_SLACK
    assert fitting(p, enough, 128, 2, 8, 8) == p
    assert fitting(p, enough - 2, 128, 2, 8, 8) == p._replace(float_stages=2)
    assert fitting(p, enough // 2, 128, 2, 8, 8) == p._replace(float_stages=2, float_slice=16, int_stages=2)
    least = fitting(p, SHARED_SLACK, 128, 2, 8, 8)  # nothing fits: the smallest there is, for the compiler to refuse
    assert least == p._replace(float_stages=2, float_slice=16, int_stages=2, int_slice=16)


@pytest.mark.machine_code
@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 128, "group": 4},
        {"head_dim": 128, "group": 4, "batch_heads": 64},
        {"head_dim": 128, "group": 4, "batch_heads": 256},
        {"head_dim": 128, "group": 16, "batch_heads": 64},
        {"head_dim": 64, "group": 8, "batch_heads": 64},
        {"head_dim": 96, "group": 4},
        {"head_dim": 256, "group": 16},
        {"head_dim": 128, "group": 4, "k_bits": 0},
        {"head_dim": 128, "group": 4, "k_bits": 4, "v_bits": 4},
        {"head_dim": 128, "group": 4, "k_bits": 4, "v_bits": 4, "batch_heads": 64},
        {"head_dim": 128, "group": 4, "k_bits": 4, "v_bits": 4, "batch_heads": 256},
        {"head_dim": 128, "group": 4, "v_bits": 4, "batch_heads": 64},
        {"head_dim": 64, "group": 8, "k_bits": 4, "v_bits": 4, "batch_heads": 64},
        {"head_dim": 128, "group": 4, "k_bits": 3, "v_bits": 3},
        {"head_dim": 64, "group": 3, "k_bits": 3, "v_bits": 3, "batch_heads": 64},
        {"head_dim": 128, "group": 4, "k_bits": 4, "v_bits": 2},
        {"head_dim": 128, "group": 7, "k_bits": 4, "v_bits": 4, "batch_heads": 48},
        {"head_dim": 96, "group": 4, "k_bits": 2, "v_bits": 2},
        {"head_dim": 128, "group": 4, "dtype": "fp32", "shared": SMALL_SHARED},
        {"head_dim": 256, "group": 4, "batch_heads": 256, "shared": SMALL_SHARED, "spills": 100},
        {"head_dim": 128, "group": 4, "k_bits": 0, "batch_heads": 64},
        {"head_dim": 128, "group": 4, "k_bits": 0, "v_bits": 0, "turn": True},
        {"head_dim": 64, "group": 8, "k_bits": 0, "v_bits": 0, "turn": True, "batch_heads": 256},
    ],
)
def test_compiled_for_hopper(shape: dict[str, Any]) -> None:
    """Few spills, no byte-wide loads, and the matrix units that were meant: Triton compiles without a GPU.

    Angles of sinks are made once a step: a float64, or the stack that a sine keeps pi on, would be in every program.
    """
    shape = dict(shape)
    allowed = shape.pop("spills", 48)  # by Triton 3.9
    (found,) = counts("compile_split_kernel", [shape])
    assert found["spills"] <= allowed
    assert found["byte_loads"] == 0 and found["float64"] == 0
    assert (found["HMMA"] > 0) == (shape.get("dtype") != "fp32" or shape.get("k_bits", 8) > 0) and (
        found["IMMA"] > 0
    ) == (shape.get("k_bits", 8) > 0)
    assert found["shared"] <= shape.get("shared", HOPPER_SHARED)
    assert found["fetches"] >= (5 if found["ahead"] else 1)  # of what is read next; and of its first tokens
    assert found["copies"] > 0, "keys and values are to be copied to shared memory asynchronously"


MOST_AFTER_WAIT = {  # instructions, as (programs per sequence and KV head, head_dim, query heads per KV head, bits)
    (1, 128, 4, 16): 80, (4, 128, 4, 16): 160, (8, 128, 4, 16): 170, (16, 128, 4, 16): 160, (31, 128, 4, 16): 160,
    (33, 128, 4, 0): 180, (33, 96, 3, 16): 180, (63, 128, 4, 8): 170, (127, 256, 16, 16): 210,
}  # fmt: skip


@pytest.mark.machine_code
def test_what_merging_leaves_for_after_its_wait() -> None:
    """Loads at once, from addresses that are there, and one pass over what they bring: every layer waits for it."""
    found_by_shape = zip(MOST_AFTER_WAIT, counts("compile_combine_kernel", list(MOST_AFTER_WAIT)), strict=True)
    for shape, found in found_by_shape:
        assert found["after_wait"] <= MOST_AFTER_WAIT[shape], (shape, found)
        assert found["early_loads"] == 1, shape  # the sequence's position
        assert found["before_loads"] <= 12 and found["trigger"] > 0, (shape, found)
        assert found["local"] == found["stack"] == 0 and found["registers"] <= 64, (shape, found)


@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 96, 128, 256])
def test_what_a_warp_merges(head_dim: int) -> None:
    """All partial results, and dims that tile a head."""
    for n_partial in range(2, 257):
        block = merging(n_partial, head_dim)
        assert block["CHUNK"] >= n_partial and head_dim % block["DIMS"] == 0
        assert block["CHUNK"] * block["DIMS"] <= 1024
        assert all(n & (n - 1) == 0 for n in block.values())


@pytest.mark.parametrize("n_column", [1, 2, 3, 8, 20, 64, 100, 256, 1000])
def test_programs_fill_the_gpu_and_their_results_are_merged_at_once(n_column: int) -> None:
    """An H200 has 132 processors. Programs are at most a sixteenth fewer than would fit it, and never more."""
    for bits in (8, 4):
        p = plan(n_column, 4, 128, 2, 132, bits, bits)
        n = sharing(p, n_column, 132)
        fit = 132 * p.per_processor // n_column
        most = MOST_PARTIAL // p.warps - 1
        assert 1 <= n <= max(2, fit) and n >= min(most, 15 * fit / 16)
        assert merging((n + 1) * p.warps, 128)["CHUNK"] <= MOST_PARTIAL


def test_every_kernel_compiles_for_hopper() -> None:
    """The interpreter is lenient about types; the compiler is not."""
    compiled(
        "compiles",
        [(8, 8, False), (4, 8, False), (8, 4, True), (4, 4, True, 8), (3, 3, True), (3, 2, True), (2, 3, False)],
    )
    for function in ("compile_without_tiles", "compile_products"):
        compiled(function, [()])
