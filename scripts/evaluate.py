"""What each cache costs in quality, through the cache: perplexity, divergence, passkeys, ROUGE-L.

  python scripts/evaluate.py perplexity --text val_books.txt.xz --context 8192 --windows 8
  python scripts/evaluate.py divergence --text my.txt --caches quantize_kv:sink_size=16,window_size=32
  python scripts/evaluate.py passkey --lengths 1024 8192 --trials 4
  python scripts/evaluate.py rouge --text stories.jsonl --context 8192

The full cache is always the reference, and always run. Texts are scored as token-by-token decoding would
leave the cache (scoring.py: the exact parallel form, or `--sequential`). Without a text the model writes
one with the full cache, whose entropy the same run tells. A table goes to standard output; with
`--json FILE` a record with everything needed to repeat it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import lzma
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin long while they wait take the processor from whoever else needs it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import passkey
import scoring
import summaries
import tables

import kv_cache
from checkpoint import check_tokenizer, end_ids, find_demo, load_model, open_checkpoint, parse_device, parse_dtype
from console import require_writable, write_whole
from engine import Engine, Sampling
from kv_cache import FullCache, KVCache, ModelCache, SelectiveCache, Shape
from options import Parser, add_plugin_flag, format_policy, load_plugin, parse_policy, positive
from tokenizer import Tokenizer, UserError, load_tokenizer

CACHES = [
    "quantize_kv:sink_size=16,window_size=32",
    "quantize_kv:sink_size=4,window_size=256",
    "compress_kv:sink_size=16,window_size=32",
    "compress_kv:sink_size=4,window_size=256",
]
BUCKETS = (0, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
ANSWER_TOKENS = 8
Save = Callable[[list[dict[str, Any]]], None]  # called with the rows that are done


class Subject:
    """The model under test, its tokenizer, and the settings to compare, the full cache first."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = parse_device(args.device)
        checkpoint = open_checkpoint(args.checkpoint_path or find_demo(), args.model)
        if checkpoint.tokenizer_path is None:
            raise UserError(f"{checkpoint.path}: no tokenizer beside the weights")
        self.name, self.config = checkpoint.name, checkpoint.config
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint.tokenizer_path)
        check_tokenizer(self.config, self.tokenizer)
        self.end_ids = end_ids(checkpoint, self.tokenizer)
        self.dtype = parse_dtype(args.dtype, checkpoint, self.device)
        others = [parse_policy(text) for text in args.caches]
        self.policies: list[KVCache] = [FullCache(), *(p for p in others if not isinstance(p, FullCache))]
        self.model = load_model(checkpoint, self.device, self.dtype)

    def shape(self, capacity: int, batch: int = 1) -> Shape:
        c = self.config
        return Shape(batch, c.n_kv_head, c.head_dim, capacity, self.dtype, self.device)

    def memory(self, policy: KVCache, n_token: int) -> dict[str, float]:
        """Bytes of a sequence's cache, and bits per element of what is quantised, scales included."""
        regions = kv_cache.plan(policy, self.config.n_layer, self.shape(n_token))
        held = {"cache_bytes": float(sum(regions.values()))}
        if regions.get("quantised") and isinstance(policy, SelectiveCache):
            bits = [f.bits_per_element(self.config.head_dim) for f in policy.formats()]
            held["bits_per_quantised_element"] = sum(bits) / 2
        return held

    def texts(self) -> list[dict[str, Any]]:
        """Texts to score: a name, a sha256, windows of ids, and bytes per id where the text is known."""
        if not self.args.text:
            return [self.own_text()]
        found = []
        for path in self.args.text:
            text = read_text(path)
            ids = torch.tensor(self.tokenizer.encode(text, bos=False))
            context = self.args.context
            cut = list(scoring.windows(ids, context, self.args.windows))
            if not cut:
                raise UserError(f"{path}: {len(ids)} tokens, and a window has {context}")
            digest = hashlib.sha256(text.encode()).hexdigest()
            found.append({"name": path.name, "sha256": digest, "windows": cut, "sampled": False})
        return found

    def own_text(self) -> dict[str, Any]:
        """What the model itself writes with the full cache: a rise over its entropy is all the cache's doing."""
        n, context = self.args.windows, self.args.context
        engine = Engine(
            self.model, ModelCache(FullCache(), self.config.n_layer, self.shape(context, n)),
            Sampling(temperature=1.0, seed=self.args.seed),
        )  # fmt: skip
        start = [self.tokenizer.bos_id if self.tokenizer.bos_id is not None else 0]
        bar = progress(engine.generate([start] * n, context - 1), context - 1, "writing")
        columns = torch.tensor([row for row in bar], dtype=torch.int64).T
        windows = [torch.cat((torch.tensor(start), column)) for column in columns]
        digest = hashlib.sha256(columns.numpy().tobytes()).hexdigest()
        return {"name": "(the model's own)", "sha256": digest, "windows": windows, "sampled": True}

    def text_bytes(self, ids: Tensor) -> int:
        return sum(len(self.tokenizer.token_bytes(i)) for i in ids.tolist())


