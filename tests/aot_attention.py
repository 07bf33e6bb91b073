"""Attention kernels compiled for Hopper, and what counts in their machine code: `aot.py` runs these."""

from __future__ import annotations

import re
from typing import Any

from aot import HOPPER_SHARED, compile_kernel, counted, disassembled, instructions

from selective_kv.formats import TILE, rotation_size
from selective_kv.kernels.close import blocks_of
from selective_kv.kernels.combine import combine_kernel
from selective_kv.kernels.decode import split_kernel
from selective_kv.kernels.decode_config import blocks, fitting, merging, plan, rounds_later, sharing
from selective_kv.kernels.dense import copy_slots_kernel, dequantize_kernel, rotate_heads_kernel
from selective_kv.kernels.history import history_kernel
from selective_kv.kernels.history_8bit import QUERIES, attend_kernel, quantize_queries_kernel, requantize_kernel
from selective_kv.kernels.merge import merge_kernel
from selective_kv.kernels.store import MOST_REGISTERS, append_kernel, close_chunk_kernel, close_kernel, slots_kernel

TYPES = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "next_weight": "*bf16", "k_new": "*bf16", "v_new": "*bf16",
         "positions": "*i64", "cos": "*fp32", "sin": "*fp32", "partial": "*fp32",
         "statistics": "*fp32", "k_codes": "*i8", "v_pairs": "*i16", "k_scale": "*i32", "v_scale": "*i32",
         "k_factor": "*i32",
         "bias_pairs": "*i32", "bias_within": "*fp16", "bias_turned": "*fp32", "softmax_scale": "fp32"}  # fmt: skip


