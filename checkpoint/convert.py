"""A Hugging Face folder as gpt-fast's model.pth (cli/convert.py is the command)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import WEIGHTS, Checkpoint, companion_folder, open_checkpoint
from checkpoint.layout import slot_names
from checkpoint.tokenizer_files import TOKENIZER_FILES
from common.errors import UserError
from common.files import is_plain_file

COMPANIONS = (
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    *TOKENIZER_FILES,
)


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Halves to neighbours within each head: a0 a1 b0 b1 becomes a0 b0 a1 b1. rows: [head * head_dim, ...]."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def gpt_fast_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights under gpt-fast's names, in the checkpoint's own dtype."""
    state: dict[str, Tensor] = {}
    for fill in checkpoint.fills:
        names, interleaved = slot_names(fill.stored.name)
        parts = fill.stored.read().split([slot.shape[0] for slot in fill.slots])
        for name, slot, rows in zip(names, fill.slots, parts, strict=True):
            if slot.rotated and not interleaved:
                rows = interleave(rows, checkpoint.config.head_dim)
            elif rows.untyped_storage().nbytes() > rows.nbytes:
                rows = rows.clone()  # torch.save would write all of the storage that a view looks at
            state[name] = rows
    for n in range(checkpoint.config.n_layer):
        for kind in ("weight", "bias") if checkpoint.config.qkv_bias else ("weight",):
            apart = [state.pop(f"layers.{n}.attention.{part}.{kind}") for part in ("wq", "wk", "wv")]
            state[f"layers.{n}.attention.wqkv.{kind}"] = torch.cat(apart)
    if checkpoint.config.tied_embeddings:  # gpt-fast ties nothing; one storage, written once
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def convert(source: Path, out: Path, model: str | None = None) -> Path:
    """Write model.pth and what belongs to it into `out`, and return its path. Raises UserError."""
    checkpoint = open_checkpoint(source, model)
    if not source.is_dir():
        raise UserError(f"{source}: not a folder")
    if checkpoint.weights is not None:
        raise UserError(f"{source}: in {checkpoint.weights} already, which gpt-fast does not read: give its source")
    if checkpoint.gguf is not None:
        raise UserError(f"{checkpoint.gguf.path}: a GGUF file is loaded as it is, and not converted")
    folder = companion_folder(source)
    copies = {Path(name).name: folder / name for name in reversed(COMPANIONS) if is_plain_file(folder / name)}
    _make_folder(out)
    if folder.samefile(out):
        copies = {name: path for name, path in copies.items() if path.parent != folder}
    else:
        _require_free(out, set(copies))
    state = gpt_fast_state(checkpoint)
    file = out / "model.pth"
    parts = {out / f"{name}.part": out / name for name in (*copies, file.name)}  # the weights last
    try:
        for name, path in copies.items():
            shutil.copyfile(path, out / f"{name}.part")
        torch.save(state, out / f"{file.name}.part")
        file.unlink(missing_ok=True)  # older weights must not be seen beside the new config, not even after a kill
        for part, whole in parts.items():
            part.replace(whole)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None
    except RuntimeError as error:  # what torch.save raises on a full disk
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return file


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{out}: not a folder") from None
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None


def _require_free(out: Path, written: set[str]) -> None:
    """Raises UserError if `out` holds files of another checkpoint, which would be taken for files of this one."""
    others = [name for name in (*WEIGHTS, *COMPANIONS) if name != "model.pth" and name not in written]
    found = [name for name in others if os.path.lexists(out / name)]
    if found:
        raise UserError(f"{out}: holds {', '.join(found)}, of another checkpoint: give an empty folder")
