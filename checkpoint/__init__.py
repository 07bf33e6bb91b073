"""Where weights come from: Hugging Face safetensors, GGUF, gpt-fast's model.pth, Meta's, or a generator.

Opening reads configs and headers only, and checks every name and shape, so that a plan can be printed
and mistakes told before memory is taken. Loading makes the model on the meta device, allocates it once,
and copies tensor by tensor from a memory map straight into place: one copy of the weights at the peak.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from checkpoint.configs import Fields, config_from_hugging_face, config_from_params, find_name, named_config, note
from checkpoint.gguf import GGUF, VOCABULARY, find_gguf, is_gguf, read_gguf, read_metadata
from checkpoint.gguf_model import gguf_config, gguf_fills, gguf_name
from checkpoint.gguf_tokenizer import gguf_tokenizer
from checkpoint.layout import Fill, match_tensors
from checkpoint.loading import first_bad_parameter, load_model, require_finite
from checkpoint.packed import DTYPES as PACKED_DTYPES
from checkpoint.packed import packing_of, unpacked
from checkpoint.quantised import DTYPES as QUANTISED_DTYPES
from checkpoint.quantised import Described, describe, parameter_fills
from checkpoint.share import Share
from checkpoint.stored import Stored, stored_tensors
from checkpoint.tokenizer_files import TOKENIZER_FILES, eos_ids_of, find_tokenizer, load_tokenizer
from common.choices import DTYPE_NAMES, require_device, require_dtype
from common.errors import UserError, printable
from common.files import is_plain_file, read_file, read_json, require_there
from model import Config
from quantize import WeightSetting, parse_weights
from tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "Share",
    "check_tokenizer",
    "chosen_weights",
    "end_ids",
    "find_demo",
    "first_bad_parameter",
    "load_model",
    "open_checkpoint",
    "parse_device",
    "parse_dtype",
    "require_finite",
]


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be loaded: its shape, and the tensors that fill it (none: no weights)."""

    path: Path | None
    name: str
    config: Config
    fills: tuple[Fill, ...] = field(default=(), repr=False)
    tokenizer_path: Path | None = None
    eos_ids: tuple[int, ...] = ()
    gguf: GGUF | None = field(default=None, repr=False)  # the file it is, or was made of: it holds the tokenizer
    weights: WeightSetting | None = None  # in how many bits they are stored, where `quantize.py` wrote them
    share: Share | None = field(default=None, repr=False)  # of the model, where this is one rank's part of it

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name, 100))  # a folder's, or what a GGUF file calls itself

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None where it has none. Raises UserError."""
        if self.gguf is not None and (own := gguf_tokenizer(self.gguf)) is not None:
            return own
        return None if self.tokenizer_path is None else load_tokenizer(self.tokenizer_path)

    def share_of(self, rank: int, n_rank: int) -> Checkpoint:
        """The part of it that one of several ranks holds: its config, its tensors. Raises UserError."""
        if self.weights is not None:
            raise UserError(f"{self.path}: in fewer bits already, which ranks cannot share: give what it was made of")
        share = Share(self.config, rank, n_rank)
        return replace(self, config=share.config, fills=share.fills(self.fills), share=share)

    @property
    def dtype(self) -> torch.dtype:
        """What most of the weights are stored in, not counting what is quantised; bfloat16 without weights."""
        if self.weights is not None:
            return next(f.stored.dtype for f in self.fills if f.slots[0].parameter == "norm.weight")
        sizes: dict[torch.dtype, int] = {}
        for fill in self.fills:
            sizes[fill.stored.dtype] = sizes.get(fill.stored.dtype, 0) + fill.stored.numel
        return max(sizes, key=sizes.__getitem__, default=torch.bfloat16)


# --- Opening ----------------------------------------------------------------------------------------


def open_checkpoint(path: Path | None, model: str | None = None) -> Checkpoint:
    """Read configs and headers, and check that they fit each other. No weights are read.

    path: a Hugging Face folder, a folder with a model.pth or a GGUF model, or a file of these kinds; None:
    the shape named by `model`, without weights. model: a name in CONFIGS, leniently spelled; given, it stands
    above what lies beside the weights. Raises UserError.
    """
    if path is None:
        if model is None:
            raise UserError("no checkpoint, and no --model NAME either")
        name, config = named_config(model)
        return Checkpoint(None, name, config)
    try:
        return _open(path, model)
    except OSError as error:  # a name too long, a folder that may not be read, links that go round
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: {error}") from None  # a null character


def _open(path: Path, model: str | None) -> Checkpoint:
    file = _weights_file(path)
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise UserError(f"{file}: weights are read by libraries that open only paths in UTF-8: rename it") from None
    if is_gguf(file):
        return _open_gguf(path, file, model)
    folder = _beside(file)
    own = describe(read_json(folder / "config.json", missing_ok=True), folder / "config.json")
    if own is not None:
        return _open_quantised(path, file, folder, own, model)
    packing = packing_of(Fields(read_json(folder / "config.json", missing_ok=True), folder / "config.json"))
    tensors = stored_tensors(file) if packing is None else stored_tensors(file, PACKED_DTYPES)
    name, config = _find_config(file, folder, tensors, model)
    if packing is not None:
        tensors = unpacked(tensors, packing, config, file)
    fills, tied = match_tensors(config, tensors, file)
    if tied is not None and not _same_as_embedding(tied, fills):
        note(f"{file}: {tied.name} differs from the embedding, although the config ties the two: both are used")
        config = replace(config, tied_embeddings=False)
        fills, _ = match_tensors(config, tensors, file)
    return Checkpoint(path, name, config, fills, find_tokenizer(folder), eos_ids_of(folder))


def _open_quantised(path: Path, file: Path, folder: Path, own: Described, model: str | None) -> Checkpoint:
    if model is not None and named_config(model)[1] != own.config:
        raise UserError(f"{path}: quantised as {own.name}, whose shape is not --model {model}'s")
    fills = parameter_fills(own, stored_tensors(file, QUANTISED_DTYPES), file)
    tokenizer, eos_ids = find_tokenizer(folder), eos_ids_of(folder)
    vocabulary = read_metadata(folder / VOCABULARY) if (folder / VOCABULARY).exists() else None
    return Checkpoint(path, own.name, own.config, fills, tokenizer, eos_ids, vocabulary, own.weights)


def _open_gguf(path: Path, file: Path, model: str | None) -> Checkpoint:
    gguf = read_gguf(file)
    name, config = (gguf_name(gguf), gguf_config(gguf)) if model is None else named_config(model)
    fills = gguf_fills(gguf, config)
    return Checkpoint(path, name, config, fills, find_tokenizer(_beside(file)), gguf=gguf)


def _same_as_embedding(output: Stored, fills: Sequence[Fill]) -> bool:
    embedding = next(fill.stored for fill in fills if fill.slots[0].parameter == "tok_embeddings.weight")
    a, b = output.read(), embedding.read()
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


WEIGHTS = (  # of several, the first one; as in transformers the whole file before the one in parts
    "model.safetensors",
    "model.safetensors.index.json",
    "model.pth",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _weights_file(path: Path) -> Path:
    require_there(path)
    if not path.is_dir():
        return path
    if (snapshot := _snapshot(path)) is not None:
        path = snapshot
    for name in WEIGHTS:
        if is_plain_file(path / name):
            return path / name
    if (gguf := find_gguf(path)) is not None:
        return gguf
    if (path / "adapter_config.json").exists():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"{path}: a LoRA adapter of {base or 'another model'} and no model of its own: merge the two first, with "
            "scripts/merge_lora.py"
        )
    raise UserError(f"{path}: no weights in this folder (looked for {', '.join(WEIGHTS)}, *.gguf)")


def companion_folder(path: Path) -> Path:
    """Where the config and the tokenizer of the checkpoint at `path` lie."""
    return _beside(_weights_file(path))


def _snapshot(folder: Path) -> Path | None:
    """The checkpoint in a folder of the Hub's cache, models--OWNER--NAME: the snapshot that main points to."""
    main = folder / "refs" / "main"
    if not (folder.name.startswith("models--") and (folder / "snapshots").is_dir()):
        return None
    if is_plain_file(main):
        found = folder / "snapshots" / read_file(main, 1000).decode("utf-8", "replace").strip()
        if found.parent == folder / "snapshots" and found.is_dir():
            return found
    snapshots = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    if len(snapshots) != 1:
        raise UserError(f"{folder}: {len(snapshots)} snapshots: name one of them")
    return snapshots[0]


