"""How far transformers' model is from itself when its past is quantised: by its own caches, and by ours.

  python scripts/divergence_transformers.py --checkpoint_path SmolLM2-135M-Instruct.Q4_1.gguf --text my.txt

The text goes through each cache in chunks, as prefill_chunk_size reads it: a token sees its own chunk exactly and what
came before as the cache holds it. Compared with DynamicCache's next-token distributions on the same chunks: mean KL
divergence, its 99th percentile, and the share of positions with the same most likely token, past the first chunk.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark import peers
from benchmark.transformers_generate import Contender, contenders
from checkpoint import load_model, open_checkpoint
from cli.options import Parser, positive
from common.errors import UserError
from common.files import require_writable, to_json, write_whole
from common.program import program
from evaluation.subject import read_text

BASE = "transformers dynamic, eager"


@torch.no_grad()
def log_probs(model: Any, ids: Tensor, contender: Contender, cache: Any) -> Tensor:
    """float32 [token, vocabulary]: after each of these tokens, which follow what the cache holds."""
    model.set_attn_implementation(contender.implementation)
    return model(ids, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)


def divergence(model: Any, ids: Tensor, chunk: int, everyone: list[Contender]) -> dict[str, dict[str, float]]:
    """All caches read the same chunks in turn, so that no logits have to be kept. ids: int64 [1, token]."""
    caches = {c.name: c.make() for c in everyone}
    found: dict[str, list[tuple[Tensor, Tensor]]] = {c.name: [] for c in everyone if c.name != BASE}
    for at in range(0, ids.shape[1], chunk):
        part = ids[:, at : at + chunk]
        expected = torch.empty(0)
        for c in everyone:
            logs = log_probs(model, part, c, caches[c.name])
            if c.name == BASE:
                expected = logs
            elif at:
                kl = (expected.exp() * (expected - logs)).sum(-1)
                found[c.name].append((kl, expected.argmax(-1) == logs.argmax(-1)))
    rows = {}
    for name, parts in found.items():
        kl, same = (torch.cat(column) for column in zip(*parts, strict=True))
        rows[name] = {
            "mean_kl": kl.mean().item(),
            "kl_99": kl.quantile(0.99).item(),
            "same_top": same.float().mean().item(),
        }
    return rows


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """Compare every cache's logits with DynamicCache's on a text. Returns the record; prints rows as they are
    measured."""
    import transformers

    p = Parser("divergence_transformers.py", description=__doc__.splitlines()[0])
    p.add_argument("--checkpoint_path", type=Path, required=True)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--context", type=positive, default=4096, help="tokens of the text that are read")
    p.add_argument("--chunk", type=positive, default=128, help="tokens read at once")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path)
    args = p.parse(sys.argv[1:] if argv is None else argv)
    if args.json:
        require_writable(args.json, "--json")
    checkpoint = open_checkpoint(args.checkpoint_path)
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise UserError(f"{args.checkpoint_path} has no tokenizer")
    text = read_text(args.text)
    ids = torch.tensor(tokenizer.encode(text[: 8 * args.context])[: args.context], device=args.device)[None]
    if ids.shape[1] < args.context:
        raise UserError(f"{args.text} has {ids.shape[1]} tokens, and {args.context} are asked for")
    model = peers.transformers_model(load_model(checkpoint, torch.device(args.device), torch.float32))
    everyone = [c for c in contenders(model.config, args.context, None) if not c.compiled]
    rows = divergence(model, ids, args.chunk, everyone)
    print(f"{'cache':32} {'mean KL':>9} {'99th':>9} {'same top':>9}")
    for name, row in rows.items():
        print(f"{name:32} {row['mean_kl']:9.2g} {row['kl_99']:9.2g} {row['same_top']:9.2%}")
    report = {
        "command": ["scripts/divergence_transformers.py", *(sys.argv[1:] if argv is None else argv)],
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": args.context, "chunk": args.chunk,
        "dtype": "float32", "transformers": transformers.__version__, "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    if args.json:
        write_whole(args.json, to_json(report) + "\n")
    return report


def main() -> None:
    with program("divergence_transformers.py"):
        run()
