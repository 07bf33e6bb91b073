"""Compile the kernels of a decode step for Hopper, with no GPU at hand, and count what matters in machine code.

    python tests/aot.py compile_append_kernel '[[128], {"head_dim": 64, "early": true}]'      what each returns, as JSON

A program of its own, because tests have Triton's interpreter (`kernel_reference.counts` runs it).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a program

from engine.kernels.argmax import part_kernel, pick_kernel
from engine.kernels.gemv import norm_kernel, rotate_kernel, swiglu_kernel, vector_kernel
from engine.kernels.gemv_int4 import int4_kernel, parts_of
from engine.kernels.gemv_int4 import plan as plan_int4
from engine.kernels.gemv_integers import integers_kernel
from engine.kernels.gemv_integers import plan as plan_integers
from engine.kernels.peer_sum import MOST_RANKS, MOST_ROWS, MOST_WORDS, WORDS, choose_kernel, places, sum_kernel
from engine.kernels.quantised import dense_kernel, embed_kernel
from engine.kernels.small_gemm import padded, plan_tokens, tokens_kernel
from engine.kernels.small_gemm_int4 import parts_of as parts_of_tokens
from engine.kernels.small_gemm_int4 import tokens_int4_kernel
from engine.kernels.small_gemm_integers import tokens_integers_kernel
from selective_kv.formats import TILE, rotation_size
from selective_kv.kernels.close import blocks_of
from selective_kv.kernels.decode import combine_kernel, split_kernel
from selective_kv.kernels.decode_config import blocks, fitting, merging, plan
from selective_kv.kernels.dense import copy_slots_kernel, dequantize_kernel, rotate_heads_kernel
from selective_kv.kernels.history import history_kernel
from selective_kv.kernels.history_8bit import QUERIES, attend_kernel, quantize_queries_kernel, requantize_kernel
from selective_kv.kernels.merge import merge_kernel
from selective_kv.kernels.store import MOST_REGISTERS, append_kernel, close_chunk_kernel, close_kernel, slots_kernel

TYPES = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "then": "*bf16", "k_new": "*bf16", "v_new": "*bf16",
         "positions": "*i64", "cos": "*fp32", "sin": "*fp32", "partial": "*fp32",
         "statistics": "*fp32", "k_codes": "*i8", "v_pairs": "*i16", "k_scale": "*i32", "v_scale": "*i32",
         "k_factor": "*i32",
         "bias_pairs": "*i32", "bias_within": "*fp16", "bias_turned": "*fp32", "softmax_scale": "fp32"}  # fmt: skip


HOPPER_SHARED = 232_448  # bytes that a program may have


def compile_split_kernel(
    head_dim: int, group: int, k_bits: int = 8, v_bits: int = 8, batch_heads: int = 8,
    dtype: str = "bf16", shared: int = HOPPER_SHARED, turn: bool = False, pairs: int = 0, new: bool = True,
) -> dict[str, int] | None:  # fmt: skip
    """Registers, spills and instruction counts of `split_kernel`; None if the tools are missing."""
    itemsize = 4 if dtype == "fp32" else 2
    p = plan(batch_heads, group, head_dim, itemsize, 132, k_bits, v_bits)
    p = fitting(p, shared, head_dim, itemsize, k_bits, v_bits)
    constants = {
        "HEAD_DIM": head_dim, "HEADS": p.heads, "WARPS": p.warps, "FLOAT_SLICE": p.float_slice,
        "INT_SLICE": p.int_slice, "FLOAT_STAGES": p.float_stages, "INT_STAGES": p.int_stages,
        **stored_as(head_dim, k_bits, v_bits, pairs=pairs),
        "AHEAD": p.ahead, "TURN_SINKS": turn, "NEW": new,
        "INTERPRET": False, "TILES": -(-group // p.heads), "OVERLAP": True,
    }  # fmt: skip
    names = split_kernel.arg_names
    types = {name: kind.replace("bf16", dtype) for name, kind in TYPES.items()}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if "stride" in n or signature[n].startswith("*")]
    source = ASTSource(
        split_kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": p.warps})
    found = counted(compiled)
    return found and found | {"ahead": p.ahead}


def compile_tokens_kernel(
    n_row: int, k: int, n_token: int, head_dim: int = 0, norm: bool = False, swiglu: bool = False, bias: bool = False,
    add: bool = False, dtype: str = "bf16",
) -> dict[str, int] | None:  # fmt: skip
    """Registers, spills and instruction counts of `tokens_kernel` by its plan; None if the tools are missing."""
    p = plan_tokens(n_row, n_token, 132, HOPPER_SHARED)
    constants = {
        "K": k, "N": padded(n_token), "ROWS": p.rows, "WARPS": p.warps, "SLICE": p.slice, "STAGES": p.stages,
        "EARLY": p.early, "HEAD_DIM": head_dim, "NORM": norm, "SWIGLU": swiglu, "BIAS": bias, "ADD": add,
        "OVERLAP": True, "INTERPRET": False,
    }  # fmt: skip
    types = {name: f"*{dtype}" for name in ("x", "weight", "bias", "norm", "residual", "out")}
    types |= {"cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
    return counted(compile_kernel(tokens_kernel, types, constants, p.warps, True))


def compile_integers_kernel(
    k: int, bits: int, group: int, swiglu: bool = False, norm: bool = True
) -> dict[str, int] | None:
    """What counts in `integers_kernel` by its plan, for a product of 4096 outputs."""
    words = -(-k // group) * group // 8 if bits == 4 else k // 4
    chunks = max(32, triton.next_power_of_2(words // 4))
    p = plan_integers(4096, chunks, swiglu, 132)
    units = max(1, p.units // 2) if swiglu else p.units
    types = {name: "*i32" for name in ("x", "ints", "pairs", "norm")} | {"unit": "*fp32", "eps": "fp32"}
    types |= {name: "*bf16" for name in ("bias", "residual", "out")} | {"cos": "*fp32", "sin": "*fp32"}
    constants = {"K": k, "BITS": bits, "GROUP": group, "UNITS": units, "CHUNKS": chunks, "HEAD_DIM": 0, "NORM": norm,
                 "SWIGLU": swiglu, "BIAS": False, "ADD": False, "FLOAT16": False, "OVERLAP": True,
                 "INTERPRET": False}  # fmt: skip
    compiled = compile_kernel(integers_kernel, types, constants, p.warps, True)
    found = counted(compiled)
    return found and found | {"rows": p.units, **of_integers(compiled)}


def compile_int4_kernel(n_unit: int, k: int, swiglu: bool = False, head_dim: int = 0) -> dict[str, Any] | None:
    """What counts in `int4_kernel` by its plan, and which lanes have what of the assembly's operands: `lanes`."""
    paired = swiglu or head_dim > 0
    p = plan_int4(n_unit, k, paired, 132)
    types = {name: "*i32" for name in ("x", "ints", "pairs", "norm")} | {"unit": "*fp32", "eps": "fp32"}
    types |= {name: "*bf16" for name in ("bias", "residual", "out")} | {"cos": "*fp32", "sin": "*fp32"}
    constants = {"K": k, "PARTS": parts_of(k), "SPLIT": p.split, "HEAD_DIM": head_dim,
                 "NORM": paired, "SWIGLU": swiglu, "BIAS": False, "ADD": not paired, "FLOAT16": False,
                 "OVERLAP": True, "INTERPRET": False}  # fmt: skip
    compiled = compile_kernel(int4_kernel, types, constants, p.warps, True)
    found = counted(compiled)
    return found and found | {"lanes": lanes_of_assembly(compiled), "blocks": 4 // p.split, **of_integers(compiled)}


def compile_tokens_int4_kernel(
    k: int, swiglu: bool = False, head_dim: int = 0, norm: bool = True, dtype: str = "bf16"
) -> dict[str, Any] | None:
    """What counts in `tokens_int4_kernel`, and which lanes have what of the assembly's operands: `lanes`."""
    types = {name: "*i32" for name in ("x", "ints", "norm")} | {"pairs": "*i64", "unit": "*fp32", "eps": "fp32"}
    types |= {name: f"*{dtype}" for name in ("bias", "residual", "out")} | {"cos": "*fp32", "sin": "*fp32"}
    constants = {"K": k, "PARTS": parts_of_tokens(k), "HEAD_DIM": head_dim, "NORM": norm, "SWIGLU": swiglu,
                 "BIAS": False, "ADD": not swiglu and not head_dim, "FLOAT16": dtype == "fp16", "OVERLAP": True,
                 "INTERPRET": False}  # fmt: skip
    compiled = compile_kernel(tokens_int4_kernel, types, constants, parts_of_tokens(k), True)
    found = counted(compiled)
    return found and found | {"lanes": lanes_of_assembly(compiled), **of_integers(compiled)}


def lanes_of_assembly(compiled: Any) -> list[str]:
    """The layouts of what inline assembly of matrix units, or between lanes, returns."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\S.*)$", compiled.asm["ttgir"], re.MULTILINE))
    used = set(re.findall(r"(?:mma|shfl)\.sync.*?-> \(?tensor<\d+x16x\w+, (#\w+)>", compiled.asm["ttgir"]))
    return sorted(layouts[name].partition(", warpsPerCTA")[0] for name in used)


def compile_tokens_integers_kernel(k: int, bits: int, group: int, n_token: int = 8) -> dict[str, int] | None:
    """What counts in `tokens_integers_kernel`."""
    slice_ = (group // 4 if bits == 4 else group) or 128
    types = {name: "*bf16" for name in ("x", "bias", "norm", "residual", "out")} | {"unit": "*fp32", "eps": "fp32"}
    types |= {"ints": "*i16" if bits == 4 else "*i8", "pairs": "*i32"}
    types |= {"cos": "*fp32", "sin": "*fp32"}
    constants = {"K": k, "BITS": bits, "GROUP": group, "N": padded(n_token), "ROWS": 32, "WARPS": 4, "SLICE": slice_,
                 "STAGES": 3, "EARLY": 512, "HEAD_DIM": 0, "NORM": False, "SWIGLU": False, "BIAS": False,
                 "ADD": False, "FLOAT16": False, "OVERLAP": True, "INTERPRET": False}  # fmt: skip
    compiled = compile_kernel(tokens_integers_kernel, types, constants, 4, True)
    found = counted(compiled)
    return found and found | of_integers(compiled)


def of_integers(compiled: Any) -> dict[str, int]:
    """Instructions that matter where weights are integers."""
    found = disassembled(compiled)
    assert found is not None
    names = instructions(found[0])
    return {
        "dp4a": len([n for n in names if n.startswith("IDP.4A")]),
        "wide_loads": len([n for n in names if n.startswith("LDG.E.128")]),
        "conversions": len([n for n in names if n.startswith("I2F")]),
    }


def counted(compiled: Any) -> dict[str, int] | None:
    """What matters of the machine code; None if the tools are missing."""
    found = disassembled(compiled)
    if found is None:
        return None
    sass, usage = found
    resources = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    count = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HMMA", "IMMA", "CCTL")}
    return count | {
        "registers": int(resources["REG"]),
        "stack": int(resources["STACK"]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "byte_loads": len(re.findall(r"\b(?:LDS\.[US]8|LDG\.E\.[US]8)\b", sass)),
        "copies": len(re.findall(r"\bLDGSTS", sass)),
        "float64": len(re.findall(r"\bD(?:ADD|FMA|MUL|SETP)\b|\bF64\b", sass)),
        "fetches": len(re.findall(r"\bCCTL\S*\.PF2", sass)),
        "shared": compiled.metadata.shared,
    }


def disassembled(compiled: Any) -> tuple[str, str] | None:
    """Machine code, and what it uses; None if the tools are missing."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    return sass, usage.stdout + usage.stderr


def instructions(sass: str) -> list[str]:
    """Their names, in order, without predicates and operands."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)


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
    constants = {"HEAD_DIM": head_dim, "HEADS": p.heads, "TILES": -(-group // p.heads), "WARPS": p.warps,
                 "HAS_INT": bits > 0, "OVERLAP": True, **blocks(p),
                 **merging((n_split + 1) * p.warps, head_dim)}  # fmt: skip
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


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4, aligned: bool = False,
    even: Sequence[str] = (), **options: int,
) -> Any:  # fmt: skip
    """For Hopper. types: of the arguments that are no int32; aligned: pointers and strides are multiples of 16, and
    what `even` names; options: of the compiler."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    sixteens = [n for n in names if n in even or (aligned and ("stride" in n or signature[n].startswith("*")))]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(n),): c for n, c in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in sixteens},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **options})


def compile_the_rest() -> None:
    """Raises what the compiler does, for the kernels that look at no tiles."""
    pointers = ("q", "k", "v", "x", "weight", "bias", "norm", "residual", "out", "qkv", "q_norm", "k_norm")
    types = {name: "*bf16" for name in (*pointers, "chunk_k", "chunk_v")}
    types |= {name: "*fp32" for name in ("partial", "statistics", "lse", "cos", "sin")}
    types |= {"positions": "*i64", "softmax_scale": "fp32", "eps": "fp32"}
    for overlap in (False, True):  # before Hopper, and since
        picking = types | {"logits": "*bf16", "keys": "*i64", "out": "*i64"}
        addresses = {f"p{rank}": "i64" for rank in range(MOST_RANKS)} | {"counts": "*i32"}
        for kind in ("*fp32", "*fp16", "*bf16"):
            compile_kernel(sum_kernel, dict.fromkeys(("x", "residual", "out"), kind) | addresses, {
                "RANK": 1, "N_RANK": 4, "WORDS": WORDS, "MOST": MOST_WORDS, "OVERLAP": overlap,
            })  # fmt: skip
        compile_kernel(choose_kernel, picking | addresses, {
            "RANK": 1, "N_RANK": 4, "BLOCK": 16, "MOST": MOST_ROWS, "CHOICES": places(4)[0], "OVERLAP": overlap,
        })  # fmt: skip
        compile_kernel(part_kernel, picking, {"BLOCK": 4096, "OVERLAP": overlap})
        for key in (False, True):
            compile_kernel(pick_kernel, picking, {"KEY": key, "BLOCK": 32, "OVERLAP": overlap})
        compile_kernel(combine_kernel, types, {
            "HEAD_DIM": 128, "HEADS": 4, "TILES": 1, "FLOAT_BLOCK": 64, "INT_BLOCK": 64,
            "WARPS": 2, "HAS_INT": True, "OVERLAP": overlap, **merging(68, 128),
        })  # fmt: skip
        for swiglu, head_dim in ((False, 0), (True, 0), (False, 128), (False, 96)):
            compile_kernel(vector_kernel, types, {
                "K": 4096, "UNITS": 2, "BLOCK": 2048, "HEAD_DIM": head_dim, "NORM": True, "SWIGLU": swiglu,
                "BIAS": not swiglu, "ADD": head_dim == 0, "OVERLAP": overlap,
            })  # fmt: skip
        compile_kernel(rotate_kernel, types, {"HEAD_DIM": 128, "NORM": True, "OVERLAP": overlap})
        compile_kernel(norm_kernel, types, {"K": 4096, "OVERLAP": overlap})
        compile_kernel(swiglu_kernel, types, {"BLOCK": 1024, "OVERLAP": overlap})
        embed = {"tokens": "*i64", "ints": "*i8", "scale": "*fp32", "steps": "*u8", "out": "*bf16"}
        for group in (0, 64):
            compile_kernel(embed_kernel, embed, {"N": 4096, "GROUP": group, "BLOCK": 4096, "OVERLAP": overlap})
        for k in (4096, 3600, 100):  # whole blocks of K, or not; rows that are not of 16 bytes
            compile_kernel(tokens_kernel, types, {
                "K": k, "N": 8, "ROWS": 32, "WARPS": 4, "SLICE": 64, "STAGES": 3, "EARLY": 512, "HEAD_DIM": 0,
                "NORM": True, "SWIGLU": True, "BIAS": False, "ADD": True, "OVERLAP": overlap, "INTERPRET": False,
            })  # fmt: skip
    for bits, group, ints, pairs in ((8, 0, "*i8", "*fp32"), (8, 64, "*i8", "*u8"), (4, 128, "*i16", "*fp16")):
        dense = {"ints": ints, "unit": "*fp32", "pairs": pairs, "out": "*bf16"}
        compile_kernel(dense_kernel, dense, {"K": 4000, "BITS": bits, "GROUP": group, "ROWS": 4, "COLUMNS": 1024})
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


if __name__ == "__main__":
    function = globals()[sys.argv[1]]
    print(json.dumps([function(**s) if isinstance(s, dict) else function(*s) for s in json.loads(sys.argv[2])]))
