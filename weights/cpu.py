"""Products on a CPU by PyTorch's own kernel for weights in 4 bits, also for weights in 8 bits.

The kernel is fast for bfloat16 activations only, so activations and results are rounded to bfloat16, whatever the
model's dtype: an error of 2**-9, where the weights' own is 2**-7 with 8 bits and 2**-4 with 4. With 8 bits products of
more than MOST_TOKENS tokens take another way that does not round, so a prompt's products differ from a step's by that
much. If PyTorch has no such kernel for the processor, a weight is made dense at every product, which is slow.

To the kernel an integer u from 0 to 15 means (u - 8) * scale + base; each group has a scale and a base in bfloat16 (its
"line"). So 8 bits are two matrices of 4 bits side by side, which multiply the same activations twice:

    ints + 128 = 16 * high + low        steps * ints = (high - 8) * 16 steps  +  ((low - 8) * steps + 8 steps)

This is exact, since a bfloat16 has the 8 bits of `steps`. PyTorch's kernel for 8 bits has no groups and takes a tenth
to a half longer.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantize
from weights.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, blocks

MOST_TOKENS = 16  # of 8 bits: for more, a weight made dense once costs less than the kernel's rows one by one
ROWS = 64  # the kernel takes multiples of 16, and is at its best with 64
GROUPS = (256, 128, 64, 32)  # of the kernel's
PACKED_AT_ONCE = 1 << 20  # elements of 8 bits


def has_kernels() -> bool:
    """Whether PyTorch's kernels for this processor are vectorised."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def pack(u: Tensor) -> Tensor:
    """Integers from 0 to 15, int32 [n, k], n a multiple of ROWS, in the order in which the kernel reads them: uint8
    [n, k / 2]."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(u, 1)


@functools.lru_cache
def order() -> tuple[Tensor, int]:
    """Where `pack` puts the rows of a block: int64 [ROWS], and how many rows it takes together.

    It takes `together` rows and writes, for each k, their integers in `together` / 2 bytes. Of ROWS rows, row r is
    number order[r] if of each byte the lower half comes first. Found by packing the rows' own numbers; raises
    RuntimeError where that is not so. (With it 8 bits are packed here, which takes an eighth of `pack`'s time.)
    """
    together = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
    rows = torch.arange(ROWS, dtype=torch.int32)[:, None].expand(-1, 2)
    packed = [pack(digit.contiguous()).view(-1, 2, together // 2) for digit in (rows & 15, rows >> 4)]
    number = sum((torch.stack((p & 15, p >> 4), -1).flatten(2).long() << 4 * i) for i, p in enumerate(packed))
    assert isinstance(number, Tensor)  # [block, k, place]
    places = number[:, 0].flatten()
    if not (torch.equal(number[:, 0], number[:, 1]) and torch.equal(places.sort().values, torch.arange(ROWS))):
        raise RuntimeError("PyTorch packs weights of 4 bits in an order that is not known here")
    return places.argsort(), together


def filled_up(n: int, k: int, group: int) -> tuple[int, int, int]:
    """Rows, groups and elements of a group that the kernel takes for a weight [n, k], padded up. group 0: the weight
    has no groups."""
    group = group or next((g for g in GROUPS if k % g == 0), GROUPS[-1])
    return n + -n % ROWS, quantize.n_groups(k, group), group


class Packed8(nn.Module):
    """A weight [n, k] in 8 bits as the kernel has it: an upper and a lower half of each row's integers."""

    ints: Tensor
    lines: Tensor
    scale: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        n, k = weight.shape
        n_row, n_group, group = filled_up(n, k, weight.group)
        self.n, self.k, self.group = n, k, group
        steps = torch.ones(n, n_group) if weight.steps is None else weight.steps.float()
        steps = F.pad(steps, (0, 0, 0, -n % ROWS)).t()  # [n_group, n and what fills it up]
        lines = torch.cat((torch.stack((16 * steps, 0 * steps), -1), torch.stack((steps, 8 * steps), -1)))
        self.lines = nn.Parameter(lines.bfloat16(), requires_grad=False)  # [2 * n_group, rows, 2]
        self.scale = nn.Parameter(weight.scale, requires_grad=False)
        width = n_group * group
        self.ints = nn.Parameter(torch.empty(n_row, width, dtype=torch.uint8), requires_grad=False)
        place, together = order()
        rows = place.argsort().view(-1, 2)  # of each byte's lower half and upper half
        at_once = max(1, PACKED_AT_ONCE // (width * ROWS)) * ROWS
        for start in range(0, n, at_once):
            ints = weight.ints[start : start + at_once]
            codes = F.pad(ints, (0, width - k, 0, -len(ints) % ROWS)).view(torch.uint8) ^ 128  # and 128
            first, second = (codes.view(-1, ROWS, width)[:, own] for own in rows.unbind(1))  # [block, ROWS / 2, width]
            packed = self.ints[start : start + at_once].view(-1, ROWS // together, 2, width, together // 2)
            for half, bytes_ in enumerate(((first >> 4) | (second & 0xF0), (first & 15) | (second << 4))):
                bytes_ = bytes_.view(len(bytes_), ROWS // together, together // 2, width)
                packed[:, :, half] = bytes_.transpose(2, 3)

    def few(self, x: Tensor) -> Tensor:
        """x: [n_token, k]. Returns float32 [n_token, n]."""
        missing = self.ints.shape[1] - self.k
        x = F.pad(x.bfloat16(), (0, missing)) if missing else x.bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(torch.cat((x, x), 1), self.ints, self.group, self.lines)
        return y[:, : self.n] * self.scale

    def many(self, x: Tensor) -> Tensor:
        """`few` for many tokens, by dense matrices in x's dtype, without rounding to bfloat16. float16 ends at 65,504,
        which sums of integers exceed: there the scales multiply first."""
        x = F.pad(x, (0, self.ints.shape[1] - self.k))
        place, scaled = order()[0], x.dtype == torch.float16
        parts = []
        for start, stop in blocks(len(self.ints) // ROWS, self.ints.shape[1] * ROWS):
            dense = self._dense(start, stop, scaled).to(x.dtype)  # [k, row], its rows in the kernel's order
            parts.append((x @ dense).unflatten(1, (-1, ROWS))[:, :, place].flatten(1))
        y = (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, : self.n].float()
        return y if scaled else y * self.scale

    def rows(self, numbers: Tensor) -> Tensor:
        """Some rows, made dense. numbers: int64 [m]. Returns float32 [m, k]."""
        place, together = order()
        block, at = numbers // ROWS, place[numbers % ROWS]
        block, at = block * (ROWS // together) + at // together, at % together
        halves = self.ints.view(-1, 2, self.ints.shape[1], together // 2)[block, :, :, at // 2]  # [m, 2, k]
        halves = (halves >> (4 * (at % 2)).to(torch.uint8)[:, None, None]) & 15
        ints = (halves[:, 0] << 4 | halves[:, 1]).short() - 128
        steps = self.lines[len(self.lines) // 2 :, numbers, 0].t()
        weight = QuantizedWeight(ints[:, : self.k], self.scale[numbers], None, self.k, self.group, steps)
        return weight.dense(torch.float32)

    def _dense(self, start: int, stop: int, scaled: bool) -> Tensor:
        """steps * ints of some blocks of ROWS rows, times the rows' scales if `scaled`: float32 [k and what fills it
        up, row]."""
        together = order()[1]
        width = self.ints.shape[1]
        upper, lower = self.ints[start * ROWS : stop * ROWS].view(-1, 2, width, together // 2).unbind(1)
        codes = torch.stack(((upper << 4) | (lower & 15), (upper & 0xF0) | (lower >> 4)), -1)
        ints = (codes ^ 128).view(torch.int8).flatten(2)  # [block, k, place]
        dense = torch.empty(width, len(ints), together)
        dense.copy_(ints.transpose(0, 1))
        rows = slice(start * ROWS, stop * ROWS)
        steps = self.lines[len(self.lines) // 2 :, rows, 0].float()
        if scaled:
            steps *= F.pad(self.scale, (0, -self.n % ROWS))[rows]
        steps = steps.unflatten(1, (-1, ROWS))
        steps = torch.empty_like(steps).index_copy_(2, order()[0], steps).flatten(1)  # [group, row], as dense has them
        return dense.view(-1, self.group, len(ints) * together).mul_(steps[:, None]).flatten(0, 1)


class Int8Linear(nn.Module):
    """8 bits on a CPU. The scales multiply in float32: in bfloat16, which the kernel wants, they would lose more."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.packed, self.bias = Packed8(linear.weight), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.packed.k)
        y = self.packed.many(rows) if len(rows) > MOST_TOKENS else self.packed.few(rows)
        y = y.to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """An embedding that is the head's matrix too."""

    def __init__(self, packed: Packed8, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.dtype = packed, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return self.packed.rows(tokens.flatten()).to(self.dtype).view(*tokens.shape, -1)


class Int4Linear(nn.Module):
    """4 bits on a CPU, in the order in which the kernel reads them. Rows and columns are filled up to what it takes."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        assert linear.pairs is not None
        n, k, group = len(linear.ints), linear.k, linear.group
        self.n, self.k, self.group, self.bias = n, k, group, linear.bias
        missing = -n % ROWS
        u = F.pad(quantize.unpack4(linear.ints, group).int(), (0, 0, 0, missing))
        scale, base = (linear.pairs.float() * linear.scale[:, None, None]).transpose(0, 1).unbind(-1)
        lines = F.pad(torch.stack((scale, base + 8 * scale), -1), (0, 0, 0, missing)).bfloat16()
        self.ints = nn.Parameter(pack(u), requires_grad=False)
        self.lines = nn.Parameter(lines, requires_grad=False)  # [n_group, n, 2]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.k).bfloat16()
        missing = -self.k % self.group
        if missing:
            rows = F.pad(rows, (0, missing))
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.ints, self.group, self.lines)
        y = y[:, : self.n].to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


def for_cpu(linear: QuantizedLinear) -> nn.Module:
    """A module that computes the same product by PyTorch's kernels. It has a copy of the weight in another order."""
    return Int8Linear(linear) if linear.weight.bits == 8 else Int4Linear(linear)


def packed_more(model: nn.Module) -> int:
    """Bytes that a model's parameters have more after `use_cpu_kernels`: what rows and groups are filled up with, and
    of 8 bits a scale and base of each group's halves."""
    more = 0
    for linear in model.modules() if has_kernels() else ():
        if not isinstance(linear, QuantizedLinear):
            continue
        n_row, n_group, group = filled_up(len(linear.ints), linear.k, linear.group)
        halves = 2 if linear.weight.bits == 8 else 1
        packed = halves * n_group * n_row * (group // 2 + 4) + (linear.scale.nbytes if halves == 2 else 0)
        kept = [linear.ints, linear.scale, linear.steps, linear.pairs]
        more += packed - sum(part.nbytes for part in kept if part is not None)
    return more


def use_cpu_kernels(model: nn.Module) -> bool:
    """Put PyTorch's kernels in the place of a model's products in 8 and 4 bits, a weight at a time.

    Returns whether all products are fast now.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if not has_kernels():
        return not names
    embedding = model.get_submodule("tok_embeddings")
    for name in names:
        parent, _, own = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, QuantizedLinear)
        fast = for_cpu(linear)
        setattr(model.get_submodule(parent), own, fast)
        if isinstance(embedding, QuantizedEmbedding) and linear.ints is embedding.ints:
            assert isinstance(fast, Int8Linear)
            model.tok_embeddings = Int8Embedding(fast.packed, embedding.dtype)
        del linear
    return True
