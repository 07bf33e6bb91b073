"""A LoRA adapter's folder, as PEFT writes it, merged into its base model: a Hugging Face folder like any other.

Every adapted matrix W becomes W + scaling * B @ A (Hu et al. 2021, arXiv:2106.09685), computed in float32 and rounded
once to the base's dtype; scaling is lora_alpha / r, or lora_alpha / sqrt(r) where `use_rslora` says so. What an adapter
may do besides (DoRA, biases, modules of its own, ranks by pattern) is refused by name.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint import Checkpoint, companion_folder, open_checkpoint
from checkpoint.configs import Fields
from checkpoint.convert import COMPANIONS
from checkpoint.stored import Stored, stored_tensors
from checkpoint.tokenizer_files import TOKENIZER_FILES
from common.errors import UserError
from common.files import is_plain_file, read_json, to_json, write_whole

PREFIX = "base_model.model."  # of every name in an adapter
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SHARD_BYTES = 4 << 30
OF_TOKENIZERS = (
    *TOKENIZER_FILES, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
# Fields of adapter_config.json that say nothing about how the matrices are merged
SILENT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "peft_type", "peft_version", "r", "revision", "runtime_config",
    "target_modules", "exclude_modules", "task_type", "use_rslora", "loftq_config", "qalora_group_size", "corda_config",
    "eva_config", "ensure_weight_tying",
}  # fmt: skip
PLAIN_STARTS = (True, False, None, "default", "gaussian", "orthogonal", "eva")  # others change the base


@dataclass(frozen=True)
class Adapter:
    """The adapter's matrices A [r, column] and B [row, r] by the name of the matrix that they adapt; one scale for
    all."""

    pairs: dict[str, tuple[Stored, Stored]]
    scaling: float

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A copy: the matrix with its adapter in it, in its own dtype; as it is where it has none."""
        if name not in self.pairs:
            return weight.clone()
        a, b = (part.read().float() for part in self.pairs[name])
        return (weight.float() + self.scaling * (b @ a)).to(weight.dtype)


def open_adapter(folder: Path) -> Adapter:
    """Raises UserError about a folder that is no LoRA adapter, or does what is not supported."""
    path = folder / "adapter_config.json"
    f = Fields(read_json(path), path)
    if f.get("peft_type", "LORA") != "LORA":
        f.refuse("peft_type", f.get("peft_type"))
    if f.get("bias", "none") != "none":
        f.refuse("bias", f.get("bias"))
    if f.get("init_lora_weights") not in PLAIN_STARTS:
        f.refuse("init_lora_weights", f.get("init_lora_weights"))
    for name, value in f.fields.items():
        if value and name not in SILENT | {"bias", "init_lora_weights"}:
            f.refuse(name, value)
    rank, alpha = f.whole("r", least=1), f.number("lora_alpha")
    file = next((folder / name for name in WEIGHTS if is_plain_file(folder / name)), None)
    if file is None:
        raise UserError(f"{folder}: an adapter_config.json and no weights ({', '.join(WEIGHTS)})")
    halves: dict[str, dict[str, Stored]] = {}
    for name, stored in stored_tensors(file).items():
        module, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
        if not name.startswith(PREFIX) or kind not in ("A.weight", "B.weight"):
            raise UserError(f"{file}: {name} is no part of a LoRA matrix")
        halves.setdefault(f"{module}.weight", {})[kind[0]] = stored
    pairs = {}
    for name, pair in halves.items():
        if len(pair) < 2 or len(pair["A"].shape) != 2 or len(pair["B"].shape) != 2:
            raise UserError(f"{file}: {name} has not both matrices, A and B")
        if not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            raise UserError(f"{file}: {name} has matrices of another rank than r, {rank}")
        pairs[name] = pair["A"], pair["B"]
    if not pairs:
        raise UserError(f"{file}: no LoRA matrix in it")
    return Adapter(pairs, alpha / (math.sqrt(rank) if f.get("use_rslora") else rank))


def _base(source: Path, adapter: Adapter) -> Checkpoint:
    """The base model, which has a place for every matrix of the adapter. Raises UserError."""
    checkpoint = open_checkpoint(source)
    config = companion_folder(source) / "config.json"
    in_few_bits = checkpoint.gguf is not None or checkpoint.weights is not None
    if not source.is_dir() or in_few_bits or read_json(config, missing_ok=True).get("quantization_config"):
        raise UserError(f"{source}: an adapter is merged into a Hugging Face folder in 16 or 32 bits")
    stored = {fill.stored.name: fill.stored for fill in checkpoint.fills}
    for name, (a, b) in adapter.pairs.items():
        if name not in stored:
            raise UserError(f"{source}: has no {name}, which the adapter changes: is it another model's?")
        if stored[name].shape != (b.shape[0], a.shape[1]):
            shape = [b.shape[0], a.shape[1]]
            raise UserError(f"{source}: {name} has shape {[*stored[name].shape]}, and the adapter's is {shape}")
    return checkpoint


def merge(source: Path, adapter_folder: Path, out: Path) -> Path:
    """Write the merged model into `out`, which must not hold anything, and return it. Raises UserError.

    The folder appears whole; tokenizer files come from the adapter, where it brings a tokenizer, or else the base.
    """
    adapter = open_adapter(adapter_folder)
    checkpoint = _base(source, adapter)
    part = out.resolve().with_name(f".{out.resolve().name}.part")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: give a folder that is empty or not there")
        shutil.rmtree(part, ignore_errors=True)  # a dead run's
        part.mkdir(parents=True)
        _copy_companions(companion_folder(source), adapter_folder, part)
        _write_weights(checkpoint, adapter, part)
        part.replace(out.resolve())
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _copy_companions(source: Path, adapter: Path, out: Path) -> None:
    own = any(is_plain_file(adapter / name) for name in TOKENIZER_FILES)
    for name in dict.fromkeys((*COMPANIONS, *OF_TOKENIZERS)):
        file = (adapter if own and name in OF_TOKENIZERS else source) / name
        if is_plain_file(file):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, out / name)


def _write_weights(checkpoint: Checkpoint, adapter: Adapter, out: Path) -> None:
    """A shard at a time, so that no more than one is held."""
    shards: list[dict[str, Stored]] = [{}]
    n_byte = 0
    for fill in checkpoint.fills:
        stored = fill.stored
        size = math.prod(stored.shape) * stored.dtype.itemsize
        if shards[-1] and n_byte + size > SHARD_BYTES:
            shards.append({})
            n_byte = 0
        shards[-1][stored.name] = stored
        n_byte += size
    places: dict[str, Any] = {}
    for n, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{n:05}-of-{len(shards):05}.safetensors"
        with torch.no_grad():
            tensors = {key: adapter.merged(key, stored.read()).contiguous() for key, stored in shard.items()}
        save_file(tensors, out / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        write_whole(out / "model.safetensors.index.json", to_json({"metadata": {}, "weight_map": places}) + "\n")
