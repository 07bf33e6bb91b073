"""What of a repository of the Hugging Face Hub is fetched (cli/download.py is the command)."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from checkpoint import open_checkpoint
from common.errors import UserError

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP library below: no connection, say
# Patterns stand for whole paths: no second copy of the weights from original/ or consolidated*
COMPANIONS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "original/tokenizer.model",
]
WEIGHTS = (  # the first of which a repository has any
    ["model*.safetensors", "model.safetensors.index.json"],
    ["consolidated.safetensors", "params.json", "tokenizer.model.v*"],  # Mistral's own
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)


def wanted(repo_id: str, files: Sequence[str]) -> list[str]:
    """Patterns of what to fetch of a repository's files. Raises UserError that says why none of them loads."""
    for patterns in WEIGHTS:
        if fnmatch.filter(files, patterns[0]):
            return COMPANIONS + patterns
    gguf = fnmatch.filter(files, "*.gguf")
    if len(gguf) == 1:
        return gguf
    if gguf:
        some = ", ".join(gguf[:3]) + (", ..." if len(gguf) > 3 else "")
        raise UserError(f"{repo_id}: {len(gguf)} GGUF files ({some}): fetch the one you want, and give its path")
    if "adapter_config.json" in files:
        what = "a LoRA adapter and no model of its own"
        raise UserError(f"{repo_id}: {what}: scripts/merge_lora.py merges its folder into a base model's")
    others = {Path(name).suffix for name in files} & {".h5", ".msgpack", ".onnx", ".pth", ".pt", ".ckpt", ".npz"}
    held = f" (it has {', '.join(sorted(others))})" if others else ""
    raise UserError(f"{repo_id}: no weights that are read here: safetensors, pytorch_model.bin or GGUF{held}")


def download(repo_id: str, out: Path, token: str | None = None) -> Path:
    """Fetch what is needed of a repository into `out` (going on where an earlier try stopped).

    Returns the folder, checked: configs and headers fit. Raises UserError.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: not a folder")
    try:
        patterns = wanted(repo_id, huggingface_hub.list_repo_files(repo_id, token=token))
        huggingface_hub.snapshot_download(repo_id, local_dir=out, allow_patterns=patterns, token=token)
    except GatedRepoError:
        raise UserError(
            f"{repo_id} is gated: accept its licence on its page, and give a token (--hf_token or HF_TOKEN)"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{repo_id}: no such model on the Hub, or a private one without a token") from None
    except HFValidationError:
        raise UserError(f"{repo_id}: not a repository's name (OWNER/NAME)") from None
    except (OSError, HTTP_ERROR) as error:  # no network, a full disk, and every other HTTP error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{repo_id}: not downloaded: {reason[0]}") from None
    open_checkpoint(out)
    return out