def progress(items: Any, total: int, what: str) -> Any:
    return tqdm(items, total=total, desc=what, disable=not sys.stderr.isatty(), leave=False)


def read_text(path: Path) -> str:
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    if not text.strip():
        raise UserError(f"{path}: an empty text")
    return text


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error over windows; none from a single one."""
    t = torch.tensor(values, dtype=torch.float64)
    return t.mean().item(), (t.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def score_texts(subject: Subject, save: Save) -> list[dict[str, Any]]:
    """One row per text and setting, with everything that perplexity and divergence report."""
    rows = []
    texts = subject.texts()
    bar = progress(None, sum(len(t["windows"]) for t in texts) * len(subject.policies), "scoring")
    for text in texts:
        windows = [w.to(subject.device) for w in text["windows"]]
        scored: list[list[scoring.Scored]] = [[] for _ in subject.policies]
        for tokens in windows:  # the reference's states of one window at a time
            full = scoring.reader(FullCache(), subject.args.sequential)(subject.model, FullCache(), tokens)
            for results, policy in zip(scored, subject.policies, strict=True):
                read = scoring.reader(policy, subject.args.sequential)
                states = full if isinstance(policy, FullCache) else read(subject.model, policy, tokens)
                results.append(scoring.score(subject.model, tokens, states, full))
                bar.update()
        n_bytes = sum(subject.text_bytes(w[1:]) for w in windows)
        rows += [
            row_of(text, subject, policy, results, scored[0], n_bytes)
            for policy, results in zip(subject.policies, scored, strict=True)
        ]
        save(rows)
    bar.close()
    return rows


def row_of(
    text: dict[str, Any], subject: Subject, policy: KVCache, results: list[scoring.Scored],
    full: list[scoring.Scored], n_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """NLLs are summed, divided, and exponentiated once. Errors are over windows, a rise's over paired ones."""
    nll = torch.cat([r.nll for r in results])
    kl = torch.cat([r.kl for r in results if r.kl is not None])
    same = torch.cat([r.same_top for r in results if r.same_top is not None])
    mean, error = mean_and_error([r.nll.mean().item() for r in results])
    rise, rise_error = mean_and_error(
        [(r.nll.mean() - f.nll.mean()).item() for r, f in zip(results, full, strict=True)]
    )
    at = torch.cat([torch.arange(1, len(r.nll) + 1) for r in results])
    by_position = {}
    for lo, hi in pairwise(BUCKETS):
        here = (at >= lo) & (at < hi)
        if here.any():
            by_position[f"{lo}-{hi}"] = {"nll": nll[here].mean().item(), "kl": kl[here].mean().item()}
    return {
        "text": text["name"], "sha256": text["sha256"], "sampled": text["sampled"], "cache": format_policy(policy),
        "tokens": len(nll), "windows": len(results), "perplexity": math.exp(mean), "nll": mean, "nll_error": error,
        "bits_per_byte": nll.sum().item() / math.log(2) / n_bytes if n_bytes else None,
        "perplexity_rise": math.expm1(rise), "perplexity_rise_error": rise_error,
        "kl": kl.mean().item(),
        "kl_error": mean_and_error([r.kl.mean().item() for r in results if r.kl is not None])[1],
        "kl_p99": kl.quantile(0.99).item() if len(kl) < 16_000_000 else None,
        "same_top": same.mean().item(), "by_position": by_position,
        **subject.memory(policy, subject.args.context),
    }  # fmt: skip


