"""Folders that AWQ or GPTQ made: 4-bit integers in int32, read as the 16-bit matrices that they stand for.

A matrix [n, k] of a module lies in tensors of the module's name and

    AWQ    qweight int32 [k, n / 8]     qzeros int32 [n_group, n / 8]     scales float16 [n_group, n]
    GPTQ   qweight int32 [k / 8, n]     the same, and g_idx int32 [k]: the group of each column, where not in order

    w[n, k] = scales[group(k), n] * (u[n, k] - zero[group(k), n])

Eight integers of 4 bits share an int32, the first in its lowest bits; AWQ's in the order 0 2 4 6 1 3 5 7 (AutoAWQ's
version "gemm"). GPTQ's format "gptq" stores zeros less one, "gptq_v2" as they are.

`--weights int4` quantises what is read again, and finds the same integers where its groups are the file's
(`quantize.SPANS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from checkpoint.layout import slot_names, slots_of
from checkpoint.stored import FLOATS, Stored
from common.errors import UserError
from model import Config

if TYPE_CHECKING:
    from checkpoint.configs import Fields

DTYPES = FLOATS | {"I32": torch.int32}
NIBBLES = 8  # in an int32
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of outputs 0 to 7 in their int32
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Packing:
    """group: columns that share a scale; 0: all. less: what stored zeros lack."""

    awq: bool
    group: int
    less: int


def packing_of(f: Fields) -> Packing | None:
    """What quantization_config says; None without one. Raises UserError about what is not read."""
    if not f.get("quantization_config"):
        return None
    q = f.inner("quantization_config")
    method = q.get("quant_method")
    if method not in ("awq", "gptq"):
        raise f.error(
            f"quantization_config: weights quantised by {method or 'somebody'} are not read: take the model in 16 bits "
            "and --weights int4 or int8, or a GGUF file of it"
        )
    bits, group = q.whole("bits", 4), q.whole("group_size", 128)
    layout = q.get("version", "gemm") if method == "awq" else q.get("checkpoint_format", "gptq")
    known = ("gemm",) if method == "awq" else ("gptq", "gptq_v2")
    if bits != 4 or group < -1 or str(layout).lower() not in known or q.get("zero_point", True) is False:
        raise f.error(
            f"quantization_config: {method} in {bits} bits, groups of {group}, layout {layout!r} is not read: only 4 "
            f"bits with zeros, in layout {' or '.join(known)}"
        )
    return Packing(method == "awq", max(group, 0), 1 if layout == "gptq" else 0)


def unpacked(tensors: dict[str, Stored], packing: Packing, config: Config, where: Path) -> dict[str, Stored]:
    """The tensors of a model in 16 bits. Raises UserError.

    GPTQ's programs write a bias of zeros to every matrix: those that the model has no place for go.
    """
    slots = slots_of(config)
    found = {}
    for name, stored in tensors.items():
        module, _, kind = name.rpartition(".")
        if f"{module}.qweight" not in tensors or (kind != "bias" and kind not in PARTS):
            found[name] = stored
        elif kind == "qweight":
            found[f"{module}.weight"] = _matrix(module, tensors, packing, where)
        elif kind == "bias" and (all(slot in slots for slot in slot_names(name)[0]) or bool(stored.read().any())):
            found[name] = stored
    for name, stored in found.items():
        if stored.dtype == torch.int32:
            raise UserError(f"{where}: {name} is I32; only {', '.join(FLOATS)} are read")
    return found


def _matrix(module: str, tensors: dict[str, Stored], packing: Packing, where: Path) -> Stored:
    parts = {kind: tensors.get(f"{module}.{kind}") for kind in PARTS}
    qweight, qzeros, scales, g_idx = parts.values()
    assert qweight is not None
    if qzeros is None or scales is None:
        raise UserError(f"{where}: {module} has no {'scales' if scales is None else 'qzeros'}")
    rows, columns = qweight.shape if len(qweight.shape) == 2 else (0, 0)
    k, n = (rows, columns * NIBBLES) if packing.awq else (rows * NIBBLES, columns)
    n_group = -(-k // packing.group) if packing.group else 1
    wanted = {"qzeros": (n_group, n // NIBBLES), "scales": (n_group, n), "g_idx": (k,)}
    for kind, shape in wanted.items():
        part = parts[kind]
        if part is not None and part.shape != shape:
            raise UserError(f"{where}: {module}.{kind} has shape {[*part.shape]}, and {[*shape]} goes with its qweight")
    for kind, floats in (("qweight", False), ("qzeros", False), ("scales", True), ("g_idx", False)):
        part = parts[kind]
        if part is not None and part.dtype.is_floating_point != floats:
            raise UserError(f"{where}: {module}.{kind} is {part.dtype}")
    if g_idx is not None and not packing.awq:
        index = g_idx.read().long()
        if k and not 0 <= int(index.min()) <= int(index.max()) < n_group:
            raise UserError(f"{where}: {module}.g_idx names a group that is not among its {n_group}")
    else:
        index = torch.arange(k) // (packing.group or k or 1)

    def read_rows(start: int, stop: int, columns: tuple[int, int] | None = None) -> Tensor:
        """float16 [stop - start, k], or some of its columns."""
        first, last = start // NIBBLES, -(-stop // NIBBLES)  # whole int32 of zeros, and of AWQ's integers
        here = slice(start - first * NIBBLES, stop - first * NIBBLES)
        zeros = (_nibbles(qzeros.read()[:, first:last], packing.awq)[:, here] + packing.less) & 15
        if packing.awq:
            u = _nibbles(qweight.read()[:, first:last], True)[:, here]
        else:
            u = _nibbles(qweight.read()[:, start:stop].t().contiguous(), False).t()
        scale = scales.read()[:, start:stop].float()
        wide = slice(*columns) if columns is not None else slice(None)
        groups = index[wide]
        return ((u[wide] - zeros[groups]) * scale[groups]).to(torch.float16).t().contiguous()

    return Stored(f"{module}.weight", (n, k), torch.float16, lambda: read_rows(0, n), read_rows)


def _nibbles(words: Tensor, awq: bool) -> Tensor:
    """int32 [m, n / 8] to their integers, [m, n]."""
    places = torch.tensor(AWQ_PLACES if awq else range(NIBBLES), dtype=torch.int32)
    return ((words[..., None] >> (4 * places)) & 15).flatten(1)
