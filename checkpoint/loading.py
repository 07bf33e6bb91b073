"""A checkpoint's weights into a model: allocated once, filled tensor by tensor from a memory map.

A matrix that is kept in fewer bits is quantised as soon as it is read, so that at the peak there are one copy of what
is kept and one tensor in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from checkpoint.configs import note
from checkpoint.layout import Fill, Slot
from checkpoint.quantised import skeleton
from checkpoint.share import Share
from common.errors import UserError
from model import Config, Ranks, Transformer
from quantize import WeightSetting
from weights.cpu import use_cpu_kernels
from weights.modules import fillers, quantized

if TYPE_CHECKING:
    from checkpoint import Checkpoint

RANDOM_ROWS = 4096  # of random weights made at once, where they are quantised


@torch.no_grad()
def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    random_weights: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    weights: WeightSetting | None = None,
    to_run: bool = True,
    ranks: Ranks | None = None,
) -> Transformer:
    """The model with its weights on `device`, in `dtype`, ready to generate.

    random_weights: fill it with seeded noise instead, made on the device. progress: called with (elements done, of how
    many) after each tensor. weights: in how many bits, unless the checkpoint says so. to_run: in the order that the
    device's products want; False: in the one that is written. ranks: those that hold the model together, where the
    checkpoint is one's share. Raises UserError.
    """
    if not (checkpoint.fills or random_weights):
        raise UserError(f"{checkpoint.name} is a shape without weights: give a checkpoint or --random_weights")
    model = skeleton(checkpoint.config, checkpoint.weights or weights, dtype, ranks).materialize(device)
    if random_weights:
        _randomize(model, torch.Generator(device).manual_seed(seed), checkpoint.share)
    else:
        _fill(model, checkpoint, progress)
    if checkpoint.share is not None and checkpoint.share.rank:  # what is summed over the ranks has its bias once
        for name, parameter in model.named_parameters():
            if name.endswith(("wo.bias", "w2.bias")):
                parameter.zero_()
    if to_run and device.type == "cpu" and not use_cpu_kernels(model):
        note("no kernels for 8 and 4 bits on this processor: a weight is made dense whenever it is used, slowly")
    return model.eval().requires_grad_(False)


def _fill(model: Transformer, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None) -> None:
    parameters, quantise = dict(model.named_parameters()), fillers(model)
    half = model.config.head_dim // 2
    total, done = sum(fill.stored.numel for fill in checkpoint.fills), 0
    for fill in checkpoint.fills:
        for slot, start, source in _pieces(fill, model.config.head_dim):
            swap, end = fill.interleaved and slot.rotated, start + len(source)
            if swap:
                source = source.unflatten(0, (-1, half, 2)).transpose(1, 2)  # [head, 2, half, ...]
            if slot.parameter in quantise:
                if not source.isfinite().all():
                    raise UserError(f"{checkpoint.path}: {fill.stored.name} holds a NaN or an infinity")
                quantise[slot.parameter](source.flatten(0, 2) if swap else source, start)
                continue
            target = parameters[slot.parameter][start:end]
            (target.unflatten(0, (-1, 2, half)) if swap else target).copy_(source)
        done += fill.stored.numel
        if progress is not None:
            progress(done, total)


_AT_ONCE = 2**22  # elements that are dequantised at a time: 16 MiB in float32


def _pieces(fill: Fill, head_dim: int) -> Iterator[tuple[Slot, int, Tensor]]:
    """A stored tensor's rows in whole heads: the slot, the row of its parameter where they begin, the values."""
    if fill.stored.read_rows is None:
        rows = fill.stored.read().split([slot.shape[0] for slot in fill.slots])
        for slot, source in zip(fill.slots, rows, strict=True):
            yield slot, slot.start, source
        return
    (slot,) = fill.slots
    step = max(1, _AT_ONCE // (fill.stored.numel // slot.shape[0]) // head_dim) * head_dim
    for start in range(0, slot.shape[0], step):
        yield slot, slot.start + start, fill.stored.read_rows(start, min(start + step, slot.shape[0]))


def _randomize(model: Transformer, generator: torch.Generator, share: Share | None) -> None:
    """GPT-2's initialisation: what writes to the residual stream is smaller the deeper the model.

    A share is cut from the same noise, which is made whole for it, a matrix (or some of its rows) at a time.
    """
    with torch.device("meta"):
        whole = Transformer(model.config if share is None else share.whole)
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    quantise = fillers(model)
    kept = {id(p) for module in quantized(model) for name, p in module.named_parameters() if name != "bias"}
    for name, parameter in model.named_parameters():
        if id(parameter) in kept:
            continue
        if "norm" in name:
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        elif parameter.shape == shapes[name]:
            parameter.normal_(0.0, _spread(name, model.config), generator=generator)
        else:
            noise = parameter.new_empty(shapes[name]).normal_(0.0, _spread(name, model.config), generator=generator)
            for at, rows in _kept(share, name, noise, 0):
                parameter[at : at + len(rows)] = rows
    for name, fill in quantise.items():
        n, k = shapes[name]
        for start in range(0, n, RANDOM_ROWS):
            noise = torch.empty(min(RANDOM_ROWS, n - start), k, device=generator.device)
            noise.normal_(0.0, _spread(name, model.config), generator=generator)
            for at, rows in _kept(share, name, noise, start):
                fill(rows, at)


def _kept(share: Share | None, name: str, noise: Tensor, start: int) -> Iterator[tuple[int, Tensor]]:
    """The parts of `noise`, rows of a whole parameter from `start` on, that a share has, each with its row in the
    share."""
    if share is None:
        yield start, noise
        return
    columns = share.columns(name)
    for at, first, last in share.spans(name, start, start + len(noise)):
        rows = noise[first - start : last - start]
        yield at, rows if columns is None else rows[:, slice(*columns)].contiguous()


def _spread(name: str, config: Config) -> float:
    """Standard deviation of a matrix's elements."""
    return 0.02 / (2 * config.n_layer) ** 0.5 if name.endswith(("wo.weight", "w2.weight")) else 0.02


def first_bad_parameter(model: Transformer) -> str | None:
    """The first parameter that holds a NaN or an infinity, by name."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return name
    return None


def require_finite(model: Transformer) -> None:
    """Raises UserError that names a weight which holds a NaN or an infinity."""
    bad = first_bad_parameter(model)
    if bad is not None:
        raise UserError(f"the weight {bad} holds a NaN or an infinity")