def _beside(file: Path) -> Path:
    """The folder where the config and the tokenizer lie: the file's own; or, if it is a link, its target's.

    The first that has any: the Hub's cache links a snapshot's files to blobs that lie elsewhere, and know no names.
    """
    folders = [Path(os.path.abspath(file)).parent, Path(os.path.realpath(file)).parent]
    known = ("config.json", "params.json", *TOKENIZER_FILES)
    return next((f for f in folders if any(is_plain_file(f / name) for name in known)), folders[0])


def _find_config(file: Path, folder: Path, tensors: dict[str, Stored], model: str | None) -> tuple[str, Config]:
    """A name to show and the shape: from --model, a file beside the weights, or the folder's name."""
    if model is not None:
        return named_config(model)
    for path in (folder / "config.json", folder / "params.json"):
        if not os.path.lexists(path):
            continue
        fields = read_json(path)
        if "dim" not in fields:
            return folder.name, config_from_hugging_face(fields, path)
        embedding = tensors.get("tok_embeddings.weight")
        n_vocab = embedding.shape[0] if embedding and embedding.shape else 0
        return folder.name, config_from_params(fields, path, n_vocab, "output.weight" not in tensors)
    for guess in (folder.name, file.stem):
        known = find_name(guess)
        if known is None:
            continue
        config = named_config(known)[1]
        try:
            match_tensors(config, tensors, file)
        except UserError as error:
            raise UserError(f"no config.json, and {guess} is not {known} ({error}): give --model NAME") from None
        note(f"no config.json beside {file.name}: {known} by the name {guess}, and all shapes agree")
        return known, config
    raise UserError(f"{folder}: no config.json or params.json beside {file.name}: give --model NAME")


