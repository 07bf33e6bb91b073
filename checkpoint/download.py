"""Fetch a model from the Hugging Face Hub: the weights in safetensors, its configs, its tokenizer.

  python scripts/download.py --repo_id Qwen/Qwen3-0.6B
  python scripts/download.py --repo_id meta-llama/Meta-Llama-3-8B --out checkpoints/llama3-8b --hf_token ...

The folder then goes to generate.py as it is. Gated models (Llama) want their licence accepted on the
model's page and a token, from --hf_token, HF_TOKEN or `hf auth login`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from checkpoint import open_checkpoint
from cli.options import Parser
from common.errors import UserError
from common.program import program

# Patterns stand for whole paths: no second copy of the weights from original/ or consolidated*
NEEDED = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "original/tokenizer.model",
]


def download(repo_id: str, out: Path, token: str | None = None) -> Path:
    """Fetch what is needed of a repository into `out` (going on where an earlier try stopped).

    Returns the folder, checked: configs and headers fit. Raises UserError.
    """
    try:
        huggingface_hub.snapshot_download(repo_id, local_dir=out, allow_patterns=NEEDED, token=token)
    except GatedRepoError:
        raise UserError(
            f"{repo_id} is gated: accept its licence on its page, and give a token (--hf_token or HF_TOKEN)"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{repo_id}: no such model on the Hub, or a private one without a token") from None
    except HFValidationError:
        raise UserError(f"{repo_id}: not a repository's name (OWNER/NAME)") from None
    except OSError as error:  # no network, a full disk, and every other HTTP error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{repo_id}: not downloaded: {reason[0]}") from None
    open_checkpoint(out)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("download.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", required=True, metavar="OWNER/NAME")
    parser.add_argument("--out", type=Path, help="the folder to write to (default: checkpoints/NAME)")
    parser.add_argument("--hf_token", default=os.environ.get("HF_TOKEN"), help="(default: HF_TOKEN)")
    with program("download.py", "interrupted: the same command goes on from here"):
        args = parser.parse(sys.argv[1:] if argv is None else argv)
        out = args.out or Path("checkpoints") / args.repo_id.split("/")[-1]
        download(args.repo_id, out, args.hf_token)
        print(f"{out}\npython generate.py --checkpoint_path {out} --prompt ...")
