"""llama.cpp's quantised KV caches against its own f16 cache, on the same file, text and tokens as evaluate.py's.

  python scripts/evaluate_llama_cpp.py --checkpoint_path model.gguf --text longctx_cc0.txt.xz --context 8192

Needs the package llama-cpp-python, which is compiled as it is installed. A table goes to standard output.

Every cache of llama.cpp is a context of its own; all of them read a window in step, 512 tokens at a time, and each
chunk's distributions are compared with the f16 context's. So its figures are of its arithmetic (weights as stored,
activations rounded to 8 bits in products) against itself, as ours are of float32 against itself: what a cache costs
where it is used. llama.cpp quantises every token as it comes, those of the chunk itself too; it has no window.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import open_checkpoint
from cli.console import shown
from cli.options import Parser, positive
from common.errors import UserError
from common.files import require_writable, to_json, write_whole
from common.messages import progress
from common.packages import missing
from common.program import program
from evaluation.scoring import windows
from evaluation.subject import read_text, sha256_of

CHUNK = 512
TYPES = {"f16": (1, 16.0), "q8_0": (8, 8.5), "q5_1": (7, 6.0), "q5_0": (6, 5.5), "q4_1": (3, 5.0), "q4_0": (2, 4.5)}
CACHES = ("q8_0", "q8_0/q4_0", "q5_1", "q5_0", "q4_0")


def package() -> Any:
    """llama_cpp's bindings. Raises UserError where the package is not installed."""
    try:
        import llama_cpp
    except ModuleNotFoundError:
        raise missing("llama_cpp", "llama.cpp beside us") from None
    return llama_cpp


def types_of(cache: str) -> tuple[str, str]:
    """ "q8_0" or "q8_0/q4_0": of keys and of values. Raises UserError."""
    k, _, v = cache.partition("/")
    for name in (k, v or k):
        if name not in TYPES:
            raise UserError(f"{cache}: llama.cpp's cache types here are {', '.join(TYPES)}, or two of them as K/V")
    return k, v or k


def bits_of(cache: str) -> float:
    """Per element, scales included, of keys and values together."""
    return sum(TYPES[name][1] for name in types_of(cache)) / 2


class Model:
    """A GGUF file as llama.cpp holds it."""

    def __init__(self, file: Path, threads: int) -> None:
        self.lib, self.threads = package(), threads
        self.lib.llama_log_set(_quiet(self.lib), ctypes.c_void_p())
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(file).encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise UserError(f"{file}: llama.cpp does not load it")
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))


def _quiet(lib: Any) -> Any:
    """A log callback that says nothing, kept alive for as long as the library."""
    global_name = "_selective_kv_quiet"
    if not hasattr(lib, global_name):
        setattr(lib, global_name, lib.llama_log_callback(lambda level, text, data: None))
    return getattr(lib, global_name)


class Context:
    """A model with a cache of one kind: tokens in, logits out."""

    def __init__(self, model: Model, cache: str, n_token: int) -> None:
        lib = model.lib
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_token, CHUNK, CHUNK
        params.n_threads = params.n_threads_batch = model.threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k, params.type_v = (TYPES[name][0] for name in types_of(cache))
        self.lib, self.model, self.at = lib, model, 0
        self.context = lib.llama_init_from_model(model.model, params)
        if not self.context:
            raise UserError(f"llama.cpp makes no context with a cache of {cache}")
        self.batch = lib.llama_batch_init(CHUNK, 0, 1)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after each of at most CHUNK tokens, float32 [token, n_vocab]: a view, good until the next call."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self.at + i, 1, 1
            batch.seq_id[i][0] = 0
        if self.lib.llama_decode(self.context, batch) != 0:
            raise UserError(f"llama.cpp failed at token {self.at}")
        self.at += len(tokens)
        logits = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, shape=(len(tokens), self.model.n_vocab))

    def forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.at = 0

    def close(self) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)


