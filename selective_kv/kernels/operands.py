"""Arguments of the Triton kernels that come from a cache's tiles: tensors, and constants that they are compiled
with."""

from __future__ import annotations

import torch
from torch import Tensor

from selective_kv.formats import rotation_size
from selective_kv.key_bias import PAIRS
from selective_kv.regions import Regions


def stored_bits(regions: Regions) -> tuple[int, int]:
    """Bits of K's and of V's integers; 0 without tiles."""
    if regions.k_format is None or regions.v_format is None:
        return 0, 0
    return regions.k_format.bits, regions.v_format.bits


def rotations(regions: Regions) -> dict[str, int]:
    """Constants K_ROTATION and V_ROTATION: the size of the format's Hadamard blocks, 1 if it is not rotated."""
    return {
        f"{name}_ROTATION": rotation_size(regions.k.shape[3]) if form is not None and form.rotated else 1
        for name, form in (("K", regions.k_format), ("V", regions.v_format))
    }


def tile_operands(regions: Regions) -> list[Tensor]:
    """The tiles' tensors: K's and V's bytes, K's and V's scales, K's factors, the last three with each pair of bfloat16
    as an int32. In place of one that does not exist stands another tensor, which kernels never read.

    Raises ValueError if rows of 3 bits are not whole 16-bit words.
    """
    if regions.k_tiles is None or regions.v_tiles is None:
        return [regions.k] * 5
    if 3 in stored_bits(regions) and regions.k.shape[3] % 4:
        raise ValueError(f"3 bits on a GPU need a head_dim that is a multiple of 4, not {regions.k.shape[3]}")
    (k, k_scale, factor), (v, v_scale, _) = regions.k_tiles, regions.v_tiles
    assert all(t.is_contiguous() for t in (k, v, k_scale, v_scale))
    words = [t.view(torch.int32).flatten(-2) for t in (k_scale, v_scale, k_scale if factor is None else factor)]
    return [k, v, *words]


def bias_operands(regions: Regions) -> tuple[list[Tensor], int]:
    """The tensors of the key bias that is kept out of tiles, and of how many pairs of channels it is kept out."""
    if regions.key_bias is None:
        return [regions.k] * 3, 0
    return [*regions.key_bias], PAIRS
