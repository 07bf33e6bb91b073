"""llama.cpp's caches against its own f16 cache, on the windows that evaluate.py scores.

  python scripts/evaluate_llama_cpp.py --checkpoint_path model.gguf --text longctx_cc0.txt.xz --context 8192 --windows 1

Needs the package llama-cpp-python, which is compiled as it is installed. A table goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import scoring
from subject import read_text, sha256_of

from checkpoint import open_checkpoint
from console import require_writable, shown, write_whole
from evaluation.peer_llama_cpp import CACHES, Model, bits_of, compare, decode_speed, package, rows_of, types_of
from options import Parser, positive
from tokenizer import UserError


def make_parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    p = Parser("evaluate_llama_cpp.py", description=__doc__, formatter_class=form)
    p.add_argument("--checkpoint_path", type=Path, required=True, help="a GGUF file")
    p.add_argument("--text", type=Path, nargs="+", required=True, help="plain, .xz or JSONL")
    p.add_argument("--context", type=positive, default=2048, help="tokens of a window (default: 2048)")
    p.add_argument("--windows", type=positive, default=1, help="windows of each text, evenly spread (default: 1)")
    p.add_argument("--caches", nargs="+", default=CACHES, metavar="TYPE", help="of keys and values, or K/V")
    p.add_argument("--threads", type=positive, default=1)
    p.add_argument("--steps", type=positive, default=20, help="timed decode steps after a window (default: 20)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    return p


def run(args: argparse.Namespace, argv: list[str]) -> None:
    for cache in args.caches:
        types_of(cache)
    if args.json:
        require_writable(args.json, "--json")
    version = package().__version__
    checkpoint = open_checkpoint(args.checkpoint_path)
    tokenizer = checkpoint.tokenizer()
    if checkpoint.gguf is None or tokenizer is None:
        raise UserError(f"{args.checkpoint_path}: not a GGUF file with a tokenizer")
    model = Model(checkpoint.gguf.path, args.threads)
    record = {
        "kind": "llama.cpp", "model": checkpoint.name, "llama_cpp_python": version, "threads": args.threads,
        "context": args.context, "command": ["scripts/evaluate_llama_cpp.py", *shown(argv)], "rows": [], "speed": [],
    }  # fmt: skip
    for path in args.text:
        text = read_text(path)
        ids = torch.tensor(tokenizer.encode(text, bos=False))
        scored: dict[str, list[dict[str, torch.Tensor]]] = {}
        done = list(record["rows"])
        for window in scoring.windows(ids, args.context, args.windows):
            for name, values in compare(model, args.caches, window):
                scored.setdefault(name, []).append(values)
            about = {"text": path.name, "sha256": sha256_of(text)}
            record["rows"] = done + [about | row for row in rows_of(scored)]
            if args.json:
                write_whole(args.json, json.dumps(record) + "\n")
        if not scored:
            raise UserError(f"{path}: {len(ids)} tokens, and a window has {args.context}")
        print(f"{path.name}: {len(next(iter(scored.values())))} windows of {args.context} tokens")
        print(f"{'cache':<12}{'bits':>6}{'mean KL':>11}{'99th pct':>10}{'same top':>10}{'perplexity':>12}{'rise':>9}")
        for r in record["rows"][len(done) :]:
            print(f"{r['cache']:<12}{r['bits']:>6.2f}{r['kl']:>11.2e}{r['kl_p99']:>10.1e}{r['same_top']:>10.2%}"
                  f"{r['perplexity']:>12.4f}{r['perplexity_rise']:>+9.2%}")  # fmt: skip
    for cache in ("f16", *args.caches):
        for n_token in (16, args.context - args.steps):
            ms = decode_speed(model, cache, window[:n_token].tolist(), args.steps)
            record["speed"].append({"cache": cache, "bits": bits_of(cache), "tokens": n_token, "step_ms": ms})
            print(f"decoding after {n_token} tokens, {cache}: {ms:.1f} ms a step, {1e3 / ms:.1f} tokens/s")
    if args.json:
        write_whole(args.json, json.dumps(record) + "\n")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        run(make_parser().parse(argv), argv)
    except UserError as error:
        print(f"evaluate_llama_cpp.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
