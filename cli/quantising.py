"""A checkpoint in fewer bits: what quantize.py writes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from checkpoint import Checkpoint, companion_folder, load_model, open_checkpoint
from checkpoint.quantised import MODEL_TYPE, write_quantised
from common.errors import UserError
from common.files import read_json
from model import Transformer
from weights.setting import WeightSetting


def quantise(source: Path, model: str | None, weights: WeightSetting, out: Path, device: torch.device) -> Path:
    """Write `source` in fewer bits to the folder `out`; returns the file of the weights. Raises UserError."""
    checkpoint = open_checkpoint(source, model)
    if checkpoint.weights is not None:
        raise UserError(f"{source}: quantised already, to {checkpoint.weights}")
    tokenizer = checkpoint.tokenizer_path
    folder = None if tokenizer is None else tokenizer.parent
    if folder is not None and folder.name == "original":
        folder = folder.parent
    if out.resolve() in {place.resolve() for place in (folder, companion_folder(source), source) if place is not None}:
        raise UserError(f"--out {out}: the folder that the weights come from")
    there = read_json(out / "config.json", missing_ok=True)
    if there and there.get("model_type") != MODEL_TYPE:
        raise UserError(f"--out {out}: holds another checkpoint: give an empty folder")

    def load() -> Transformer:
        dtype = checkpoint.dtype if checkpoint.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        return load_model(checkpoint, device, dtype, progress=progress, weights=weights, to_run=False)

    return write_quantised(out, checkpoint.name, weights, checkpoint.eos_ids, folder, checkpoint.gguf, load)


def progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done / total:4.0%}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    return sum(fill.stored.numel * fill.stored.dtype.itemsize for fill in checkpoint.fills)
