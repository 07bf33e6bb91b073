"""The kernels of a decode step's products: `contract.py` says what they compute, `step_kernels` chooses."""

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