def compile_split_kernel(
    head_dim: int, group: int, k_bits: int = 8, v_bits: int = 8, batch_heads: int = 8,
    dtype: str = "bf16", shared: int = HOPPER_SHARED, turn: bool = False, pairs: int = 0, new: bool = True,
) -> dict[str, int] | None:  # fmt: skip
    """Registers, spills and instruction counts of `split_kernel`; None if the tools are missing."""
    itemsize = 4 if dtype == "fp32" else 2
    p = plan(batch_heads, group, head_dim, itemsize, 132, k_bits, v_bits)
    p = fitting(p, shared, head_dim, itemsize, k_bits, v_bits)
    columns = -(-group // p.heads)
    n_partial = ((p.splits or sharing(p, batch_heads * columns, 132)) + 1) * p.warps
    stored = stored_as(head_dim, k_bits, v_bits, pairs=pairs)
    constants = {
        "HEAD_DIM": head_dim, "HEADS": p.heads, "WARPS": p.warps, "FLOAT_SLICE": p.float_slice,
        "INT_SLICE": p.int_slice, "FLOAT_STAGES": p.float_stages, "INT_STAGES": p.int_stages, **stored,
        "V_LATER": rounds_later(p, k_bits, v_bits, stored["V_ROTATION"], merging(n_partial, head_dim)["DIMS"]),
        "HALVES": p.halves and p.warps * p.int_slice == TILE, "AHEAD": p.ahead, "TURN_SINKS": turn, "NEW": new,
        "INTERPRET": False, "COLUMNS": columns, "OVERLAP": True,
    }  # fmt: skip
    types = {name: kind.replace("bf16", dtype) for name, kind in TYPES.items()}
    compiled = compile_kernel(split_kernel, types, constants, p.warps, True)
    found = counted(compiled)
    return found and found | {"ahead": p.ahead}


def stored_as(head_dim: int, k_bits: int, v_bits: int, rotated: bool = True, pairs: int = 0) -> dict[str, Any]:
    """What kernels are told of the formats, and of how many pairs of channels the bias is not in the tiles."""
    turn = rotation_size(head_dim) if rotated and k_bits else 1
    return {"K_BITS": k_bits, "V_BITS": v_bits, "BALANCED": 0 < k_bits < 8, "K_ROTATION": turn,
            "V_ROTATION": turn if v_bits < 8 else 1, "PAIRS": pairs}  # fmt: skip


STORE_TYPES = {name: "*bf16" for name in ("chunk_k", "chunk_v", "k_new", "v_new", "k", "v", "rotation")} | {
    "k_codes": "*u8", "v_codes": "*u8", "k_scale": "*i32", "v_scale": "*i32", "k_factor": "*i32", "positions": "*i64",
    "bias_pairs": "*i32", "bias_within": "*fp16", "bias_turned": "*fp32", "offsets": "*i64",
}  # fmt: skip


def compile_append_kernel(head_dim: int, early: bool = False) -> dict[str, int] | None:
    """What counts in `append_kernel` as a launch has it: above all what follows its wait."""
    constants = {"HEAD_DIM": head_dim, "OVERLAP": True, "EARLY": early}
    compiled = compile_kernel(append_kernel, STORE_TYPES, constants, 1, True)
    found = disassembled(compiled)
    if found is None:
        return None
    names = instructions(found[0])
    wait = names.index("ACQBULK")
    return {
        "instructions": len(names),
        "after_wait": names.index("EXIT", wait) - wait,
        "trigger": names.index("PREEXIT") - wait,
        "registers": int(re.findall(r"REG:(\d+)", found[1])[0]),
    }


def closing(head_dim: int, k_bits: int, v_bits: int, rotated: bool = True, pairs: int = 0) -> dict[str, Any]:
    """What kernels that quantise tiles are told."""
    keys, values, _ = blocks_of(head_dim)
    return {"HEAD_DIM": head_dim, "INTERPRET": False, **stored_as(head_dim, k_bits, v_bits, rotated, pairs),
            "K_ROWS": keys, "V_ROWS": values, "BLOCKS": max(-(-head_dim // keys), TILE // values)}  # fmt: skip


def compile_close_kernel(head_dim: int, k_bits: int, v_bits: int, chunk: bool = True) -> dict[str, int] | None:
    """What counts in `close_chunk_kernel` or `close_kernel`."""
    constants, warps = closing(head_dim, k_bits, v_bits), blocks_of(head_dim)[2]
    if chunk:
        options = {"num_stages": 1, "maxnreg": MOST_REGISTERS}
        compiled = compile_kernel(close_chunk_kernel, STORE_TYPES, constants, warps, True, **options)
    else:
        compiled = compile_kernel(close_kernel, STORE_TYPES, constants | {"SEQUENCES": 8}, warps, True, num_stages=1)
    found = disassembled(compiled)
    if found is None:
        return None
    names = instructions(found[0])
    return {
        "instructions": len(names),
        "products": len([n for n in names if n.startswith("HGMMA")]),
        "local": len([n for n in names if n.startswith(("LDL", "STL"))]),
        "registers": int(re.findall(r"REG:(\d+)", found[1])[0]),
        "shared": compiled.metadata.shared,
    }


def compile_combine_kernel(
    n_split: int, head_dim: int = 128, group: int = 4, bits: int = 16, dtype: str = "bf16"
) -> dict[str, int] | None:
    """What counts in `combine_kernel` as a launch has it: above all what follows its wait. bits: K's and V's."""
    itemsize = 4 if dtype == "fp32" else 2
    p = plan(8, group, head_dim, itemsize, 132, bits // 2, bits // 2)
    merged = merging((n_split + 1) * p.warps, head_dim)
    rotation = stored_as(head_dim, bits // 2, bits // 2)["V_ROTATION"]
    later = rounds_later(p, bits // 2, bits // 2, rotation, merged["DIMS"])
    constants = {"HEAD_DIM": head_dim, "HEADS": p.heads, "COLUMNS": -(-group // p.heads), "WARPS": p.warps,
                 "HAS_INT": bits > 0, "HALVES": False, "V_LATER": later, "OVERLAP": True,
                 **blocks(p), **merged}  # fmt: skip
    types = {"partial": "*fp32", "statistics": "*fp32", "positions": "*i64", "out": f"*{dtype}"}
    compiled = compile_kernel(combine_kernel, types, constants, 1, True)
    found = disassembled(compiled)
    if found is None:
        return None
    names = instructions(found[0])
    merge = names.index("MUFU.EX2")
    wait = max(i for i in range(merge) if names[i] == "ACQBULK")  # a sequence without a token has its own
    last = next(i for i in range(merge, len(names)) if names[i].startswith("STG"))
    return {
        "early_loads": len([n for n in names[:wait] if n.startswith("LDG")]),
        "before_loads": next(i for i in range(wait, merge) if names[i].startswith("LDG")) - wait,
        "after_wait": last - wait,
        "trigger": names.index("PREEXIT", wait) - wait,
        "local": len([n for n in names if n.startswith(("LDL", "STL"))]),
        "stack": int(re.findall(r"STACK:(\d+)", found[1])[0]),
        "registers": int(re.findall(r"REG:(\d+)", found[1])[0]),
    }


def compiles(k_bits: int, v_bits: int, rotated: bool, pairs: int = 0) -> None:
    """Raises what the compiler does, for any kernel that writes or reads tiles."""
    shared = closing(128, k_bits, v_bits, rotated, pairs)
    compile_kernel(close_kernel, STORE_TYPES, shared | {"SEQUENCES": 1}, 8)
    compile_kernel(close_chunk_kernel, STORE_TYPES, shared, 8)
    dense = {name: shared[name] for name in ("HEAD_DIM", "K_BITS", "V_BITS", "BALANCED")} | {"BLOCK": 32}
    compile_kernel(dequantize_kernel, STORE_TYPES, dense)
    rotations = {name: shared[name] for name in ("HEAD_DIM", "K_ROTATION", "V_ROTATION", "INTERPRET")}
    slots = STORE_TYPES | {"k_slots": "*bf16", "v_slots": "*bf16"}
    compile_kernel(copy_slots_kernel, slots, rotations | {"BLOCK": 32})
    if max(k_bits, v_bits) <= 4 and rotated:
        types = STORE_TYPES | {"k": "*i8", "v": "*fp8e4nv", "k_step": "*fp32", "v_step": "*fp32"}
        compile_kernel(requantize_kernel, types, {name: dense[name] for name in dense if name != "BLOCK"}, 8)


def compile_attend_kernel(head_dim: int) -> dict[str, int] | None:
    """Registers, spills and 8-bit products of `history_8bit`'s attention; None if the tools are missing."""
    types = {"q": "*i8", "k": "*i8", "v": "*fp8e4nv", "rotation": "*bf16", "out": "*bf16"}
    types |= {name: "*fp32" for name in ("q_scale", "k_step", "v_step", "lse")}
    constants = {"HEAD_DIM": head_dim, "QUERIES": QUERIES, "ROTATION": head_dim, "STAGES": 3, "INTERPRET": False}
    compiled = compile_kernel(attend_kernel, types, constants, aligned=True, even=("n_key",))
    found, code = counted(compiled), disassembled(compiled)
    if found is None or code is None:
        return None
    names = instructions(code[0])
    return found | {
        "int8": sum(n.startswith("IGMMA") for n in names),
        "float8": sum(n.startswith("QGMMA") for n in names),
    }


def compile_without_tiles() -> None:
    """Raises what the compiler does, for the attention kernels that look at no tiles."""
    pointers = ("q", "k", "v", "x", "out", "chunk_k", "chunk_v")
    types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(("partial", "statistics", "lse", "cos", "sin"), "*fp32")
    types |= {"positions": "*i64", "softmax_scale": "fp32"}
    for overlap in (False, True):  # before Hopper, and since
        compile_kernel(combine_kernel, types, {
            "HEAD_DIM": 128, "HEADS": 4, "COLUMNS": 1, "FLOAT_BLOCK": 64, "INT_BLOCK": 64,
            "WARPS": 2, "HAS_INT": True, "HALVES": True, "V_LATER": 1, "OVERLAP": overlap,
            **merging(68, 128),
        })  # fmt: skip
    compile_kernel(slots_kernel, types, {"HEAD_DIM": 128, "BLOCK": 16})
    for rotation in (1, 128):
        merged = {f"{name}{i}": kind for i in range(7) for name, kind in (("out", "*bf16"), ("lse", "*fp32"))}
        merged |= {"merged": "*bf16", "merged_lse": "*fp32", "rotation": "*bf16"}
        constants = {"HEAD_DIM": 128, "TOKENS": 32, "N": 7, "ROTATION": rotation, "INTERPRET": False}
        compile_kernel(merge_kernel, merged, constants)
    queries = {"HEAD_DIM": 128, "ROTATION": 128, "BLOCK": 128, "INTERPRET": False}
    compile_kernel(rotate_heads_kernel, types | {"rotation": "*bf16"}, queries, 8)
    rounded = {"q": "*bf16", "out": "*i8", "scales": "*fp32", "rotation": "*bf16", "softmax_scale": "fp32"}
    compile_kernel(quantize_queries_kernel, rounded, queries, 8)
    own = types | {"own": "*bf16", "own_lse": "*fp32", "out_lse": "*fp32"}
    for turn in (False, True):
        compile_kernel(history_kernel, own, {
            "HEAD_DIM": 128, "QUERIES": 128, "KEYS": 64, "STAGES": 3, "TURN_SINKS": turn, "INTERPRET": False,
        })  # fmt: skip
