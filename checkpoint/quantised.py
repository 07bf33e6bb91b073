"""Checkpoints in 8 and 4 bits: a folder that loads at the speed of its own size.

    config.json         model_type "selective_kv", which other programs refuse by name; the shape as `model.Config` has
                        it; and what `--weights` said
    model.safetensors   the model's parameters as they lie in memory, under their names in `model.Transformer`
    tokenizer files     copied; vocabulary.gguf, a GGUF's metadata, where the tokenizer was in one

Nothing is quantised twice: what was chosen when the folder was written is what runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.configs import Fields
from checkpoint.gguf import GGUF, VOCABULARY, metadata_alone
from checkpoint.layout import Fill, Slot
from checkpoint.stored import FLOATS, INTEGERS, Stored
from checkpoint.tokenizer_files import TOKENIZER_FILES
from common.errors import UserError
from common.files import part_of, write_whole
from model import Config, Ranks, RopeScaling, Transformer
from quantize import WeightSetting, parse_weights
from weights.modules import replace_matrices

MODEL_TYPE = "selective_kv"
VERSION = 1
WIDEST_HEAD = 1 << 16
DTYPES = FLOATS | INTEGERS  # that `stored_tensors` may meet in such a folder
COMPANIONS = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Described:
    """What config.json says."""

    name: str
    config: Config
    weights: WeightSetting
    dtype: torch.dtype


def describe(fields: dict[str, Any], path: Path) -> Described | None:
    """What the config.json of such a folder says; None for any other folder's. Raises UserError."""
    if fields.get("model_type") != MODEL_TYPE:
        return None
    if fields.get("version") != VERSION:
        raise UserError(f"{path}: version {fields.get('version')!r} of this format, and {VERSION} is read")
    try:
        f = Fields(fields, path).inner("config")
        shape, scaling = _values(f, Config), f.inner("rope_scaling")
        if scaling.fields:
            factors = tuple(map(float, scaling.get("factors", [])))
            shape["rope_scaling"] = RopeScaling(**_values(scaling, RopeScaling), factors=factors)
        config = Config(**shape)
        setting = parse_weights(_with_group(fields["weights"]))
        dtype = {str(d).removeprefix("torch."): d for d in FLOATS.values()}[fields["dtype"]]
        name = str(fields["name"])
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not as quantize.py writes it ({type(error).__name__}: {error})") from None
    if setting is None:
        raise UserError(f"{path}: weights {fields['weights']!r}, which are in no fewer bits")
    return Described(name, config, setting, dtype)


def _with_group(weights: str) -> str:
    """What the first folders left out: their 8 bits had a scale a row."""
    if not weights.startswith("int8") or "group_size=" in weights:
        return weights
    rest = weights.partition(":")[2]
    return "int8:group_size=0" + (f",{rest}" if rest else "")


