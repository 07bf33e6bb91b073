"""Kernels of a step's products compiled for Hopper, and what counts in their machine code: `aot.py` runs these."""

from __future__ import annotations

import re
from typing import Any

import triton
from aot import HOPPER_SHARED, compile_kernel, counted, disassembled, instructions

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
    types = {name: "*i32" for name in ("x", "ints", "pairs", "norm")} | {"row_scale": "*fp32", "eps": "fp32"}
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
    types = {name: "*i32" for name in ("x", "ints", "pairs", "norm")} | {"row_scale": "*fp32", "eps": "fp32"}
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
    types = {name: "*i32" for name in ("x", "ints", "norm")} | {"pairs": "*i64", "row_scale": "*fp32", "eps": "fp32"}
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
    types = {name: "*bf16" for name in ("x", "bias", "norm", "residual", "out")} | {"row_scale": "*fp32", "eps": "fp32"}
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


def compile_products() -> None:
    """Raises what the compiler does, for all kernels of a step's products and choices."""
    pointers = ("x", "gate_up", "weight", "bias", "norm", "residual", "out", "qkv", "q_norm", "k_norm")
    types = dict.fromkeys(pointers, "*bf16") | {"cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
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
        dense = {"ints": ints, "row_scale": "*fp32", "pairs": pairs, "out": "*bf16"}
        compile_kernel(dense_kernel, dense, {"K": 4000, "BITS": bits, "GROUP": group, "ROWS": 4, "COLUMNS": 1024})
