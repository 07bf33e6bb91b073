"""Compile kernels for Hopper, with no GPU at hand, and count what matters in their machine code.

    python tests/aot.py compile_append_kernel '[[128], {"head_dim": 64, "early": true}]'      what each returns, as JSON

A program of its own, because tests have Triton's interpreter (`kernel_reference.counts` runs it). Its functions are in
`aot_attention.py` and `aot_products.py`.
"""

from __future__ import annotations

import importlib
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

HOPPER_SHARED = 232_448  # bytes that a program may have
MODULES = ("aot_attention", "aot_products")  # where the functions are


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


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # what is compiled
    modules = [importlib.import_module(name) for name in MODULES]
    function = next(getattr(module, sys.argv[1]) for module in modules if hasattr(module, sys.argv[1]))
    print(json.dumps([function(**s) if isinstance(s, dict) else function(*s) for s in json.loads(sys.argv[2])]))