def score_passkeys(subject: Subject, save: Save) -> list[dict[str, Any]]:
    """Greedy answers from the real caches. All but the question is read first, so that the answer can only
    come from what the cache holds of it."""
    args = subject.args
    if args.text:
        filler = subject.tokenizer.encode(read_text(args.text[0]), bos=False)
    else:
        args.context, args.windows = min(512, subject.config.context), 8
        filler = torch.cat([w[1:] for w in subject.own_text()["windows"]]).tolist()
    longest = max(args.lengths)
    if longest + ANSWER_TOKENS > subject.config.context:
        raise UserError(f"--lengths {longest} and the answer are past the model's context of {subject.config.context}")
    filler *= -(-2 * longest // len(filler))
    rng = random.Random(args.seed)
    tests = []
    for length, depth, _ in itertools.product(args.lengths, args.depths, range(args.trials)):
        start = rng.randrange(len(filler) - length)
        tests.append((length, depth, filler[start : start + length], *passkey.draw(rng)))
    bar = progress(None, len(tests) * len(subject.policies), "passkeys")
    rows = []
    for policy in subject.policies:
        right: dict[str, dict[str, float]] = {str(n): {f"{d:g}": 0.0 for d in args.depths} for n in args.lengths}
        for length, depth, text, name, key in tests:
            right[str(length)][f"{depth:g}"] += recalls(subject, policy, length, depth, text, name, key) / args.trials
            bar.update()
        cells = [share for row in right.values() for share in row.values()]
        rows.append({"cache": format_policy(policy), "recalled": right, "mean": sum(cells) / len(cells),
                     "trials_per_cell": args.trials, **subject.memory(policy, longest)})  # fmt: skip
        save(rows)
    bar.close()
    return rows


def recalls(
    subject: Subject, policy: KVCache, length: int, depth: float, filler: list[int], name: str, key: str
) -> bool:
    def encode(text: str) -> list[int]:
        return subject.tokenizer.encode(text, bos=False)

    bos = [] if subject.tokenizer.bos_id is None else [subject.tokenizer.bos_id]
    try:
        ids, _ = passkey.make_prompt(encode, filler, length, depth, name, key, bos)
    except ValueError as error:
        raise UserError(f"--lengths {length}: {error}") from None
    n_body = len(ids) - len(encode(passkey.question(name)))
    cache = ModelCache(policy, subject.config.n_layer, subject.shape(length + ANSWER_TOKENS))
    engine = Engine(subject.model, cache, Sampling(temperature=0), capture=False, lag=0)
    engine.read([ids[:n_body]])
    rows = engine.generate([ids[n_body:]], ANSWER_TOKENS)
    answer = subject.tokenizer.decode([token for row in rows for token in row if token is not None])
    return "".join(itertools.takewhile(str.isdigit, answer.strip())) == key


def score_summaries(subject: Subject, save: Save) -> list[dict[str, Any]]:
    """Greedy summaries by every cache. A document is cut at its end where the prompt would not fit."""
    args = subject.args
    if len(args.text) != 1:
        raise UserError("rouge takes one --text: a JSONL file of documents with references")
    documents = summaries.read_documents(args.text[0], args.documents)
    context, n_cut = min(args.context, subject.config.context), 0
    bar = progress(None, len(documents) * len(subject.policies), "summaries")
    written: list[list[str]] = [[] for _ in subject.policies]
    for document in documents:
        question = subject.tokenizer.encode(document.question, bos=False)
        room = context - args.max_new_tokens - len(question)
        if room < 1:
            raise UserError(f"--context {context} has no room for a document beside {args.max_new_tokens} new tokens")
        ids = subject.tokenizer.encode(document.text)
        n_cut += len(ids) > room
        for texts, policy in zip(written, subject.policies, strict=True):
            cache = ModelCache(policy, subject.config.n_layer, subject.shape(context))
            engine = Engine(subject.model, cache, Sampling(temperature=0), subject.end_ids, capture=False, lag=0)
            engine.read([ids[:room]])  # the document apart: the summary is written from what the cache holds
            rows = engine.generate([question], args.max_new_tokens)
            tokens = [token for row in rows for token in row if token is not None and token not in subject.end_ids]
            texts.append(subject.tokenizer.decode(tokens))
            bar.update()
        save(summary_rows(subject, documents, written))
    bar.close()
    if n_cut:
        print(f"{n_cut} of {len(documents)} documents were cut to fit {context} tokens", file=sys.stderr)
    return summary_rows(subject, documents, written)


def summary_rows(
    subject: Subject, documents: list[summaries.Document], written: list[list[str]]
) -> list[dict[str, Any]]:
    """One row per setting, over the documents that all of them have summarised."""
    path, context = subject.args.text[0], min(subject.args.context, subject.config.context)
    documents = documents[: len(written[-1])]
    return [
        {
            "text": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "cache": format_policy(policy),
            "documents": len(documents),
            "rouge_l": summaries.mean_and_interval(
                [summaries.rouge_l(t, d.references) for t, d in zip(texts, documents, strict=True)]
            ),
            "rouge_l_to_full": summaries.mean_and_interval(
                [summaries.rouge_l(t, [full]) for t, full in zip(texts, written[0], strict=True)]
            ),
            **subject.memory(policy, context),
        }
        for policy, texts in zip(subject.policies, written, strict=True)
    ]


def record(subject: Subject, kind: str, rows: list[dict[str, Any]], argv: list[str], finished: bool) -> dict[str, Any]:
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "kind": kind, "model": subject.name, "dtype": str(subject.dtype).removeprefix("torch."),
        "device": str(subject.device), "seed": subject.args.seed, "torch": torch.__version__,
        "python": sys.version.split()[0], "commit": git.stdout.strip() or None,
        "command": ["scripts/evaluate.py", *(Path(w).name if "/" in w else w for w in argv)], "finished": finished,
        "rows": rows,
    }  # fmt: skip


