"""Products of a CPU: PyTorch's own kernels for weights in 8 and 4 bits, which read them as they are.

They are fast for bfloat16 activations only, so an activation is rounded to bfloat16 on its way in and a result on its
way out, whatever the model's dtype: an error of 2**-9 beside the weights' own, 2**-7 of 8 bits and 2**-4 of 4. Of 8
bits, products of more than MOST_TOKENS tokens are made otherwise and do not round: a prompt's differ so much from a
step's. Where PyTorch has no such kernel for the processor a weight is made dense at every product, which is slow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantize
from weights.modules import QuantizedLinear, QuantizedWeight, product

MOST_TOKENS = 16  # of 8 bits: for more, a weight made dense once costs less than the kernel's rows one by one
ROWS = 64  # of 4 bits: the kernel takes multiples of 16, and is at its best with 64
COLUMNS = 32  # of 8 bits: the kernel reads that many at once, past a row's end too


def has_kernels() -> bool:
    """Whether PyTorch's kernels for this processor are vectorised."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class Int8Linear(nn.Module):
    """8 bits on a CPU. The scales multiply in float32: in bfloat16, which the kernel wants, they would lose more."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.k, self.scale, self.bias = linear.k, linear.scale, linear.bias
        missing = -linear.k % COLUMNS
        self.ints = nn.Parameter(F.pad(linear.ints, (0, missing)), requires_grad=False) if missing else linear.ints
        self.register_buffer("ones", torch.ones(len(self.ints), dtype=torch.bfloat16), persistent=False)

    ones: Tensor

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.k)
        if len(rows) > MOST_TOKENS:
            y = product(rows, QuantizedWeight(self.ints[:, : self.k], self.scale, None, self.k, 0), self.bias)
        else:
            missing = self.ints.shape[1] - self.k
            rows = F.pad(rows.bfloat16(), (0, missing)) if missing else rows.bfloat16()
            y = torch._weight_int8pack_mm(rows, self.ints, self.ones)
            y = (y * self.scale).to(x.dtype)
            y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """4 bits on a CPU, in the order in which the kernel reads them.

    The kernel's value of an integer is (u - 8) * scale + base. Rows and columns are filled up to what it takes.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        assert linear.pairs is not None
        n, k, group = len(linear.ints), linear.k, linear.group
        self.n, self.k, self.group, self.bias = n, k, group, linear.bias
        missing = -n % ROWS
        u = F.pad(quantize.unpack4(linear.ints, group).int(), (0, 0, 0, missing))
        scale, base = (linear.pairs.float() * linear.scale[:, None, None]).transpose(0, 1).unbind(-1)
        lines = F.pad(torch.stack((scale, base + 8 * scale), -1), (0, 0, 0, missing)).bfloat16()
        self.ints = nn.Parameter(torch.ops.aten._convert_weight_to_int4pack_for_cpu(u, 1), requires_grad=False)
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
    """The same product by PyTorch's kernels. A weight of 4 bits is written anew, and the old one can go."""
    return Int8Linear(linear) if linear.group == 0 else Int4Linear(linear)


def use_cpu_kernels(model: nn.Module) -> bool:
    """Put PyTorch's kernels in the place of a model's products in 8 and 4 bits, a weight at a time.

    Returns whether all products are fast now.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if not has_kernels():
        return not names
    for name in names:
        parent, _, own = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, QuantizedLinear)
        setattr(model.get_submodule(parent), own, for_cpu(linear))
    return True