def compare(model: Model, caches: Sequence[str], tokens: Tensor) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Per cache, f16 first: nll, kl and same_top of every token but the first, float32 [token - 1]. tokens: [token]."""
    names = ["f16", *caches]
    contexts = [Context(model, name, len(tokens)) for name in names]
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in names]
    ids = tokens.tolist()
    for lo in progress(range(0, len(ids), CHUNK), None, "llama.cpp"):
        chunk = ids[lo : lo + CHUNK]
        targets = tokens[lo + 1 : lo + 1 + len(chunk)]
        full = None
        for results, context in zip(found, contexts, strict=True):
            logits = torch.from_numpy(context.read(chunk)[: len(targets)].copy())
            log_p = F.log_softmax(logits, -1)
            full = log_p if full is None else full
            kl = (full.exp() * (full - log_p)).sum(-1)
            nll = -log_p.gather(1, targets[:, None])[:, 0]
            results.append((nll, kl, (log_p.argmax(-1) == full.argmax(-1)).float()))
    for context in contexts:
        context.close()
    for name, results in zip(names, found, strict=True):
        nll, kl, same = (torch.cat(parts) for parts in zip(*results, strict=True))
        yield name, {"nll": nll, "kl": kl, "same_top": same}


def rows_of(scored: dict[str, list[dict[str, Tensor]]]) -> list[dict[str, Any]]:
    """One row a cache over all windows, as evaluate.py's: NLLs summed, divided and exponentiated once."""
    rows = []
    full = [r["nll"].double().mean() for r in scored["f16"]]
    for name, results in scored.items():
        nll, kl, same = (torch.cat([r[key] for r in results]).double() for key in ("nll", "kl", "same_top"))
        rise = [float(r["nll"].double().mean() - f) for r, f in zip(results, full, strict=True)]
        rows.append({
            "cache": name, "bits": bits_of(name), "tokens": len(nll), "windows": len(results),
            "perplexity": math.exp(nll.mean()), "perplexity_rise": math.expm1(sum(rise) / len(rise)),
            "kl": float(kl.mean()), "kl_p99": float(np.quantile(kl.numpy(), 0.99)), "same_top": float(same.mean()),
            "kl_windows": [float(r["kl"].double().mean()) for r in results],
        })  # fmt: skip
    return rows


def decode_speed(model: Model, cache: str, tokens: Sequence[int], steps: int) -> float:
    """Milliseconds of a step after `tokens`: the median of `steps` single ones."""
    context = Context(model, cache, len(tokens) + steps)
    for lo in range(0, len(tokens), CHUNK):
        context.read(tokens[lo : lo + CHUNK])
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        context.read([tokens[0]])
        times.append(time.perf_counter() - began)
    context.close()
    return 1e3 * sorted(times)[len(times) // 2]


def make_parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    p = Parser("evaluate_llama_cpp.py", description=__doc__, formatter_class=form)
    p.add_argument("--checkpoint_path", type=Path, required=True, help="a GGUF file")
    p.add_argument("--text", type=Path, nargs="+", required=True, help="plain, .xz or JSONL")
    p.add_argument("--context", type=positive, default=2048, help="tokens of a window (default: 2048)")
    p.add_argument("--windows", type=positive, default=1, help="windows of each text, evenly spread (default: 1)")
    p.add_argument("--caches", nargs="+", default=CACHES, metavar="TYPE", help="of keys and values, or K/V")
    p.add_argument("--threads", type=positive, default=1)
    p.add_argument("--steps", type=int, default=20, help="timed decode steps after a window, 0 for none (default: 20)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    return p


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Score the text with every cache, time decoding, print rows and write the record. Raises UserError."""
    for cache in args.caches:
        types_of(cache)
    if args.json:
        require_writable(args.json, "--json")
    version = package().__version__
    checkpoint = open_checkpoint(args.checkpoint_path)
    tokenizer = checkpoint.tokenizer()
    if checkpoint.gguf is None or checkpoint.weights is not None or tokenizer is None:
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
        for window in windows(ids, args.context, args.windows):
            for name, values in compare(model, args.caches, window):
                scored.setdefault(name, []).append(values)
            about = {"text": path.name, "sha256": sha256_of(text)}
            record["rows"] = done + [about | row for row in rows_of(scored)]
            if args.json:
                write_whole(args.json, to_json(record) + "\n")
        if not scored:
            raise UserError(f"{path}: {len(ids)} tokens, and a window has {args.context}")
        print(f"{path.name}: {len(next(iter(scored.values())))} windows of {args.context} tokens")
        print(f"{'cache':<12}{'bits':>6}{'mean KL':>11}{'99th pct':>10}{'same top':>10}{'perplexity':>12}{'rise':>9}")
        for r in record["rows"][len(done) :]:
            print(f"{r['cache']:<12}{r['bits']:>6.2f}{r['kl']:>11.2e}{r['kl_p99']:>10.1e}{r['same_top']:>10.2%}"
                  f"{r['perplexity']:>12.4f}{r['perplexity_rise']:>+9.2%}")  # fmt: skip
    for cache in ("f16", *args.caches) if args.steps > 0 else ():
        for n_token in (16, args.context - args.steps):
            ms = decode_speed(model, cache, window[:n_token].tolist(), args.steps)
            record["speed"].append({"cache": cache, "bits": bits_of(cache), "tokens": n_token, "step_ms": ms})
            print(f"decoding after {n_token} tokens, {cache}: {ms:.1f} ms a step, {1e3 / ms:.1f} tokens/s")
    if args.json:
        write_whole(args.json, to_json(record) + "\n")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with program("evaluate_llama_cpp.py"):
        run(make_parser().parse(argv), argv)
