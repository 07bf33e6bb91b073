"""The kernels of a decode step's products: `contract.py` says what they compute, `step_kernels` chooses.

Words, each with one meaning here:
    row          of a weight: the k elements that make one output
    unit         of the output: rows that the epilogue needs together. With SwiGLU a row of the gate and its row of the
                 up projection, with RoPE the two rows of a rotated pair, otherwise one row
    paired       with two rows a unit: the first rows come first, then the second ones
    repeats      how many times a program computes its number of units, one after the other
    group        elements of a row that share a scale (quantize.py); pairs: scale and base of groups, in one tensor
    step         of a group in 8 bits: its scale, in the row's scale (quantize.py)
    term         an activation is two int8 terms, hi and lo (gemv_integers.py)
    part         the elements of a row that one warp multiplies
    lane, column of a matrix unit's operands (gemv_int4.py)
    prologue     a norm before the product; epilogue: bias, SwiGLU, RoPE and residual after it, in the same launch
"""

from __future__ import annotations

import torch

from engine.kernels.contract import StepKernels
from engine.kernels.pytorch import PYTORCH
from selective_kv.kernels import uses_triton

__all__ = ["PYTORCH", "StepKernels", "step_kernels"]


def step_kernels(device: torch.device) -> StepKernels:
    """Triton's where `selective_kv.kernels.attention_kernels` would be Triton's, PyTorch's elsewhere."""
    if not uses_triton(device):
        return PYTORCH
    from engine.kernels.triton_backend import TRITON

    return TRITON