def make_parser() -> Parser:
    p = Parser("evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=("perplexity", "divergence", "passkey", "rouge"))
    p.add_argument("--checkpoint_path", type=Path, help="(default: the bundled model)")
    p.add_argument("--model", metavar="NAME")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--device", default="auto")
    p.add_argument("--caches", nargs="+", default=CACHES, metavar="CACHE", help="beside the full cache")
    add_plugin_flag(p)
    p.add_argument("--text", type=Path, nargs="+", default=[], help="plain or .xz; passkey: filler; rouge: JSONL")
    p.add_argument("--context", type=positive, default=2048, help="tokens of a window (default: 2048)")
    p.add_argument("--windows", type=positive, default=4, help="windows of each text, evenly spread (default: 4)")
    p.add_argument("--sequential", action="store_true", help="token by token through the cache: slow, the same")
    p.add_argument("--lengths", nargs="+", type=positive, default=[1024, 2048, 4096])
    p.add_argument("--depths", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    p.add_argument("--trials", type=positive, default=4, help="passkeys a cell (default: 4)")
    p.add_argument("--documents", type=positive, default=25, help="rouge: how many (default: 25)")
    p.add_argument("--max_new_tokens", type=positive, default=128, help="rouge: of a summary (default: 128)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    return p


def run(args: argparse.Namespace, argv: list[str]) -> None:
    subject = Subject(args)
    if args.kind != "passkey" and args.context > subject.config.context:
        raise UserError(f"--context {args.context} is past the model's context of {subject.config.context}")
    if any(not 0 <= depth <= 1 for depth in args.depths):
        raise UserError("--depths lie between 0 and 1")

    if args.json:
        require_writable(args.json, "--json")

    def save(rows: list[dict[str, Any]], finished: bool = False) -> None:
        """What is done so far: a crash later loses none of it."""
        if args.json:
            write_whole(args.json, json.dumps(record(subject, args.kind, rows, argv, finished)) + "\n")

    if args.kind == "passkey":
        rows = score_passkeys(subject, save)
        tables.print_passkeys(rows)
    elif args.kind == "rouge":
        rows = score_summaries(subject, save)
        tables.print_summaries(rows)
    else:
        rows = score_texts(subject, save)
        tables.print_scores(rows, args.kind)
    save(rows, finished=True)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        load_plugin(argv)
        run(make_parser().parse(argv), argv)
    except UserError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
