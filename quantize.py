"""Weights in 8 and 4 bits: how a matrix becomes integers and back. (weights/setting.py: what `--weights` says.)

  python generate.py --weights int4 --prompt "Once upon a time"                       quantised while loading
  python quantize.py --checkpoint_path DIR --weights int4 --out checkpoints/small     written, to load at its own size

A row is an output channel; nothing is shared between rows.

8 bits: symmetric, one scale a row; in groups, how many such scales the step of each group is.

    w[n, k] = scale[n] * ints[n, k]                             ints: int8, -127 to 127; scale = absmax / 127
    w[n, k] = scale[n] * steps[n, k // group] * ints[n, k]      steps: uint8, 1 to 255; scale = absmax / (127 * 255)

A row's largest element is in one group only: the steps of the others are shorter, by 28% in groups of 64 of a row of
576. A byte is enough to say by how much (KL 2% above that of steps as they come), and every product of it with an
integer is exact in float32.

4 bits: asymmetric, a scale and a base per group of 32, 64 or 128 elements of a row.

    w[n, k] = unit[n] * (scale[n, k // group] * u + base[n, k // group])                u: 0 to 15

Scale and base are float16. The row's unit, a power of two near its largest element, keeps them in float16's range
whatever the weights are, and costs nothing: a product multiplies its result by it, as by the scale of 8 bits. Of
weights that are bfloat16 a constant group comes back exactly (scale 0), zeros always do.

No data is needed to choose scale and base: of a few ranges, each narrower than the last, the one is kept whose squared
error is least after integers and line have been fitted to each other (`quantize4`). LOG.md has what that is worth.

Four integers lie in an int16, and those of a group that are `group / 4` apart share one, so that each of the four
nibbles meets consecutive activations. Of a group of 32, word j holds elements j, j + 8, j + 16 and j + 24:

    bits of word 1:   15..12: u[25]   11..8: u[17]   7..4: u[9]   3..0: u[1]

Where groups do not divide a row, its last group is filled up with elements that no product looks at.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # the command, which imports what it needs when its flags have been read
    from common.program import start

    start("cli.quantize")
    sys.exit()

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from weights.setting import GROUP_SIZES, WeightSetting, parse_weights, weights_help

__all__ = [
    "GROUP_SIZES",
    "WeightSetting",
    "at_once",
    "dequantize4",
    "dequantize8",
    "dequantize8_groups",
    "n_groups",
    "pack4",
    "parse_weights",
    "quantize4",
    "quantize8",
    "quantize8_groups",
    "unpack4",
    "weights_help",
]
MOST_STEPS = 255  # of a group of 8 bits, in the row's scale
LEVELS = 15  # of 4 bits, above zero
SHRINKS = (1.0, 0.88, 0.76, 0.64)  # ranges tried, of a group's own
REFITS = 6  # times that line and integers are fitted to each other
SPANS = range(8, LEVELS)  # largest integers of groups that another format had in 4 bits, with a zero of its own
ON_A_GRID = 0.05  # of a step: elements that are so near to integers of a line were made from them


def at_once(device: torch.device) -> int:
    """Elements to quantise at once. There are a dozen temporaries of that size, and a processor's cache is small."""
    return 1 << 16 if device.type == "cpu" else 1 << 24