def find_demo() -> Path:
    """The bundled small model's folder."""
    path = Path(__file__).resolve().parents[1] / "assets" / "demo"
    if not path.is_dir():
        raise UserError("no --checkpoint_path, and the bundled model (assets/demo) is not here")
    return path


# --- What goes with it ------------------------------------------------------------------------------


def chosen_weights(checkpoint: Checkpoint, text: str | None) -> WeightSetting | None:
    """`--weights` for a checkpoint: what it says itself, or the flag, if given. Raises UserError where they differ."""
    wanted = None if text is None else parse_weights(text)
    if checkpoint.weights is not None and text is not None and wanted != checkpoint.weights:
        raise UserError(f"{checkpoint.path}: quantised already, to {checkpoint.weights}: --weights {text} needs others")
    return checkpoint.weights or wanted


def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError where the tokenizer has ids that the embedding has no row for.

    A special token past the last row (a pad token that was added and never trained) is told, and refused where a
    text names it.
    """
    highest = max(tokenizer.n_plain, (tokenizer.bos_id or 0) + 1)
    if highest > config.vocab_size:
        raise UserError(
            f"the tokenizer has {highest} tokens and the model's vocabulary {config.vocab_size}: "
            f"they do not belong together"
        )
    tokenizer.n_row = config.vocab_size
    if tokenizer.n_vocab > config.vocab_size:
        lost = {n: name for name, n in tokenizer.special_ids.items() if n >= config.vocab_size}
        named = "".join(f": {lost[n]}" for n in sorted(lost)[:1])
        note(f"{tokenizer.n_vocab - config.vocab_size} special tokens have no row in the embedding{named}")


def end_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Every token that ends a text, by the checkpoint's configs and by its tokenizer."""
    return frozenset(checkpoint.eos_ids) | frozenset(tokenizer.eos_ids if tokenizer is not None else ())


DTYPES: dict[str, torch.dtype] = {name: getattr(torch, full) for name, full in DTYPE_NAMES.items()}


def parse_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """--dtype. auto: float32 on a CPU, elsewhere the checkpoint's own."""
    require_dtype(name)
    if name != "auto":
        return DTYPES[name]
    own = checkpoint.dtype if checkpoint.dtype in DTYPES.values() else torch.float32
    return torch.float32 if device.type == "cpu" else own


def parse_device(name: str, elsewhere: bool = False) -> torch.device:
    """--device. auto: a GPU where there is one. Raises UserError where the device is not there, unless `elsewhere`: a
    plan may be for another machine.

    A CUDA device becomes the current one: kernels are launched and graphs captured on that.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    require_device(name)
    kind, _, number = name.partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: no Apple GPU here")
    if kind != "cuda":
        return torch.device(name)
    n_device = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(number or 0)
    if elsewhere and index >= n_device:
        return torch.device("cuda", index)
    if n_device == 0:
        raise UserError(f"--device {name}: no CUDA device here (--device cpu runs anywhere)")
    if index >= n_device:
        raise UserError(f"--device {name}: the last of the {n_device} CUDA devices here is cuda:{n_device - 1}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
