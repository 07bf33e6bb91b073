"""Fetch a model from the Hugging Face Hub: its weights (in safetensors where it has them), configs and tokenizer.

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

from cli.options import Parser
from common.program import importing, program


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("download.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", required=True, metavar="OWNER/NAME")
    parser.add_argument("--out", type=Path, help="the folder to write to (default: checkpoints/NAME)")
    parser.add_argument("--hf_token", default=os.environ.get("HF_TOKEN"), help="(default: HF_TOKEN)")
    with program("download.py", "interrupted: the same command goes on from here"):
        args = parser.parse(sys.argv[1:] if argv is None else argv)
        out = args.out or Path("checkpoints") / args.repo_id.split("/")[-1]
        with importing():
            from checkpoint.download import download
        download(args.repo_id, out, args.hf_token)
        print(f"{out}\npython generate.py --checkpoint_path {out} --prompt ...")