def n_groups(k: int, group: int) -> int:
    """Groups of a row of k elements."""
    return -(-k // group)


def quantize8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w: [n, k], any float dtype. Returns int8 [n, k] and float32 [n]. A row of zeros has scale 0."""
    w = w.float()
    scale = w.abs().amax(1) / 127
    ints = (w / torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-127, 127)
    return ints.to(torch.int8), scale


def dequantize8(ints: Tensor, scale: Tensor) -> Tensor:
    """float32 [n, k]."""
    return ints.float() * scale[:, None]


def quantize8_groups(w: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """w: [n, k], any float dtype. Returns int8 [n, k], the groups' steps, uint8 [n, n_group], and float32 [n].

    A step is rounded up, so that no element is clipped. A row of zeros has scale 0, a group of zeros one step.
    """
    w = w.float()
    n, k = w.shape
    grouped = F.pad(w, (0, n_groups(k, group) * group - k)).view(n, -1, group)
    most = grouped.abs().amax(-1)  # [n, n_group]
    row = most.amax(1, keepdim=True)
    steps = (most * MOST_STEPS / torch.where(row > 0, row, 1.0)).ceil_().clamp_(1, MOST_STEPS)
    scale = row / (127 * MOST_STEPS)
    step = torch.where(scale > 0, scale, 1.0) * steps
    ints = (grouped / step[..., None]).round_().clamp_(-127, 127)
    return ints.to(torch.int8).flatten(1)[:, :k].contiguous(), steps.to(torch.uint8), scale[:, 0]


def dequantize8_groups(ints: Tensor, steps: Tensor, scale: Tensor, group: int) -> Tensor:
    """float32 [n, k]. ints, steps and scale as `quantize8_groups` returns them."""
    every = steps.float().repeat_interleave(group, 1)[:, : ints.shape[1]]
    return every.mul_(ints).mul_(scale[:, None])


def quantize4(w: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """w: [n, k], any float dtype. Returns u, uint8 [n, n_group * group], scale and base, float16 [n, n_group, 2], and
    the rows' units, float32 [n].

    For each range of SHRINKS, REFITS times: integers nearest to the line, then the line of least squares through the
    elements at those integers. What is rounded is then fitted to scale and base as float16 has them.
    """
    w = w.float()
    n, k = w.shape
    unit = torch.exp2(w.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny).log2().floor())
    w = w / unit[:, None]
    missing = n_groups(k, group) * group - k
    if missing:  # repeats of the row's last element widen no range
        w = torch.cat((w, w[:, -1:].expand(n, missing)), 1)
    w = w.view(n, -1, group)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    best: Sequence[Tensor] = _rounded(w, (high - low) / LEVELS, low)
    for span in _spans(w[:4], low[:4], high[:4]):  # what was in 4 bits before gets its own integers
        scale, base = _line(w, _nearest(w, (high - low) / span, low))
        best = _better(best, _rounded(w, scale, base))
    for shrink in SHRINKS:
        margin = (high - low) * (0.5 * (1 - shrink))
        scale, base = (high - low) * (shrink / LEVELS), low + margin
        for _ in range(REFITS):
            scale, base = _line(w, _nearest(w, scale, base))
        best = _better(best, _rounded(w, scale, base))
    u, scale, base, _ = best
    return u.to(torch.uint8).flatten(1), torch.cat((scale, base), -1).to(torch.float16), unit


def _better(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """For each group the candidate with the smaller error, which is the last tensor of both."""
    better = b[-1] < a[-1]
    return [torch.where(better, new, old) for new, old in zip(b, a, strict=True)]


def _spans(w: Tensor, low: Tensor, high: Tensor) -> list[int]:
    """The numbers of SPANS such that in some group of a few rows all elements lie on a line at the integers from 0 to
    it.

    Weights that were in 4 bits before, symmetric ones above all, seldom have all 16 integers in a group. Ranges of 15
    steps miss theirs, and cost as much again as the first quantising: 8% of a weight's size.
    """
    found = []
    for span in SPANS:
        scale = (high - low) / span
        error = _rounded(w, scale, low)[3] / w.shape[-1]
        if bool((error < (ON_A_GRID * scale) ** 2).any()):
            found.append(span)
    return found


def _nearest(w: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    """Integers of each element, as float32. w: [n, n_group, group]; scale, base: [n, n_group, 1]."""
    u = (w - base).div_(torch.where(scale == 0, 1.0, scale))
    return u.round_().clamp_(0, LEVELS)


def _line(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and base of least squares: w is nearest to scale * u + base. A constant group: 0 and its mean."""
    mean_w, mean_u = w.mean(-1, keepdim=True), u.mean(-1, keepdim=True)
    apart = u - mean_u
    spread = apart.square().sum(-1, keepdim=True)
    scale = (apart * w).sum(-1, keepdim=True) / torch.where(spread == 0, 1.0, spread)
    return scale, mean_w - scale * mean_u


def _rounded(w: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers, the scale and base that float16 holds, and the squared error of each group."""
    scale, base = scale.half().float(), base.half().float()
    u = _nearest(w, scale, base)
    return u, scale, base, torch.addcmul(base - w, scale, u).square_().sum(-1, keepdim=True)


def pack4(u: Tensor, group: int) -> Tensor:
    """u: uint8 [n, n_group * group]. Returns int16 [n, n_group * group / 4]."""
    parts = u.to(torch.int32).view(len(u), -1, 4, group // 4)
    shift = torch.arange(0, 16, 4, dtype=torch.int32, device=u.device)[:, None]
    return (parts << shift).sum(2, dtype=torch.int32).to(torch.int16).flatten(1)


def unpack4(words: Tensor, group: int) -> Tensor:
    """What `pack4` was given."""
    shift = torch.arange(0, 16, 4, dtype=torch.int16, device=words.device)[:, None]
    return ((words.view(len(words), -1, 1, group // 4) >> shift) & 15).to(torch.uint8).flatten(1)


def dequantize4(u: Tensor, pairs: Tensor, unit: Tensor, k: int) -> Tensor:
    """float32 [n, k]. u: uint8 [n, n_group * group]; pairs, unit: as `quantize4` returns them."""
    n, n_group, _ = pairs.shape
    scale, base = (pairs.float() * unit[:, None, None])[..., None].unbind(2)  # [n, n_group, 1]
    return torch.addcmul(base, scale, u.view(n, n_group, -1).float()).flatten(1)[:, :k]
