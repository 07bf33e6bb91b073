"""What the kernels have in common, whatever they compute."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: programs run one by one on the CPU


@triton.jit
def prefetch(at):
    """Ask for the 128-byte line at each address (a pointer, or int64) to be brought to the L2. Nobody waits for it.

    Not in the interpreter, which knows no assembly. An assembly has a result, whether or not anyone asks for it.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def in_order(bits):
    """Bits of float32 as int32 that compare as the numbers do; and those of the numbers again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
