"""What holds a matrix in 8 or 4 bits in a model: in place of an `nn.Linear`, and of an `nn.Embedding`.

Both have parameters of integers and of scales, so that a model's bytes are counted, moved and saved as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantize
from model import Transformer
from quantize import WeightSetting

DENSE_ELEMENTS = 1 << 27  # of a weight made dense at once, for many tokens: 256 MiB in 16 bits
DENSE_ROWS = 256  # a library's products like multiples of it


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [n, k] in 8 bits or 4: what a product takes where it would take a Tensor.

    ints: int8 [n, k], or int16 [n, n_group * group / 4]; scale: float32 [n] (of 4 bits a row's unit); pairs: float16
    [n, n_group, 2], scale and base of each group (None of 8 bits); group: elements of a group, 0 where a row is not cut
    into groups; steps: uint8 [n, n_group], of 8 bits in groups. `quantize.py` says what they mean.
    """

    ints: Tensor
    scale: Tensor
    pairs: Tensor | None
    k: int
    group: int
    steps: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.ints.shape[0], self.k

    @property
    def bits(self) -> int:
        return 8 if self.pairs is None else 4

    def __len__(self) -> int:
        return self.ints.shape[0]

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Some of the rows: views."""
        return self.of(slice(start, stop))

    def of(self, part: slice | Tensor) -> QuantizedWeight:
        """Some of the rows: views, or copies of those at the given numbers."""
        pairs, steps = (None if t is None else t[part] for t in (self.pairs, self.steps))
        return QuantizedWeight(self.ints[part], self.scale[part], pairs, self.k, self.group, steps)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight in a float dtype, [n, k]."""
        if self.steps is not None:
            return quantize.dequantize8_groups(self.ints, self.steps, self.scale, self.group).to(dtype)
        if self.pairs is None:
            return quantize.dequantize8(self.ints, self.scale).to(dtype)
        u = quantize.unpack4(self.ints, self.group)
        return quantize.dequantize4(u, self.pairs, self.scale, self.k).to(dtype)


Weight = Tensor | QuantizedWeight
Product = Callable[[Tensor, QuantizedWeight, Tensor | None], Tensor]


def blocks(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Rows that are made dense together, of a weight [n, k]: first and one past the last."""
    step = max(1, DENSE_ELEMENTS // k)
    if step > DENSE_ROWS:
        step -= step % DENSE_ROWS
    return ((start, min(start + step, n)) for start in range(0, n, step))


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """weight @ x + bias in plain PyTorch: rows are made dense, some at a time. x: [n_token, k]; [n_token, n]."""
    parts = [F.linear(x, weight.rows(*block).dense(x.dtype)) for block in blocks(*weight.shape)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if bias is None else y + bias


def _storage(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class QuantizedLinear(nn.Module):
    """`nn.Linear` of a `QuantizedWeight`. Values come from `fill`. bits: 8 or 4; group: 0 (of 8 bits alone): a scale a
    row.

    multiply: what computes the product; `product`, unless a device has something better (`Engine` says so).
    """

    scale: Tensor
    pairs: Tensor | None
    steps: Tensor | None
    bias: Tensor | None

    def __init__(self, n: int, k: int, bits: int, group: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.k, self.group = k, group
        self.multiply: Product = product
        n_group = quantize.n_groups(k, group) if group else 0
        steps = pairs = None
        if bits == 8:
            self.ints = _storage(n, k, dtype=torch.int8)
            steps = _storage(n, n_group, dtype=torch.uint8) if group else None
        else:
            self.ints = _storage(n, n_group * group // 4, dtype=torch.int16)
            pairs = _storage(n, n_group, 2, dtype=torch.float16)
        self.register_parameter("steps", steps)
        self.register_parameter("pairs", pairs)
        self.scale = _storage(n, dtype=torch.float32)
        self.register_parameter("bias", _storage(n, dtype=dtype) if bias else None)

    @property
    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.ints, self.scale, self.pairs, self.k, self.group, self.steps)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x.reshape(-1, self.k), self.weight, self.bias).view(*x.shape[:-1], -1)

    def fill(self, rows: Tensor, start: int) -> None:
        """Quantise rows [n, k] of any float dtype and device, to be the ones from `start` on."""
        step = max(1, quantize.at_once(self.ints.device) // self.k)
        for chunk in rows.split(step):
            at = slice(start, start + len(chunk))
            chunk = chunk.to(self.ints.device)
            if self.pairs is None:
                _fill8(self, chunk, at)
            else:
                u, self.pairs[at], self.scale[at] = quantize.quantize4(chunk, self.group)
                self.ints[at] = quantize.pack4(u, self.group)
            start += len(chunk)


def _fill8(into: QuantizedLinear | QuantizedEmbedding, w: Tensor, at: slice) -> None:
    """Quantise w to be some of the rows."""
    if into.steps is None:
        into.ints[at], into.scale[at] = quantize.quantize8(w)
    else:
        into.ints[at], into.steps[at], into.scale[at] = quantize.quantize8_groups(w, into.group)


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` in 8 bits; group 0: a scale a row. Its rows come out in `dtype`."""

    steps: Tensor | None

    def __init__(self, n: int, dim: int, group: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.group = dtype, group
        self.ints = _storage(n, dim, dtype=torch.int8)
        n_group = quantize.n_groups(dim, group) if group else 0
        self.register_parameter("steps", _storage(n, n_group, dtype=torch.uint8) if group else None)
        self.scale = _storage(n, dtype=torch.float32)

    @property
    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.ints, self.scale, None, self.ints.shape[1], self.group, self.steps)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight.of(tokens.flatten()).dense(self.dtype).view(*tokens.shape, -1)

    def fill(self, rows: Tensor, start: int) -> None:
        """See `QuantizedLinear.fill`."""
        step = max(1, quantize.at_once(self.ints.device) // rows.shape[1])
        for chunk in rows.split(step):
            _fill8(self, chunk.to(self.ints.device), slice(start, start + len(chunk)))
            start += len(chunk)


def quantized(model: nn.Module) -> Iterator[QuantizedLinear | QuantizedEmbedding]:
    """A model's matrices in fewer bits."""
    return (module for module in model.modules() if isinstance(module, (QuantizedLinear, QuantizedEmbedding)))


def fillers(model: nn.Module) -> dict[str, Callable[[Tensor, int], None]]:
    """What quantises rows into each matrix in fewer bits, by the name that its dense parameter would have.

    A tied matrix is the embedding's.
    """
    found: dict[str, Callable[[Tensor, int], None]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)) and id(module.ints) not in seen:
            seen.add(id(module.ints))
            found[f"{name}.weight"] = module.fill
    return found


def replace_matrices(model: Transformer, setting: WeightSetting, dtype: torch.dtype) -> None:
    """Put modules of fewer bits in the place of a model's matrices, on the meta device, and tie what is tied."""
    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                continue
            bits = setting.bits_of(name, model.config)
            if bits == 16:
                continue
            new: nn.Module
            if isinstance(module, nn.Embedding):
                new = QuantizedEmbedding(module.num_embeddings, module.embedding_dim, setting.group_of(bits), dtype)
            else:
                n, k = module.out_features, module.in_features
                new = QuantizedLinear(n, k, bits, setting.group_of(bits), module.bias is not None, dtype)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)
    model.tie()
