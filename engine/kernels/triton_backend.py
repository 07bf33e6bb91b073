"""The products of a decode step in Triton."""

from __future__ import annotations

from engine.kernels.argmax import best, chosen, greedy
from engine.kernels.contract import StepKernels
from engine.kernels.gemv import linear, qkv, rotate_qk

__all__ = ["TRITON", "best", "chosen", "greedy", "linear", "qkv", "rotate_qk"]

TRITON = StepKernels(
    name="Triton products", linear=linear, qkv=qkv, rotate_qk=rotate_qk, greedy=greedy, best=best, chosen=chosen
)