def _values(f: Fields, cls: type) -> dict[str, Any]:
    """The fields of a dataclass that are numbers, words or switches, each of its type. Raises UserError."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.type == "int":
            found[field.name] = f.whole(field.name, least=0)
        elif field.type == "float":
            found[field.name] = f.number(field.name)
        elif field.type in ("bool", "str"):
            value = f.get(field.name)
            if not isinstance(value, bool if field.type == "bool" else str):
                raise f.error(f"{field.name} is {value!r}, not a {field.type}")
            found[field.name] = value
    if cls is Config and (found["vocab_rows"] or found["vocab_start"] or found["head_dim"] > WIDEST_HEAD):
        raise f.error(f"a head of a part of the vocabulary, or of more than {WIDEST_HEAD} dimensions")
    return found


def skeleton(
    config: Config, weights: WeightSetting | None, dtype: torch.dtype, ranks: Ranks | None = None
) -> Transformer:
    """The model on the meta device, its matrices in the bits that `weights` says."""
    with torch.device("meta"):
        model = Transformer(config, ranks).to(dtype)
    if weights is not None:
        replace_matrices(model, weights, dtype)
    return model


def parameter_fills(described: Described, tensors: dict[str, Stored], file: Path) -> tuple[Fill, ...]:
    """Each parameter from the tensor of its name. Raises UserError about one that is missing, or of another kind."""
    if described.config.n_layer > len(tensors):
        raise UserError(f"{file}: {len(tensors)} tensors, and the config has {described.config.n_layer} layers")
    fills = []
    try:
        wanted = dict(skeleton(described.config, described.weights, described.dtype).named_parameters())
    except (RuntimeError, OverflowError) as error:  # sizes whose product is no number of bytes
        raise UserError(f"{file}: the config's sizes are impossible ({str(error).partition(chr(10))[0]})") from None
    for name, parameter in wanted.items():
        if name not in tensors:
            old = "; 8 bits had no groups when it was written: quantise it anew" if name.endswith(".steps") else ""
            raise UserError(f"{file}: missing {name}, which the config has{old}")
        stored = tensors[name]
        if stored.shape != tuple(parameter.shape):
            raise UserError(f"{file}: {name} has shape {[*stored.shape]}, and the config's is {[*parameter.shape]}")
        if stored.dtype != parameter.dtype:
            raise UserError(f"{file}: {name} is {stored.dtype}, and the config's is {parameter.dtype}")
        fills.append(Fill(stored, (Slot(name, stored.shape),), interleaved=False))
    for name in tensors.keys() - wanted.keys():
        raise UserError(f"{file}: {name} has no place in this model or its config")
    return tuple(fills)


def write_quantised(
    out: Path, name: str, weights: WeightSetting, eos_ids: tuple[int, ...], tokenizer_folder: Path | None,
    gguf: GGUF | None, load: Callable[[], Transformer],
) -> Path:  # fmt: skip
    """Write a model, which `load` returns when the folder is ready for it, and the tokenizer's files beside it.
    gguf: the file that holds the tokenizer.

    config.json comes last: a folder without it is none. What the folder held stays whole until the new weights are, and
    a folder that was made for nothing goes again. Returns the file of the weights. Raises UserError.
    """
    with _folder(out):
        return _write(out, name, weights, eos_ids, tokenizer_folder, gguf, load())


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """The folder is there; one that was made for nothing goes again."""
    made = not out.exists()
    with _errors_reported(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if made:
            with suppress(OSError):  # something is in it
                out.rmdir()


def _write(
    out: Path, name: str, weights: WeightSetting, eos_ids: tuple[int, ...], tokenizer_folder: Path | None,
    gguf: GGUF | None, model: Transformer,
) -> Path:  # fmt: skip
    file = out / "model.safetensors"
    tensors: dict[str, Tensor] = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    fields = {
        "model_type": MODEL_TYPE, "version": VERSION, "name": name, "weights": weights.in_full(),
        "dtype": str(model.norm.weight.dtype).removeprefix("torch."), "config": asdict(model.config),
        "eos_token_id": list(eos_ids),
    }  # fmt: skip
    part = part_of(file)
    with _errors_reported(out):
        try:
            save_file(tensors, part, {"format": "pt"})
            mask = os.umask(0)
            os.umask(mask)
            part.chmod(0o666 & ~mask)  # as any new file's: the library lets nobody else read it
            for name_of_old in ("config.json", VOCABULARY):  # not theirs, not even after a kill
                (out / name_of_old).unlink(missing_ok=True)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        for companion in COMPANIONS if tokenizer_folder is not None else ():
            assert tokenizer_folder is not None
            source = tokenizer_folder / companion
            if source.is_file() and source.resolve() != (out / companion).resolve():
                (out / companion).parent.mkdir(exist_ok=True)
                shutil.copyfile(source, out / companion)
        if gguf is not None:
            (out / VOCABULARY).write_bytes(metadata_alone(gguf))
        write_whole(out / "config.json", json.dumps(fields, indent=1) + "\n")
    return file


@contextmanager
def _errors_reported(out: Path) -> Iterator[None]:
    """Turn errors of writing to `out` into UserErrors."""
    try:
        yield
    except FileExistsError:
        raise UserError(f"{out}: not a folder") from None
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{out}: {error}") from None
